"""Continuous batching over a bank: every prompt gets what its adapter alone gives it."""

import dataclasses
import json
import random
import threading

import jax
import numpy as np
import pytest
import serve_many
from helpers import compilations, tolerance
from serving import Request, Server
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

import lora_jax
from lora_jax import Adapter, LoraParams
from lora_jax.io import hf, peft, safetensors
from lora_jax.many import AdapterBank
from lora_jax.recipes.models import llama

pytestmark = pytest.mark.usefixtures("standard_promotion")

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
SIZE, STOPS = 20, range(58, 64)
DEPTH = 20  # of sums that follow each other: eight a layer, and those around the layers


class Tiny:
    """A small Llama that says many different things, and adapters of it."""

    def __init__(self):
        self.model = llama.from_config(CONFIG, scan_layers=True)
        params = jax.jit(self.model.init)(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
        tripled = {True: np.float32(3), False: np.float32(1)}
        self.params = jax.tree.map(lambda x: np.asarray(x) * tripled[x.ndim > 1], params)
        self.layout = lora_jax.layout_of(self.plain, self.params, np.zeros((1, 8), np.int32))
        self.like = self.lorafy(3)
        self.base_alone = jax.jit(self.plain)
        self.adapted = jax.jit(lora_jax.lora(self.plain))

    def plain(self, params, ids):
        return self.model.apply({"params": params}, ids)

    def lorafy(self, rank):
        targets = ".*(q|v|down)_proj/kernel"
        return lora_jax.lorafy(self.params, rank, targets=targets, layout=self.layout)

    def adapter(self, seed, std=0.5):
        """In NumPy, so that nothing compiles."""
        rng = np.random.default_rng(seed)

        def drawn(x):
            return rng.normal(0, std, x.shape).astype(x.dtype) if x.ndim else np.float32(0.5)

        return jax.tree.map(drawn, self.like.adapter)

    def bank(self, slots, adapters, **options):
        bank = AdapterBank(self.like, slots, **options)
        for name, adapter in adapters.items():
            bank.add(name, adapter)
        return bank

    def server(self, bank, **options):
        options = {"rows": 3, "size": SIZE, "lengths": (8,), "stop": STOPS, **options}
        server = Server(self.model, bank, **options)
        server.warm_up()
        return server

    def check(self, done, adapter, stops=STOPS):
        """That a request came to what its adapter alone comes to, and ended where it ends."""
        prompt, _, max_new = done.request
        ids = np.zeros((1, SIZE), np.int32)
        ids[0, : len(prompt) + len(done.tokens)] = [*prompt, *done.tokens]
        if adapter is None:
            logits = self.base_alone(self.params, ids)
        else:
            logits = self.adapted(LoraParams(self.params, adapter), ids)
        logits = np.asarray(logits[0], np.float64)[len(prompt) - 1 :]
        largest, count = logits.max(-1), len(done.tokens)
        # Each way is one rounding off the exact one; tokens that are likely alike may be either.
        allowed = 2 * tolerance(depth=DEPTH) * np.abs(logits).max()
        assert done.error is None
        at = np.arange(count)
        assert (largest[:count] - logits[at, done.tokens] <= allowed).all()
        assert not set(done.tokens) & set(stops)
        if count < max_new:
            assert largest[count] - logits[count, list(stops)].max() <= allowed
        logprobs = logits[at, done.tokens] - np.log(np.exp(logits[:count]).sum(-1))
        np.testing.assert_allclose(done.logprobs, logprobs, rtol=0, atol=allowed)


@pytest.fixture(scope="module")
def tiny():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return Tiny()


def prompts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 64, rng.integers(1, 9)).tolist() for _ in range(count)]


