"""``lorafy``: what it selects, how factors start, which containers it keeps, what it refuses."""

import dataclasses
import functools
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict
from helpers import assert_close, drawn, scan_case, tolerance
from hypothesis import given
from hypothesis import strategies as st

import lora_jax
from lora_jax._weights.axes import factor_shapes, max_rank
from lora_jax._weights.conventions import conventional
from lora_jax._weights.paths import flatten


def kernel(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


@pytest.fixture
def params():
    return {
        "embed": {"embedding": kernel(50, 16)},
        "layer_0": {
            "query": {"kernel": kernel(16, 16), "bias": kernel(16)},
            "value": {"kernel": kernel(16, 16)},
            "up": {"kernel": kernel(16, 64)},
            "norm": {"scale": kernel(16)},
        },
        "lm_head": {"kernel": kernel(16, 50)},
        "step": jnp.zeros((), jnp.int32),
    }


def paths(lora_params):
    return list(lora_params.adapter.factors)


def test_default_targets_are_query_and_value(params):
    assert paths(lora_jax.lorafy(params)) == ["layer_0/query/kernel", "layer_0/value/kernel"]


def test_all_linear_leaves_out_embeddings_and_head(params):
    assert paths(lora_jax.lorafy(params, targets="all-linear")) == [
        "layer_0/query/kernel",
        "layer_0/up/kernel",
        "layer_0/value/kernel",
    ]


def test_a_pattern_is_matched_in_full(params):
    assert paths(lora_jax.lorafy(params, targets=".*", init=drawn)) == [
        "embed/embedding",
        "layer_0/query/kernel",
        "layer_0/up/kernel",
        "layer_0/value/kernel",
        "lm_head/kernel",
    ]
    with pytest.raises(ValueError, match=r"targets='layer_0' selects nothing.*no path at all"):
        lora_jax.lorafy(params, targets="layer_0")


def test_lists_callables_and_exclude(params):
    chosen = lora_jax.lorafy(params, targets=[".*up/kernel", "lm_head/.*"])
    assert paths(chosen) == ["layer_0/up/kernel", "lm_head/kernel"]
    chosen = lora_jax.lorafy(params, targets=lambda path, leaf: leaf.shape[1] == 64)
    assert paths(chosen) == ["layer_0/up/kernel"]
    chosen = lora_jax.lorafy(params, targets=lambda path, leaf: 3 if "up" in path else False)
    assert chosen.adapter.factors["layer_0/up/kernel"].rank == 3
    chosen = lora_jax.lorafy(params, targets=lambda path, leaf: np.prod(leaf.shape) > 1000)
    assert paths(chosen) == ["layer_0/up/kernel"]
    chosen = lora_jax.lorafy(params, targets=re.compile(".*UP/.*", re.IGNORECASE))
    assert paths(chosen) == ["layer_0/up/kernel"]
    chosen = lora_jax.lorafy(params, targets="all-linear", exclude=[".*query.*", ".*up.*"])
    assert paths(chosen) == ["layer_0/value/kernel"]
    chosen = lora_jax.lorafy(params, exclude=".*query.*")
    assert paths(chosen) == ["layer_0/value/kernel"]


def test_rank_and_alpha_by_pattern_first_match_first(params):
    rank = {".*query.*": 2, ".*": 4}
    lora_params = lora_jax.lorafy(params, rank, alpha={".*value.*": 8, ".*": 1.0}, init=drawn)
    query, value = lora_params.adapter.factors.values()
    assert (query.rank, value.rank) == (2, 4)
    assert (float(query.scale), float(value.scale)) == (0.5, 2.0)


def test_shapes_of_the_factors_and_their_dtype():
    params = {"query": {"kernel": kernel(16, 4, 8, dtype=jnp.bfloat16), "bias": kernel(4, 8)}}
    layout = {"query/kernel": "ioo"}
    (f,) = lora_jax.lorafy(params, 3, layout=layout).adapter.factors.values()
    assert (f.a.shape, f.b.shape, f.layout) == ((16, 3), (3, 4, 8), "ioo")
    assert (f.a.dtype, f.b.dtype, f.scale.shape) == (jnp.float32, jnp.float32, ())
    (f,) = lora_jax.lorafy(params, 3, layout=layout, dtype=jnp.bfloat16).adapter.factors.values()
    assert f.a.dtype == jnp.bfloat16


def test_a_has_variance_one_over_in_and_b_is_zero():
    params = {"query": {"kernel": kernel(2000, 4), "x": kernel(500, 4, 8)}}
    lora_params = lora_jax.lorafy(params, 4, targets=".*", layout={"query/x": "iio"})
    f = lora_params.adapter.factors["query/kernel"]
    a = np.asarray(f.a, np.float64)
    assert abs(a.var() * 2000 - 1) < 0.1
    assert abs(a.mean()) < 3 / np.sqrt(2000 * a.size)
    assert not np.any(f.b)
    a = np.asarray(lora_params.adapter.factors["query/x"].a, np.float64)
    assert abs(a.var() * 2000 - 1) < 0.1


def test_every_path_has_its_own_factors_and_keys_matter(params):
    f = lora_jax.lorafy(params, 4).adapter.factors
    assert not np.array_equal(f["layer_0/query/kernel"].a, f["layer_0/value/kernel"].a)
    g = lora_jax.lorafy(params, 4, key=jax.random.key(1)).adapter.factors
    assert not np.array_equal(f["layer_0/query/kernel"].a, g["layer_0/query/kernel"].a)
    more = lora_jax.lorafy(params, 4, targets="all-linear").adapter.factors
    assert np.array_equal(f["layer_0/query/kernel"].a, more["layer_0/query/kernel"].a)


def test_stacked_layers_have_factors_of_their_own():
    case = scan_case()
    f = lora_jax.lorafy(case.params, 4, targets="layers/Dense_0/kernel").adapter.factors
    (f,) = f.values()
    assert (f.layout, f.a.shape, f.b.shape) == ("bio", (3, 32, 4), (3, 4, 48))
    assert not np.array_equal(*np.asarray(f.a)[:2])


def test_eager_and_jitted_init_are_equal_to_the_bit():
    params = {"query": {"kernel": kernel(48, 32)}, "value": {"kernel": kernel(48, 7)}}
    init = functools.partial(lora_jax.lorafy, rank=5)
    eager, jitted = init(params), jax.jit(init)(params)
    abstract = jax.eval_shape(init, params)
    assert jax.tree.structure(eager) == jax.tree.structure(jitted) == jax.tree.structure(abstract)
    for e, j in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        assert np.asarray(e).tobytes() == np.asarray(j).tobytes()


def test_init_is_the_same_in_every_process():
    """Those of another process and of an earlier version."""
    factors = lora_jax.lorafy({"query": {"kernel": kernel(48, 8)}}).adapter.factors
    first = [-0.005037602968513966, 0.197309672832489, -0.29588794708251953, -0.25706419348716736]
    assert_close(np.asarray(factors["query/kernel"].a)[0, :4], np.array(first))


@pytest.mark.long
def test_init_is_the_same_in_another_process():
    code = (
        "import jax.numpy as jnp, lora_jax;"
        "p = lora_jax.lorafy({'query': {'kernel': jnp.ones((48, 8))}});"
        "print(p.adapter.factors['query/kernel'].a.sum())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = lora_jax.lorafy({"query": {"kernel": jnp.ones((48, 8))}})
    expected = np.asarray(here.adapter.factors["query/kernel"].a, np.float64)
    # Of a sum in which much cancels, the error is relative to its terms.
    gap = abs(float(run.stdout) - expected.sum())
    assert gap <= tolerance(length=expected.size) * np.abs(expected).sum()


def test_the_base_is_the_very_same_arrays(params):
    base, _ = lora_jax.lorafy(params)
    assert base is params


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Attention:
    query: jax.Array
    value: jax.Array


CONTAINERS = {
    "dict": ({"a": {"query": kernel(4, 4)}}, "a/query"),
    "FrozenDict": (FrozenDict({"a": {"query": kernel(4, 4)}}), "a/query"),
    "list and tuple": ([({"query": kernel(4, 4)},)], "0/0/query"),
    "dataclass": ({"x": Attention(kernel(4, 4), kernel(4))}, "x/query"),
    "integer keys": ({0: {"query": kernel(4, 4)}}, "0/query"),
    "nn.Partitioned": ({"query": nn.Partitioned(kernel(4, 4), ("embed", None))}, "query"),
    "nnx.State": (
        nnx.state(nnx.Dict(query=nnx.Linear(4, 4, rngs=nnx.Rngs(0)))),
        "query/kernel",
    ),
    "nnx module": (nnx.Dict(query=nnx.Linear(4, 4, rngs=nnx.Rngs(0))), "query/kernel"),
    "params collection": ({"params": {"query": kernel(4, 4)}, "stats": {"query": 1}}, "query"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_are_kept(name):
    params, path = CONTAINERS[name]
    lora_params = lora_jax.lorafy(params, 2)
    assert paths(lora_params) == [path]
    merged = lora_jax.merge(lora_params)
    assert type(merged) is type(params)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    leaves = zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True)
    assert all(np.array_equal(m, p) for m, p in leaves)


def test_full_leaves_are_float32_copies_and_win_over_targets(params):
    params["layer_0"]["norm"]["scale"] = kernel(16, dtype=jnp.bfloat16)
    lora_params = lora_jax.lorafy(
        params, targets="all-linear", full=["lm_head/.*", ".*/up/.*", ".*scale"]
    )
    adapter = lora_params.adapter
    assert set(adapter.full) == {"lm_head/kernel", "layer_0/up/kernel", "layer_0/norm/scale"}
    assert paths(lora_params) == ["layer_0/query/kernel", "layer_0/value/kernel"]
    assert adapter.full["layer_0/norm/scale"].dtype == jnp.float32
    head = params["lm_head"]["kernel"]
    assert adapter.full["lm_head/kernel"] is not head
    assert adapter.full["lm_head/kernel"].unsafe_buffer_pointer() != head.unsafe_buffer_pointer()
    only = lora_jax.lorafy(params, targets=[], full="lm_head/.*")
    assert not only.adapter.factors
    assert list(only.adapter.full) == ["lm_head/kernel"]


def test_repr_and_summary_count_like_peft(params):
    lora_params = lora_jax.lorafy(params, 2, full="layer_0/norm/scale")
    line = "trainable params: 144 || all params: 3,297 || trainable%: 4.37"
    assert repr(lora_params) == f"LoraParams(2 adapted weights, 1 full leaves; {line})"
    table = lora_params.summary().splitlines()
    assert table[0].split() == ["path", "shape", "layout", "rank", "scale", "parameters"]
    assert table[2].split() == ["layer_0/query/kernel", "16x16", "io", "2", "8", "64"]
    assert table[4].split() == ["layer_0/norm/scale", "16", "-", "full", "-", "16"]
    assert table[-1] == line
    with pytest.raises(TypeError, match=r"lora_jax.combine"):
        lora_jax.split(lora_params)[1].summary()
    assert "base=None" in repr(lora_jax.LoraParams(None, 0))
    assert "adapter=Adapter" in repr(lora_jax.labels(lora_params))
    assert "lm_head" not in repr(jax.eval_shape(lambda: lora_params))


# --- conventions -------------------------------------------------------------------------------

STACK = {"norm": {"scale": kernel(3, 8)}}
FLAT = {"norm": {"scale": kernel(8)}}
CONVENTIONS = [
    ({"w": kernel(4, 8)}, "w", "io"),
    ({"m": {"query": {"kernel": kernel(8, 2, 4)}} | FLAT}, "m/query/kernel", "ioo"),
    ({"m": {"out": {"kernel": kernel(2, 4, 8)}} | FLAT}, "m/out/kernel", "iio"),
    ({"m": {"o_proj": {"kernel": kernel(2, 4, 8)}} | FLAT}, "m/o_proj/kernel", "iio"),
    ({"m": {"query": {"kernel": kernel(3, 8, 8)}} | STACK}, "m/query/kernel", "bio"),
    ({"m": {"query": {"kernel": kernel(3, 8, 2, 4)}} | STACK}, "m/query/kernel", "bioo"),
    ({"m": {"out": {"kernel": kernel(3, 2, 4, 8)}} | STACK}, "m/out/kernel", "biio"),
    ({"m": {"mlp": {"kernel": kernel(3, 8, 16)}} | STACK}, "m/mlp/kernel", "bio"),
    ({"query": {"kernel": kernel(8, 2, 4)}, "out": {"bias": kernel(8)}}, "query/kernel", "ioo"),
    (
        {"a": {"query": {"kernel": kernel(8, 2, 4)}, "mlp": {"kernel": kernel(8, 8)}}},
        "a/query/kernel",
        "ioo",
    ),
]


# Vectors of [heads, head_dim] beside attention kernels do not make a stack.
QK_NORM = {
    "query": {"kernel": kernel(8, 2, 4)},
    "q_norm": {"scale": kernel(2, 4)},
    "out": {"kernel": kernel(2, 4, 8)},
}
CONVENTIONS += [
    ({"m": {"attn": QK_NORM} | FLAT}, "m/attn/out/kernel", "iio"),
    ({"m": {"attn": QK_NORM} | FLAT}, "m/attn/query/kernel", "ioo"),
]


@pytest.mark.parametrize(("params", "path", "layout"), CONVENTIONS)
def test_conventions(params, path, layout):
    leaves = flatten(params)[0]
    assert conventional(path, leaves[path], leaves) == layout


@pytest.mark.parametrize(
    "params",
    [
        {"a": {"query": {"kernel": kernel(8, 2, 4)}}},
        {"a": {"mlp": {"kernel": kernel(8, 2, 4)}} | FLAT},
        {"a": {"conv": {"kernel": kernel(3, 3, 4, 8)}} | FLAT},
        {"a": {"mlp": {"kernel": kernel(8, 2, 4)}} | {"norm": {"scale": kernel(5, 4)}}},
    ],
)
def test_ambiguous_axes_raise_and_say_how_to_resolve_it(params):
    with pytest.raises(ValueError, match=r"ambiguous .*layout=\{'a/.*/kernel': \.\.\.\}"):
        lora_jax.lorafy(params, targets=".*kernel")


@given(
    st.lists(st.tuples(st.sampled_from("bio"), st.integers(1, 7)), min_size=2, max_size=5),
    st.integers(1, 9),
)
def test_factor_shapes_multiply_out_to_the_weight(axes, rank):
    layout = "".join(letter for letter, _ in axes)
    shape = tuple(size for _, size in axes)
    a, b = factor_shapes(layout, shape, rank)
    n = layout.count("b")
    assert a[:n] == b[:n]
    assert a[-1] == b[n] == rank
    assert sorted((*a[:-1], *b[n + 1 :])) == sorted(shape)
    if "i" in layout and "o" in layout:
        assert max_rank(layout, shape) == min(np.prod(a[n:-1]), np.prod(b[n + 1 :]))


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, -1, 17, 10**6])
def test_a_rank_outside_one_to_min_in_out_raises(params, rank):
    with pytest.raises(ValueError, match=rf"rank={rank} for 'layer_0/query/kernel'.*= 16"):
        lora_jax.lorafy(params, rank)


def test_the_largest_rank_is_allowed(params):
    assert (
        lora_jax.lorafy(params, 16, init=drawn).adapter.factors["layer_0/query/kernel"].rank == 16
    )


def test_rank_of_a_wrong_type_raises(params):
    for rank in (True, 2.0, "8"):
        with pytest.raises(TypeError, match="expected an int"):
            lora_jax.lorafy(params, rank)


@pytest.mark.parametrize("alpha", [0, 0.0, -1, float("nan"), float("inf")])
def test_alpha_must_be_finite_and_positive(params, alpha):
    with pytest.raises(ValueError, match=r"alpha=.*finite number > 0"):
        lora_jax.lorafy(params, alpha=alpha)


def test_alpha_of_a_wrong_type_raises(params):
    with pytest.raises(TypeError, match="alpha='16'"):
        lora_jax.lorafy(params, alpha="16")


BAD_TARGETS = [
    (".*nothing.*", r"selects nothing.*no path at all.*nearest"),
    (".*bias", r"layer_0/query/bias: a bias, a norm or a statistic: train it fully, with full="),
    (".*scale", r"norm/scale: a bias, a norm"),
    ("step", r"step: dtype int32, not a real floating type"),
    (["lm_head/.*", "oops"], r"targets='oops' selects nothing"),
    (lambda path, leaf: False, r"the callable chose none of the 5 leaves"),
    ("(", r"targets='\(' is not a regular expression"),
    ([], r"nothing to train"),
]


@pytest.mark.parametrize(("targets", "message"), BAD_TARGETS)
def test_targets_that_select_nothing_raise(params, targets, message):
    with pytest.raises(ValueError, match="(?s)" + message):
        lora_jax.lorafy(params, targets=targets)


def test_no_query_or_value_raises_with_candidates():
    with pytest.raises(ValueError, match=r"targets=None adapts query and value.*up/kernel"):
        lora_jax.lorafy({"up": {"kernel": kernel(4, 4)}})


def test_many_useless_matches_are_cut_short():
    params = {"query": kernel(4, 4)} | {f"b{i}": {"bias": kernel(4)} for i in range(20)}
    with pytest.raises(ValueError, match="and 12 more"):
        lora_jax.lorafy(params, targets=".*bias")


def test_other_bad_arguments(params):
    with pytest.raises(TypeError, match="targets=3"):
        lora_jax.lorafy(params, targets=3)
    with pytest.raises(TypeError, match="callable returned 'yes'"):
        lora_jax.lorafy(params, targets=lambda path, leaf: "yes")
    with pytest.raises(ValueError, match="exclude='oops' selects nothing"):
        lora_jax.lorafy(params, exclude="oops")
    with pytest.raises(ValueError, match=r"(?s)full='step' selects nothing.*dtype int32"):
        lora_jax.lorafy(params, full="step")
    with pytest.raises(ValueError, match=r"rank=\{'oops': ...\} matches none"):
        lora_jax.lorafy(params, {"oops": 2, ".*": 4})
    with pytest.raises(ValueError, match="no pattern of the mapping matches"):
        lora_jax.lorafy(params, {".*query.*": 2})
    with pytest.raises(ValueError, match="alpha: no pattern"):
        lora_jax.lorafy(params, alpha={".*query.*": 2})
    with pytest.raises(ValueError, match="nothing to train"):
        lora_jax.lorafy(params, exclude=".*")
    with pytest.raises(ValueError, match="factors need a real floating type"):
        lora_jax.lorafy(params, dtype=jnp.int32)
    with pytest.raises(ValueError, match=r"exclude='.*up.*'"):
        lora_jax.lorafy(params, targets=".*up/kernel", exclude=".*up.*")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({".*query/kernel": "ix"}, "one letter per axis"),
        ({".*query/kernel": "ii"}, "at least one 'i' and one 'o'"),
        ({".*query/kernel": "bio"}, "3 letters for a weight of 2 axes"),
        ({"oops": "io"}, "matches none"),
        ({".*query/kernel": 3}, "layout=3"),
    ],
)
def test_bad_layouts_raise(params, layout, message):
    with pytest.raises(ValueError, match=message):
        lora_jax.lorafy(params, layout=layout)


