"""Control flow: regions stay regions, names stay names, and the oracle holds inside."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
    CASES,
    all_eqns,
    assert_close,
    assert_oracle,
    drawn,
    loss_of,
    normal,
    randomize_b,
)
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lora_jax


@pytest.fixture
def square():
    return adapted({"w": normal(0, (8, 8), std=0.3)})


@pytest.fixture
def stack():
    return adapted({"w": normal(0, (3, 8, 8), std=0.3)}, {"w": "bio"})


def adapted(params, layout=None, targets=".*", **options):
    options = {"targets": targets, "layout": layout, "init": drawn, **options}
    return randomize_b(lora_jax.lorafy(params, 2, **options))


def both(fn, **options):
    """The adapted and the merged outputs, by one program."""
    apply = lora_jax.lora(fn, **options)
    return jax.jit(lambda p, *args: (apply(p, *args), fn(lora_jax.merge(p), *args)))


X = normal(9, (4, 8))


def names(fn, *args):
    return [eqn.primitive.name for eqn in all_eqns(jax.make_jaxpr(fn)(*args))]


def test_jit_inside_keeps_its_name(square):
    @jax.jit
    def my_projection(w, x):
        return jnp.tanh(x @ w)

    def fn(p, x):
        return my_projection(p["w"], x)

    assert_oracle(fn, square, X)
    eqns = all_eqns(jax.make_jaxpr(lora_jax.lora(fn))(square, X))
    assert "my_projection" in [e.params["name"] for e in eqns if e.primitive.name == "jit"]


def test_jit_inside_may_return_the_weight(square):
    fn = lambda p, x: x @ jax.jit(lambda w: (w.T, 1.0))(p["w"])[0].T  # noqa: E731
    assert_oracle(fn, square, X)


def test_remat_stays_a_region_with_its_policy(square):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

    def fn(p, x):
        return jax.checkpoint(lambda w, x: jnp.sin(x @ w), policy=policy)(p["w"], x)

    assert_oracle(fn, square, X)
    eqns = list(all_eqns(jax.make_jaxpr(lora_jax.lora(fn))(square, X)))
    (region,) = [e for e in eqns if "remat" in e.primitive.name or "checkpoint" in e.primitive.name]
    assert region.params["policy"] is policy or region.params["policy"] == policy
    assert [e.primitive.name for e in all_eqns(region.params["jaxpr"])].count("dot_general") == 3


@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="memory of a CPU: products of GPUs have workspaces"
)
def test_remat_saves_the_memory_it_saved_before():
    params = {"w": jax.ShapeDtypeStruct((8, 64, 64), jnp.float32)}
    lora_params = jax.eval_shape(lambda p: adapted(p, {"w": "bio"}), params)
    x = jax.ShapeDtypeStruct((512, 64), jnp.float32)

    def temp(wrap):
        def fn(p, x):
            def layer(x, w):
                return jnp.tanh(jnp.tanh(jnp.tanh(x @ w) @ w) @ w), None

            return lax.scan(wrap(layer), x, p["w"])[0]

        step = jax.jit(lora_jax.value_and_grad(loss_of(lora_jax.lora(fn))))
        return step.lower(lora_params, x).compile().memory_analysis().temp_size_in_bytes

    assert temp(functools.partial(jax.checkpoint, prevent_cse=False)) < 0.6 * temp(lambda f: f)


@pytest.mark.parametrize("prevent_cse", [True, (True, False)])
def test_remat_around_constants_and_a_loop(square, prevent_cse):
    table = jnp.linspace(0.5, 1.5, 8)

    def fn(p, x):
        @functools.partial(jax.checkpoint, prevent_cse=prevent_cse)
        def region(w, x):
            step = lambda x, k: (jnp.tanh(x @ w) * table[None] + k, None)  # noqa: E731
            return lax.scan(step, x, jnp.arange(2.0))[0]

        return region(p["w"], x)

    assert_oracle(fn, square, X)


def test_remat_of_a_gradient_taken_inside(square):
    def fn(p, x):
        f = jax.checkpoint(lambda x: jnp.sin(x @ p["w"]).sum())
        return jax.grad(f)(x)

    assert_oracle(fn, square, X)


def test_scan_over_stacked_and_closed_over_weights(stack, square):
    def fn(p, x):
        def layer(x, w):
            return jnp.tanh(x @ w @ p["shared"]["w"]), x.sum()

        return lax.scan(layer, x, p["stack"]["w"], reverse=True, unroll=1)

    def split(stack, square, x):
        return lora_jax.lora(fn)({"stack": stack, "shared": square}, x)

    def merged(stack, square, x):
        return fn({"stack": lora_jax.merge(stack), "shared": lora_jax.merge(square)}, x)

    run = jax.jit(lambda *args: (split(*args), merged(*args)))
    assert_close(*run(stack, square, X), depth=16)
    assert names(split, stack, square, X).count("scan") == 1


@pytest.mark.parametrize("layout", ["bio", "ibo", "obi"])
def test_scan_over_any_axis_the_factors_may_or_may_not_have(layout):
    lora_params = adapted({"w": normal(0, (8, 8, 8), std=0.3)}, {"w": layout})

    def fn(p, x):
        if layout == "bio":
            return lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, p["w"])[0]
        # The scanned axis is an input or an output axis: one row or column at a time, beside one
        # use of the whole.
        whole = "cib,ibo->co" if layout == "ibo" else "cib,obi->co"
        y = jnp.einsum(whole, jnp.broadcast_to(x[..., None], (*x.shape, 8)), p["w"])
        rows = lax.scan(lambda c, w: (c, x @ w), jnp.float32(0), p["w"])[1]
        return y, rows

    assert_oracle(fn, lora_params, X)


def test_scan_with_the_weight_in_the_carry(square):
    def fn(p, x):
        def step(carry, _):
            w, x = carry
            return (w, jnp.tanh(x @ w)), None

        return lax.scan(step, (p["w"], x), None, length=3)[0][1]

    assert_oracle(fn, square, X)


def test_a_carry_that_changes_its_form_is_a_materialization(square):
    def fn(p, x):
        def step(w, _):
            return w.T, None

        return x @ lax.scan(step, p["w"], None, length=2)[0]

    with pytest.raises(NotImplementedError, match=r"carried through 'scan'"):
        jax.eval_shape(lora_jax.lora(fn), square, X)
    assert_oracle(fn, square, X, on_materialize="allow")


def test_a_weight_scaled_in_the_carry(square):
    def fn(p, x):
        return x @ lax.scan(lambda w, _: (w * -0.5, None), p["w"], None, length=3)[0]

    assert_oracle(fn, square, X)


def test_a_weight_among_the_outputs_of_a_scan(square):
    def fn(p, x):
        return x @ lax.scan(lambda c, _: (c, p["w"]), jnp.float32(0), None, length=2)[1][1]

    assert_oracle(fn, square, X)


def test_a_carry_that_takes_the_weight_is_a_materialization(square):
    def fn(p, x):
        def step(carry, _):
            return (p["w"], jnp.tanh(x @ carry[0])), None

        return lax.scan(step, (jnp.zeros_like(p["w"]), x), None, length=3)[0][1]

    with pytest.raises(NotImplementedError, match="leaves the body of 'scan'"):
        jax.eval_shape(lora_jax.lora(fn), square, X)
    assert_oracle(fn, square, X, on_materialize="allow")


def test_while_with_closed_over_and_carried_weights(square):
    def closed(p, x):
        return lax.while_loop(
            lambda c: (c[0] < 3) & ((c[1] @ p["w"]).sum() < 1e9),
            lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"])),
            (0, x),
        )

    def carried(p, x):
        return lax.while_loop(
            lambda c: c[0] < 3,
            lambda c: (c[0] + 1, c[1], jnp.tanh(c[2] @ c[1])),
            (0, p["w"], x),
        )[2]

    for fn in (closed, carried):
        assert_close(*both(fn)(square, X))


def test_while_that_changes_the_carried_weight(square):
    def fn(p, x):
        body = lambda c: (c[0] + 1, p["w"] if c[0] is None else c[1].T)  # noqa: E731
        return x @ lax.while_loop(lambda c: c[0] < 2, body, (0, p["w"]))[1]

    with pytest.raises(NotImplementedError, match="changes its form while it is carried"):
        jax.eval_shape(lora_jax.lora(fn), square, X)
    assert_close(*both(fn, on_materialize="allow")(square, X))


def test_a_while_whose_body_brings_the_weight_in(square):
    def fn(p, x):
        body = lambda c: (c[0] + 1, p["w"])  # noqa: E731
        return x @ lax.while_loop(lambda c: c[0] < 2, body, (0, jnp.zeros((8, 8))))[1]

    with pytest.raises(NotImplementedError, match="changes its form while it is carried"):
        jax.eval_shape(lora_jax.lora(fn), square, X)
    assert_close(*both(fn, on_materialize="allow")(square, X))


def test_cond_and_switch(square):
    def fn(p, x):
        y = lax.cond(x.sum() > 0, lambda w: jnp.tanh(x @ w), lambda w: x @ w.T, p["w"])
        branches = [lambda w, k=k: k * (y @ w) for k in (1.0, 2.0, 3.0)]
        return lax.switch(jnp.int32(1), branches, p["w"])

    assert_oracle(fn, square, X)
    assert_oracle(fn, square, -X)

    @jax.jit
    def run(p, xs):
        batched = jax.vmap(lora_jax.lora(fn), in_axes=(None, 0))(p, xs)
        return batched, jnp.stack([fn(lora_jax.merge(p), x) for x in xs])

    assert_close(*run(square, np.stack([X, -X])))


def test_cond_that_returns_the_weight(square):
    same = lambda p, x: x @ lax.cond(x.sum() > 0, lambda w: w.T, lambda w: w.T, p["w"])  # noqa: E731
    differs = lambda p, x: x @ lax.cond(x.sum() > 0, lambda w: w, lambda w: w.T, p["w"])  # noqa: E731
    assert_oracle(same, adapted(square.base, {"w": "oi"}), X)
    with pytest.raises(NotImplementedError, match="leaves the branches of 'cond'"):
        jax.eval_shape(lora_jax.lora(differs), square, X)
    assert_oracle(differs, square, X, on_materialize="allow")


@pytest.mark.parametrize("kind", ["custom_jvp", "custom_vjp"])
def test_a_custom_derivative_around_the_weight_is_kept(square, kind):
    if kind == "custom_jvp":
        project = jax.custom_jvp(lambda w, x: x @ w)
        project.defjvp(
            lambda primals, tangents: (project(*primals), 7 * (tangents[1] @ primals[0]))
        )
    else:
        project = jax.custom_vjp(lambda w, x: x @ w)
        project.defvjp(lambda w, x: (x @ w, w), lambda w, g: (jnp.zeros_like(w), 7 * (g @ w.T)))

    def fn(p, x):
        return project(p["w"], x)

    with pytest.raises(NotImplementedError, match=f"custom derivative .'{kind}"):
        jax.eval_shape(lora_jax.lora(fn), square, X)
    apply = lora_jax.lora(fn, on_materialize="allow")

    @jax.jit
    def gradients(p, x):
        merged = lora_jax.merge(p)
        functions = (lambda x: apply(p, x), lambda x: fn(merged, x), lambda x: x @ merged["w"])
        return [jax.grad(lambda x, f=f: f(x).sum())(x) for f in functions]

    actual, expected, plain = gradients(square, X)
    assert_close(actual, expected)
    assert_close(actual, 7 * np.asarray(plain))


def test_custom_derivatives_beside_the_weight_are_untouched(square):
    @jax.custom_vjp
    def loud(x):
        return x

    loud.defvjp(lambda x: (x, None), lambda _, g: (3 * g,))
    assert_oracle(lambda p, x: jax.nn.relu(loud(x @ p["w"])), square, X)


def test_forward_mode_and_linearize(square):
    apply = lora_jax.lora(lambda p, x: jnp.sin(x @ p["w"]))
    merged = lambda p, x: jnp.sin(x @ lora_jax.merge(p)["w"])  # noqa: E731
    trainable, frozen = lora_jax.split(square)
    tangent = jax.tree.map(np.ones_like, trainable)

    def jvp(f, trainable):
        return jax.jvp(lambda t: f(lora_jax.combine(t, frozen), X), (trainable,), (tangent,))

    assert_close(*jax.jit(lambda t: (jvp(apply, t), jvp(merged, t)))(trainable))


def test_vmap_over_a_stack_of_adapters(square):
    adapters = [randomize_b(square, seed).adapter for seed in (1, 2, 3)]
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *adapters)
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    many = jax.vmap(lora_jax.lora(fn), in_axes=(lora_jax.LoraParams(None, 0), None))

    @jax.jit
    def run(base, stacked, adapters):
        each = [fn(lora_jax.merge(lora_jax.LoraParams(base, one)), X) for one in adapters]
        return many(lora_jax.LoraParams(base, stacked), X), jnp.stack(each)

    assert_close(*run(square.base, stacked, adapters))
    with pytest.raises(ValueError, match="stack of adapters"):
        jax.eval_shape(lora_jax.lora(fn), lora_jax.LoraParams(square.base, stacked), X)


def test_lora_inside_scan_and_remat(square):
    apply = lora_jax.lora(lambda p, x: jnp.tanh(x @ p["w"]))
    merged = lambda p, x: jnp.tanh(x @ lora_jax.merge(p)["w"])  # noqa: E731

    def run(f, p):
        def loss(p):
            y, _ = lax.scan(lambda x, _: (jax.checkpoint(f)(p, x), None), X, None, length=3)
            return y.sum()

        return lora_jax.value_and_grad(loss)(p)

    assert_close(*jax.jit(lambda p: (run(apply, p), run(merged, p)))(square), depth=16)


@pytest.mark.devices(4)
@pytest.mark.parametrize("check_vma", [True, False])
def test_lora_inside_shard_map(square, check_vma):
    mesh = Mesh(np.array(jax.devices()[:4]), ("d",))
    apply = lora_jax.lora(lambda p, x: jnp.tanh(x @ p["w"]))

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("d")),
        out_specs=PartitionSpec("d"),
        check_vma=check_vma,
    )
    def sharded(p, x):
        return apply(p, x)

    assert_close(jax.jit(sharded)(square, X), jax.jit(apply)(square, X))


@pytest.mark.devices(4)
def test_collectives_inside_the_function_under_pmap(square):
    def fn(p, x):
        return lax.pmean(x @ p["w"], "d")

    def run(p, x):
        return lora_jax.lora(fn)(p, x), fn(lora_jax.merge(p), x)

    xs = np.stack([np.asarray(X) * i for i in range(4)])
    assert_close(*jax.pmap(run, "d", in_axes=(None, 0))(square, xs))


def test_side_effects_and_dropped_outputs_survive(square, capfd):
    def fn(p, x):
        jax.debug.print("norm {n}", n=(x @ p["w"]).sum() * 0)
        top, _ = lax.top_k(x @ p["w"], 2)
        return top

    assert_oracle(fn, square, X)
    jax.effects_barrier()
    assert "norm" in capfd.readouterr().out


def test_static_arguments_methods_and_rngs_reach_the_function():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool, mode: str = "a"):
            assert mode in "ab"
            return nn.Dropout(0.5, deterministic=not train)(nn.Dense(8, name="query")(x))

        def double(self, x):
            return 2 * self(x, False)

    net, rngs = Net(), {"dropout": jax.random.key(3)}
    variables = jax.jit(net.init, static_argnums=2)(jax.random.key(0), X, False)
    lora_params = randomize_b(lora_jax.lorafy(variables["params"], 2, init=drawn))
    whole = lora_jax.lorafy(variables, init=drawn)

    @jax.jit
    def run(lora_params, whole):
        pairs = []
        for adapted, plain in (
            ({"params": lora_params}, {"params": lora_jax.merge(lora_params)}),
            (whole, variables),
        ):
            for apply, p in ((lora_jax.lora(net.apply), adapted), (net.apply, plain)):
                pairs.append(
                    [
                        apply(p, X, False, mode="b"),
                        apply(p, X, True, rngs=rngs),
                        apply(p, X, method=Net.double),
                        apply(p, X, False),
                    ]
                )
        return pairs

    adapted, merged, start, base = run(lora_params, whole)
    assert_close(adapted, merged)
    assert_close(start, base)


# --- bad input ---------------------------------------------------------------------------------


def test_lora_of_something_else_raises():
    with pytest.raises(TypeError, match="expected a function, got int"):
        lora_jax.lora(3)
    with pytest.raises(ValueError, match="on_materialize='maybe'"):
        lora_jax.lora(lambda p: p, on_materialize="maybe")


def test_a_call_without_lora_params_raises(square):
    with pytest.raises(ValueError, match="without a LoraParams"):
        lora_jax.lora(lambda p, x: x @ p["w"])(square.base, X)


def test_a_function_that_uses_no_adapted_weight_raises(square):
    w = square.base["w"]
    with pytest.raises(ValueError, match="uses none of the 1 adapted leaves: w"):
        lora_jax.lora(lambda p, x: x @ w)(square, X)
    full = lora_jax.lorafy(square.base, targets=[], full="w")
    with pytest.raises(ValueError, match="uses none of the 1 adapted leaves: w"):
        lora_jax.lora(lambda p, x: x)(full, X)


def test_one_unused_weight_among_used_ones_is_fine(square):
    params = {"w": square.base["w"], "v": normal(1, (8, 8))}
    assert_oracle(lambda p, x: x @ p["w"], adapted(params), X)


def test_a_function_that_returns_the_weight_raises(square):
    with pytest.raises(NotImplementedError, match="is returned by the function"):
        lora_jax.lora(lambda p, x: (x @ p["w"], p["w"]))(square, X)


def test_full_leaves_are_trained_and_cast(square):
    params = {"w": square.base["w"], "head": jnp.ones((8, 3), jnp.bfloat16)}
    lora_params = adapted(params, targets="w", full="head")

    def fn(p, x):
        assert p["head"].dtype == jnp.bfloat16
        return x @ p["w"] @ p["head"].astype(jnp.float32)

    assert_oracle(fn, lora_params, X)
    grads = jax.jit(lora_jax.value_and_grad(loss_of(lora_jax.lora(fn))))(lora_params, X)[1]
    assert np.any(grads.full["head"])


def test_every_case_runs_eagerly(square):
    case = CASES["plain dict"]()
    lora_params = case.lorafy()
    assert_close(
        lora_jax.lora(case.fn)(lora_params, case.x), case.fn(lora_jax.merge(lora_params), case.x)
    )


def test_the_error_inside_a_library_function_names_the_users_line(square):
    fn = lambda p, x: x @ jnp.nan_to_num(p["w"])  # noqa: E731
    with pytest.raises(NotImplementedError, match=rf"at {__file__}:\d+ \(<lambda>\): fn = "):
        jax.eval_shape(lora_jax.lora(fn), square, X)


def test_a_materialized_use_says_nothing_about_the_layout(square):
    fn = lambda p, x: jnp.sin(p["w"])[:4] + x @ p["w"].T  # noqa: E731
    assert_oracle(fn, square, X, on_materialize="allow")


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.mlp = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.mlp(x))


def test_nnx_scan_over_remat_hands_its_parameters_back_unread():
    graph, _ = nnx.split(nnx.eval_shape(lambda: Layer(nnx.Rngs(0))), nnx.Param)
    state = nnx.vmap(lambda key: nnx.state(Layer(nnx.Rngs(key)), nnx.Param))
    state = jax.jit(state)(jax.random.split(jax.random.key(0), 3))

    @functools.partial(nnx.scan, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, layer):
        return nnx.remat(lambda layer, x: layer(x))(layer, x)

    def fn(state, x):
        return run(x, nnx.merge(graph, state, copy=True))

    assert_oracle(fn, adapted(state, targets="all-linear"), X)


def test_nested_cond(square):
    def fn(p, x):
        def level(depth, x):
            if not depth:
                return jnp.tanh(x @ p["w"])
            return lax.cond(x.sum() > 0, lambda x: level(depth - 1, x), lambda x: -x, x)

        return level(4, x)

    assert_oracle(fn, square, X)
    assert names(lora_jax.lora(fn), square, X).count("dot_general") == 3


@pytest.mark.devices(4)
def test_shardings_asked_for_inside_are_the_frozen_parts(square):
    mesh = Mesh(np.array(jax.devices()[:4]), ("d",))
    columns, everywhere = (
        NamedSharding(mesh, s) for s in (PartitionSpec(None, "d"), PartitionSpec())
    )
    project = jax.jit(lambda w, x: (x @ w, w.T), in_shardings=(columns, everywhere))

    def fn(p, x):
        w = lax.with_sharding_constraint(p["w"], columns)
        y, transposed = project(w, x)
        return y, x @ transposed.T

    assert_close(*both(fn)(square, X))


@pytest.mark.devices(4)
def test_boxed_parameters_under_a_mesh():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "d"))
    model = nn.Dense(8, name=None, kernel_init=init)
    variables = jax.jit(model.init)(jax.random.key(0), X)
    lora_params = adapted(variables, targets="kernel")
    with jax.set_mesh(mesh):
        assert_close(*both(model.apply)(lora_params, X))


def test_barriers_and_names_pass_the_weight_on(square):
    def fn(p, x):
        w, x = lax.optimization_barrier((p["w"], x))
        return x @ checkpoint_name(w, "kernel")

    assert_oracle(fn, square, X)


def test_a_python_number_is_a_scale(square):
    f = dataclasses.replace(square.adapter.factors["w"], scale=0.5)
    lora_params = lora_jax.LoraParams(square.base, lora_jax.Adapter({"w": f}))
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    actual = jax.jit(lambda x: lora_jax.lora(fn)(lora_params, x))(X)
    assert_close(actual, np.asarray(X, np.float64) @ np.asarray(lora_jax.merge(lora_params)["w"]))


def test_constant_outputs_have_the_types_jit_gives_them(square):
    fn = lambda p, x: (x @ p["w"], 1.0, jnp.int32(3))  # noqa: E731
    actual, expected = lora_jax.lora(fn)(square, X), jax.jit(fn)(square.base, X)
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert (a.dtype, a.weak_type, a) == (e.dtype, e.weak_type, e)


def test_loops_stay_loops_without_jit(stack):
    fn = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]  # noqa: E731
    with jax.disable_jit():
        actual = lora_jax.lora(fn)(stack, X)
    assert_close(actual, jax.jit(fn)(lora_jax.merge(stack), X))


def test_the_users_scopes_are_on_the_low_rank_path(square):
    def fn(p, x):
        with jax.named_scope("block"):
            return x @ p["w"]

    text = jax.jit(lora_jax.lora(fn)).lower(square, X).compile().as_text()
    assert "block/lora/dot_general" in text
