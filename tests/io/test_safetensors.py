"""An adapter as one file: what comes back, what is refused, and what damage does."""

import dataclasses
import errno
import json
import os
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from damage import EDITS, EXAMPLES, damaged, fuzz, kill_while_saving, run_script
from helpers import drawn, normal, randomize_b
from hypothesis import strategies as st

import lora_jax
from lora_jax.io import _files, orbax, peft, safetensors
from lora_jax.io._checksum import checksum

PARAMS = {
    "layers": {"kernel": normal(0, (2, 6, 5))},
    "dotted.name": {"kernel": normal(1, (6, 4), jnp.bfloat16)},
    "embed": {"embedding": normal(2, (7, 6))},
    "bias": jnp.asarray(np.zeros(5, np.float32)),
}
LAYOUT = {"layers.*": "bio"}


def adapter_of(params=PARAMS, **options):
    """An adapter with a bit of everything."""
    options = {
        "rank": 2,
        "targets": [r"layers/kernel[0:1]", "dotted.*"],
        "layout": LAYOUT,
        "rows": {"embed.*": [5, 1]},
        "full": "bias",
        "init": drawn,
    } | options
    return randomize_b(lora_jax.lorafy(params, **options))


def equal(one, other):
    """Bit for bit, but for the norms, which belong to the base."""
    without = [
        jax.tree.map(
            lambda f: dataclasses.replace(f, norm=None) if f.norm is not None else f,
            x.adapter.factors,
            is_leaf=lambda f: isinstance(f, lora_jax.Factors | lora_jax.Rows),
        )
        for x in (one, other)
    ]
    assert jax.tree.structure(without[0]) == jax.tree.structure(without[1])
    trees = [(w, x.adapter.full) for w, x in zip(without, (one, other), strict=True)]
    for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b, equal_nan=True)


@jax.jit
def applied(lora_params, x):
    """One program for all adapters of the same shapes, so that bits can be compared."""
    return lora_jax.lora(lambda p, x: x @ p["dotted.name"]["kernel"])(lora_params, x)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dora": True, "rows": None, "targets": "dotted.*"},
        {"freeze": ("a",)},
        {"dtype": jnp.bfloat16},
        {"init": "pissa", "targets": "dotted.*"},
    ],
)
@pytest.mark.parametrize("content", [False, True])
def test_an_adapter_comes_back_bit_for_bit(options, content, tmp_path):
    lora_params = adapter_of(**options)
    safetensors.save(tmp_path / "a", lora_params, content=content, about="words")
    again = safetensors.load(tmp_path / "a", lora_params.base)
    equal(again, lora_params)
    assert again.base is lora_params.base
    assert safetensors.about(tmp_path / "a") == "words"
    x = np.ones((3, 6), jnp.bfloat16)
    assert np.array_equal(applied(again, x), applied(lora_params, x))


def test_an_adapter_is_a_file_of_its_own(tmp_path):
    adapter = adapter_of().adapter
    safetensors.save(tmp_path / "a", adapter)
    again = safetensors.load(tmp_path / "a")
    assert isinstance(again, lora_jax.Adapter)
    equal(lora_jax.LoraParams(None, again), lora_jax.LoraParams(None, adapter))
    equal(safetensors.load(tmp_path / "a", PARAMS), adapter_of())
    names = set(safetensors.load(tmp_path / "a").factors)
    assert names == {"layers/kernel[0:1, :, :]", "dotted.name/kernel", "embed/embedding"}


def test_the_base_is_told_from_others(tmp_path):
    lora_params = adapter_of()
    safetensors.save(tmp_path / "a", lora_params)
    safetensors.save(tmp_path / "content", lora_params, content=True)
    other = dict(PARAMS)
    del other["embed"]
    with pytest.raises(ValueError, match="another model: its base had a leaf 'embed/embedding'"):
        safetensors.load(tmp_path / "a", other)
    with pytest.raises(ValueError, match=r"there 'bias' has shape \(5,\), here \(6,\)"):
        safetensors.load(tmp_path / "a", PARAMS | {"bias": jnp.zeros(6)})
    with pytest.raises(ValueError, match=r"another model, without the leaves \['more'\]"):
        safetensors.load(tmp_path / "a", PARAMS | {"more": jnp.zeros(6)})
    with pytest.raises(TypeError, match="params is a LoraParams, expected its base"):
        safetensors.load(tmp_path / "a", lora_params)
    with pytest.warns(UserWarning, match="'bias' was float32 and is bfloat16 here"):
        safetensors.load(tmp_path / "a", PARAMS | {"bias": jnp.zeros(5, jnp.bfloat16)})
    moved = PARAMS | {"bias": jnp.zeros(5).at[2].set(1e-30)}
    safetensors.load(tmp_path / "a", moved)
    with pytest.raises(ValueError, match="was trained on other weights: 'bias' has the contents"):
        safetensors.load(tmp_path / "content", moved)


