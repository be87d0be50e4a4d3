"""Fine-tune a language model with LoRA on one device or many; stop and resume at any step.

    python examples/train_lm.py                                # SmolLM2 on Shakespeare
    python examples/train_lm.py --model FOLDER --data pairs.jsonl --mesh data=2,fsdp=2,tensor=2

The model is a Llama, Mistral, Qwen2 or Qwen3 from a Hugging Face folder or a GGUF file. It is read
directly into its shardings, and is never an output of the step: only the adapter trains, crosses
the network and is saved. A step depends only on ``--seed`` and its number, so a run that is killed
and restarted with the same command ends with the same bits.
"""

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import data
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax.io import hf, orbax, peft
from lora_jax.recipes.lm import data as lm_data
from lora_jax.recipes.lm import metrics as lm_metrics
from lora_jax.recipes.lm.agree import agree
from lora_jax.recipes.lm.cache import kept_programs
from lora_jax.recipes.lm.data import Rows
from lora_jax.recipes.lm.flags import out_of_memory, parse_args
from lora_jax.recipes.lm.job import Job, abstract, kinds_of, model_of, prepare
from lora_jax.recipes.lm.mesh import ROWS, mesh_of
from lora_jax.recipes.lm.metrics import Log
from lora_jax.recipes.lm.startup import Startup, compile_step
from lora_jax.recipes.lm.step import State, make_validation
from lora_jax.recipes.models import llama

# The settings that determine the losses: a run can only continue with the same values.
SETTINGS = tuple(
    "batch length rank alpha targets rate warmup steps clip dropout dtype seed".split()
)
PER_PROCESS = ("model", "data", "out", "coordinator", "process")  # may differ between processes


def run(args: argparse.Namespace) -> Startup:
    """Load the model, train the adapter, and save it; return how long the start took."""
    startup = Startup()
    connect(args)
    agree({f"--{name}": value for name, value in vars(args).items() if name not in PER_PROCESS})
    with kept_programs(args.cache) as note:
        fine_tune(args, startup, note)
    return startup


def fine_tune(args: argparse.Namespace, startup: Startup, note: str | None) -> None:
    """Do the work of :func:`run`, with a line to print."""
    mesh = mesh_of(args.mesh or "data=-1", args.explicit)
    check(args, mesh)
    path = args.model or data.smollm2()
    source = hf.open_source(path)
    if source.config is None:
        raise FileNotFoundError(f"--model {path}: no config.json in it")
    model = model_of(source.config, mesh, args)
    with startup.part("data"):
        training, validation, rows = rows_of(source, model, args)
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {"data": training.fingerprint()}
    like = abstract(model, mesh, args)
    if jax.process_count() > 1:
        agree({"the rows of --data": settings["data"]} | kinds_of(model, like, args))

    args.out.mkdir(parents=True, exist_ok=True)
    with orbax.Checkpointer(args.out / "checkpoints", keep=3) as checkpointer:
        check_settings(checkpointer, settings, mesh, args.out)
        with startup.part("read"):
            base = jax.block_until_ready(hf.load(path, like=like))
        with startup.part("lorafy"):
            job = prepare(model, base, args, mesh)
            jax.block_until_ready(job.state)
        with startup.part("read"):
            first, state = resume(checkpointer, base, job)
        lora_params = lora_jax.combine(state.trainable, job.frozen)
        counts = {
            "tokens": args.batch * args.length,
            "flops": lm_metrics.flops_per_token(model, lora_params, args.length),
        }
        options = {"rate": job.rate, "tensorboard": args.tensorboard, "startup": startup}
        with Log(args.out, first, **options, **counts) as log:
            log.say(f"{path}: {lora_params}")
            log.say(f"{len(training.ids):,} rows of {args.length} tokens: {rows}")
            log.say(f"{mesh.size} x {jax.devices()[0].device_kind}: {dict(mesh.shape)}")
            if note:
                log.say(note)
            if first:
                log.say(f"continuing from step {first} in {args.out}")
            held_out, size = validation.take(slice(args.validation)), args.batch // args.accumulate
            validate = make_validation(lora_jax.lora(job.loss), held_out, size, mesh)

            def save(step: int, state: State) -> None:
                lora_params = lora_jax.combine(state.trainable, job.frozen)
                extra = {"settings": json.dumps(settings)}
                checkpointer.save(step, lora_params, state.opt_state, extra)

            if first < args.steps:
                state = train(args, startup, job, first, state, training, validate, log, save)
            checkpointer.wait()
            if args.export:
                export(path, source, state.trainable, job.frozen, mesh, args.out)
                log.say(f"wrote {args.out / 'adapter'} and {args.out / 'merged'}")


def train(
    args: argparse.Namespace,
    startup: Startup,
    job: Job,
    first: int,
    state: State,
    training: Rows,
    validate: Callable[..., jax.Array],
    log: Log,
    save: Callable[[int, State], None],
) -> State:
    """Do the steps after ``first``; while the host waits or writes, the devices work."""
    frozen = job.frozen
    batch = job.place(training.batch(args.batch, first, args.seed))
    step = compile_step(job.steps, startup, state, frozen, batch, np.int32(first))
    if not first:
        with startup.part("validated"):
            log.flush(0, validate(state.trainable, frozen))
    for done in range(first + 1, args.steps + 1):
        state, found = step(state, frozen, batch, np.int32(done - 1))
        batch = job.place(training.batch(args.batch, done, args.seed))
        log.add(done, found, is_shown=done % args.log == 0 or done == first + 1)
        if done % args.every == 0 or done == args.steps:
            # Write the log first: a resumed run must not miss a row.
            log.flush(done, validate(state.trainable, frozen))
            save(done, state)
            log.restart()
    return state