@pytest.mark.parametrize("donate", [True, False])
def test_200_prompts_over_64_adapters_that_come_and_go(tiny, donate):
    now = {f"a{k}": tiny.adapter(k) for k in range(64)}
    replacing = [tiny.adapter(100 + k) for k in range(24)]
    adding = {f"b{k}": tiny.adapter(200 + k) for k in range(24)}
    history = {name: [(0, adapter)] for name, adapter in now.items()}  # from which step on
    bank = tiny.bank(8, now, donate=donate)
    server = tiny.server(bank, rows=10, lengths=(4, 8))
    draw = random.Random(1)
    todo = prompts(200)
    waiting, pending, requests, done = list(range(200)), {}, {}, []

    with compilations() as compiled:
        while waiting or pending:
            if waiting and server.steps % 4 == 0:  # they come little by little
                for k in waiting[:8]:
                    name = None if k % 9 == 8 else draw.choice(list(bank))
                    n = server.submit(Request(todo[k], name, draw.randint(1, 12)))
                    pending[n] = requests[n] = name
                del waiting[:8]
            done += (ended := server.step())
            for one in ended:
                del pending[one.number]
            idle = [name for name in bank if name not in pending.values()]
            if idle and replacing and server.steps % 3 == 0:
                name = draw.choice(idle)
                bank.add(name, replacing.pop(), replace=True)
                history[name].append((server.steps, bank[name].adapter))
            if idle and adding and server.steps % 3 == 1:
                bank.remove(draw.choice(idle))
                name, adapter = adding.popitem()
                bank.add(name, adapter)
                history[name] = [(server.steps, adapter)]
    assert compiled == []
    assert sorted(one.number for one in done) == list(range(200))
    assert server.peak == 10
    assert len(adding) < 12
    assert len(replacing) < 12
    assert len({name for name in requests.values() if name}) > 50
    assert len({tuple(one.tokens) for one in done}) > 100
    assert 20 < sum(len(one.tokens) < one.request.max_new for one in done) < 180
    assert bank.stats.evictions > 20
    assert bank.stats.hits > 5
    assert server.tokens == sum(len(one.tokens) for one in done)
    for one in done:
        name = one.request.adapter
        versions = [x for step, x in history.get(name, []) if step <= one.started]
        tiny.check(one, versions[-1] if name else None)
    assert "8 slots: 0 in use" in repr(bank)


def test_another_thread_may_change_the_bank(tiny):
    kept = {f"a{k}": tiny.adapter(k) for k in range(6)}
    bank = tiny.bank(3, kept, donate=True)
    server = tiny.server(bank)
    for k, prompt in enumerate(prompts(40)):
        server.submit(Request(prompt, f"a{k % 6}", 6))
    is_over = threading.Event()
    others = [tiny.adapter(50 + k) for k in range(4)]
    changes = []

    def change():
        for k in range(10_000):
            if is_over.is_set():
                return
            try:
                bank.add(f"b{k}", others[k % 4])
                bank.acquire(f"b{k}")
                bank.release(f"b{k}")
                changes.append(k)
            except RuntimeError:  # all slots are in use
                pass
            bank.remove(f"b{k}")

    thread = threading.Thread(target=change)
    thread.start()
    try:
        done = []
        while len(done) < 40:
            try:
                done += server.step()
            except RuntimeError as error:  # they had the last slot for a moment
                assert "waits for a slot" in str(error)  # noqa: PT017
    finally:
        is_over.set()
        thread.join()
    for one in done:
        tiny.check(one, kept[one.request.adapter])
    assert changes


# --- whose turn it is --------------------------------------------------------------------------


def started(server, requests):
    """The numbers of requests in the order in which their turn came."""
    numbers = [server.submit(request) for request in requests]
    done = list(server.run())
    assert sorted(one.number for one in done) == numbers
    return [one.number for one in sorted(done, key=lambda one: (one.started, one.number))], done


def test_it_is_first_come_first_served_where_there_are_slots(tiny):
    bank = tiny.bank(3, {f"a{k}": tiny.adapter(k) for k in range(9)})
    server = tiny.server(bank, stop=[])
    requests = [Request(p, f"a{k % 9}", 1 + k % 5) for k, p in enumerate(prompts(30))]
    order, done = started(server, requests)
    assert order == list(range(30))
    steps = [one.started for one in sorted(done)]
    assert steps == sorted(steps)


