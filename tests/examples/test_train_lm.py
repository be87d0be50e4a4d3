"""The trainer of the examples: on every mesh the same losses, killed and resumed the same bits."""

import contextlib
import csv
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import train_lm
from helpers import assert_close, tolerance
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

import lora_jax
from lora_jax.io import hf, orbax, peft
from lora_jax.recipes.lm import agree as lm_agree
from lora_jax.recipes.lm import cache as lm_cache
from lora_jax.recipes.lm import data as lm_data
from lora_jax.recipes.lm import mesh as lm_mesh
from lora_jax.recipes.lm import metrics as lm_metrics
from lora_jax.recipes.loss import summed_loss as summed_loss_of
from lora_jax.recipes.models import llama

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    # Orbax's own, at load and save.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "eos_token_id": 63,
}
STEPS, MESH = 20, "data=2,fsdp=2,tensor=2"
SUMS = 20  # that follow each other in the model: eight a layer, and those around the layers
eight_devices = pytest.mark.devices(8)
SMALL = "--batch 16 --length 8 --rank 2 --warmup 2 --rate 0.03 --every 10 --validation 16".split()


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Keep the large programs of this file in a cache, for runs that go on and for children."""
    with contextlib.ExitStack() as stack:
        if jax.config.jax_compilation_cache_dir is None:
            folder = str(tmp_path_factory.mktemp("compiled"))
            options = {
                "jax_compilation_cache_dir": folder,
                "jax_persistent_cache_min_compile_time_secs": 0.3,
            }
            for name, value in options.items():
                before = getattr(jax.config, name)
                jax.config.update(name, value)
                stack.callback(jax.config.update, name, before)
                stack.enter_context(mock.patch.dict(os.environ, {name.upper(): str(value)}))
            compilation_cache.reset_cache()
            stack.callback(compilation_cache.reset_cache)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of a random Llama whose tokens are the words ``w0`` to ``w63``."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    network = llama.from_config(CONFIG, scan_layers=True)
    params = jax.jit(network.init)(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
    hf.save(folder, params, "llama", config=CONFIG)
    tokenizer = Tokenizer(WordLevel({f"w{k}": k for k in range(64)}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Words that mostly follow from those before them."""
    rng = np.random.default_rng(0)
    after, words = rng.permutation(64), [0]
    for _ in range(4000):
        words.append(int(after[words[-1]]) if rng.random() < 0.8 else int(rng.integers(64)))
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(" ".join(f"w{k}" for k in words))
    return path