def test_layout_must_be_a_mapping(params):
    with pytest.raises(TypeError, match="expected a mapping"):
        lora_jax.lorafy(params, layout="io")


def test_a_layout_makes_a_target_of_a_leaf_named_like_a_vector():
    lora_params = lora_jax.lorafy({"b": kernel(4, 4)}, 2, targets="b", layout={"b": "oi"})
    assert lora_params.adapter.factors["b"].layout == "oi"


@pytest.mark.parametrize("params", [{}, {"a": None}, [], {"a": "text"}])
def test_params_without_arrays_raise(params):
    with pytest.raises(ValueError, match="params has no arrays"):
        lora_jax.lorafy(params)


def test_the_bias_of_a_stacked_projection_shows_the_stack():
    def layout(kernel, bias):
        params = {"query": {"kernel": jnp.ones(kernel), "bias": jnp.ones(bias)}}
        return lora_jax.lorafy(params, 1).adapter.factors["query/kernel"].layout

    assert layout((3, 6, 5), (3, 5)) == "bio"
    assert layout((6, 3, 5), (3, 5)) == "ioo"
    assert layout((3, 6, 2, 5), (3, 2, 5)) == "bioo"
    with pytest.raises(ValueError, match="ambiguous"):
        layout((3, 3, 5), (3, 5))