@pytest.mark.parametrize("targets", ["dotted.*", "dotted.*[:, 0:2]"])
def test_what_an_initializer_left_is_told_from_the_weights(targets, tmp_path):
    lora_params = adapter_of(init="pissa", targets=targets)
    safetensors.save(tmp_path / "a", lora_params)
    with pytest.raises(ValueError, match=r"other weights: 'dotted\.name/kernel' .*to_plain"):
        safetensors.load(tmp_path / "a", PARAMS)
    with pytest.raises(ValueError, match="belongs to what its initializer left of the base"):
        safetensors.save(tmp_path / "b", lora_params.adapter)
    with pytest.raises(TypeError, match="expected a LoraParams or an Adapter, got dict"):
        safetensors.save(tmp_path / "b", PARAMS)
    plain = lora_jax.algebra.to_plain(
        lora_params, adapter_of(init="pissa", targets=targets), PARAMS
    )
    safetensors.save(tmp_path / "b", plain)
    equal(safetensors.load(tmp_path / "b", PARAMS), plain)


def test_a_stack_is_not_saved_as_what_nobody_could_load(tmp_path):
    stack = lora_jax.many.stack(
        [lora_jax.lorafy(PARAMS, 2, targets="dotted.*", init=drawn).adapter] * 2
    )
    with pytest.raises(
        ValueError, match=r"safetensors\.save: the adapter is a stack: .* lora_jax\.many\.unstack"
    ):
        safetensors.save(tmp_path / "x", stack)
    with pytest.raises(
        ValueError, match=r"orbax\.save: the adapter is a stack: .* lora_jax\.many\.unstack"
    ):
        orbax.save(tmp_path / "x", stack)
    assert not list(tmp_path.iterdir())


def test_values_that_are_not_finite_are_refused_unless_asked_for(tmp_path):
    lora_params = adapter_of()
    lora_params.adapter.full["bias"] = jnp.full(5, jnp.nan)
    safetensors.save(tmp_path / "a", lora_params)
    with pytest.raises(ValueError, match=r"'bias\.full' has values that are not finite"):
        safetensors.load(tmp_path / "a", PARAMS)
    equal(safetensors.load(tmp_path / "a", PARAMS, finite=False), lora_params)


def test_files_of_others_are_refused(tmp_path):
    arrays = {"x": np.ones(3, np.float32)}
    safetensors_of = safetensors_file(tmp_path / "a")
    safetensors_of(arrays, {"format": "pt"})
    with pytest.raises(ValueError, match=r"is no adapter of lora_jax: .*lora_jax\.io\.peft"):
        safetensors.load(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        safetensors.load(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError):
        safetensors.load(tmp_path)
    for data in (b"", b"\0" * 7, (2**40).to_bytes(8, "little") + b"{}", b"{" * 5000):
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(ValueError, match="is no complete safetensors file"):
            safetensors.load(tmp_path / "a")


def safetensors_file(path):
    return lambda arrays, metadata: _files.write_tensors(path, arrays, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(version=4), "has version 4, and this library reads 1, 2, 3"),
        (lambda r: r.update(version=1), "its record has the keys"),
        (lambda r: r.update(format="x"), "has no record of an adapter"),
        (lambda r: r.update(more=1), "its record has the keys"),
        (lambda r: r.pop("full"), "its record has the keys"),
        (lambda r: r.update(full=[1]), "no list of paths"),
        (lambda r: r.update(base=[]), "its record has the keys"),
        (lambda r: r["base"].pop("content"), "its record of the base is not one"),
        (lambda r: r["base"]["leaves"].update(bias=[1]), "of the base's leaf 'bias' is"),
        (lambda r: r["base"]["content"].update(nix="x"), "contents is of other leaves"),
        (lambda r: r["factors"]["dotted.name/kernel"].update(rank="2"), "its record of 'dotted"),
        (lambda r: r["factors"]["dotted.name/kernel"].update(layout="xy"), "layout='xy'"),
        (lambda r: r["factors"]["dotted.name/kernel"].update(layout="io" * 2), "do not fit rank 2"),
        (lambda r: r["factors"]["dotted.name/kernel"].update(rank=3), "do not fit rank 3"),
        (lambda r: r["factors"]["dotted.name/kernel"].update(frozen=["c"]), "its record of"),
        (lambda r: r["factors"]["dotted.name/kernel"].update(dora=True), "without .*magnitude"),
        (lambda r: r["factors"].pop("dotted.name/kernel"), "with .*dotted"),
    ],
)
def test_records_that_say_something_else_are_refused(change, message, tmp_path):
    safetensors.save(tmp_path / "a", adapter_of())
    with _files.open_tensors(tmp_path / "a") as file:
        metadata, arrays = dict(file.metadata), dict(file)
    record = _files.parse_json(metadata["lora_jax"], "here")
    change(record)

    metadata["lora_jax"] = json.dumps(record)
    metadata["sha256"] = _files.digest(arrays, [record, metadata["about"]])
    _files.write_tensors(tmp_path / "a", arrays, metadata)
    with pytest.raises(ValueError, match=message):
        safetensors.load(tmp_path / "a")


