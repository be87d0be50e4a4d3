"""Compile a training step or a merge of a Llama for TPUs, without a TPU.

    python -m benchmarks.tpu.programs '{"topology": "v5e:2x2", "model": "tiny"}'

This command compiles one program and prints its costs as JSON. The argument sets fields of
:class:`Case`. ``aot.py`` and ``tests/test_tpu.py`` run it in a separate process for each case.
"""

import dataclasses
import json
import math
import re
import sys
import time
from importlib.metadata import version
from typing import Any

from benchmarks.tpu import slices

slices.set_environment()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import lora_jax  # noqa: E402
from benchmarks import hlo  # noqa: E402
from lora_jax.recipes.models import llama  # noqa: E402

MODELS = {
    # the shape of Llama 3 8B
    "8b": llama.Llama(128_256, 4096, 14_336, 32, 32, 8, 128, scan_layers=True),
    "scanned": llama.Llama(512, 1024, 2048, 4, 8, 4, 128, scan_layers=True),
    "tiny": llama.Llama(512, 256, 512, 2, 4, 2, 64, attention_bias=True),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to compile.

    Attributes:
        topology: the name of a slice, as the compiler knows it.
        spread: ``"pmap"`` or ``"data"`` (each chip has the base and a part of the batch);
            ``"fsdp"`` (the base is sharded over the chips like the batch); ``"fsdp+tp"`` (the chips
            form a square, whose sides shard the inputs and the outputs of a weight).
        method: ``"lora"``; ``"nf4"`` or ``"int8"``, LoRA on a quantized base; ``"full"``, all
            parameters train.
        program: ``"train"``, a training step, or ``"merge"``, merging all adapted weights.
        model: a key of ``MODELS``.
        dtype: the dtype of the base and the activations. Factors and moments are float32.
        rank: the rank of the factors, on all projections.
        length: the length of a sequence; there is one sequence per chip.
        full: a pattern of full leaves, besides the factors.
        attention: a kernel of ``recipes.attention.NAMES``.
        chips: how many chips of the slice are used; None for all.
    """

    topology: str = "v5e:2x2"
    spread: str = "fsdp"
    method: str = "lora"
    program: str = "train"
    model: str = "8b"
    dtype: str = "bfloat16"
    rank: int = 16
    length: int = 2048
    full: str | None = None
    attention: str = "auto"
    chips: int | None = None


def compile_case(case: Case) -> Any:
    """Compile a case; return the program and the shapes of its state."""
    chips = slices.devices(case.topology)[: case.chips]
    side = math.isqrt(len(chips)) if case.spread == "fsdp+tp" else 1
    mesh = Mesh(np.array(chips).reshape(-1, side), ("fsdp", "tp"))
    fields = {"dtype": case.dtype, "remat": True, "attention": case.attention}
    model = dataclasses.replace(MODELS[case.model], **fields)
    params = abstract_params(model, case)
    if case.spread != "pmap":
        model = dataclasses.replace(model, activations=NamedSharding(mesh, P("fsdp")))
    base_places = jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, spec_of(path, x, case)), params, is_leaf=is_weight
    )
    if case.method == "full":
        step, state, places = full_step(model, params, base_places, case)
    else:
        state, places = abstract_lora(params, base_places, case)
        if case.program == "merge":
            lora_params = arguments(state, places)
            merge = jax.jit(lora_jax.merge, donate_argnums=0, out_shardings=places.base)
            return merge.lower(lora_params).compile(), state
        step, state, places = lora_step(model, state, places, case)
    ids = jax.ShapeDtypeStruct((len(chips), case.length + 1), jnp.int32)
    if case.spread == "pmap":
        ids = jax.ShapeDtypeStruct((len(chips), 1, case.length + 1), jnp.int32)
        mapped = jax.pmap(
            step,
            axis_name="data",
            devices=chips,
            in_axes=(None, None, None, 0),
            out_axes=None,
            donate_argnums=(0, 1),
        )
        return mapped.lower(*state, ids).compile(), state
    trained = places[:2]
    ids = arguments(ids, NamedSharding(mesh, P("fsdp")))
    out = (*trained, NamedSharding(mesh, P()))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=out)
    return jitted.lower(*arguments(state, places), ids).compile(), state


def abstract_params(model: llama.Llama, case: Case) -> Any:
    """Return the shapes of the parameters, quantized for the methods nf4 and int8."""
    ids = jax.ShapeDtypeStruct((1, case.length), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(case.dtype)), params)
    if case.method in ("nf4", "int8"):
        return jax.eval_shape(lambda p: lora_jax.quant.quantize(p, case.method), params)
    return params


def abstract_lora(params: Any, base_places: Any, case: Case) -> tuple[Any, Any]:
    """Return a LoraParams of shapes, and one of shardings."""
    state = jax.eval_shape(
        lambda p: lora_jax.lorafy(p, case.rank, targets="all-linear", full=case.full), params
    )
    return state, lora_jax.shardings(state, base_places)


def is_weight(x: Any) -> bool:
    """Return whether ``x`` is a weight; the leaves of a quantized weight are its arrays."""
    return hasattr(x, "shape")


def spec_of(path: tuple[Any, ...], x: Any, case: Case) -> P:
    """Shard the inputs of a weight along ``fsdp`` and its outputs along ``tp``, or the reverse."""
    name = jax.tree_util.keystr(path)
    if case.spread in ("pmap", "data") or "norm" in name:
        return P()
    if "bias" in name:
        return P(*[None] * (len(x.shape) - 1), "tp")
    is_reversed = any(part in name for part in ("embed_tokens", "o_proj", "down_proj"))
    axes = ("tp", "fsdp") if is_reversed else ("fsdp", "tp")
    return P(*[None] * (len(x.shape) - 2), *axes)


def arguments(tree: Any, places: Any) -> Any:
    """Add shardings to shapes; the scales of a quantized weight have its axes, some of size 1."""

    def place_weight(place: NamedSharding, x: Any) -> Any:
        def place_array(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            spec = [
                axis if axis and size % place.mesh.shape[axis] == 0 else None
                for size, axis in zip(x.shape, place.spec, strict=False)
            ]
            sharding = NamedSharding(place.mesh, P(*spec))
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return jax.tree.map(place_array, x)

    return jax.tree.map(place_weight, places, tree)


def loss_of(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Return the mean negative log-likelihood of the next token."""
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


def lora_step(model: llama.Llama, state: Any, places: Any, case: Case) -> tuple[Any, Any, Any]:
    """Make a step over ``(trainable, opt_state, frozen, ids)``, its shapes and its shardings."""
    apply, tx = lora_jax.lora(model.apply), optax.adamw(1e-4)

    def step(trainable, opt_state, frozen, ids):
        def loss_fn(trainable):
            lora_params = lora_jax.combine(trainable, frozen)
            return loss_of(apply({"params": lora_params}, ids[:, :-1]), ids)

        found = jax.value_and_grad(loss_fn)(trainable)
        loss, grads = jax.lax.pmean(found, "data") if case.spread == "pmap" else found
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, loss

    trainable, frozen = lora_jax.split(state)
    of_trainable, of_frozen = lora_jax.split(places)
    opt_state = jax.eval_shape(tx.init, trainable)
    of_opt_state = lora_jax.state_shardings(opt_state, trainable, of_trainable)
    return step, (trainable, opt_state, frozen), (of_trainable, of_opt_state, of_frozen)


def full_step(model: llama.Llama, params: Any, places: Any, case: Case) -> tuple[Any, Any, Any]:
    """Make such a step that trains all parameters, with float32 moments and nothing frozen."""
    tx = optax.adamw(1e-4)

    def to_float32(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def step(params, opt_state, frozen, ids):
        del frozen

        def loss_fn(params):
            return loss_of(model.apply({"params": params}, ids[:, :-1]), ids)

        found = jax.value_and_grad(loss_fn)(params)
        loss, grads = jax.lax.pmean(found, "data") if case.spread == "pmap" else found
        updates, opt_state = tx.update(to_float32(grads), opt_state, to_float32(params))
        params = jax.tree.map(lambda p, u: (p.astype(u.dtype) + u).astype(p.dtype), params, updates)
        return params, opt_state, loss

    opt_state = jax.eval_shape(lambda p: tx.init(to_float32(p)), params)
    return (
        step,
        (params, opt_state, ()),
        (
            places,
            lora_jax.state_shardings(opt_state, params, places),
            (),
        ),
    )


def sizes_of(error: str) -> list[float]:
    """Read the bytes that a program needs and a chip has from either form of compiler error."""
    forms = (
        r"required .*?\(([\d.]+)([MG])\) exceeds available HBM \(([\d.]+)([MG])\)",
        r"Used ([\d.]+)([MG]) of ([\d.]+)([MG]) hbm",
    )
    found = next(filter(None, (re.search(form, error) for form in forms)), None)
    if found is None:
        raise ValueError(f"the compiler's error does not contain the memory needed: {error}")
    unit = {"M": 2**20, "G": 2**30}
    return [float(found[1]) * unit[found[2]], float(found[3]) * unit[found[4]]]


def measure(case: Case) -> dict[str, Any]:
    """Return the costs of a case for one chip, or ``needs`` and ``has`` if it does not fit."""
    row: dict[str, Any] = dataclasses.asdict(case)
    row |= {name: version(name) for name in ("jax", "libtpu")}
    start = time.perf_counter()
    try:
        program, state = compile_case(case)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needs, has = sizes_of(str(error))
        seconds = time.perf_counter() - start
        return row | {"fits": False, "needs": needs, "has": has, "seconds": seconds}
    row |= {"fits": True, "seconds": time.perf_counter() - start}
    memory = program.memory_analysis()
    for name in ("argument", "output", "temp", "alias"):
        row[name] = getattr(memory, f"{name}_size_in_bytes")
    row["peak"] = memory.peak_memory_in_bytes
    text = program.as_text()
    row["flops_once"] = program.cost_analysis()["flops"]
    row["matmul_flops"] = hlo.matmul_flops(text)
    row["kernels"] = text.count('custom_call_target="tpu_custom_call"')
    row["collectives"] = [dataclasses.asdict(x) for x in hlo.collectives(text)]
    if case.program == "train":
        row["trainable"] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state[0]))
    return row


if __name__ == "__main__":
    print(json.dumps(measure(Case(**json.loads(sys.argv[1])))))
