"""Training steps and merges of Llamas, compiled for TPUs that are not there.

    python -m benchmarks.tpu.programs '{"topology": "v5e:2x2", "model": "tiny"}'

compiles one program in a process of its own and prints what it takes as JSON: the fields of
:class:`Case` may be given. ``aot.py`` and ``tests/test_tpu.py`` run it so.
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
    # the widths of Llama 3 8B
    "8b": llama.Llama(128_256, 4096, 14_336, 32, 32, 8, 128, scan_layers=True),
    "scanned": llama.Llama(512, 1024, 2048, 4, 8, 4, 128, scan_layers=True),
    "tiny": llama.Llama(512, 256, 512, 2, 4, 2, 64, attention_bias=True),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What to compile.

    Attributes:
        topology: a slice, by the name that its compiler knows.
        spread: ``"pmap"`` or ``"data"`` (each chip has the base and a part of the batch),
            ``"fsdp"`` (the base is spread over the chips as the batch is), ``"fsdp+tp"`` (over a
            square of chips, along the inputs by its one side and along the outputs by the other).
        method: ``"lora"``; ``"nf4"`` or ``"int8"``, LoRA on a quantized base; ``"full"``, where
            all parameters train.
        program: ``"train"``, a step of it, or ``"merge"``, of all adapted weights.
        model: of ``MODELS``.
        dtype: of the base and the activations. Factors and moments are float32.
        rank: of the factors, on all projections.
        length: of a sequence. There is one for each chip.
        whole: a pattern of leaves to train whole beside the factors.
    """

    topology: str = "v5e:2x2"
    spread: str = "fsdp"
    method: str = "lora"
    program: str = "train"
    model: str = "8b"
    dtype: str = "bfloat16"
    rank: int = 16
    length: int = 2048
    whole: str | None = None


def compiled(case: Case) -> Any:
    """Compile a case; also returns what the chips have of the trained state and of the base."""
    chips = slices.devices(case.topology)
    side = math.isqrt(len(chips)) if case.spread == "fsdp+tp" else 1
    mesh = Mesh(np.array(chips).reshape(-1, side), ("fsdp", "tp"))
    model = dataclasses.replace(MODELS[case.model], dtype=case.dtype, remat=True)
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
    """The shapes of the parameters, quantized if that is the method."""
    ids = jax.ShapeDtypeStruct((1, case.length), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(case.dtype)), params)
    if case.method in ("nf4", "int8"):
        return jax.eval_shape(lambda p: lora_jax.quant.quantize(p, case.method), params)
    return params


def abstract_lora(params: Any, base_places: Any, case: Case) -> tuple[Any, Any]:
    """A LoraParams of shapes, and one of shardings."""
    state = jax.eval_shape(
        lambda p: lora_jax.lorafy(p, case.rank, targets="all-linear", full=case.whole), params
    )
    return state, lora_jax.shardings(state, base_places)


def is_weight(x: Any) -> bool:
    """Whether it is a leaf of the parameters; a quantized one has leaves of its own."""
    return hasattr(x, "shape")


def spec_of(path: tuple[Any, ...], x: Any, case: Case) -> P:
    """Of a parameter: inputs along ``fsdp``, outputs along ``tp``; the other way where tp ends."""
    name = jax.tree_util.keystr(path)
    if case.spread in ("pmap", "data") or "norm" in name:
        return P()
    if "bias" in name:
        return P(*[None] * (len(x.shape) - 1), "tp")
    turned = any(part in name for part in ("embed_tokens", "o_proj", "down_proj"))
    axes = ("tp", "fsdp") if turned else ("fsdp", "tp")
    return P(*[None] * (len(x.shape) - 2), *axes)


def arguments(tree: Any, places: Any) -> Any:
    """Shapes with shardings. The scales of a quantized weight have its axes, some of size 1."""

    def placed(place: NamedSharding, x: Any) -> Any:
        def part(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            spec = [
                axis if axis and size % place.mesh.shape[axis] == 0 else None
                for size, axis in zip(x.shape, place.spec, strict=False)
            ]
            own = NamedSharding(place.mesh, P(*spec))
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own)

        return jax.tree.map(part, x)

    return jax.tree.map(placed, places, tree)


def loss_of(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """The mean negative log-likelihood of the next token."""
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


def lora_step(model: llama.Llama, state: Any, places: Any, case: Case) -> tuple[Any, Any, Any]:
    """A step over ``(trainable, opt_state, frozen, ids)``, their shapes and their shardings."""
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
    """The same with all parameters trained, float32 moments, and nothing frozen."""
    tx = optax.adamw(1e-4)

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def step(params, opt_state, frozen, ids):
        del frozen

        def loss_fn(params):
            return loss_of(model.apply({"params": params}, ids[:, :-1]), ids)

        found = jax.value_and_grad(loss_fn)(params)
        loss, grads = jax.lax.pmean(found, "data") if case.spread == "pmap" else found
        updates, opt_state = tx.update(wide(grads), opt_state, wide(params))
        params = jax.tree.map(lambda p, u: (p.astype(u.dtype) + u).astype(p.dtype), params, updates)
        return params, opt_state, loss

    opt_state = jax.eval_shape(lambda p: tx.init(wide(p)), params)
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
    """What a program needs and what a chip has, in the two ways in which the compiler says so."""
    ways = (
        r"required .*?\(([\d.]+)([MG])\) exceeds available HBM \(([\d.]+)([MG])\)",
        r"Used ([\d.]+)([MG]) of ([\d.]+)([MG]) hbm",
    )
    found = next(filter(None, (re.search(way, error) for way in ways)), None)
    if found is None:
        raise ValueError(f"the compiler's error does not say what would be needed: {error}")
    unit = {"M": 2**20, "G": 2**30}
    return [float(found[1]) * unit[found[2]], float(found[3]) * unit[found[4]]]


def measured(case: Case) -> dict[str, Any]:
    """What a case takes, of one chip; ``needs`` and ``has`` where it does not fit."""
    row: dict[str, Any] = dataclasses.asdict(case)
    row |= {name: version(name) for name in ("jax", "libtpu")}
    start = time.perf_counter()
    try:
        program, state = compiled(case)
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
    row["collectives"] = [dataclasses.asdict(x) for x in hlo.collectives(text)]
    if case.program == "train":
        row["trainable"] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state[0]))
    return row


if __name__ == "__main__":
    print(json.dumps(measured(Case(**json.loads(sys.argv[1])))))
