"""What a model has besides parameters: beside an adapter in its file, and in no fingerprint."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import NormedNet, assert_same, drawn, normal, randomize_b

import lora_jax
from lora_jax.io import _record, hf, orbax, peft, safetensors
from lora_jax.io.hf import _shards

FORMATS = {"safetensors": safetensors, "orbax": orbax}


def nnx_model():
    """The parameters and the rest of a model, after a call that changed the rest."""
    model = NormedNet(nnx.Rngs(0))
    model(normal(1, (6, 24)))
    _, params, rest = nnx.split(model, nnx.Param, ...)
    return params, rest


def linen_model():
    variables = {
        "params": {"query": {"kernel": normal(0, (4, 4))}},
        "batch_stats": {"norm": {"mean": normal(1, (4,)), "steps": jnp.int32(3)}},
        "rng": {
            "key": jax.random.split(jax.random.key(1, impl="rbg"), 2),
            "raw": jnp.zeros((0, 3)),
        },
        "cache": {"is_full": nn.Partitioned(jnp.array([True, False]), ("x",))},
    }
    return {"params": variables.pop("params")}, variables


MODELS = {"nnx": nnx_model(), "linen": linen_model()}


def adapted(params, **options):
    return randomize_b(lora_jax.lorafy(params, 2, targets="all-linear", init=drawn, **options))


def whole(params, rest):
    """All of a model in one tree."""
    return nnx.merge_state(params, rest) if isinstance(params, nnx.State) else params | rest


@pytest.mark.parametrize("as_shapes", [False, True])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", FORMATS)
def test_a_state_comes_back_bit_for_bit(kind, model, as_shapes, tmp_path):
    module, (params, rest) = FORMATS[kind], MODELS[model]
    lora_params = adapted(params)
    module.save(tmp_path / "it", lora_params, state=rest)
    like = jax.eval_shape(lambda: rest) if as_shapes else jax.tree.map(jnp.zeros_like, rest)
    found, state = module.load(tmp_path / "it", params, state=like)
    assert_same(found, lora_params)
    assert jax.tree.structure(state) == jax.tree.structure(rest)
    for one, other in zip(*map(jax.tree.leaves, (state, rest)), strict=True):
        assert one.dtype == other.dtype  # for keys: of the same generator
    assert_same(*(jax.tree.map(data, x) for x in (state, rest)))
    adapter, _ = module.load(tmp_path / "it", state=like)
    assert_same(adapter, lora_params.adapter)


def data(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


@pytest.mark.parametrize("kind", FORMATS)
def test_a_state_is_never_left_out_in_silence(kind, tmp_path, recwarn):
    module, (params, rest) = FORMATS[kind], MODELS["nnx"]
    lora_params = adapted(whole(params, rest))
    message = r"no parameters, and they are not saved: .*norm/mean \(nnx.BatchStat, not nnx.Param\)"
    with pytest.warns(UserWarning, match=message) as caught:
        module.save(tmp_path / "without", lora_params)
    assert (len(caught), caught[0].filename) == (1, __file__)
    for k, options in enumerate(({"state": {}}, {"state": rest})):
        module.save(tmp_path / str(k), lora_params, **options)
    module.load(tmp_path / "0", params)
    assert not recwarn
    with pytest.warns(UserWarning, match=r"contains the state .* not loaded: dropout/rngs/count,"):
        module.load(tmp_path / "1", params)
    for name in ("without", "0"):
        with pytest.raises(ValueError, match=r"contains no state\. Load it without state="):
            module.load(tmp_path / name, params, state=rest)


def test_runs_and_peft_warn_of_a_state_that_is_left_out(tmp_path):
    params, rest = MODELS["nnx"]
    with orbax.Checkpointer(tmp_path) as run:
        with pytest.warns(UserWarning, match=r"norm/mean .* pass them in extra; extra=\{\} leaves"):
            run.save(0, adapted(whole(params, rest)))
        run.save(1, adapted(whole(params, rest)), extra={"rest": rest})
        run.save(2, adapted(params))
    with pytest.warns(UserWarning, match=r"peft\.save: the base has .*norm/mean .* take state=;"):
        peft.save(tmp_path / "peft", adapted(whole(params, rest)))
    peft.save(tmp_path / "params", adapted(params))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_state_of_another_model_is_refused(kind, tmp_path):
    module, (params, rest) = FORMATS[kind], MODELS["linen"]
    module.save(tmp_path / "it", adapted(params), state=rest)

    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            module.load(tmp_path / "it", params, state=rest | changes)

    stats = rest["batch_stats"]["norm"]
    refused(r"only .*it has a leaf 'batch_stats/norm/mean'", batch_stats={})
    refused(r"only state= has a leaf 'more': .* Nearest in the other: rng/key", more=jnp.ones(3))
    changed = {"norm": stats | {"mean": jnp.ones(5)}}
    refused(
        r"'batch_stats/norm/mean' was saved as float32\[4\], and is float32\[5\]",
        batch_stats=changed,
    )
    keys = {"key": jax.random.split(jax.random.key(0), 2), "raw": rest["rng"]["raw"]}
    refused(r"'rng/key' was saved as key<rbg>\[2\], and is key<fry>\[2\]", rng=keys)
    with pytest.raises(TypeError, match=r"state has int 3 at 'batch_stats', .*by jnp.asarray"):
        module.load(tmp_path / "it", params, state=rest | {"batch_stats": 3})


@pytest.mark.parametrize("kind", FORMATS)
def test_parameters_are_no_state(kind, tmp_path):
    module = FORMATS[kind]
    for params, rest in MODELS.values():
        every = whole(params, rest)
        with pytest.raises(ValueError, match=r"state has parameters of the base, \['(norm|query)/"):
            module.save(tmp_path / "it", adapted(every), state=every)
    with pytest.raises(TypeError, match="state has str 'x' at 'name', expected an array"):
        module.save(tmp_path / "it", adapted(linen_model()[0]), state={"name": "x"})
    assert not (tmp_path / "it").exists()


@pytest.mark.parametrize("content", [False, True])
@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_fingerprints_are_of_parameters(model, is_old, content, tmp_path, monkeypatch):
    if is_old:  # earlier records have all leaves of the base
        monkeypatch.setattr(_record, "parameters_in", _record.arrays_in)
    params, rest = MODELS[model]
    every, moved = whole(params, rest), jax.tree.map(later, rest)
    safetensors.save(tmp_path / "all", adapted(every), state={}, content=content)
    safetensors.save(tmp_path / "params", adapted(params), content=content)
    for base in (every, whole(params, moved), params):
        safetensors.load(tmp_path / "params", base)
        if base is not params or not is_old:
            safetensors.load(tmp_path / "all", base)
    other = jax.tree.map(later, params)
    if content:
        with pytest.raises(ValueError, match=r"trained on other weights: '(norm|query)"):
            safetensors.load(tmp_path / "all", whole(other, rest))


def test_a_second_adapter_on_a_frozen_one_has_the_same_state(tmp_path):
    params, rest = MODELS["nnx"]
    two = adapted(adapted(whole(params, rest)))
    with pytest.warns(UserWarning, match="they are not saved: dropout/rngs/count"):
        safetensors.save(tmp_path / "without", two)
    safetensors.save(tmp_path / "it", two, state=rest)
    found, state = safetensors.load(tmp_path / "it", adapted(params), state=rest)
    assert_same(found.adapter, two.adapter)
    assert_same(jax.tree.map(data, state), jax.tree.map(data, rest))
    with pytest.raises(ValueError, match="state has parameters of the base"):
        safetensors.save(tmp_path / "other", two, state=params)


def later(x):
    """Another array of the same kind."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.clone(jax.random.wrap_key_data(data(x) + 1, impl=jax.random.key_impl(x)))
    return ~x if x.dtype == bool else x + 1