# Checks, before the model is loaded


def connect(args: argparse.Namespace) -> None:
    """Connect to the other processes."""
    given = {args.coordinator, args.processes, args.process} - {None}
    if given and None in (args.coordinator, args.processes, args.process):
        raise ValueError("--coordinator, --processes and --process go together")
    if args.coordinator:
        jax.distributed.initialize(
            args.coordinator,
            args.processes,
            args.process,
            coordinator_bind_address=args.coordinator,  # the default listens on all networks
        )
    elif args.distributed:
        try:
            jax.distributed.initialize()
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"--distributed: JAX knows no cluster here ({error}): neither Slurm nor Open MPI, "
                "Kubernetes or Cloud TPU started this process. Pass --coordinator HOST:PORT "
                "--processes N --process K, or neither, for the devices of one process"
            ) from error


def check(args: argparse.Namespace, mesh: Mesh) -> None:
    """Check that the arguments fit each other, the devices and the files."""
    if args.pmap and (args.mesh or args.explicit):
        other = f"--mesh {args.mesh}" if args.mesh else "--explicit"
        raise ValueError(f"--pmap: it sets its own mesh; pass it without {other}")
    devices = math.prod(mesh.shape[axis] for axis in ROWS)
    if args.batch % (devices * args.accumulate):
        raise ValueError(
            f"--batch {args.batch}: expected a multiple of {devices * args.accumulate}, for "
            f"{devices} devices (data x fsdp) and --accumulate {args.accumulate}: pass such a "
            "--batch, or a --mesh with less of data and fsdp and more of tensor"
        )
    if args.warmup >= args.steps:
        raise ValueError(f"--warmup {args.warmup}: expected less than --steps {args.steps}")
    steps = (args.out / "checkpoints").glob("*")
    if args.resume and not any(path.name.isdigit() for path in steps):
        raise FileNotFoundError(f"--resume: {args.out} has no checkpoint")
    if args.tensorboard:
        lm_metrics.event_writer()


def check_settings(
    checkpointer: orbax.Checkpointer, settings: Mapping[str, Any], mesh: Mesh, out: Path
) -> None:
    """Check that the last checkpoint, if there is one, has the same settings."""
    latest = checkpointer.latest
    agree({"the last step in --out": latest})
    if latest is None:
        return
    replicated = NamedSharding(mesh, P())
    saved = checkpointer.load(None, extra={"settings": ""}, shardings=replicated).extra["settings"]
    for name, value in json.loads(saved).items():
        if value != settings[name]:
            raise ValueError(
                f"--{name}: {out} was started with {value}, and now it is {settings[name]}: "
                "continue with the same value, or pass another --out"
            )


def rows_of(
    source: hf.Source, model: llama.Llama, args: argparse.Namespace
) -> tuple[Rows, Rows, str]:
    """Tokenize the data: return training rows, validation rows, and a description."""
    tokenizer = lm_data.tokenizer_of(source)
    if tokenizer.get_vocab_size() > model.vocab_size:
        raise ValueError(
            f"--model {source.where}: its tokenizer has {tokenizer.get_vocab_size()} tokens, and "
            f"config.json has vocab_size {model.vocab_size}"
        )
    end = source.config.get("eos_token_id")
    end = end[0] if isinstance(end, list) else end
    return lm_data.read(args.data, tokenizer, args.length, end)


# Resuming and exporting


def resume(checkpointer: orbax.Checkpointer, base: Any, job: Job) -> tuple[int, State]:
    """Load the last saved step and its state; without a checkpoint, 0 and the initial state."""
    if checkpointer.latest is None:
        return 0, job.state

    def place(name: str, shape: tuple[int, ...]) -> NamedSharding:
        path, _, field = name.rpartition(".")
        return getattr(job.places.adapter.factors[path], field)

    found = checkpointer.load(base, job.state.opt_state, shardings=place)
    return found.step, State(lora_jax.split(found.lora_params)[0], found.opt_state)


def export(
    path: Path,
    source: hf.Source,
    trainable: lora_jax.Adapter,
    frozen: lora_jax.LoraParams,
    mesh: Mesh,
    out: Path,
) -> None:
    """Write the adapter for PEFT, and merge it into a copy of the model's files, on the host."""
    gather = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))
    lora_params = lora_jax.combine(jax.device_get(gather(trainable)), frozen)
    if jax.process_index() == 0:
        names = hf.FAMILIES[source.config["model_type"]].names
        more = {"base_model": path, "task_type": "CAUSAL_LM", "overwrite": True}
        peft.save(out / "adapter", lora_params, names=names, **more)
        hf.merge(path, out / "adapter", out / "merged", overwrite=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run, and report errors that the user can fix as one message."""
    args = parse_args(argv)
    try:
        run(args)
    except (ImportError, OSError, TypeError, ValueError, NotImplementedError) as error:
        raise SystemExit(f"train_lm: {error}") from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise SystemExit(f"train_lm: {out_of_memory(str(error), args)}") from error


if __name__ == "__main__":
    main()
