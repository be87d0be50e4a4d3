"""Fine-tune a language model with LoRA: on one device or many, stopped and resumed at will.

    python examples/train_lm.py                                # SmolLM2 on Shakespeare
    python examples/train_lm.py --model FOLDER --data pairs.jsonl --mesh data=2,fsdp=2,tensor=2

The model is a Llama, Mistral, Qwen2 or Qwen3, of a Hugging Face folder or a GGUF file. It is read
straight into its shardings, and is never an output of the step: the adapter is all that trains,
crosses the network, and is saved. What a step does depends on ``--seed`` and its number alone, so
that a run that is killed and started again by the same command ends with the same bits.
"""

import argparse
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import data
import jax
import jax.numpy as jnp
import lm_data
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from lm_data import Rows
from lm_mesh import ROWS, mesh_of, placed
from lm_metrics import Log, flops_per_token
from lm_step import State, make_step, make_validation, on_mesh, on_pmap
from models import llama

import lora_jax
from lora_jax.io import hf, orbax, peft

# What decides the losses, to rounding: a run goes on with these or not at all.
SETTINGS = tuple(
    "batch length rank alpha targets rate warmup steps clip dropout dtype seed".split()
)


def run(args: argparse.Namespace) -> None:
    """From the files of the model to those of the adapter."""
    connect(args)
    mesh = mesh_of(args.mesh or "data=-1")
    check(args, mesh)
    path = args.model or data.smollm2()
    model, source = model_of(path, mesh, args)
    training, validation, note = rows_of(source, model, args)

    def plain(params, ids):
        return model.apply({"params": params}, ids)

    ids = jax.ShapeDtypeStruct((args.batch // args.accumulate, args.length), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    base = hf.load(path, like=placed(shapes, mesh, args.dtype))
    layout = lora_jax.layout_of(plain, base, ids)
    options = {"alpha": args.alpha, "targets": args.targets, "key": jax.random.key(args.seed)}
    lora_params = lora_jax.lorafy(base, args.rank, layout=layout, **options)
    rate = optax.warmup_cosine_decay_schedule(0.0, args.rate, args.warmup, args.steps)
    tx = optax.chain(optax.clip_by_global_norm(args.clip), optax.adamw(rate))

    # Factors go where the base goes, but whole along fsdp; and moments where the factors go.
    places = lora_jax.shardings(lora_params, replicate=["fsdp"])
    lora_params = jax.device_put(lora_params, places)
    trainable, frozen = lora_jax.split(lora_params)
    of_adapter = lora_jax.split(places)[0]
    of_state = lora_jax.state_shardings(jax.eval_shape(tx.init, trainable), trainable, of_adapter)
    state = State(trainable, jax.jit(tx.init, out_shardings=of_state)(trainable))

    apply = lora_jax.lora(plain, dropout=args.dropout)
    seed = args.seed if args.dropout else None
    if args.pmap:
        step, put = on_pmap(make_step(apply, tx, seed, "data"), mesh, args.accumulate)
    else:
        step = make_step(apply, tx, seed)
        step, put = on_mesh(step, mesh, State(of_adapter, of_state), args.accumulate)
    rows = validation.take(slice(args.validation))
    validate = make_validation(lora_jax.lora(plain), rows, args.batch, mesh)

    args.out.mkdir(parents=True, exist_ok=True)
    with orbax.Checkpointer(args.out / "checkpoints", keep=3) as checkpointer:
        settings = {name: getattr(args, name) for name in SETTINGS}
        settings |= {"data": training.fingerprint()}
        first, state = resumed(checkpointer, args, settings, base, state, places)
        counts = {
            "tokens": args.batch * args.length,
            "flops": flops_per_token(model, lora_params, args.length),
        }
        with Log(args.out, first, rate=rate, tensorboard=args.tensorboard, **counts) as log:
            log.say(f"{path}: {lora_params}")
            log.say(f"{len(training.ids):,} rows of {args.length} tokens: {note}")
            log.say(f"{mesh.size} x {jax.devices()[0].device_kind}: {dict(mesh.shape)}")
            if first:
                log.say(f"going on from step {first} in {args.out}")
            else:
                log.flush(0, lambda: validate(trainable, frozen))
            for done in range(first + 1, args.steps + 1):
                batch = put(training.batch(args.batch, done - 1, args.seed))
                state, found = step(state, frozen, batch, np.int32(done - 1))
                log.add(done, found)
                is_due = done % args.every == 0 or done == args.steps
                if is_due:  # first the log, so that no row is missing where the run goes on
                    log.flush(done, functools.partial(validate, state.trainable, frozen))
                    lora_params = lora_jax.combine(state.trainable, frozen)
                    extra = {"settings": json.dumps(settings)}
                    checkpointer.save(done, lora_params, state.opt_state, extra)
                    log.restart()
                elif done % args.log == 0 or done == first + 1:
                    log.flush(done)
            checkpointer.wait()
            if args.export:
                export(path, source, state.trainable, frozen, mesh, args.out)
                log.say(f"wrote {args.out / 'adapter'} and {args.out / 'merged'}")


def connect(args: argparse.Namespace) -> None:
    """Find the other processes."""
    told = {args.coordinator, args.processes, args.process} - {None}
    if told and None in (args.coordinator, args.processes, args.process):
        raise ValueError("--coordinator, --processes and --process go together")
    if args.coordinator:
        jax.distributed.initialize(
            args.coordinator,
            args.processes,
            args.process,
            coordinator_bind_address=args.coordinator,  # or it listens to every network
        )
    elif args.distributed:
        jax.distributed.initialize()


def check(args: argparse.Namespace, mesh: Mesh) -> None:
    """Raise where the arguments do not fit each other."""
    if args.pmap and args.mesh:
        raise ValueError(f"--pmap: it is a mesh of its own, without --mesh {args.mesh}")
    devices = math.prod(mesh.shape[axis] for axis in ROWS)
    if args.batch % (devices * args.accumulate):
        raise ValueError(
            f"--batch {args.batch}: expected a multiple of {devices * args.accumulate}, for "
            f"{devices} devices (data x fsdp) and --accumulate {args.accumulate}"
        )
    if args.warmup >= args.steps:
        raise ValueError(f"--warmup {args.warmup}: expected less than --steps {args.steps}")


def model_of(path: Path, mesh: Mesh, args: argparse.Namespace) -> tuple[llama.Llama, hf.Source]:
    """The network of a folder or a GGUF file, and its files."""
    source = hf.open_source(path)
    if source.config is None:
        raise FileNotFoundError(f"--model {path}: no config.json in it")
    changes = {"scan_layers": True, "remat": args.remat, "dtype": jnp.dtype(args.dtype)}
    if not args.pmap:  # or the compiler could gather the batch rather than the weights
        changes["activations"] = NamedSharding(mesh, P(ROWS))
    return llama.from_config(source.config, **changes), source


def rows_of(
    source: hf.Source, model: llama.Llama, args: argparse.Namespace
) -> tuple[Rows, Rows, str]:
    """The data in the tokens of the model: to train on, to validate by, and what it is."""
    tokenizer = lm_data.tokenizer_of(source)
    if tokenizer.get_vocab_size() > model.vocab_size:
        raise ValueError(
            f"--model {source.where}: its tokenizer has {tokenizer.get_vocab_size()} tokens, and "
            f"config.json says vocab_size {model.vocab_size}"
        )
    end = source.config.get("eos_token_id")
    end = end[0] if isinstance(end, list) else end
    return lm_data.read(args.data, tokenizer, args.length, end)


def resumed(
    checkpointer: orbax.Checkpointer,
    args: argparse.Namespace,
    settings: dict[str, Any],
    base: Any,
    state: State,
    places: lora_jax.LoraParams,
) -> tuple[int, State]:
    """The last step that was saved, and its state; or 0, and the state as it is.

    Raises:
        FileNotFoundError: there is none, and ``--resume``.
        ValueError: it is of other settings.
    """
    if checkpointer.latest is None:
        if args.resume:
            raise FileNotFoundError(f"--resume: {args.out} has no checkpoint")
        return 0, state

    def place(name: str, shape: tuple[int, ...]) -> NamedSharding:
        path, _, field = name.rpartition(".")
        return getattr(places.adapter.factors[path], field)

    whole = places.adapter.factors[next(iter(places.adapter.factors))].scale
    saved = checkpointer.load(None, extra={"settings": ""}, shardings=whole).extra["settings"]
    for name, value in json.loads(saved).items():
        if value != settings[name]:
            raise ValueError(
                f"--{name}: {args.out} was begun with {value}, and now it is {settings[name]}: "
                "go on with the same, or pass another --out"
            )
    found = checkpointer.load(base, state.opt_state, shardings=place)
    return found.step, State(lora_jax.split(found.lora_params)[0], found.opt_state)


def export(
    path: Path,
    source: hf.Source,
    trainable: lora_jax.Adapter,
    frozen: lora_jax.LoraParams,
    mesh: Mesh,
    out: Path,
) -> None:
    """Write the adapter for PEFT, and the model's files with it merged, which takes no devices."""
    gather = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))
    lora_params = lora_jax.combine(jax.device_get(gather(trainable)), frozen)
    if jax.process_index() == 0:
        names = hf.FAMILIES[source.config["model_type"]].names
        more = {"base_model": path, "task_type": "CAUSAL_LM", "overwrite": True}
        peft.save(out / "adapter", lora_params, names=names, **more)
        hf.merge(path, out / "adapter", out / "merged", overwrite=True)