def test_earlier_fingerprints_with_random_state_load_onto_parameters(tmp_path, monkeypatch):
    monkeypatch.setattr(_record, "parameters_in", _record.arrays_in)
    params, rest = MODELS["nnx"]
    keys = nnx.filter_state(rest, nnx.RngState)
    safetensors.save(tmp_path / "it", adapted(whole(params, keys)), state={})
    record = safetensors.read(tmp_path / "it")[1]
    assert record["base"]["leaves"]["dropout/rngs/key"] == ["key<fry>"]
    safetensors.load(tmp_path / "it", params)


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ({"dtype": "float32"}, "its record of the state's 'norm/mean'"),
        ({"dtype": "float32", "shape": [True]}, "its record of the state's 'norm/mean'"),
        ({"dtype": "float32", "shape": [], "impl": 3}, "its record of the state's 'norm/mean'"),
        (None, r"the arrays are not those of its record: .* with \['norm/mean.state'\]"),
    ],
)
def test_records_of_a_state_are_checked(note, message, tmp_path):
    params, rest = MODELS["nnx"]
    safetensors.save(tmp_path / "it", adapted(params), state=rest)
    adapter, record, state = safetensors.read(tmp_path / "it")
    record = json.loads(json.dumps(record))
    record["state"]["norm/mean"] = note
    if note is None:
        del record["state"]["norm/mean"]
    safetensors.write(tmp_path / "other", adapter, record, state)
    with pytest.raises(ValueError, match=message):
        safetensors.load(tmp_path / "other")
    record["state"] = {"gone": {"dtype": "float32", "shape": []}}
    safetensors.write(tmp_path / "third", adapter, record, {})
    with pytest.raises(ValueError, match=r"damaged: it has no array 'gone\.state'"):
        safetensors.load(tmp_path / "third")


