"""Attention by every path: what a token sees, and what is never formed."""

import functools
import itertools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import all_eqns, assert_close, drawn, normal, randomize_b
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax.recipes import attention
from lora_jax.recipes.attention import choose, splash, xla
from lora_jax.recipes.lm import mesh as lm_mesh
from lora_jax.recipes.models import llama

pytestmark = pytest.mark.usefixtures("standard_promotion")

LENGTH = xla.LONG + 61  # no multiple of a block


def inputs(length, dtype=jnp.float32, heads=2):
    """Return queries, keys and values with one head for two of the queries'."""
    shapes = (1, length, heads, 4), (1, length, heads // 2, 4), (1, length, heads // 2, 4)
    return [normal(k, shape, dtype) for k, shape in enumerate(shapes)]


def with_gradients(fn, *args):
    """Return ``fn(*args)``, and the gradients of a sum of it with random weights."""

    @jax.jit
    def both(*args):
        y, back = jax.vjp(fn, *args)
        return y, back(normal(9, y.shape, y.dtype))

    return both(*args)


@pytest.mark.parametrize(
    ("window", "dtype"),
    [(None, "float32"), (100, "float32"), (100, "bfloat16"), (None, "bfloat16")],
)
def test_a_long_row_attends_by_blocks_as_at_once(window, dtype):
    args = inputs(LENGTH, dtype)

    def plain(query, key, value):
        sizes = window and (window - 1, 0)
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=True, local_window_size=sizes
        )

    found = with_gradients(lambda *args: attention.attend(*args, window=window, name="xla"), *args)
    assert_close(found, with_gradients(plain, *args), length=LENGTH)


@pytest.mark.parametrize("window", [None, 100])
def test_no_array_of_length_times_length_exists(window):
    length = 4096
    args = [jax.ShapeDtypeStruct((1, length, *x.shape[2:]), x.dtype) for x in inputs(1)]

    def largest(name):
        def loss(*args):
            return attention.attend(*args, window=window, name=name).sum()

        eqns = all_eqns(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*args))
        return max(math.prod(v.aval.shape) for e in eqns for v in e.outvars)

    assert max(largest(name) for name in ("xla", "auto")) < length**2 / (16 if window else 3)


SEGMENTS = np.array([[0, 0, 0, 5, 5, 2, 2, 2, 2, 0, 0], [1] * 9 + [3, 1]], np.int32)


@pytest.mark.parametrize(("scan_layers", "remat"), [(True, "full"), (False, "none")])
def test_packed_texts_are_read_as_alone(scan_layers, remat, monkeypatch):
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "head_dim": 4}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = llama.Llama(**sizes, **heads, scan_layers=scan_layers, remat=remat, sliding_window=3)
    ids = np.random.default_rng(0).integers(0, 40, SEGMENTS.shape).astype(np.int32)
    params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
    lora_params = randomize_b(lora_jax.lorafy(params, 2, targets="all-linear", init=drawn))
    apply = lora_jax.lora(model.apply)

    @jax.jit
    def packed(lora_params, ids):
        return apply({"params": lora_params}, ids, segments=SEGMENTS)

    found = packed(lora_params, ids)
    monkeypatch.setattr(xla, "LONG", 4)
    monkeypatch.setattr(xla, "BLOCK", 4)
    jax.clear_caches()
    assert_close(packed(lora_params, ids), found, depth=24)
    alone = jax.jit(lambda params, ids: model.apply({"params": params}, ids))
    merged = lora_jax.merge(lora_params)
    for row, (texts, numbers) in enumerate(zip(ids, SEGMENTS, strict=True)):
        ends = [*(np.flatnonzero(np.diff(numbers)) + 1), len(numbers)]
        for start, end in itertools.pairwise([0, *ends]):
            text = np.zeros((1, len(texts)), np.int32)
            text[0, : end - start] = texts[start:end]  # later tokens do not count
            assert_close(found[row, start:end], alone(merged, text)[0, : end - start], depth=24)


def test_gradients_stay_in_their_segments(monkeypatch):
    args = inputs(11)
    monkeypatch.setattr(xla, "BLOCK", 4)
    segments = SEGMENTS[:1]
    at_once = with_gradients(lambda *x: attention.attend(*x, segments=segments, window=3), *args)
    monkeypatch.setattr(xla, "LONG", 4)
    blocks = with_gradients(lambda *x: attention.attend(*x, segments=segments, window=3), *args)
    assert_close(blocks, at_once)
    other = [x.at[:, 3:5].multiply(2) for x in args]
    changed = with_gradients(lambda *x: attention.attend(*x, segments=segments, window=3), *other)
    same = np.r_[0:3, 5:11]
    assert_close(*(jax.tree.map(lambda x: x[:, same], y) for y in (changed, blocks)))