@pytest.mark.parametrize("patience", [0, 3, 8])
def test_who_waits_for_a_slot_is_passed_so_often_and_no_more(tiny, patience):
    bank = tiny.bank(1, {"hot": tiny.adapter(0), "cold": tiny.adapter(1)})
    server = tiny.server(bank, patience=patience, stop=[])
    names = ["hot", "cold", *["hot", "hot", "hot", None] * 10]
    requests = [Request([1, 2], name, 3 + k % 4) for k, name in enumerate(names)]
    _, done = started(server, requests)
    of = {one.number: one for one in done}
    passed = [n for n in range(2, 42) if of[n].started < of[1].started]
    assert passed == list(range(2, 2 + patience))
    for one in done:
        name = one.request.adapter
        tiny.check(one, None if name is None else bank[name].adapter, stops=[])


def test_more_adapters_than_slots_all_have_their_turn(tiny):
    adapters = {f"a{k}": tiny.adapter(k) for k in range(12)}
    bank = tiny.bank(2, adapters)
    server = tiny.server(bank, patience=4)
    draw = random.Random(0)
    requests = [Request(p, draw.choice([*adapters, "a0", "a0"]), 5) for p in prompts(60)]
    _, done = started(server, requests)
    for one in done:
        tiny.check(one, adapters[one.request.adapter])
    assert server.peak > 2  # rows share an adapter


# --- what fails --------------------------------------------------------------------------------


def test_a_removed_adapter_fails_its_own_requests_only(tiny):
    adapters = {f"a{k}": tiny.adapter(k) for k in range(3)}
    bank = tiny.bank(2, adapters)
    server = tiny.server(bank)
    for k, prompt in enumerate(prompts(12)):
        server.submit(Request(prompt, f"a{k % 3}", 4))
    bank.remove("a1")
    done = list(server.run())
    assert len(done) == 12
    for one in done:
        if one.request.adapter == "a1":
            assert one.error.startswith("AdapterBank.acquire: there is no adapter 'a1': add it.")
            assert one.tokens == []
        else:
            tiny.check(one, adapters[one.request.adapter])


def test_an_adapter_that_overflows_fails_its_own_requests_only(tiny):
    adapters = {"good": tiny.adapter(0), "bad": tiny.adapter(1, std=1e30)}
    server = tiny.server(tiny.bank(2, adapters))
    for k in range(8):  # the bad ones are longer: nothing of theirs is left in the row
        server.submit(Request([1, 2] * (1 if k % 2 else 4), ["bad", "good"][k % 2], 4))
    done = list(server.run())
    assert len(done) == 8
    for one in done:
        if one.request.adapter == "bad":
            assert "the logits of adapter 'bad' are not finite" in one.error
        else:
            tiny.check(one, adapters["good"])


def test_slots_that_others_hold_are_an_error_and_no_endless_wait(tiny):
    adapters = {"a": tiny.adapter(0), "b": tiny.adapter(1)}
    bank = tiny.bank(1, adapters)
    server = tiny.server(bank)
    bank.acquire("b")
    server.submit(Request([1], "a", 2))
    server.submit(Request([1], "gone", 2))
    with pytest.raises(RuntimeError, match=r"'a' waits for a slot.* 1 in use.*: release some"):
        list(server.run())
    bank.release("b")
    first, second = sorted(server.run())
    tiny.check(first, adapters["a"])
    assert "no adapter 'gone'" in second.error


BAD_REQUESTS = [
    (Request([], None, 4), ValueError, "the prompt has 0 tokens, expected 1 to 8"),
    (Request([1] * 9, None, 4), ValueError, "the prompt has 9 tokens, expected 1 to 8: shorten"),
    (Request([1] * 8, None, 13), ValueError, "max_new=13, expected 1 to 12: a row has room for 20"),
    (Request([1], None, 0), ValueError, "max_new=0, expected 1 to 19"),
    (Request([1, 64], None, 4), ValueError, "the prompt has the token 64, expected 0 to 63"),
    (Request([1, -1], None, 4), ValueError, "the prompt has the token -1, expected 0 to 63"),
    (Request([1], 3, 4), TypeError, "adapter=3: expected a name, or None"),
]