@pytest.mark.parametrize("kind", FORMATS)
def test_doubles_of_numpy_come_back(kind, tmp_path):
    module, (params, _) = FORMATS[kind], MODELS["linen"]
    state = {"mean": np.linspace(0, 1, 3), "own": np.ones(3, np.float32)}
    module.save(tmp_path / "it", adapted(params), state=state)
    _, found = module.load(tmp_path / "it", params, state=state)
    assert isinstance(found["mean"], np.ndarray)
    assert_same(found["mean"], state["mean"])


def test_the_commands_keep_a_state_or_say_that_they_do_not(cli, here, capsys):
    from lora_jax.cli import main

    params, rest = MODELS["nnx"]
    safetensors.save("with.safetensors", adapted(params), state=rest)
    cli("convert", "with.safetensors", "folder", "--to", "orbax")
    cli("convert", "folder", "again.safetensors", "--to", "safetensors")
    assert (here / "again.safetensors").stat().st_size == (here / "with.safetensors").stat().st_size
    assert "state beside it: dropout/rngs/count, dropout/rngs/key, norm/mean" in cli(
        "inspect", "folder"
    )
    assert cli("inspect", "folder", "--json")["state"]["norm/mean"] == ["float32", 32]
    assert "equal" in cli("diff", "again.safetensors", "folder")
    safetensors.save("moved.safetensors", adapted(params), state=jax.tree.map(later, rest))
    assert "norm/mean (state)" in cli("diff", "moved.safetensors", "folder", status=1)
    assert main(["convert", "folder", "peft", "--to", "peft"]) == 0
    assert (
        "no room for the model's state, which was dropout/rngs/count, " in capsys.readouterr().err
    )


STATISTICS = {r"(.*/)?norm/mean": "norm.running_mean", r"(.*/)?norm/var": "norm.running_var"}
NAMES = STATISTICS | {"(query|value|norm)": r"\1"}


def test_models_of_files_have_statistics_that_are_named(tmp_path):
    params, rest = MODELS["nnx"]
    state = whole(params, rest)
    hf.save(tmp_path / "params", params)
    unnamed = r"without them: norm/mean \(nnx.BatchStat, .*running_mean'"
    for k, names in enumerate((None, {"(query|value|norm)": r"\1"})):
        with pytest.warns(UserWarning, match=rf"hf\.save: .*{unnamed}") as caught:
            hf.save(tmp_path / str(k), adapted(state), names=names)
        assert caught[0].filename == __file__
        assert (
            _shards.tensors_in(tmp_path / str(k)).keys()
            == _shards.tensors_in(tmp_path / "params").keys()
        )
    other = nnx.merge_state(params, jax.tree.map(later, rest))
    with pytest.warns(UserWarning, match=rf"hf\.load: .*{unnamed}") as caught:
        found = hf.load(tmp_path / "params", other, hf.Family())
    assert caught[0].filename == __file__
    assert_same(jax.tree.map(data, found), jax.tree.map(data, other))

    hf.save(tmp_path / "named", adapted(state), names=NAMES)
    assert "norm.running_var" in _shards.tensors_in(tmp_path / "named")
    hf.save(tmp_path / "again", state, hf.Family(), names=NAMES, source=tmp_path / "named")
    found = hf.load(tmp_path / "again", other, hf.Family(), names=NAMES)
    assert_same(found["norm"], state["norm"])
    assert (
        found["dropout"]["rngs"]["key"].get_value() == other["dropout"]["rngs"]["key"].get_value()
    )
    with pytest.raises(ValueError, match=r"like: 'dropout/rngs/count' is to stay as it is in like"):
        hf.load(tmp_path / "again", jax.eval_shape(lambda: other), hf.Family(), names=NAMES)


def test_the_commands_know_what_is_no_parameter(cli, here, capsys):
    from lora_jax.cli import main

    for model, (params, rest) in MODELS.items():
        rest = {"batch_stats": rest["batch_stats"]} if model == "linen" else rest
        state = whole(params, rest)
        orbax.save_params(f"{model}_state", state)
        orbax.save_params(
            f"{model}_tuned", whole(jax.tree.map(noisy, params), jax.tree.map(later, rest))
        )
        safetensors.save(f"{model}_adapter", adapted(params))
        count = len(jax.tree.leaves(params))
        text = cli("verify", f"{model}_adapter", f"{model}_state")
        assert f"all {count} leaves" in text
        assert main(["convert", f"{model}_state", f"{model}_hf", "--to", "hf"]) == 0
        out, err = capsys.readouterr()
        assert f": {count} tensors" in out
        assert "norm/mean (" in err
        words = ("extract", f"{model}_state", f"{model}_tuned", f"{model}_lora", "--rank", "1")
        assert main([*words, "--rest", "full"]) == 0
        assert "no parameters, and are left out: " in capsys.readouterr().err
        found = orbax.load(f"{model}_lora", params)
        assert not any("norm/mean" in path for path in found.adapter.full)


def noisy(x):
    return x + normal(7, x.shape, x.dtype)