def test_segments_that_cannot_be_are_refused():
    args = inputs(11)
    for segments in (SEGMENTS, SEGMENTS[:1, 1:], SEGMENTS[0], SEGMENTS[:1].astype(np.float32)):
        with pytest.raises(ValueError, match=r"segments: .*, expected integers of shape \[1, 11\]"):
            attention.attend(*args, segments=jnp.asarray(segments))
    q, k, v = (x.astype(jnp.bfloat16) for x in args)
    segments = jnp.asarray(SEGMENTS[:1])
    with pytest.raises(ValueError, match=r"attention='cudnn': .* no segments. Pass 'auto', or"):
        attention.attend(q, k, v, segments=segments, name="cudnn")
    model = llama.Llama(40, 16, 24, 1, 4, 2, 4)
    with pytest.raises(ValueError, match="a cache has one text per row"):
        model.init(jax.random.key(0), SEGMENTS, model.empty(2, 11), segments=SEGMENTS)
    with pytest.raises(ValueError, match=r"segments: int32\[11\], expected integers of shape"):
        model.init(jax.random.key(0), SEGMENTS, segments=SEGMENTS[0])


@pytest.mark.parametrize("window", [None, 3])
def test_a_long_prompt_is_read_into_a_cache_by_blocks(window, monkeypatch):
    query, _, _ = (jnp.concatenate([x, 2 * x]) for x in inputs(11))
    _, keys, values = (jnp.concatenate([x, -x]) for x in inputs(19))
    positions = np.array([[0], [6]]) + np.arange(11)[None]  # rows have different lengths
    attend_cached = functools.partial(attention.attend_cached, window=window)
    at_once = with_gradients(lambda *x: attend_cached(*x, positions), query, keys, values)
    monkeypatch.setattr(xla, "LONG", 4)
    monkeypatch.setattr(xla, "BLOCK", 4)
    blocks = with_gradients(lambda *x: attend_cached(*x, positions), query, keys, values)
    assert_close(blocks, at_once)
    for row, at in enumerate(positions[:, 0]):  # one row's blocks read what its window sees
        x = [y[row : row + 1] for y in (query, keys, values)]
        found = attend_cached(*x, positions[row : row + 1])
        assert_close(found, at_once[0][row : row + 1])
        x[0] = jnp.pad(x[0], ((0, 0), (at, 0), (0, 0), (0, 0)))
        x[1:] = (y[:, : at + 11] for y in x[1:])
        assert_close(found, attention.attend(*x, window=window)[:, at:])


def test_one_token_over_a_cache_may_be_cudnns(monkeypatch):
    monkeypatch.setattr(choose, "why_not_cudnn", lambda *_: None)
    monkeypatch.setattr(choose, "one_by_cudnn", lambda query, *_: query)
    _, keys, values = inputs(19)

    def is_chosen(length, **options):
        fn = functools.partial(attention.attend_cached, **options)
        args = inputs(length)[0], keys, values, 5 + np.arange(length)[None]
        expected = attention.attend_cached(*args, **options | {"name": "xla"})
        assert_close(fn(*args), expected)  # on this platform
        names = {e.primitive.name for e in all_eqns(jax.make_jaxpr(fn)(*args))}
        return "platform_index" in names

    assert is_chosen(1)
    assert is_chosen(1, window=19)
    assert not is_chosen(1, window=18)
    assert not is_chosen(2)
    assert not is_chosen(1, name="xla")


@pytest.mark.parametrize(
    ("window", "is_packed", "dtype"),
    [(None, False, "float32"), (140, True, "float32"), (None, True, "bfloat16")],
)
def test_the_kernel_for_tpus_attends_as_xla(window, is_packed, dtype):
    args = inputs(300, dtype, heads=4)  # padded to three blocks
    options = {"window": window}
    if is_packed:
        options["segments"] = np.repeat(np.array([[4, 7, 4]], np.int32), 100, axis=1)
    found, expected = (
        with_gradients(functools.partial(fn, **options, **more), *args)
        for fn, more in (
            (attention.by_splash, {"interpret": True}),
            (attention.attend, {"name": "xla"}),
        )
    )
    assert_close(found, expected)