@pytest.fixture(scope="module")
def whole(model, text, tmp_path_factory):
    """The folder of a run on eight devices that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "out"
    train(model, text, out, "--mesh", MESH, "--export")
    return out


def arguments(model, text, out, *extra):
    paths = ["--model", str(model), "--data", str(text), "--out", str(out)]
    return [*paths, "--steps", str(STEPS), *SMALL, *extra]


def train(model, text, out, *extra):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        train_lm.main(arguments(model, text, out, *extra))
    return losses(out)


def losses(out):
    """The losses of the steps, which are there once each and in order."""
    rows = [row for row in metrics(out) if row["loss"]]
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return [float(row["loss"]) for row in rows]


def metrics(out):
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def close(actual, expected):
    """To the rounding of all steps before, each forth and back through the model."""
    np.testing.assert_allclose(actual, expected, rtol=tolerance(depth=2 * SUMS * STEPS))


# --- on every mesh -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(model, text):
    """The losses on one device, of the same training written in the other style."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        network, params = loaded(model)

        def apply(params, ids):
            return network.apply({"params": params}, ids)

        layout = lora_jax.layout_of(apply, params, np.zeros((1, 8), np.int32))
        lora_params = lora_jax.lorafy(params, 2, layout=layout)  # the trainer's initializer
        schedule = optax.warmup_cosine_decay_schedule(0.0, 0.03, 2, STEPS)
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
        tx = lora_jax.optimizer(tx)
        opt_state, found = tx.init(lora_params), []
        tokens = np.array([int(word[1:]) for word in text.read_text().split()])
        windows = np.stack([tokens[k : k + 9] for k in range(0, len(tokens) - 8, 8)])
        training = windows[: -(len(windows) // 20)]
        order = np.random.RandomState([0, 0]).permutation(len(training))

        def loss(lora_params, batch):
            logits = lora_jax.lora(apply)(lora_params, batch[:, :-1])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
            return losses.mean()

        @jax.jit
        def step(lora_params, opt_state, batch):
            value, grads = jax.value_and_grad(loss)(lora_params, batch)
            updates, opt_state = tx.update(grads, opt_state, lora_params)
            return optax.apply_updates(lora_params, updates), opt_state, value

        for k in range(STEPS):
            batch = training[order[16 * k : 16 * k + 16]]
            lora_params, opt_state, value = step(lora_params, opt_state, batch)
            found.append(float(value))
        return found


def loaded(folder):
    """The network of a folder and its parameters."""
    network = llama.from_config(CONFIG, scan_layers=True)
    like = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
    return network, hf.load(folder, like)


SPREAD = ["--pmap --accumulate 2"]  # and MESH, below
MORE_SPREAD = [
    f"--explicit --mesh {MESH}",
    "--mesh data=8",
    "--mesh fsdp=-1",
    "--explicit --mesh tensor=8 --accumulate 4 --remat",
]


@eight_devices
@pytest.mark.parametrize(
    "extra", [*SPREAD, *(pytest.param(x, marks=pytest.mark.long) for x in MORE_SPREAD)]
)
def test_meshes_and_parts_of_batches_change_no_loss(model, text, alone, tmp_path, extra):
    close(train(model, text, tmp_path / "out", *extra.split()), alone)


@eight_devices
def test_all_axes_at_once_change_no_loss_and_the_model_learns(whole, alone):
    close(losses(whole), alone)
    assert len(alone) == STEPS
    assert np.mean(alone[-3:]) < np.mean(alone[:3]) - 0.2
    rows = metrics(whole)
    validated = {int(row["step"]): float(row["validation"]) for row in rows if row["validation"]}
    assert list(validated) == [0, 10, 20]
    assert validated[20] < validated[0]


@eight_devices
def test_what_is_exported_computes_what_was_trained(model, whole):
    network, params = loaded(model)
    ids = np.random.default_rng(0).integers(0, 64, (2, 8))
    with orbax.Checkpointer(whole / "checkpoints") as checkpointer:
        lora_params = checkpointer.load(params).lora_params

    def plain(params, ids):
        return network.apply({"params": params}, ids)

    apply, adapted = jax.jit(plain), jax.jit(lora_jax.lora(plain))
    expected = adapted(lora_params, ids)
    assert np.abs(expected - apply(params, ids)).max() > 0.1
    adapter = peft.load(whole / "adapter", params, names=hf.FAMILIES["llama"].names)
    assert_close(adapted(adapter, ids), expected, depth=SUMS)
    assert_close(apply(loaded(whole / "merged")[1], ids), expected, depth=SUMS)
    assert (whole / "merged" / "tokenizer.json").exists()


# --- killed and resumed ------------------------------------------------------------------------


def start(model, text, out, *extra, kill=None, devices=8):
    """A process that kills itself two steps behind step ``kill``, when that is saved."""
    return child("run_until_killed", devices, str(kill), *arguments(model, text, out, *extra))


def child(name, devices, *argv, **options):
    """A process that calls a function of this module."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, __file__, name, *argv]
    return subprocess.Popen(command, env=environment, **{"stdout": subprocess.DEVNULL} | options)


def run_until_killed(kill, *argv):
    add = train_lm.Log.add

    def added(self, step, found, **options):
        add(self, step, found, **options)
        saved = Path(argv[argv.index("--out") + 1], "checkpoints", kill)
        if kill != "None" and step == int(kill) + 2:
            jax.block_until_ready(found)
            while not saved.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    train_lm.Log.add = added
    train_lm.main(argv)


@eight_devices
def test_a_run_goes_on_from_its_last_checkpoint_with_the_same_bits(model, text, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / "20")  # the last step is 10
    cut(out)
    train(model, text, out, "--mesh", MESH, "--resume")
    assert losses(out) == losses(whole)


def cut(out):
    """Leave the metrics of ten steps, and what is written when the process ends in the middle."""
    lines = (out / "metrics.csv").read_text().splitlines(keepends=True)
    steps = [int(line.split(",")[0]) for line in lines[1:]]
    kept = [lines[0], *(line for line, step in zip(lines[1:], steps, strict=True) if step <= 10)]
    (out / "metrics.csv").write_text("".join(kept) + "11,3.5,1.0\n12,3.")


@pytest.mark.long
@eight_devices
def test_a_run_that_is_killed_goes_on_with_the_same_bits(model, text, whole, tmp_path):
    out = tmp_path / "out"
    assert start(model, text, out, "--mesh", MESH, kill=10).wait() == -signal.SIGKILL
    assert losses(out) == losses(whole)[:10]
    cut(out)
    train(model, text, out, "--mesh", MESH, "--resume")
    assert losses(out) == losses(whole)


@pytest.mark.long
@eight_devices
def test_a_run_goes_on_with_fewer_devices(model, text, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / "20")  # of eight devices, the last step is 10
    few = start(model, text, out, "--mesh", "fsdp=2,tensor=2", "--every", "4", kill=12, devices=4)
    assert few.wait() == -signal.SIGKILL
    assert start(model, text, out, "--resume", devices=1).wait() == 0
    close(losses(out), losses(whole))
    assert losses(out)[:10] == losses(whole)[:10]


@eight_devices
def test_what_fewer_devices_do_not_divide_is_told_first(model, text, whole, monkeypatch):
    monkeypatch.setattr(train_lm.hf, "load", None)  # nothing is loaded
    monkeypatch.setattr(train_lm, "mesh_of", functools.partial(lm_mesh.mesh_of, count=6))
    message = "--batch 16: expected a multiple of 6, .*: pass such a --batch, or a --mesh with less"
    with pytest.raises(SystemExit, match=message):
        train(model, text, whole)
    with pytest.raises(SystemExit, match=r"--mesh: tensor=3 does not divide \d+, an axis of"):
        train(model, text, whole, "--mesh", "fsdp=2,tensor=3")


def pair_of_processes():
    """The flags of either."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = "--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process"
    return [(*flags, "0"), (*flags, "1")]


@pytest.mark.long
@eight_devices
def test_two_processes_train_save_die_and_go_on_as_one_on_another_mesh(
    model, text, whole, tmp_path
):
    out = tmp_path / "out"
    group = [
        start(model, text, out, "--mesh", MESH, *flags, kill=(None, 10)[k], devices=4)
        for k, flags in enumerate(pair_of_processes())
    ]
    try:
        assert group[1].wait() == -signal.SIGKILL
    finally:
        for process in group:  # the other waits for it, or has given up
            process.kill()
            process.wait()
    close(losses(out), losses(whole)[:10])
    close(train(model, text, out, "--mesh", "data=2,fsdp=-1", "--resume"), losses(whole))


def said_by_two(monkeypatch, *facts):
    """What two threads hear, each with its own facts, in the place of two processes."""
    parts, said, both = {}, {}, threading.Barrier(2, timeout=60)

    def gathered(x):
        parts[threading.current_thread().name] = x
        both.wait()
        found = np.stack([parts["0"], parts["1"]])
        both.wait()
        return found

    def call(own):
        try:
            said[threading.current_thread().name] = lm_agree.agree(own)
        except ValueError as error:
            said[threading.current_thread().name] = str(error)

    monkeypatch.setattr(lm_agree, "process_allgather", gathered)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    threads = [threading.Thread(target=call, args=[x], name=str(k)) for k, x in enumerate(facts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said["0"], said["1"]


def test_facts_that_differ_are_named_on_both_sides(monkeypatch):
    facts = {"--rank": 2, "--targets": None, "the rows of --data": "abc"}
    assert said_by_two(monkeypatch, facts, facts) == (None, None)
    other = facts | {"--rank": 4, "--targets": "all-linear"}
    first, second = said_by_two(monkeypatch, facts, other)
    assert first == second
    said = '--rank is 2 on 0 and 4 on 1; --targets is null on 0 and "all-linear" on 1. Start all'
    assert first.startswith(f"the processes do not agree: {said}")


@pytest.mark.long
@eight_devices
def test_processes_that_do_not_agree_all_say_on_what(model, text, whole, tmp_path):
    wide = tmp_path / "wide"
    config = CONFIG | {"hidden_size": 32}
    network = llama.from_config(config, scan_layers=True)
    params = jax.jit(network.init)(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
    hf.save(wide, params, "llama", config=config)
    shutil.copy(model / "tokenizer.json", wide)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])

    new = str(tmp_path / "out")
    # What the second says in the place of the first's flags.
    runs = [
        ["--rank", "4", "--targets", "all-linear"],
        ["--data", str(other)],
        ["--model", str(wide)],
        ["--out", str(whole)],
    ]
    pairs = [
        child(
            "run_each",
            *(1, json.dumps([flags, *([[]] * len(runs) if k == 0 else runs)])),
            *arguments(model, text, new),
            stdout=subprocess.PIPE,
            text=True,
        )
        for k, flags in enumerate(pair_of_processes())
    ]
    try:
        texts = [process.communicate(timeout=300)[0] for process in pairs]
    finally:
        for process in pairs:
            process.kill()
            process.wait()
    said = [re.findall("^train_lm: the processes do not agree: .*", t, re.MULTILINE) for t in texts]
    assert said[0] == said[1]
    expected = [
        r'--rank is 2 on 0 and 4 on 1; --targets is null on 0 and "all-linear" on 1\. Start all',
        r'the rows of --data is "\w+" on 0 and "\w+" on 1\. Start',
        r"the adapter of layers/self_attn/q_proj/kernel is \"bio, a float32\(2, 16, 2\), .* on 1",
        r"the last step in --out is null on 0 and 20 on 1\.",
    ]
    assert len(said[0]) == len(expected)
    for line, pattern in zip(said[0], expected, strict=True):
        assert re.search(pattern, line), line


def run_each(runs, *argv):
    """Runs of the trainer in one process, of which the first flags are for all; what they say."""
    flags, *runs = json.loads(runs)
    train_lm.connect(train_lm.parse_args(flags))
    train_lm.connect = lambda args: None
    for extra in runs:
        try:
            train_lm.main([*argv, *flags, *extra])
        except SystemExit as error:
            print(error, flush=True)


# --- waiting -----------------------------------------------------------------------------------


class Late:
    """A metric that is ready when somebody waits for it, who is written down."""

    def __init__(self, value, step, events):
        self.value, self.step, self.events = value, step, events

    def copy_to_host_async(self):
        self.events.append(("copy", self.step))

    def is_ready(self):
        return False

    def __array__(self, *args, **kwargs):
        self.events.append(("wait", self.step))
        return np.asarray(self.value)


@eight_devices
@pytest.mark.parametrize("extra", [f"--mesh {MESH}", *SPREAD])
def test_the_host_waits_for_a_step_when_two_more_are_queued(
    model, text, tmp_path, monkeypatch, extra
):
    """And all steps run the one program that the startup compiled."""
    events = []

    def compile_step(step, *args):
        compiled = compile_step_of(step, *args)

        def run(state, frozen, batch, number):
            step = int(number) + 1
            with monitored("/jax/core/compile/backend_compile_duration") as programs:
                state, found = compiled(state, frozen, batch, number)
            assert not programs
            events.append(("step", step))
            return state, {name: Late(x, step, events) for name, x in found.items()}

        return run

    def make_validation(*args):
        validate = make_validation_of(*args)
        return lambda *halves: (events.append("validate"), validate(*halves))[1]

    compile_step_of = train_lm.compile_step
    make_validation_of = train_lm.make_validation
    monkeypatch.setattr(train_lm, "compile_step", compile_step)
    monkeypatch.setattr(train_lm, "make_validation", make_validation)
    found = train(model, text, tmp_path / "out", "--log", "3", *extra.split())
    assert len(found) == STEPS

    waits = {step: events.index(("wait", step)) for step in range(1, STEPS + 1)}
    for step, place in waits.items():
        last = 10 if step <= 10 else 20  # then all is written
        assert ("step", min(step + 2, last)) in events[:place]
        assert events.index(("copy", step)) == events.index(("step", step)) + 1
    ends = [k for k, event in enumerate(events) if event == "validate"]
    assert ends[0] == 0
    for step, end in zip((10, 20), ends[1:], strict=True):  # before the host waits for the last two
        assert waits[step - 2] < end < waits[step - 1]


@contextlib.contextmanager
def monitored(name):
    """The durations of what JAX does in the block."""
    found = []

    def listen(event, seconds, **_):
        if event == name:
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def set_flag():
    """Set flags of JAX until the test ends."""
    with contextlib.ExitStack() as stack:

        def update(name, value):
            stack.callback(jax.config.update, name, getattr(jax.config, name))
            jax.config.update(name, value)

        yield update
    compilation_cache.reset_cache()


@pytest.mark.usefixtures("one_device")
def test_the_start_is_printed_part_by_part(model, text, tmp_path, capsys, set_flag):
    set_flag("jax_persistent_cache_min_compile_time_secs", 0)
    before, kept = jax.config.jax_compilation_cache_dir, tmp_path / "kept"
    for is_cached in (False, True):
        extra = ["--steps", "3", "--cache", str(kept)]
        argv = arguments(model, text, tmp_path / f"out {is_cached}", *extra)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            startup = train_lm.run(train_lm.parse_args(argv))
        parts = ["data", "read", "lorafy", "traced", "compiled", "validated", "first step"]
        assert list(startup.seconds) == parts
        assert all(seconds >= 0 for seconds in startup.seconds.values())
        assert sum(startup.seconds.values()) <= startup.total
        assert startup.is_cached == is_cached
        *_, validated, line, first, last = capsys.readouterr().out.splitlines()
        assert [re.match(r"step +(\d)", x)[1] for x in (validated, first, last)] == list("013")
        numbers = ", ".join(rf"{name} \d+\.\d" for name in parts)
        numbers = numbers.replace(
            ", validated", " from the cache, validated" if is_cached else ", validated"
        )
        assert re.fullmatch(rf"ready in \d+\.\d s, --remat none: {numbers}", line)
    assert list(kept.glob("jit_step-*"))
    assert jax.config.jax_compilation_cache_dir == before


def test_programs_are_kept_where_the_user_or_the_platform_tells(tmp_path, monkeypatch, set_flag):
    def kept(cache=None):
        with lm_cache.kept_programs(cache) as note:
            return jax.config.jax_compilation_cache_dir, note

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LORA_JAX_CACHE", raising=False)
    set_flag("jax_compilation_cache_dir", None)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert kept() == (None, None)
    assert kept("mine") == (str(tmp_path / "mine"), None)
    assert kept("gs://mine") == ("gs://mine", None)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    default = str(tmp_path / ".cache" / "lora_jax" / "compiled")
    assert kept() == (default, f"compiled programs are kept in {default}")
    assert kept("none") == (None, None)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        assert kept() == (None, None)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *args: False)
        message = f"cannot write to {tmp_path}; pass another --cache, or --cache none"
        said = f"compiled programs are not kept: --cache .cache/lora_jax/compiled: {message}"
        assert kept() == (None, said)
        with pytest.raises(PermissionError, match=message):
            kept("mine")

    set_flag("jax_compilation_cache_dir", "theirs")
    assert kept() == ("theirs", None)
    assert kept("none") == (None, None)
    assert jax.config.jax_compilation_cache_dir == "theirs"
    assert not list(tmp_path.iterdir())


# --- data --------------------------------------------------------------------------------------


def test_each_token_is_a_target_once_and_the_end_is_held_out(model, text):
    tokenizer = lm_data.tokenizer_of(hf.open_source(model))
    training, validation, note = lm_data.read(text, tokenizer, 8, None)
    words = np.array([int(word[1:]) for word in text.read_text().split()])
    rows = np.concatenate([training.targets, validation.targets])
    assert (rows.ravel() == words[1 : rows.size + 1]).all()
    assert len(words) - 1 - rows.size < 8
    assert len(validation.ids) == len(rows) // 20
    assert note == "text.txt, text"


def test_every_epoch_has_all_rows_in_an_order_of_its_own():
    rows = lm_data.Rows(np.arange(10)[:, None], np.arange(10)[:, None])
    order = np.concatenate([rows.batch(4, step, seed=3).ids[:, 0] for step in range(5)])
    first, second = order[:10], order[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert (first != second).any()
    assert (rows.batch(4, 2, seed=3).ids[:, 0] == order[8:12]).all()
    assert (rows.batch(4, 2, seed=4).ids[:, 0] != order[8:12]).any()


def pairs(folder, *lines):
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def pair(prompt="w1 w2 w3", completion="w4 w5"):
    return {"prompt": prompt, "completion": completion}


def test_only_the_completion_is_learned(model, tmp_path):
    long = "w9 " * 8 + "w1 w2"
    path = pairs(tmp_path, pair(), "", pair(long), *[pair("w7", "w8")] * 38)
    tokenizer = lm_data.tokenizer_of(hf.open_source(model))
    training, validation, note = lm_data.read(path, tokenizer, 6, 63)
    assert [len(training.ids), len(validation.ids)] == [38, 2]
    assert "the beginning of the prompt is cut off in 1" in note
    assert training.ids[:2].tolist() == [[1, 2, 3, 4, 5, 0], [9, 9, 1, 2, 4, 5]]
    assert training.targets[:2].tolist() == [[-1, -1, 4, 5, 63, -1], [-1, -1, -1, 4, 5, 63]]

    logits = np.random.default_rng(0).normal(size=(38, 6, 64)).astype(np.float32)
    x = logits[0, 2:5].astype(np.float64)
    expected = (np.log(np.exp(x).sum(-1)) - x[np.arange(3), [4, 5, 63]]).sum()
    summed_loss = jax.jit(summed_loss_of)
    found = summed_loss(logits[:1], training.targets[:1])
    assert_close(found, expected)
    logits[0, [0, 1, 5]] += 1.0 + np.arange(64)  # what comes before and after is not looked at
    assert summed_loss(logits[:1], training.targets[:1]) == found


@pytest.fixture
def one_device(monkeypatch):
    """What no mesh changes compiles faster for one device."""
    monkeypatch.setattr(train_lm, "mesh_of", functools.partial(lm_mesh.mesh_of, count=1))


@pytest.mark.usefixtures("one_device")
def test_pairs_train_in_half_precision_and_with_dropout(model, tmp_path):
    path, out = pairs(tmp_path, *[pair("w1 w2", "w3 w4")] * 40), tmp_path / "out"
    options = ["--dtype", "bfloat16", "--dropout", "0.1", "--targets", ".*/(q|down)_proj/kernel"]
    found = train(model, path, out, *options, "--export")
    assert found[-1] < found[0] - 0.5
    before = load_file(model / "model.safetensors")
    after = load_file(out / "merged" / "model.safetensors")
    assert {x.dtype for x in after.values()} == {np.dtype(np.float32)}  # as the model's files
    assert sum((x != after[name]).any() for name, x in before.items()) == 2 * 2


BAD_DATA = [
    (pair(), '{"prompt": "w1"', "line 2: not JSON"),
    (pair(), '["w1"]', "line 2: expected an object per line"),
    (pair(), {"prompt": "w1"}, r"line 2: expected an object per line, .* got {\"prompt\": \"w1\"}"),
    (pair(), pair(completion=3), "line 2, key 'completion': expected a text, got 3"),
    (pair(), pair(prompt=" "), "line 2, key 'prompt': expected a text, got ' '"),
    (pair(), pair(completion="w1 " * 9), "line 2: the completion has 9 tokens, and a row 8: pass"),
    (pair(), "pairs.jsonl: one row, expected one for training and one for"),
    ("", "pairs.jsonl: no pairs in it"),
]


@pytest.mark.parametrize("case", BAD_DATA, ids=lambda case: case[-1][:30])
def test_bad_lines_are_named(model, tmp_path, case):
    *lines, message = case
    tokenizer = lm_data.tokenizer_of(hf.open_source(model))
    with pytest.raises(ValueError, match=message):
        lm_data.read(pairs(tmp_path, *lines), tokenizer, 8, None)


def test_other_bad_data_is_named(model, tmp_path):
    tokenizer = lm_data.tokenizer_of(hf.open_source(model))
    path = tmp_path / "a.txt"
    with pytest.raises(FileNotFoundError, match=r"a.txt: no such file"):
        lm_data.read(path, tokenizer, 8, None)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"a.txt: not UTF-8 text"):
        lm_data.read(path, tokenizer, 8, None)
    path.write_text("w1 w2")
    with pytest.raises(ValueError, match=r"a.txt: 2 tokens, too few for one row of --length 8"):
        lm_data.read(path, tokenizer, 8, None)
    with pytest.raises(ValueError, match=r"a.csv: expected a .txt, or a .jsonl"):
        lm_data.read(tmp_path / "a.csv", tokenizer, 8, None)
    (model / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    try:
        with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
            lm_data.tokenizer_of(hf.open_source(model))
    finally:
        (tmp_path / "tokenizer.json").rename(model / "tokenizer.json")


# --- arguments that do not fit -----------------------------------------------------------------

BAD_ARGUMENTS = [
    (["--mesh", "model=8"], "'model' is not one of data, fsdp, tensor"),
    (["--mesh", "data=2,data=4"], "'data' is not one of data, fsdp, tensor, once each"),
    (["--mesh", "data=x"], "data=x, expected a number >= 1, or -1"),
    (["--mesh", "data=0"], "data=0, expected a number >= 1, or -1"),
    (["--mesh", "data=-1,fsdp=-1"], "both data and fsdp are -1"),
    (["--mesh", "data=2,fsdp=2"], "the product of the sizes is 4, and there are 8 devices"),
    (["--mesh", "data=3,fsdp=-1"], "the product of the sizes is 3, and there are 8 devices"),
    (["--mesh", "data=8", "--pmap"], "--pmap: it sets its own mesh; pass it without --mesh data=8"),
    (["--batch", "12"], "--batch 12: expected a multiple of 8, for 8 devices"),
    (["--accumulate", "4"], "--batch 16: expected a multiple of 32"),
    (["--warmup", "20"], "--warmup 20: expected less than --steps 20"),
    (["--process", "0"], "--coordinator, --processes and --process go together"),
    (["--mesh", "data=8", "--resume"], "--resume: .* has no checkpoint"),
    (["--explicit", "--pmap"], "--pmap: it sets its own mesh; pass it without --explicit"),
    (["--dropout", "1"], "dropout"),
    (["--targets", "oops"], "targets='oops' selects nothing"),
    (["--model", "nowhere"], "nowhere"),
]


@eight_devices
@pytest.mark.parametrize(
    ("extra", "message"), BAD_ARGUMENTS, ids=lambda x: "" if isinstance(x, str) else " ".join(x)
)
def test_arguments_that_do_not_fit_are_one_message(model, text, tmp_path, extra, message):
    with pytest.raises(SystemExit, match=message):
        train(model, text, tmp_path / "out", *extra)
    assert not (tmp_path / "out" / "metrics.csv").exists()


BEFORE_THE_MODEL = [
    (["--resume"], "--resume: .*out has no checkpoint"),
    (["--tensorboard"], "--tensorboard: tensorboardX is missing"),
    (
        ["--cache", f"{__file__}/a"],
        r"--cache .*\.py/a: /.*\.py is not a folder; pass another --cache",
    ),
    (["--cache", ""], "--cache '': expected a folder, or none"),
]


@pytest.mark.parametrize(("extra", "message"), BEFORE_THE_MODEL)
def test_what_is_missing_is_told_before_the_model_is_opened(
    model, text, tmp_path, monkeypatch, extra, message
):
    monkeypatch.setattr(train_lm.hf, "open_source", None)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(SystemExit, match=message):
        train(model, text, tmp_path / "out", *extra)
    assert not (tmp_path / "out").exists()


NO_CLUSTER = (
    r"train_lm: --distributed: JAX knows no cluster here \(.*\): neither Slurm nor .* started "
    r"this process\. Pass --coordinator HOST:PORT --processes N --process K, or neither"
)


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_no_cluster_is_one_message(kind, monkeypatch):
    def initialize():
        raise kind("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(SystemExit, match=NO_CLUSTER):
        train_lm.main(["--distributed"])


@pytest.mark.long
def test_no_cluster_is_one_message_of_a_process():
    command = [sys.executable, train_lm.__file__, "--distributed"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert re.match(NO_CLUSTER, done.stderr)


# --- memory ------------------------------------------------------------------------------------


@pytest.fixture
def on_a_cpu():
    """Skip elsewhere. No mark: a child must not start the backend when it imports this file."""
    if jax.default_backend() != "cpu":
        pytest.skip("it expects what XLA says of a CPU")


@pytest.mark.usefixtures("on_a_cpu", "one_device")
def test_too_little_memory_is_one_message_with_what_to_change(model, tmp_path):
    # Far too long: where memory is promised freely, less would be promised and kill the process.
    path = pairs(tmp_path, *[pair("w1", "w2")] * 17)  # padded to the length
    message = (
        r"memory of the devices is too small: Out of memory allocating .* GiB\. Pass --remat, "
    )
    with pytest.raises(SystemExit, match=message + ".* or --length below 3000000, or --mesh fsdp"):
        train(
            model, path, tmp_path / "out", "--length", "3000000"
        )  # the scores of 512 tokens alone


OUT_OF_MEMORY = [
    ("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.", [], "allocating 16.00 GiB"),
    (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 25.81G of 15.48G hbm.\n\n"
        "Total hbm usage >= 25.81G",
        ["--remat", "--mesh", "fsdp=8", "--dtype", "bfloat16", "--batch", "4", "--accumulate", "4"],
        "Used 25.81G of 15.48G hbm. Pass --batch below 4, or --length below 64$",
    ),
    (
        "RESOURCE_EXHAUSTED: ",
        ["--accumulate", "2"],
        "small: XLA gives no details. Pass --remat",
    ),
]


@pytest.mark.parametrize(("error", "flags", "message"), OUT_OF_MEMORY)
def test_advice_on_memory_is_what_was_not_followed_yet(monkeypatch, error, flags, message):
    monkeypatch.setattr(train_lm, "run", raising(error))
    with pytest.raises(SystemExit, match=message):
        train_lm.main(flags)


def test_other_errors_of_the_runtime_pass_through(monkeypatch):
    monkeypatch.setattr(train_lm, "run", raising("INTERNAL: a kernel failed"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: a kernel failed"):
        train_lm.main([])


def raising(message):
    def run(args):
        raise jax.errors.JaxRuntimeError(message)

    return run


@pytest.mark.parametrize("extra", [["--batch", "0"], ["--rate", "nan"], ["--clip", "0"]])
def test_numbers_out_of_range_are_refused_by_the_parser(extra, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_lm.main(extra)
    assert f"argument {extra[0]}: {extra[1]}: expected a finite number >" in capsys.readouterr().err


@eight_devices
def test_axes_that_the_mesh_does_not_divide_are_named():
    network = llama.from_config(CONFIG | {"intermediate_size": 36}, scan_layers=True)
    shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
    message = r"tensor=8 does not divide 36, an axis of 'layers/mlp/\w+_proj/kernel' of shape"
    with pytest.raises(ValueError, match=message):
        lm_mesh.placed(shapes, lm_mesh.mesh_of("tensor=8"), "float32")
    places = lm_mesh.placed(shapes, lm_mesh.mesh_of("fsdp=4,tensor=2"), "float32")
    kernel = places["layers"]["self_attn"]["o_proj"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "tensor", "fsdp")
    assert places["norm"]["scale"].sharding.is_fully_replicated


@eight_devices
def test_a_run_goes_on_with_its_own_settings_only(model, text, whole):
    with pytest.raises(SystemExit, match=r"--rate: .* was started with 0.03, and now it is 0.01"):
        train(model, text, whole, "--mesh", MESH, "--rate", "0.01")
    other = text.with_name("other.txt")
    other.write_text(text.read_text()[::-1])
    with pytest.raises(SystemExit, match=r"--data: .* was started with \w+, and now it is \w+"):
        train(model, other, whole, "--mesh", MESH)


def test_models_that_do_not_fit_are_named(model, text, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(model, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["more"])
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(SystemExit, match=r"its tokenizer has 65 tokens, and config\.json has"):
        train(folder, text, tmp_path / "out")
    (folder / "config.json").unlink()
    with pytest.raises(SystemExit, match=r"other: no config\.json in it"):
        train(folder, text, tmp_path / "out")


# --- metrics -----------------------------------------------------------------------------------


def test_lines_and_events_say_how_it_goes(monkeypatch, tmp_path, capsys):
    events = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            events.append((Path(folder).name, purge_step))

        def add_scalar(self, name, value, step):
            events.append((name, value, step))

        def close(self):
            events.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setattr(lm_metrics, "peak", lambda: 1e12)
    options = {"tokens": 64, "flops": 1e6, "rate": lambda step: 0.5 * step, "tensorboard": True}
    with lm_metrics.Log(tmp_path, 0, **options) as log:
        log.add(1, {"loss": jnp.float32(2.5)})
        log.flush(1)
        log.add(2, {"loss": jnp.float32(2.25)})
        log.flush(2, 3.0)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step     1  loss 2.5000"
    assert re.fullmatch(
        r"step     2  loss 2.2500  validation 3.0000  [\d,]+ tokens/s  MFU .*%", second
    )
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[:2] == [",".join(lm_metrics.COLUMNS), "1,2.5,,0.0,,,"]
    assert lines[2].startswith("2,2.25,,0.5,3.0,")
    assert events[0] == ("tensorboard", 1)
    assert ("validation", 3.0, 2) in events
    assert events[-1] == "closed"

    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match="--tensorboard: tensorboardX is missing"):
        lm_metrics.Log(tmp_path, 0, **options)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_numbers_that_are_not_finite_end_the_run(name, tmp_path):
    options = {"tokens": 64, "flops": 1e6, "rate": lambda step: 0.5 * step}
    with lm_metrics.Log(tmp_path, 0, **options) as log:
        log.add(1, {"loss": jnp.float32(2.5), "grad_norm": jnp.float32(1)})
        log.add(
            2, {"loss": jnp.float32(2.5), "grad_norm": jnp.float32(1), name: jnp.float32("nan")}
        )
        message = f"step 2: {name} is nan. Pass a lower --rate, now 0.5 at this step, or --clip 1"
        with pytest.raises(ValueError, match=message):
            log.flush(2)


@pytest.mark.usefixtures("on_a_cpu")
def test_flops_are_those_that_the_compiler_counts():
    wide = {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 512}
    network = llama.from_config(CONFIG | wide)  # of a scan the compiler counts one layer
    ids = jax.ShapeDtypeStruct((1, 32), jnp.int32)
    params = jax.eval_shape(network.init, jax.random.key(0), ids)["params"]
    lora_params = jax.eval_shape(lambda params: lora_jax.lorafy(params, 2), params)

    def loss(lora_params, ids):
        apply = lora_jax.lora(lambda params, ids: network.apply({"params": params}, ids))
        return apply(lora_params, ids).sum()

    compiled = jax.jit(lora_jax.value_and_grad(loss)).lower(lora_params, ids).compile()
    counted = compiled.cost_analysis()["flops"] / 32
    assert 0.95 < lm_metrics.flops_per_token(network, lora_params, 32) / counted < 1.05


if __name__ == "__main__":
    {f.__name__: f for f in (run_until_killed, run_each)}[sys.argv[1]](*sys.argv[2:])