def test_what_does_not_fit_is_refused_up_front(tiny):
    server = Server(tiny.model, tiny.bank(1, {}), rows=1, size=SIZE, lengths=(8,))
    for request, kind, message in BAD_REQUESTS:
        with pytest.raises(kind, match=message):
            server.submit(request)
    assert list(server.run()) == []
    for wrong in ({"rows": 0}, {"patience": -1}, {"lengths": ()}, {"lengths": (0, 4)}, {"size": 7}):
        options = {"rows": 1, "size": SIZE, "lengths": (8,)} | wrong
        with pytest.raises(ValueError, match=f"Server: .*{next(iter(wrong))}="):
            Server(tiny.model, tiny.bank(1, {}), **options)


# --- the command -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A model whose tokens are the words ``w0`` to ``w63``, and four adapters of it.

    Beside two that are alike, one of rows alone, and a sum, whose rank is more than some weights
    have.
    """
    folder = tmp_path_factory.mktemp("model")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        hf.save(folder / "tiny", tiny.params, "llama", config=CONFIG)
        tokenizer = Tokenizer(WordLevel({f"w{k}": k for k in range(64)}, "w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.save(str(folder / "tiny" / "tokenizer.json"))
        first, second = (LoraParams(tiny.params, tiny.adapter(k)) for k in range(2))
        peft.save(folder / "first", first, names=hf.FAMILIES["llama"].names)
        safetensors.save(folder / "second.safetensors", second)
        add = jax.jit(lambda x, y: x + y + x + y)
        total = LoraParams(tiny.params, add(first.adapter, second.adapter))
        safetensors.save(folder / "sum.safetensors", total)
        rows = lora_jax.lorafy(tiny.params, targets=[], rows={"embed_tokens/embedding": [3, 7]})
        b = np.float32(0.1)
        factors = {k: dataclasses.replace(f, b=f.b + b) for k, f in rows.adapter.factors.items()}
        safetensors.save(folder / "rows.safetensors", LoraParams(tiny.params, Adapter(factors)))
    return folder


@pytest.fixture
def compiled_in_run(monkeypatch):
    """The programs that are compiled after the warm-up, a list for each run of a server."""
    run, runs = Server.run, []

    def counted(server):
        with compilations() as compiled:
            yield from run(server)
        runs.append(compiled)

    monkeypatch.setattr(Server, "run", counted)
    return runs


def test_the_command_serves_made_up_adapters(folder, capsys, compiled_in_run):
    serve(folder, "--requests", "30", "--adapters", "12", "--check", "30")
    printed = capsys.readouterr().out
    assert "12 adapters of rank 8 with random B" in printed
    assert "requests      30\n" in printed
    assert "rows in use   8 at most" in printed
    assert compiled_in_run == [[]]
    assert "checked       30 requests" in printed
    assert "tokens: equal to those of each adapter alone" in printed


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
@pytest.mark.filterwarnings("ignore:.*on a base of another precision:UserWarning")
def test_the_command_serves_adapters_and_prompts_from_files(
    folder, tmp_path, capsys, compiled_in_run, dtype
):
    names = ["first", "second", None, "sum", "rows"]
    lines = [
        {"prompt": f"w{k} w{k + 1} w7", "adapter": names[k % 5], "max_new": 1 + k % 4}
        for k in range(10)
    ]
    del lines[2]["adapter"], lines[3]["max_new"]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    files = [f"first={folder / 'first'}"]
    files += [f"{name}={folder / name}.safetensors" for name in ("second", "sum", "rows")]
    flags = [x for file in files for x in ("--adapter", file)]
    serve(folder, *flags, "--prompts", str(path), "--check", "10", "--dtype", dtype, "--slots", "1")
    printed = capsys.readouterr().out
    assert "4 adapters: first, second, sum, rows" in printed
    assert "checked       10 requests" in printed
    assert compiled_in_run == [[]]
    assert printed.count("none") == 2


def serve(folder, *flags):
    serve_many.main(["--model", str(folder / "tiny"), "--lengths", "16", *flags])


def test_a_completion_of_another_adapter_is_found(folder, monkeypatch):
    own = AdapterBank.acquire
    monkeypatch.setattr(AdapterBank, "acquire", lambda bank, name: own(bank, name) * 0)
    with pytest.raises(
        SystemExit, match=r"--check: new token \d+ of request \d+ is \d+, but .* alone gives \d+"
    ):
        serve(folder, "--requests", "8", "--check", "8")


BAD_ARGUMENTS = [
    (["--adapter", "a"], "--adapter a: expected NAME=PATH, each name once"),
    (["--adapter", "a=nowhere"], "--adapter a=nowhere: no such file or folder"),
    (
        ["--lengths", "2"],
        r"prompt 0: the prompt has \d tokens, expected 1 to 2: .*--lengths is at most 2",
    ),
    (["--prompts", "nowhere.jsonl"], "--prompts nowhere.jsonl: no such file"),
    (["--model", "nowhere"], "nowhere"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_ARGUMENTS, ids=lambda x: str(x)[:30])
def test_arguments_that_do_not_fit_are_one_message(folder, flags, message):
    with pytest.raises(SystemExit, match=f"serve_many: .*{message}"):
        serve(folder, *flags)


def test_a_model_without_its_configuration_is_named(folder, tmp_path):
    (tmp_path / "model.safetensors").symlink_to(folder / "tiny" / "model.safetensors")
    with pytest.raises(SystemExit, match=r"no config\.json in it"):
        serve_many.main(["--model", str(tmp_path)])


BAD_LINES = [
    ("", "the file contains no prompts"),
    ('{"prompt": "w1"', "line 2: not JSON"),
    ('["w1"]', r"line 2: expected one object per line, .* got \[\"w1\"\]"),
    ('{"adapter": "random0"}', "line 2: expected one object per line"),
    ('{"prompt": "w1", "max": 3}', "line 2: expected one object per line"),
    ('{"prompt": 3}', "line 2, key 'prompt': expected str, got 3"),
    ('{"prompt": "w1", "max_new": true}', "line 2, key 'max_new': expected int, got True"),
    ('{"prompt": "w1", "adapter": 3}', "line 2, key 'adapter': expected str, got 3"),
    ('{"prompt": "w1", "adapter": "rendom0"}', "line 2: there is no adapter 'rendom0' among"),
    ('{"prompt": " "}', "line 2: the prompt has 0 tokens"),
    ('{"prompt": "w1", "max_new": 0}', "line 2, key 'max_new': expected at least 1, got 0"),
    (r'{"prompt": "\ud800 w1"}', "line 2: TextInputSequence must be str"),
    (b"\xff", "not UTF-8 text"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=lambda x: str(x)[:30])
def test_bad_lines_are_named(folder, tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\n" + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(SystemExit, match=message):
        serve(folder, "--prompts", str(path), "--adapters", "2")


def test_a_failure_of_the_device_is_not_taken_for_a_wait(tiny, monkeypatch):
    bank = tiny.bank(1, {"a": tiny.adapter(0)})
    server = tiny.server(bank)
    server.submit(Request([1, 2], "a", 3))

    def fails(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(bank, "_copy", fails)
    monkeypatch.setattr(bank, "_overwrite", fails)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        server.step()


def test_prompts_that_end_at_once_were_at_work(tiny):
    server = tiny.server(tiny.bank(1, {"a": tiny.adapter(0)}))
    prompt = [1, 2]
    server.submit(Request(prompt, "a", 1))
    prompt.extend([3] * 100)  # the caller's own
    (one,) = server.run()
    assert len(one.request.prompt) == 2
    assert server.peak == 1
