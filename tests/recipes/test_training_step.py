"""What the training step computes, however much of it is kept, and by whatever kernel."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import all_eqns, assert_close

import lora_jax
from lora_jax.recipes import attention, remat
from lora_jax.recipes.lm import flags, job, memory, mesh, startup
from lora_jax.recipes.lm.data import Rows
from lora_jax.recipes.loss import summed_loss
from lora_jax.recipes.models import llama

pytestmark = pytest.mark.usefixtures("standard_promotion")

CONFIG = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = np.random.default_rng(0).integers(0, 96, (2, 11), np.int32)
TARGETS = np.where(np.arange(11)[None] % 3 == 1, -1, np.roll(IDS, -1, 1)).astype(np.int32)


def params_of(**changes):
    model = llama.from_config(CONFIG, scan_layers=True, **changes)
    return jax.jit(model.init)(jax.random.key(0), IDS)["params"]


def value_and_grad(params, **changes):
    """Return the loss and its gradient by a model with these changes, adapted everywhere."""
    model = llama.from_config(CONFIG, scan_layers=True, **changes)
    loss = lora_jax.lora(lambda p, ids, t: model.apply({"params": p}, ids, targets=t))
    adapted = lora_jax.lorafy(params, 2, targets=".*(kernel|embedding)", init=drawn)
    return jax.jit(lora_jax.value_and_grad(loss))(adapted, IDS, TARGETS)


def drawn(key, target):
    shapes = (*target.batch, target.inputs, 2), (*target.batch, 2, target.outputs)
    a, b = (jax.random.normal(jax.random.fold_in(key, k), s) for k, s in enumerate(shapes))
    return 0.1 * a, 0.1 * b


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_in_chunks_is_that_of_all_logits(tied):
    params = params_of(tie_word_embeddings=tied)
    model = llama.from_config(CONFIG, scan_layers=True, tie_word_embeddings=tied)

    def whole(p, ids, targets):
        return summed_loss(model.apply({"params": p}, ids), targets)

    adapted = lora_jax.lorafy(params, 2, targets=".*(kernel|embedding)", init=drawn)
    expected = jax.jit(lora_jax.value_and_grad(lora_jax.lora(whole)))(adapted, IDS, TARGETS)
    for chunk in (6, 1024):  # three positions of both rows: the last chunk is padded
        found = value_and_grad(params, tie_word_embeddings=tied, chunk=chunk)
        assert_close(found, expected, depth=32)


def test_a_frozen_head_makes_its_logits_once():
    params = params_of()

    def plain(is_frozen):
        model = llama.from_config(CONFIG, scan_layers=True, chunk=6, frozen_head=is_frozen)
        return lambda p, ids, targets: model.apply({"params": p}, ids, targets=targets)

    def loss_of(is_frozen):
        return lora_jax.lora(plain(is_frozen))

    adapted = lora_jax.lorafy(params, 2, targets=".*proj/kernel", init=drawn)
    found, expected = (
        jax.jit(lora_jax.value_and_grad(loss_of(is_frozen)))(adapted, IDS, TARGETS)
        for is_frozen in (True, False)
    )
    assert_close(found, expected, depth=32)

    def products(of, is_frozen):
        eqns = all_eqns(jax.make_jaxpr(of(loss_of(is_frozen)))(adapted, IDS, TARGETS))
        return sum(e.primitive.name == "dot_general" and 96 in _sizes(e) for e in eqns)

    assert products(lora_jax.value_and_grad, True) == 2
    assert products(lora_jax.value_and_grad, False) == 3
    assert products(lambda f: f, True) == 1, "without gradients, they are not computed"
    with pytest.raises(ValueError, match="is_frozen=True: the kernel is differentiated"):
        jax.grad(plain(True))(params, IDS, TARGETS)
    head = lora_jax.lorafy(params, 2, targets="lm_head/kernel")
    with pytest.raises(NotImplementedError, match=r"lm_head/kernel(.|\n)* custom derivative"):
        loss_of(True)(head, IDS, TARGETS)


def _sizes(eqn):
    return {size for x in (*eqn.invars, *eqn.outvars) for size in x.aval.shape}


def test_the_logits_of_all_tokens_never_exist():
    model = llama.from_config(CONFIG, scan_layers=True, chunk=4)
    params = params_of()
    loss = jax.value_and_grad(lambda p: model.apply({"params": p}, IDS, targets=TARGETS))
    shapes = {v.aval.shape for e in all_eqns(jax.make_jaxpr(loss)(params)) for v in e.outvars}
    assert (2, 2, 96) in shapes
    assert not [shape for shape in shapes if shape[-1:] == (96,) and np.prod(shape[:-1]) > 16]


def test_what_is_recomputed_changes_no_number_and_saves_memory():
    params = params_of()
    expected = value_and_grad(params)
    kept = [{"remat": name} for name in remat.NAMES if name != "none"]
    for changes in (*kept, {"unroll": 3}, {"unroll": 3, "remat": True}):
        assert_close(value_and_grad(params, **changes), expected, depth=32)

    def temp(name):
        model = llama.from_config(CONFIG, scan_layers=True, remat=name)
        ids = jax.ShapeDtypeStruct((4, 128), jnp.int32)
        loss = jax.grad(lambda p, ids: model.apply({"params": p}, ids, targets=ids))
        return jax.jit(loss).lower(params, ids).compile().memory_analysis().temp_size_in_bytes

    assert temp("full") < temp("attention") < temp("dots") < temp("none")
    with pytest.raises(ValueError, match=r"remat='some': expected one of \('none', 'dots'"):
        llama.from_config(CONFIG, remat="some").init(jax.random.key(0), IDS)


@pytest.mark.parametrize("layers", ["scanned", "unrolled"])
def test_the_fastest_step_that_fits_is_taken(layers, monkeypatch):
    argv = f"--length 64 --batch 4 --steps 20 --layers {layers} --mesh data=1 --remat"
    on = mesh.mesh_of("data=1", count=1)

    def prepared(name):
        args = flags.parse_args([*argv.split(), name])
        model = job.model_of(CONFIG, on, args)
        params = jax.jit(model.init)(jax.random.key(0), IDS)["params"]
        places = jax.tree.map(lambda x: x.sharding, job.abstract(model, on, args))
        return job.prepare(model, jax.device_put(params, places), args, on)

    def taken(made):
        ids = np.zeros((4, 64), np.int32)
        clock = startup.Startup()
        inputs = made.state, made.frozen, made.place(Rows(ids, ids)), np.int32(0)
        return startup.compile_step(made.steps, clock, *inputs), clock.remat

    assert list(prepared("auto").steps) == ["none"], "a CPU does not tell its memory"
    monkeypatch.setattr(memory, "limit", lambda: 2**60)
    made = prepared("auto")
    names = list(made.steps)
    assert names == list(remat.candidates(jax.devices()[0], layers == "scanned"))
    assert len(names) <= 4
    sizes = {}
    for name in names:
        program, found = taken(prepared(name))
        assert found == name
        sizes[name] = memory.needed(program)
    for limit in (2**60, *sizes.values(), 0):
        monkeypatch.setattr(memory, "limit", lambda limit=limit: limit)
        fits = [name for name in names if sizes[name] <= limit]
        assert taken(made)[1] == (fits or names[-1:])[0]


def test_attention_that_cannot_be_is_refused_before_anything_is_loaded():
    q = jnp.ones((1, 4, 2, 8))
    with pytest.raises(ValueError, match=r"attention='flash': expected one of \('auto', 'cudnn'"):
        attention.attend(q, q, q, name="flash")
    with pytest.raises(ValueError, match=r"attention='cudnn': it takes bfloat16 and float16"):
        attention.attend(q, q, q, name="cudnn")
    assert_close(*(attention.attend(q, q, q, name=name) for name in ("auto", "xla")))
    for name in ("cudnn", "splash") if jax.default_backend() == "cpu" else ():
        args = flags.parse_args(["--attention", name, "--dtype", "bfloat16"])
        with pytest.raises(ValueError, match=rf"--attention {name}: .* Pass --attention auto"):
            job.model_of(CONFIG, mesh.mesh_of("data=1", count=1), args)
        args = flags.parse_args(["--attention", name, "--explicit"])
        with pytest.raises(
            ValueError, match=r": it has no rules for the axes of --explicit\. Pass"
        ):
            job.model_of(CONFIG, mesh.mesh_of("data=1", True, count=1), args)
    args = flags.parse_args(["--layers", "unrolled", "--remat"])
    model = job.model_of(CONFIG, mesh.mesh_of("data=1", count=1), args)
    assert (model.unroll, model.remat, model.attention) == (3, "full", "auto")


def test_a_host_without_memory_for_offload_is_told():
    class Device:
        device_kind = "Some device"

        def addressable_memories(self):
            return []

    on = types.SimpleNamespace(devices=np.array([Device()]))
    args = flags.parse_args(["--remat", "offload"])
    with pytest.raises(ValueError, match=r"offload: Some device has .* Pass --remat full"):
        job.model_of(CONFIG, on, args)
    assert remat.candidates(Device(), is_loop=True) == ("dots", "attention", "full")