def test_the_factors_of_another_lora_are_no_targets():
    state = nnx.state(nnx.Dict(query=nnx.LoRALinear(6, 5, lora_rank=2, rngs=nnx.Rngs(0))))
    for targets in (None, "all-linear"):
        assert list(lora_jax.lorafy(state, 1, targets=targets).adapter.factors) == ["query/kernel"]


def test_one_array_at_two_targets_raises():
    w = kernel(4, 4)
    with pytest.raises(ValueError, match="'query/kernel' and 'value/kernel' are one and the same"):
        lora_jax.lorafy({"query": {"kernel": w}, "value": {"kernel": w}}, 2)


def test_two_leaves_of_one_path_raise():
    with pytest.raises(ValueError, match="two leaves spell the same path 'a/query'"):
        lora_jax.lorafy({"a/query": kernel(4, 4), "a": {"query": kernel(4, 4)}})


def test_numpy_parameters_and_python_leaves_are_kept():
    params = {"query": np.ones((4, 4), np.float32), "eps": 1e-6, "name": "x"}
    lora_params = lora_jax.lorafy(params, 2)

    def fn(p, x):
        assert p["name"] == "x"
        assert isinstance(p["eps"], float)
        return x @ p["query"]

    x = np.ones((1, 4), np.float32)
    actual = jax.jit(lambda x: lora_jax.lora(fn)(lora_params, x))(x)
    assert_close(actual, jnp.asarray(fn(params, x)))
    assert lora_jax.merge(lora_params)["eps"] == 1e-6


def test_a_lookup_table_starts_with_rows_of_variance_one():
    params = {
        "embed": {"embedding": jnp.ones((400, 64))},
        "patch_embedding": {"kernel": jnp.ones((400, 64))},
    }
    factors = lora_jax.lorafy(params, 8, targets=".*").adapter.factors
    spread = {path: np.asarray(f.a, np.float64).std() for path, f in factors.items()}
    assert spread["embed/embedding"] == pytest.approx(1, rel=0.1)
    assert spread["patch_embedding/kernel"] == pytest.approx(1 / 20, rel=0.1)
    linear = lora_jax.lorafy(params, 8, targets="all-linear", init=drawn).adapter.factors
    assert list(linear) == ["patch_embedding/kernel"]
