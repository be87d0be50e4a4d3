"""Prepare a training up to its first step, for the trainer and the benchmarks.

``args`` is the command line of the trainer. No file is read here.
"""

import argparse
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax.recipes import remat
from lora_jax.recipes.attention import why_not_cudnn, why_not_splash
from lora_jax.recipes.lm import memory
from lora_jax.recipes.lm.data import Rows
from lora_jax.recipes.lm.mesh import ROWS, placed
from lora_jax.recipes.lm.step import Loss, State, compile_for_mesh, compile_for_pmap, make_step
from lora_jax.recipes.models import llama


class Job(NamedTuple):
    """A training before its first step.

    Attributes:
        plain: the model, a function of parameters and ids.
        loss: its loss, a function of parameters, ids and targets.
        state: the first state.
        frozen: the half of the LoraParams that does not train.
        places: shardings of the LoraParams.
        rate: the learning rate as a function of the step.
        steps: the step by what its backward pass keeps, the fastest first; several for ``--remat
            auto``, of which :func:`compile_step` takes the first that fits. Each is a function of a
            state, the frozen half, rows from ``place`` and the step's number; see
            :func:`make_step`.
        place: puts the rows of a batch on the devices.
    """

    plain: Callable[..., Any]
    loss: Loss
    state: State
    frozen: lora_jax.LoraParams
    places: lora_jax.LoraParams
    rate: Callable[[Any], Any]
    steps: Mapping[str, Any]
    place: Callable[[Rows], Rows]


def model_of(config: Mapping[str, Any], mesh: Mesh, args: argparse.Namespace) -> llama.Llama:
    """Return the network that a config.json describes.

    Raises:
        ValueError: it is not supported, or the attention that was asked for does not fit it, or the
            devices' host has no memory for ``--remat offload``.
    """
    if args.remat == "offload" and (reason := remat.why_not_offload(mesh.devices.flat[0])):
        raise ValueError(f"--remat offload: {reason} Pass --remat full")
    changes = {"scan_layers": True, "dtype": jnp.dtype(args.dtype)}
    changes |= {
        "attention": args.attention,
        "remat": "none" if args.remat == "auto" else args.remat,
    }
    if args.layers == "unrolled":
        changes["unroll"] = config.get("num_hidden_layers", 1)
    if not args.pmap:  # else the compiler could gather the batch instead of the weights
        changes["activations"] = NamedSharding(mesh, P(ROWS))
    model = llama.from_config(config, **changes)
    if reason := _why_not(model, mesh, args):
        raise ValueError(f"--attention {args.attention}: {reason} Pass --attention auto")
    return model


def _why_not(model: llama.Llama, mesh: Mesh, args: argparse.Namespace) -> str | None:
    """Return why the attention that was asked for by name does not fit; None if it does."""
    if args.attention not in ("cudnn", "splash"):
        return None
    if args.explicit:
        return "it has no rules for the axes of --explicit."
    query, key = (
        (*ids_of(args).shape, heads, model.head_dim)
        for heads in (model.num_attention_heads, model.num_key_value_heads)
    )
    if args.attention == "cudnn":
        return why_not_cudnn(query, key, model.dtype, model.sliding_window)
    return why_not_splash(query, model.dtype, model.activations or NamedSharding(mesh, P()))


def ids_of(args: argparse.Namespace) -> jax.ShapeDtypeStruct:
    """Return the shape of the ids that the model reads at once."""
    return jax.ShapeDtypeStruct((args.batch // args.accumulate, args.length), jnp.int32)


def abstract(model: llama.Llama, mesh: Mesh, args: argparse.Namespace) -> Any:
    """Return the parameters' shapes, dtype and shardings."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids_of(args))["params"]
    return placed(shapes, mesh, args.dtype)


def plain_of(model: llama.Llama) -> Callable[..., Any]:
    """Return the model as a function of parameters and ids."""

    def plain(params: Any, ids: jax.Array) -> Any:
        return model.apply({"params": params}, ids)

    return plain


def loss_of(model: llama.Llama) -> Loss:
    """Return the model's loss as a function of parameters, ids and targets."""

    def loss(params: Any, ids: jax.Array, targets: jax.Array) -> Any:
        return model.apply({"params": params}, ids, targets=targets)

    return loss


def adapted(model: llama.Llama, base: Any, args: argparse.Namespace) -> lora_jax.LoraParams:
    """Add a new adapter to a base."""
    layout = lora_jax.layout_of(plain_of(model), base, ids_of(args))
    options = {"alpha": args.alpha, "targets": args.targets, "key": jax.random.key(args.seed)}
    return lora_jax.lorafy(base, args.rank, layout=layout, **options)


def kinds_of(model: llama.Llama, like: Any, args: argparse.Namespace) -> dict[str, str]:
    """Describe the adapter, with a line per weight."""
    lora_params = jax.eval_shape(lambda base: adapted(model, base, args), like)
    return {
        f"the adapter of {path}": f"{f.layout}, a {f.a.dtype}{f.a.shape}, b {f.b.dtype}{f.b.shape}"
        for path, f in lora_params.adapter.factors.items()
    }


def prepare(
    model: llama.Llama, base: Any, args: argparse.Namespace, mesh: Mesh, adapt: Any = adapted
) -> Job:
    """Prepare a base for the first step: adapter, optimizer, shardings, compiled step."""
    lora_params = adapt(model, base, args)
    rate = optax.warmup_cosine_decay_schedule(0.0, args.rate, args.warmup, args.steps)
    tx = optax.chain(optax.clip_by_global_norm(args.clip), optax.adamw(rate))

    # Factors are sharded as the base is, but replicated along fsdp; moments as the factors are.
    places = lora_jax.shardings(lora_params, replicate=["fsdp"])
    trainable, frozen = lora_jax.split(jax.device_put(lora_params, places))
    of_adapter = lora_jax.split(places)[0]
    of_state = lora_jax.state_shardings(jax.eval_shape(tx.init, trainable), trainable, of_adapter)
    state = State(trainable, jax.jit(tx.init, out_shardings=of_state)(trainable))

    head = "embed_tokens/embedding" if model.tie_word_embeddings else "lm_head/kernel"
    trained = (key.partition("[")[0] for key in lora_params.adapter.factors)  # or a part of it
    is_frozen = head not in trained
    model = model.clone(frozen_head=is_frozen)
    seed = args.seed if args.dropout else None

    def build(name: str) -> tuple[Any, Callable[[Rows], Rows]]:
        loss = lora_jax.lora(loss_of(model.clone(remat=name)), dropout=args.dropout)
        step = make_step(loss, tx, seed, "data" if args.pmap else None)
        if args.pmap:
            return compile_for_pmap(step, mesh, args.accumulate)
        return compile_for_mesh(step, mesh, State(of_adapter, of_state), args.accumulate)

    built = {name: build(name) for name in kept_by(model, mesh, args)}
    steps = {name: step for name, (step, _) in built.items()}
    _, place = next(iter(built.values()))
    return Job(plain_of(model), loss_of(model), state, frozen, places, rate, steps, place)


def kept_by(model: llama.Llama, mesh: Mesh, args: argparse.Namespace) -> tuple[str, ...]:
    """Return the names of ``recipes.remat`` to try; ``none`` where devices tell no memory."""
    if args.remat != "auto":
        return (args.remat,)
    is_loop = model.unroll < model.num_hidden_layers
    if memory.limit() is None:
        return ("none",)
    return remat.candidates(mesh.devices.flat[0], is_loop)
