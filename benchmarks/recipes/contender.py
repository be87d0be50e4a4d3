"""Measure a training step in JAX, in this process, and print a JSON line.

``ours`` is the trainer's own step. ``floor`` is the same without adapters: one row of the embedding
table trains, so that the backward pass goes through all layers. ``qwix`` is the same model with the
LoRA of qwix (``pip install qwix``)::

    python -m benchmarks.recipes.contender ours --sizes sizes.json --batch 4 --length 2048
"""

import argparse
import importlib.metadata
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax
from benchmarks.recipes.scaling import OPTIONS, random_base
from lora_jax.recipes.attention import why_not_cudnn
from lora_jax.recipes.lm import flags as lm_flags
from lora_jax.recipes.lm import job as lm_job
from lora_jax.recipes.lm import mesh as lm_mesh
from lora_jax.recipes.lm import metrics as lm_metrics
from lora_jax.recipes.lm.data import Rows

PROJECTIONS = r".*(q|k|v|o|gate|up|down)_proj"
TABLE = "embed_tokens/embedding"


def measure(who: str, sizes: Mapping[str, Any], argv: list[str], repeats: int) -> dict[str, Any]:
    """Return the median time of a step and its memory; ``argv`` are flags of the trainer."""
    args = lm_flags.parse_args([*OPTIONS, "--mesh=data=1", *argv])
    mesh = lm_mesh.mesh_of(args.mesh, count=1)
    model = lm_job.model_of(sizes, mesh, args)
    base = random_base(lm_job.abstract(model, mesh, args))
    tokens = np.random.default_rng(0).integers(
        0, model.vocab_size, (args.batch, args.length + 1), np.int32
    )
    start = time.perf_counter()
    if who == "qwix":
        step, state, inputs = of_qwix(model, base, args, tokens)
    else:
        step, state, inputs = of_trainer(model, base, args, mesh, tokens, who == "floor")
    compiled = step.lower(state, *inputs).compile()
    warm = time.perf_counter() - start
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        state, loss = compiled(state, *inputs)
        jax.block_until_ready(loss)
        times.append(time.perf_counter() - start)
    device, memory = jax.devices()[0], compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    of_model = lora_jax.LoraParams(base, lora_jax.Adapter({}))
    flops = lm_metrics.flops_per_token(model, of_model, args.length)
    seconds = statistics.median(times[2:])
    heads = model.num_attention_heads, model.num_key_value_heads
    shapes = [(args.batch, args.length, count, model.head_dim) for count in heads]
    is_cudnn = not why_not_cudnn(*shapes, model.dtype, model.sliding_window)
    names = ("jax", "flax", *(["qwix"] if who == "qwix" else []))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return {
        "ms": 1000 * seconds,
        "memory_gb": used / 1e9,
        "temp_gb": memory.temp_size_in_bytes / 1e9,
        "warm_s": warm,
        "attention": "cudnn" if is_cudnn and args.attention != "xla" else "xla",
        "mfu": args.batch * args.length / seconds * flops / lm_metrics.peak(),
        "versions": versions,
        "device": device.device_kind,
        "loss": float(loss["loss"]),
        "trained": sum(x.size for x in jax.tree.leaves(state[0])),
    }


def of_trainer(
    model: Any, base: Any, args: Any, mesh: Any, tokens: np.ndarray, is_floor: bool
) -> tuple[Any, Any, tuple[Any, ...]]:
    """Return the trainer's step, its state, and the other inputs."""
    adapt = one_row if is_floor else lm_job.adapted
    job = lm_job.prepare(model, base, args, mesh, adapt)
    rows = job.place(Rows(tokens[:, :-1], tokens[:, 1:]))
    return job.steps[args.remat], job.state, (job.frozen, rows, np.int32(0))


def one_row(model: Any, base: Any, args: Any) -> lora_jax.LoraParams:
    """Train one row of the embedding table, and no more."""
    del model, args
    return lora_jax.lorafy(base, targets=[], rows={TABLE: [0]}, layout={TABLE: "io"})


def of_qwix(
    model: Any, base: Any, args: Any, tokens: np.ndarray
) -> tuple[Any, Any, tuple[Any, ...]]:
    """Return a step with the same optimizer and loss over a model that qwix adapts."""
    import qwix

    rule: dict[str, Any] = {"module_path": PROJECTIONS, "rank": args.rank, "alpha": args.alpha}
    ids, targets = tokens[:, :-1], tokens[:, 1:]
    wide = qwix.apply_lora_to_model(
        model.clone(dtype=jnp.float32), qwix.LoraProvider(**rule)
    )  # factors start in the dtype of the parameters, which is float32 in Flax
    shapes = jax.eval_shape(wide.init, jax.random.key(0), ids)["params"]
    new = {path: leaf for path, leaf in by_path(shapes).items() if "lora" in path}
    keys = jax.random.split(jax.random.key(1), len(new))
    trained = {  # in the dtype of the activations: qwix computes in that of the factors
        path: 0.01 * jax.random.normal(k, x.shape, model.dtype)
        for k, (path, x) in zip(keys, new.items(), strict=True)
    }
    frozen = by_path(base)
    model = qwix.apply_lora_to_model(model.clone(frozen_head=True), qwix.LoraProvider(**rule))
    tx = optax.chain(optax.clip_by_global_norm(args.clip), optax.adamw(args.rate))

    def loss(trained: Any, frozen: Any, ids: Any, targets: Any) -> Any:
        params = tree_of(trained | frozen)
        return model.apply({"params": params}, ids, targets=targets) / ids.size

    def step(state: Any, frozen: Any, ids: Any, targets: Any) -> Any:
        trained, opt_state = state
        value, gradients = jax.value_and_grad(loss)(trained, frozen, ids, targets)
        updates, opt_state = tx.update(gradients, opt_state, trained)
        return (optax.apply_updates(trained, updates), opt_state), {"loss": value}

    state = (trained, tx.init(trained))
    return jax.jit(step, donate_argnums=0), state, (frozen, jnp.asarray(ids), jnp.asarray(targets))


def by_path(tree: Any) -> dict[str, Any]:
    """Return the leaves by path, with ``/`` between the names."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def tree_of(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested dict of leaves by path."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree


def main() -> None:
    """Measure, and print a line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("who", choices=("ours", "floor", "qwix"))
    parser.add_argument("--sizes", type=Path, required=True, help="a config.json")
    parser.add_argument("--repeats", type=int, default=10)
    options, argv = parser.parse_known_args()
    sizes = json.loads(options.sizes.read_text())
    print(json.dumps(measure(options.who, sizes, argv, options.repeats)))


if __name__ == "__main__":
    main()