def test_json_that_says_a_key_twice_or_is_endless_is_refused(tmp_path):
    for text, message in [
        ('{"a": 1, "a": 2}', "stands twice"),
        ("[" * 100_000, "is not JSON"),
        ("{", "is not JSON"),
    ]:
        with pytest.raises(ValueError, match=message):
            _files.parse_json(text, "here")
    (tmp_path / "a").write_bytes(b" " * (_files.LARGEST_JSON + 1))
    with pytest.raises(ValueError, match="bytes, expected at most"):
        _files.read_json(tmp_path / "a")


# Damage.


def peak(*, anew=False):
    """The most memory that this process has had, in bytes; or from now on."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def test_damaged_files_are_never_loaded_as_others(tmp_path):
    lora_params = adapter_of()
    safetensors.save(tmp_path / "a", lora_params)
    data = (tmp_path / "a").read_bytes()
    outcomes, grown = [], [0]

    @fuzz
    @hypothesis.given(EDITS)
    def run(edits):
        (tmp_path / "b").write_bytes(damaged(data, edits))
        before = peak(anew=True)
        try:
            again = safetensors.load(tmp_path / "b", PARAMS)
        except (ValueError, OSError):
            grown.append(peak() - before)
            outcomes.append("refused")
        else:
            equal(again, lora_params)  # the damage undid itself
            outcomes.append("whole")

    run()
    assert outcomes.count("refused") > 0.9 * len(outcomes) >= 0.9 * 0.8 * EXAMPLES
    assert max(grown) < 2 * len(data) + 64 * 2**20


def test_every_flipped_bit_is_noticed(tmp_path):
    safetensors.save(tmp_path / "a", adapter_of())
    data = (tmp_path / "a").read_bytes()
    rng = np.random.default_rng(1)
    for place in rng.choice(len(data), 200, replace=False):
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "b").write_bytes(flipped)
        with pytest.raises(ValueError, match=r"damaged|is no"):
            safetensors.load(tmp_path / "b", PARAMS)


def test_damaged_files_of_peft_are_errors_or_adapters(tmp_path):
    params: dict = {"q": {"kernel": jnp.ones((6, 5)), "bias": jnp.ones(5)}}
    params["head"] = {"kernel": jnp.ones((5, 3))}
    options = {"targets": "q.*", "full": "head.*", "bias": "all", "dora": True}
    peft.save(tmp_path / "a", randomize_b(lora_jax.lorafy(params, 2, **options)))
    files = {name: (tmp_path / "a" / name).read_bytes() for name in (peft.CONFIG, peft.TENSORS)}
    (tmp_path / "b").mkdir()
    outcomes = []

    @fuzz
    @hypothesis.given(st.sampled_from(list(files)), EDITS)
    def run(which, edits):
        for name, data in files.items():
            new = damaged(data, edits) if name == which else data
            (tmp_path / "b" / name).write_bytes(new)
        try:
            again = peft.load(tmp_path / "b", params)
        except (ValueError, OSError):
            outcomes.append("refused")
        else:  # PEFT's files hold no checksum: other numbers are an adapter, too
            assert set(again.adapter.factors) == {"q/kernel"}
            outcomes.append("loaded")

    run()
    assert outcomes.count("refused") > 0.4 * len(outcomes) >= 0.4 * 0.8 * EXAMPLES


def test_checksums_see_every_entry():
    x = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    others = [x + 1e-6 * (np.arange(48) == i).reshape(8, 6).astype(np.float32) for i in range(48)]
    swapped = x[[1, 0, *range(2, 8)]]
    others += [swapped, x.T, x.reshape(6, 8), x[:7], x.astype(jnp.bfloat16), x + np.float32(0.5)]
    others += [x[:6], x[:6].T]
    assert len({checksum(y) for y in [x, *others]}) == 1 + len(others)
    kinds = "bool int8 uint16 int32 float16 bfloat16 float8_e4m3fn int4 complex64"
    found = {checksum((np.arange(6) % 2).astype(jnp.dtype(kind))) for kind in kinds.split()}
    assert len(found) == 9
    assert checksum(jax.random.key(0)) != checksum(jax.random.key(1))
    assert checksum(np.zeros((0, 3), np.float32)).endswith(":0000000000000000")


@pytest.mark.devices(8)
def test_checksums_see_no_sharding():
    x = normal(0, (8, 6))
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for spec in (("a", "b"), ("b",), (None, "b"), ()):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        assert checksum(jax.device_put(x, sharding)) == checksum(x)


# Half-written files.


def test_an_existing_file_is_kept(tmp_path):
    safetensors.save(tmp_path / "a", adapter_of())
    with pytest.raises(FileNotFoundError, match=r"no/a: there is no folder .*/no to write in"):
        safetensors.save(tmp_path / "no" / "a", adapter_of())
    with pytest.raises(FileExistsError, match="pass overwrite=True, or another path"):
        safetensors.save(tmp_path / "a", adapter_of())
    safetensors.save(tmp_path / "a", adapter_of(rank=1), overwrite=True)
    assert safetensors.load(tmp_path / "a").factors["dotted.name/kernel"].rank == 1
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileExistsError, match="of another kind than what is saved there"):
        safetensors.save(tmp_path / "folder", adapter_of(), overwrite=True)
    with pytest.raises(OSError, match="nowhere"):
        safetensors.save(tmp_path / "nowhere" / "a", adapter_of())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "folder"]


SAVES = {
    "safetensors": lambda path, x: safetensors.save(path, x, overwrite=True),
    "peft": lambda path, x: peft.save(path, x, overwrite=True),
}
LOADS = {"safetensors": safetensors.load, "peft": peft.load}


@pytest.mark.parametrize("kind", SAVES)
def test_a_full_disk_leaves_what_was_there(kind, tmp_path, monkeypatch):
    params = {"q": {"kernel": jnp.ones((6, 5))}}
    first, second = (randomize_b(lora_jax.lorafy(params, rank, targets=".*")) for rank in (1, 2))
    SAVES[kind](tmp_path / "a", first)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for module, name in [(os, "fsync"), (_files, "write_tensors"), (_files, "_put")]:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(OSError, match="No space left"):
                SAVES[kind](tmp_path / "a", second)
    equal(LOADS[kind](tmp_path / "a", params), first)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_system_without_exchange_says_so(tmp_path, monkeypatch):
    params = {"q": {"kernel": jnp.ones((6, 5))}}
    lora_params = randomize_b(lora_jax.lorafy(params, 1, targets=".*"))
    peft.save(tmp_path / "a", lora_params)
    monkeypatch.setattr(_files.ctypes, "CDLL", lambda *_, **__: object())
    with pytest.raises(OSError, match="cannot exchange two folders in one step"):
        peft.save(tmp_path / "a", lora_params, overwrite=True)
    equal(peft.load(tmp_path / "a", params), lora_params)


@pytest.mark.long
def test_a_file_larger_than_allowed_is_an_error_of_the_system(tmp_path):
    script = f"""
        import os, resource, signal
        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax.numpy as jnp, lora_jax
        from lora_jax.io import peft, safetensors
        lora_params = lora_jax.lorafy({{"q": {{"kernel": jnp.ones((512, 512))}}}}, 64, targets=".*")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        for save in (peft.save, safetensors.save):
            try:
                save({str(tmp_path / "a")!r}, lora_params)
            except OSError as error:
                print("refused", error)
    """
    assert run_script(script).count("refused") == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kills", [6, pytest.param(24, marks=pytest.mark.long)])
def test_a_saving_process_killed_at_any_moment_leaves_a_whole_adapter(kills, tmp_path):
    program = """
        import numpy as np, lora_jax
        from lora_jax.io import peft, safetensors

        params = {"q": {"kernel": np.ones((2048, 1024), np.float32)}}

        def save(path, k):
            f = lora_jax.Factors(
                np.full((2048, 128), k, np.float32), np.full((128, 1024), k, np.float32),
                np.float32(1), "io",
            )
            x = lora_jax.LoraParams(params, lora_jax.Adapter({"q/kernel": f}))
            kind = (safetensors, peft)[int(os.path.dirname(path)[-1]) % 2]  # of ten folders, five
            kind.save(path, x, overwrite=True)
    """
    params = {"q": {"kernel": np.ones((2048, 1024), np.float32)}}
    for i, count in enumerate(kill_while_saving(program, tmp_path, kills)):
        kind = ("safetensors", "peft")[i % 2]
        f = LOADS[kind](tmp_path / str(i) / "a", params).adapter.factors["q/kernel"]
        (k,) = {float(x.min()) for x in (f.a, f.b)} | {float(x.max()) for x in (f.a, f.b)}
        assert k in (count - 1, count), kind