@pytest.mark.devices(4)
@pytest.mark.parametrize("heads", [4, 2])
def test_on_a_mesh_each_device_has_its_rows_and_heads(heads):
    mesh = lm_mesh.mesh_of("fsdp=2,tensor=2", count=4)
    spread = NamedSharding(mesh, P(lm_mesh.ROWS))
    args = [jnp.concatenate([x, 2 * x]) for x in inputs(130, heads=heads)]
    options = {"segments": np.arange(260, dtype=np.int32).reshape(2, 130) // 100}
    expected = with_gradients(functools.partial(attention.attend, **options), *args)
    on_mesh = functools.partial(attention.by_splash, **options, spread=spread, interpret=True)
    found = with_gradients(on_mesh, *jax.device_put(args, spread))
    assert_close(found, expected)
    kept = {
        v.aval.shape[0]
        for e in all_eqns(jax.make_jaxpr(on_mesh)(*args))
        for v in e.outvars
        if e.primitive.name == "pallas_call" and v.aval.ndim == 3
    }
    assert kept == {2}, "half of the four heads; all two, if there is one of the keys"


def device(platform, kind):
    return SimpleNamespace(platform=platform, device_kind=kind)


REFUSED = [
    ({"dtype": "float16"}, "it takes bfloat16 and float32, and these are float16."),
    ({"query": (2, 8, 4, 512)}, "it takes a head_dim up to 256, and this is 512."),
    ({"query": (3, 8, 4, 16), "axis": "fsdp"}, "the 2 devices of the batch do not divide its 3 "),
    ({"device": None, "libtpu": False}, "this process has no TPU, and libtpu, the compiler for"),
    ({"device": None, "libtpu": True}, None),
    ({"device": device("cuda", "NVIDIA H200")}, "for TPUs, and the program is for cuda."),
    ({"device": device("tpu", "TPU v3")}, "it is for later TPUs than TPU v3."),
    ({"device": device("tpu", "TPU v5 lite")}, None),
]


@pytest.mark.devices(2)
@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_a_kernel_that_cannot_be_says_why(changes, message, monkeypatch):
    case = {"query": (2, 8, 4, 16), "dtype": "bfloat16", "axis": None, "libtpu": False}
    case |= {"device": device("tpu", "TPU v6 lite")} | changes
    monkeypatch.setattr(splash, "device_of", lambda spread: case["device"])
    monkeypatch.setattr(splash, "_can_compile", lambda: case["libtpu"])
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    spread = NamedSharding(lm_mesh.mesh_of("fsdp=2", count=2), P(case["axis"]))
    query, dtype = case["query"], case["dtype"]
    found = attention.why_not_splash(query, dtype, spread)
    assert found is None if message is None else message in found
    if message:
        x = jnp.zeros(query, dtype)
        with pytest.raises(ValueError, match=r"attention='splash': .*\. Pass 'auto', or 'xla'"):
            attention.attend(x, x, x, name="splash", spread=spread)


def test_the_kernel_for_tpus_is_taken_where_it_pays(monkeypatch):
    def kernels(length, mapped=None, **options):
        fn = functools.partial(attention.attend, **options)
        eqns = all_eqns(jax.make_jaxpr(mapped(fn) if mapped else fn)(*inputs(length)))
        return sum(e.primitive.name == "pallas_call" for e in eqns)

    mesh = lm_mesh.mesh_of("data=1", count=1)
    assert kernels(512, spread=NamedSharding(mesh, P())) == 0, "these are no TPUs"
    for module in (choose, splash):
        monkeypatch.setattr(module, "device_of", lambda spread: device("tpu", "TPU v4"))
    spread = NamedSharding(mesh, P())
    assert (kernels(511, spread=spread), kernels(512, spread=spread)) == (0, 1)
    assert kernels(512, name="xla", spread=spread) == 0
    assert kernels(8, name="splash", spread=spread) == 1
    rows = {"mesh": mesh, "in_specs": P("data"), "out_specs": P("data")}
    mapped = functools.partial(jax.shard_map, **rows, check_vma=False)
    assert kernels(512, mapped) == 1
    mapped = functools.partial(jax.shard_map, **rows)
    assert kernels(512, mapped) == 0
    with pytest.raises(ValueError, match=r"jax.shard_map has no types for it: there, pass check_"):
        kernels(512, mapped, name="splash")
    x = jax.device_put(inputs(8)[0], NamedSharding(lm_mesh.mesh_of("data=1", True, 1), P("data")))
    for name in ("cudnn", "splash"):
        with pytest.raises(ValueError, match=r"no rules for the Explicit axes .* Pass 'auto', or"):
            attention.attend(x, x, x, name=name)