def number(kind: type, least: float = -math.inf, above: float = -math.inf) -> Callable[[str], Any]:
    """An argparse type: a finite int or float in a range."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (value >= least and value > above and math.isfinite(value)):
            wanted = f">= {least:g}" if math.isfinite(least) else f"> {above:g}"
            raise argparse.ArgumentTypeError(f"{text}: expected a finite number {wanted}")
        return value

    parse.__name__ = kind.__name__  # for argparse's own message
    return parse


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    count, natural, positive = number(int, 1), number(int, 0), number(float, above=0)

    def group(name: str, **flags: dict[str, Any]) -> None:
        members = parser.add_argument_group(name)
        for flag, options in flags.items():
            options["help"] += f" ({options['default']})" if "default" in options else ""
            members.add_argument(f"--{flag}", **options)

    is_set = {"action": "store_true"}
    group(
        "model and data",
        model={"type": Path, "help": "a folder or a GGUF file (SmolLM2-135M)"},
        data={"type": Path, "help": "a .txt, or a .jsonl of prompt and completion (Shakespeare)"},
        length={"type": count, "default": 64, "help": "tokens a row"},
        validation={"type": count, "default": 64, "help": "rows to validate by, at most"},
        dtype={"choices": ("float32", "bfloat16"), "default": "float32", "help": "of all but A, B"},
    )
    group(
        "training",
        rank={"type": count, "default": 8, "help": "of A and B"},
        alpha={"type": positive, "default": 16.0, "help": "the update is scaled by alpha / rank"},
        targets={"help": "a regular expression, or all-linear (queries, values)"},
        dropout={"type": number(float, 0), "default": 0.0, "help": "of what the adapters read"},
        batch={"type": count, "default": 8, "help": "rows a step, on all devices together"},
        accumulate={"type": count, "default": 1, "help": "parts of a batch, one after the other"},
        steps={"type": count, "default": 100, "help": "in all"},
        rate={"type": positive, "default": 1e-3, "help": "the highest; a cosine ends it"},
        warmup={"type": natural, "default": 10, "help": "steps"},
        clip={"type": positive, "default": 1.0, "help": "the largest norm of a gradient"},
        seed={"type": natural, "default": 0, "help": "of factors, data and dropout"},
        remat=is_set | {"help": "layers once more in the backward pass, for memory"},
    )
    group(
        "devices",
        mesh={"help": "sizes of data, fsdp, tensor, as data=2,tensor=-1 (data=-1)"},
        pmap=is_set | {"help": "data parallel by jax.pmap"},
        distributed=is_set | {"help": "several processes, as the cluster's environment says"},
        coordinator={"help": "or as these say: host:port of process 0,"},
        processes={"type": count, "help": "how many,"},
        process={"type": natural, "help": "and which this is"},
    )
    group(
        "files",
        out={"type": Path, "default": Path("runs", "lm"), "help": "checkpoints, metrics.csv"},
        every={"type": count, "default": 50, "help": "steps between checkpoints, each validated"},
        log={"type": count, "default": 10, "help": "steps between lines"},
        resume=is_set | {"help": "fail where --out has no checkpoint to go on from"},
        export=is_set | {"help": "at the end, OUT/adapter for PEFT and OUT/merged"},
        tensorboard=is_set | {"help": "events in OUT/tensorboard"},
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run, and turn errors that a user can mend into one message."""
    args = parse_args(argv)
    try:
        run(args)
    except (ImportError, OSError, TypeError, ValueError, NotImplementedError) as error:
        raise SystemExit(f"train_lm: {error}") from error


if __name__ == "__main__":
    main()
