"""A bank of adapters: what comes out of its slots is what each adapter computes alone."""

import dataclasses
import functools
import gc
import random
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import jit_rows, rows_like
from helpers import (
    assert_close,
    bits,
    compilations,
    dict_case,
    drawn,
    normal,
    randomize_b,
    scan_case,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_jax
from lora_jax import Adapter, LoraParams
from lora_jax._weights.paths import flatten
from lora_jax.io import orbax, peft, safetensors
from lora_jax.many import AdapterBank

EVERY = ["w1", "layers/0/w2"]  # the targets of dict_case


def made(case, seed, rank, **options):
    options = {"alpha": 2.0 + seed, "key": jax.random.key(seed), "init": drawn, **options}
    return randomize_b(lora_jax.lorafy(case.params, rank, **options), seed + 100)


@functools.cache
def one_of_some(n):
    targets = (EVERY, EVERY, ["w1"], ["layers/0/w2"])
    return made(dict_case(), n, (4, 2, 1)[n % 3], targets=targets[n % 4])


def some(count=3):
    return dict_case(), {f"a{n}": one_of_some(n) for n in range(count)}


def like(case, rank=4, **options):
    options = {"targets": EVERY, "init": drawn, **options}
    return lora_jax.lorafy(case.params, rank, **options)


def filled():
    """A bank of two adapters, in none of its two slots."""
    case, adapters = some(2)
    bank = AdapterBank(like(case), slots=2)
    for name, p in adapters.items():
        bank.add(name, p)
    return case, adapters, bank


def merged(params, adapter):
    """The weights by path in float64, by the definition; axes in the order batch, in, out."""
    weights = {path: np.asarray(x, np.float64) for path, x in flatten(params)[0].items()}
    weights |= {path: np.asarray(x, np.float64) for path, x in adapter.full.items()}
    for path, f in adapter.factors.items():
        w, batch = weights[path], weights[path].shape[: f.layout.count("b")]
        a = np.asarray(f.a, np.float64).reshape(*batch, -1, f.rank)
        b = np.asarray(f.b, np.float64).reshape(*batch, f.rank, -1)
        w = weights[path] = w + float(f.scale) * (a @ b).reshape(w.shape)
        if f.magnitude is not None:
            weights[path] = np.asarray(f.magnitude, np.float64) * w / np.linalg.norm(w, axis=0)
    return weights


def alone(case, adapters, names, x):
    """Each row by itself, by its adapter merged, in float64: the oracle for ``dict_case``."""
    found = []
    for name, row in zip(names, np.asarray(x, np.float64), strict=True):
        adapter = Adapter({}) if name is None else adapters[name].adapter
        w = merged(case.params, adapter)
        found.append(np.tanh(row @ w["w1"] + w["b1"]) @ w["layers/0/w2"])
    return np.stack(found)


def broken(lora_params, key, field, value=np.nan):
    f = lora_params.adapter.factors[key]
    x = np.array(getattr(f, field))
    x[(0,) * x.ndim] = value
    factors = lora_params.adapter.factors | {key: dataclasses.replace(f, **{field: x})}
    return dataclasses.replace(
        lora_params, adapter=dataclasses.replace(lora_params.adapter, factors=factors)
    )


# --- serving -----------------------------------------------------------------------------------


def test_rows_are_those_of_the_single_adapters():
    case, adapters = some(5)
    bank = AdapterBank(like(case), slots=3)
    for name, lora_params in adapters.items():
        bank.add(name, lora_params)
    apply = jit_rows(case.fn)
    for names in (["a0", None, "a1", "a0"], ["a2", "a3", "a4", "a4"], ["a1", "a0", None, "a3"]):
        x = rows_like(case.x, 4)
        with bank.using(names) as (lora_params, ids):
            assert lora_params.base is case.params
            found = apply(lora_params, x, lora_ids=ids)
        assert ids.dtype == np.int32
        assert [None if k < 0 else bank.slots[k] for k in ids] == names
        assert_close(found, alone(case, adapters, names, x))


COUNTS = {"prompts": 60, "adapters": 24, "versions": 40, "slots": 6, "width": 8}
MANY = {"prompts": 200, "adapters": 64, "versions": 96, "slots": 8, "width": 10}


@pytest.mark.parametrize(
    ("donate", "counts"),
    [
        pytest.param(False, COUNTS, id="60 prompts"),
        pytest.param(True, COUNTS, id="60 prompts, donated"),
        pytest.param(False, MANY, id="200 prompts", marks=pytest.mark.long),
        pytest.param(True, MANY, id="200 prompts, donated", marks=pytest.mark.long),
    ],
)
def test_prompts_over_more_adapters_than_slots_compile_nothing(donate, counts):
    """Continuous batching; adapters come, change and go meanwhile."""
    case, rng = scan_case(), random.Random(int(donate))
    subsets = ("all-linear", "layers/Dense_1/kernel", "layers/.*Attention.*/kernel")
    kinds = [
        lora_jax.lorafy(case.params, rank, targets=targets, init=drawn)
        for rank, targets in zip((4, 2, 1), subsets, strict=True)
    ]

    def new(seed):
        numbers = np.random.default_rng(seed)
        draw = lambda x: numbers.normal(0, 0.2, x.shape).astype(x.dtype)  # noqa: E731
        return jax.tree.map(draw, kinds[seed % 3].adapter)

    count, width = counts["prompts"], counts["width"]
    versions = [new(seed) for seed in range(counts["versions"])]
    room = lora_jax.lorafy(case.params, 4, targets=["all-linear", *subsets[1:]], init=drawn)
    bank = AdapterBank(room, slots=counts["slots"], donate=donate)
    now = {f"a{n}": versions[n] for n in range(counts["adapters"])}
    prompts = np.asarray(rows_like(case.x, count))
    apply = jit_rows(case.fn)
    apply(bank.lora_params, prompts[:width], lora_ids=np.full(width, -1, np.int32))
    ready = apply._cache_size()

    fresh, waiting, served, done = iter(versions[len(now) :]), [*range(count)], {}, []
    running = [None] * width  # of each row: the prompt, its adapter's name, steps left
    with compilations() as compiled:
        for name, lora_params in now.items():
            bank.add(name, lora_params)
        while waiting or any(running):
            for row in range(width):
                if running[row] is None and waiting:
                    name = rng.choice(list(now)) if rng.random() < 0.95 else None
                    if name is not None:
                        try:
                            slot = bank.acquire(name)
                        except RuntimeError:  # every slot is in use: later
                            continue
                        assert bank.slots[slot] == name
                    n = waiting.pop()
                    served[n] = name, now.get(name)
                    running[row] = [n, name, rng.randint(1, 4)]
            for _ in range(2):  # others come and go while these are in flight
                name, is_new = rng.choice(list(now)), rng.random() < 0.5
                if any(r and r[1] == name for r in running):
                    with pytest.raises(RuntimeError, match=f"{name!r} is in use"):
                        bank.remove(name)
                elif (version := next(fresh, None)) is not None:
                    if is_new:
                        bank.remove(name)
                        del now[name]
                        name += "'"
                    bank.add(name, version, replace=not is_new)
                    now[name] = version
            batch = np.stack([prompts[r[0] if r else 0] for r in running])
            slots = {name: k for k, name in enumerate(bank.slots)}
            ids = [slots[r[1]] if r and r[1] is not None else -1 for r in running]
            y = np.asarray(apply(bank.lora_params, batch, lora_ids=np.array(ids, np.int32)))
            for row, r in enumerate(running):
                if r is None:
                    continue
                done.append((r[0], y, row))
                r[2] -= 1
                if not r[2]:
                    if r[1] is not None:
                        bank.release(r[1])
                    running[row] = None
    assert compiled == []
    assert apply._cache_size() == ready
    assert len(served) == count
    assert len({name for name, _ in served.values()}) > count / 4
    assert next(fresh, None) is None
    assert bank.stats.evictions > count / 4
    assert len(bank) == counts["adapters"]

    expected, plain, tree = {}, jax.jit(case.fn), flatten(case.params)[1]
    for n, (_, adapter) in served.items():
        weights = merged(case.params, adapter or Adapter({})).values()
        params = jax.tree.unflatten(tree, [x.astype(np.float32) for x in weights])
        expected[n] = np.asarray(plain(params, prompts[n][None]))
    assert len(done) > 2 * count  # steps of all prompts, before, while and after others were loaded
    for n, y, row in done:
        assert_close(y[row : row + 1], expected[n], depth=26)  # 3 layers of 8 sums, and 2


def test_threads_share_a_bank():
    case, adapters = some(12)
    bank = AdapterBank(like(case), slots=8, donate=True)
    for name, lora_params in adapters.items():
        bank.add(name, lora_params)
    apply = jit_rows(case.fn)
    x = rows_like(case.x, 3)
    expected = {name: alone(case, adapters, [name] * 3, x) for name in adapters}
    apply(bank.lora_params, x, lora_ids=np.zeros(3, np.int32))
    failures = []

    def serve(seed):
        rng = random.Random(seed)
        try:
            for n in range(30):
                names = rng.choices(list(adapters), k=2)
                with bank.using([*names, None]) as (lora_params, ids):
                    y = apply(lora_params, x, lora_ids=ids)
                for row, name in enumerate(names):
                    assert_close(np.asarray(y)[row], expected[name][row])
                bank.add(f"{seed}.{n}", adapters["a0"])
                bank.remove(f"{seed}.{n}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(bank) == 12
    assert "0 in use, 8 idle, 0 empty" in repr(bank)


# --- which adapter is where --------------------------------------------------------------------


class Model:
    """The same in lists: who is in which slot, who uses it, and when it was used last."""

    def __init__(self, slots, host):
        self.slots, self.host = [None] * slots, host
        self.values, self.pins, self.order = {}, {}, []  # order: the oldest use first
        self.stats = [0, 0, 0, 0]

    def use(self, name):
        self.order = [*(n for n in self.order if n != name), name]

    def add(self, name, value, replace):
        if name in self.values:
            if not replace:
                return ValueError
            if self.pins[name]:
                return RuntimeError
        else:
            if len(self.values) == self.host:
                self.remove(next(n for n in self.order if not self.pins[n]))
                self.stats[3] += 1
            self.pins[name] = 0
            self.use(name)
        self.values[name] = value
        return None

    def remove(self, name):
        if name not in self.values:
            return KeyError
        if self.pins[name]:
            return RuntimeError
        del self.values[name], self.pins[name]
        self.order.remove(name)
        self.slots = [None if n == name else n for n in self.slots]
        return None

    def acquire(self, names):
        names = list(dict.fromkeys(names))
        if any(name not in self.values for name in names):
            return KeyError
        new = [name for name in names if name not in self.slots]
        empty = [k for k, name in enumerate(self.slots) if name is None]
        idle = [n for n in self.order if n in self.slots and n not in names and not self.pins[n]]
        if len(new) > len(empty) + len(idle):
            return RuntimeError
        for name in new:
            k = empty.pop(0) if empty else self.slots.index(idle[0])
            if self.slots[k] is not None:
                idle.pop(0)
                self.stats[2] += 1
            self.slots[k] = name
            self.stats[1] += 1
        self.stats[0] += len(names) - len(new)
        for name in names:
            self.pins[name] += 1
            self.use(name)
        return None

    def release(self, name):
        if name not in self.values:
            return KeyError
        if not self.pins[name]:
            return ValueError
        self.pins[name] -= 1
        self.use(name)
        return None


def operation_of(rng, model):
    """An operation that mostly can be done."""
    name = rng.choice("abcdef")
    used = [n for n, pins in model.pins.items() if pins]
    match rng.choices(["add", "remove", "acquire", "release", "using", "look"], [3, 1, 4, 4, 3, 1]):
        case ["add"]:
            return "add", name, rng.randint(1, 99), rng.random() < 0.5
        case ["release"] if used and rng.random() < 0.9:
            return "release", rng.choice(used)
        case ["using"]:
            return "using", rng.choices("abcdef", k=rng.randint(0, 3))
        case ["look"]:
            return ("look",)
        case [operation]:
            return operation, name
    return None


@settings(max_examples=12)
@given(st.integers(0, 2**32), st.booleans(), st.sampled_from([None, 5]))
def test_any_order_of_operations_is_as_in_lists(seed, donate, host):
    params = {"w": np.ones((2, 2), np.float32)}
    a, b = np.ones((2, 1), np.float32), np.ones((1, 2), np.float32)

    def numbered(value):
        return Adapter({"w": lora_jax.Factors(a, b * value, float(value), "io")})

    def numbers(lora_params):
        f = lora_params.adapter.factors["w"]
        assert list(f.scale) == list(f.b[:, 0, 0])
        return np.asarray(f.scale).tolist()

    def run(operation, *args):
        if operation == "add":
            return bank.add(args[0], numbered(args[1]), replace=args[2])
        if operation == "look":
            return handed.append((bank.lora_params, contents()))
        if operation != "using":
            return getattr(bank, operation)(*args)
        with bank.using(args[0]) as (lora_params, ids):
            assert [model.slots[k] for k in ids] == args[0]
            assert numbers(lora_params) == contents()
        for name in dict.fromkeys(args[0]):
            model.release(name)
        return None

    def contents():
        return [model.values.get(name, 0) for name in model.slots]

    rng = random.Random(seed)
    bank = AdapterBank(LoraParams(params, numbered(0)), slots=3, donate=donate, host=host)
    model, handed = Model(3, host), []
    for _ in range(100):
        operation, *args = operation_of(rng, model)
        by_model = {"using": model.acquire, "look": lambda: None}
        names = [args] if operation == "acquire" else args
        if error := by_model.get(operation, getattr(model, operation, None))(*names):
            with pytest.raises(error):
                run(operation, *args)
        else:
            slot = run(operation, *args)
            assert slot == (model.slots.index(args[0]) if operation == "acquire" else None)
        assert list(bank.slots) == model.slots
        assert {name: float(bank[name].adapter.factors["w"].scale) for name in bank} == model.values
        assert list(bank.stats) == model.stats
    assert numbers(bank.lora_params) == contents()  # slots that are empty are zero
    for lora_params, then in () if donate else handed:  # what was given once is as it was
        assert numbers(lora_params) == then


def test_a_batch_that_does_not_fit_takes_nothing():
    case, adapters = some(4)
    bank = AdapterBank(like(case), slots=2)
    for name, lora_params in adapters.items():
        bank.add(name, lora_params)
    with bank.using(["a0"]):
        before = bank.slots, bank.stats, bits(bank.lora_params.adapter)
        for names in (["a1", "a2"], ["a0", "a1", "a2"]):
            with (
                pytest.raises(
                    RuntimeError,
                    match=r"using: 'a1', 'a2' would need 2 more of 2 slots, and 1 are free. "
                    r"In use, and how often: 'a0' \(1\). Release some",
                ),
                bank.using(names),
            ):
                pass
        with (
            pytest.raises(KeyError, match="using: there is no adapter 'a9'"),
            bank.using(["a1", "a9"]),
        ):
            pass
        assert (bank.slots, bank.stats, bits(bank.lora_params.adapter)) == before
        with bank.using(["a1", "a0", None]):
            with pytest.raises(RuntimeError, match=r"acquire: 'a2' .* 'a0' \(2\), 'a1' \(1\)"):
                bank.acquire("a2")
            assert "2 in use" in repr(bank)
    slot = bank.acquire("a2")
    assert bank.slots[slot] == "a2"
    with pytest.raises(RuntimeError, match="mix fewer adapters"), bank.using(adapters):
        pass


def test_a_block_that_fails_releases_what_it_used():
    case, adapters = some(1)
    bank = AdapterBank(like(case), slots=1)
    bank.add("a0", adapters["a0"])
    with pytest.raises(ZeroDivisionError), bank.using(["a0"]):
        _ = 1 / 0
    bank.remove("a0")
    assert bank.slots == (None,)


def test_what_using_gave_outlives_loads_within_its_block():
    case, adapters = some(3)
    bank = AdapterBank(like(case), slots=3, donate=True)
    for name, lora_params in adapters.items():
        bank.add(name, lora_params)
    with bank.using(["a0"]) as (first, _):
        kept = bits(first.adapter)
        with bank.using(["a1"]) as (second, _):
            bank.acquire("a2")
            assert bits(first.adapter) == kept
            assert bits(second.adapter) != kept
    assert bits(first.adapter) == kept
    seen = bank.lora_params
    bank.remove("a0")
    assert all(x.is_deleted() for x in jax.tree.leaves(seen.adapter))


def test_only_the_first_of_several_loads_copies_the_stack():
    case, adapters = some(3)
    bank = AdapterBank(like(case), slots=3)
    seen = bank.lora_params
    copies = []
    copy, bank._copy = bank._copy, lambda *args: copies.append(1) or copy(*args)
    for name, lora_params in adapters.items():
        bank.add(name, lora_params)
    with bank.using(adapters):
        pass
    assert len(copies) == 1
    assert not any(x.is_deleted() for x in jax.tree.leaves(seen.adapter))


# --- adapters come, change and go --------------------------------------------------------------


@pytest.mark.parametrize("donate", [False, True])
def test_other_rows_keep_their_bits_whatever_happens(donate):
    case, adapters = some(4)
    bank = AdapterBank(like(case), slots=3, donate=donate)
    for name in ("a0", "a1", "a2"):
        bank.add(name, adapters[name])
    slot, other = bank.acquire("a0"), bank.acquire("a1")
    bank.release("a1")
    x = rows_like(case.x, 3)
    apply = jit_rows(case.fn)
    ids = np.array([slot, -1, other], np.int32)

    def run():
        return np.asarray(apply(bank.lora_params, x, lora_ids=ids))

    first = run()
    bad = [
        (key, field, broken(adapters["a1"], key, field, value))
        for key, field, value in (
            ("w1", "a", np.nan),
            ("layers/0/w2", "b", np.inf),
            ("w1", "scale", -np.inf),
        )
    ]
    with compilations() as compiled:
        for key, field, lora_params in bad:
            for name in ("a1", "a2", "new"):
                with pytest.raises(
                    ValueError,
                    match=f"add: '{name}': {field} of '{key}' has NaNs or infinities",
                ):
                    bank.add(name, lora_params, replace=True)
            assert bits(run()) == bits(first)
        assert list(bank) == ["a0", "a1", "a2"]
    assert compiled == []
    bank.add("a1", adapters["a3"], replace=True)
    second = run()
    assert bits(second[:2]) == bits(first[:2])
    assert_close(second[2:], alone(case, adapters, ["a3"], np.asarray(x)[2:]))
    bank.remove("a1")
    third = run()
    assert bits(third[:2]) == bits(first[:2])
    np.testing.assert_array_equal(
        third[2], np.asarray(apply(bank.lora_params, x, lora_ids=np.full(3, -1, np.int32)))[2]
    )
    with pytest.raises(RuntimeError, match=r"remove: 'a0' is in use, 1 times: release it first"):
        del bank["a0"]
    with pytest.raises(RuntimeError, match=r"add: 'a0' is in use.*added by another name"):
        bank.add("a0", adapters["a1"], replace=True)
    assert bits(run()[:2]) == bits(first[:2])
    bank.release("a0")
    bank.add("a0", adapters["a1"], replace=True)
    assert_close(run()[:1], alone(case, adapters, ["a1"], np.asarray(x)[:1]))
    assert bits(run()[1]) == bits(first[1])


def test_the_bank_has_copies_of_its_own():
    case, adapters = some(1)
    host = jax.tree.map(np.array, adapters["a0"].adapter)
    bank = AdapterBank(like(case), slots=1)
    bank.add("a0", host)
    kept = bits(bank["a0"].adapter)
    for x in jax.tree.leaves(host):
        x[...] = 7
    assert bits(bank["a0"].adapter) == kept
    with pytest.raises(ValueError, match="read-only"):
        bank["a0"].adapter.factors["w1"].a[0, 0] = 1
    found = jax.jit(lora_jax.lora(case.fn))(bank["a0"], case.x)
    assert_close(found, alone(case, adapters, ["a0"] * len(case.x), case.x))
    with bank.using(["a0"]) as (lora_params, _):
        assert bits(jax.tree.map(lambda x: np.asarray(x)[0], lora_params.adapter)) == kept


def test_the_host_drops_what_was_used_least_recently():
    case, adapters = some(4)
    bank = AdapterBank(like(case), slots=1, host=2)
    bank.add("a0", adapters["a0"])
    bank.add("a1", adapters["a1"])
    with bank.using(["a0"]):
        bank.add("a2", adapters["a2"])
        assert list(bank) == ["a0", "a2"]
        bank.add("a3", adapters["a3"])  # not a0, which is in use
        assert list(bank) == ["a0", "a3"]
    bank.add("a0", adapters["a1"], replace=True)
    assert bank.stats == (0, 1, 0, 2)
    with pytest.raises(KeyError, match=r"acquire: there is no adapter 'a2': add it. Nearest: a"):
        bank.acquire("a2")


# --- what adapters may be ----------------------------------------------------------------------


def served(case, bank, name, x):
    with bank.using([name] * len(x)) as (lora_params, ids):
        return jit_rows(case.fn)(lora_params, x, lora_ids=ids)


def test_files_of_every_kind_come_in(tmp_path):
    case, adapters = some(3)
    names = {r"w1": "up", r"layers/0/w2": "down"}
    peft.save(tmp_path / "p", adapters["a0"], names=names, layout={".*": "io"})
    safetensors.save(tmp_path / "s", adapters["a1"])
    orbax.save(tmp_path / "o", adapters["a2"])
    bank = AdapterBank(like(case), slots=3)
    options = {"names": names, "layout": {".*": "io"}}
    bank.add("a0", peft.load(tmp_path / "p", case.params, **options))
    bank.add("a1", safetensors.load(tmp_path / "s", case.params))
    bank.add("a2", orbax.load(tmp_path / "o", case.params))
    x = rows_like(case.x, 3)
    with bank.using(adapters) as (lora_params, ids):
        found = jit_rows(case.fn)(lora_params, x, lora_ids=ids)
    assert_close(found, alone(case, adapters, list(adapters), x))
    bank.add("alone", safetensors.load(tmp_path / "s"))  # without its base
    assert_close(served(case, bank, "alone", x), alone(case, adapters, ["a1"] * 3, x))


def test_dora_beside_adapters_without_its_targets():
    case = dict_case()
    options = {"dora": True}
    adapters = {
        "both": made(case, 0, 3, targets=EVERY, **options),
        "one": made(case, 1, 2, targets="w1", **options),
    }
    for name, p in adapters.items():
        factors = {
            key: dataclasses.replace(f, magnitude=f.magnitude * 1.1)
            for key, f in p.adapter.factors.items()
        }
        adapters[name] = LoraParams(case.params, Adapter(factors))
    x = rows_like(case.x, 2)
    for keep in (True, False):
        start = like(case, dora=True)
        if not keep:
            factors = {
                k: dataclasses.replace(f, norm=None) for k, f in start.adapter.factors.items()
            }
            start = LoraParams(case.params, Adapter(factors))
        bank = AdapterBank(start, slots=2)
        for name, p in adapters.items():
            bank.add(name, p)
            expected = alone(case, adapters, [name] * 2, x)
            assert_close(served(case, bank, name, x), expected)
    with pytest.raises(
        ValueError, match="'layers/0/w2': whether there is a magnitude is False here and True"
    ):
        bank.add("plain", like(case))
    with pytest.raises(
        ValueError, match="'w1': whether there is a magnitude is True here and False there"
    ):
        AdapterBank(like(case)).add("dora", adapters["one"])


def test_leaves_trained_whole_parts_and_rows_of_tables():
    params = {
        "c": normal(0, (6, 9)),
        "bias": jnp.asarray(np.arange(9.0), jnp.float32),
        "embedding": normal(1, (8, 6)),
    }
    case = dataclasses.replace(
        dict_case(), params=params, fn=lambda p, x: p["embedding"][x] @ p["c"] + p["bias"][None]
    )
    targets, table = ["c[:, 0:3]", "c[:, 6:9]"], {"embedding": [1, 2, 5]}
    adapters = {
        "whole": made(case, 0, 2, targets=targets[0], full="bias"),
        "rows": made(case, 1, 1, targets=targets, rows=table),
    }
    p = adapters["whole"]
    adapter = dataclasses.replace(p.adapter, full={"bias": np.ones(9, np.float32)})
    adapters["whole"] = LoraParams(params, adapter)
    bank = AdapterBank(like(case, 2, targets=targets, full="bias", rows=table), rank=4)
    assert bank.lora_params.adapter.factors["c[:, 0:3]"].rank == 4
    x = np.array([1, 5, 7], np.int32)
    merge = jax.jit(lora_jax.merge)
    for name, p in adapters.items():
        bank.add(name, p)
        w = {path: np.asarray(leaf, np.float64) for path, leaf in merge(p).items()}
        expected = w["embedding"][x] @ w["c"] + w["bias"]
        assert_close(served(case, bank, name, x), expected)
    np.testing.assert_array_equal(bank["rows"].adapter.full["bias"], params["bias"])


def test_residual_adapters_have_a_base_of_their_own():
    case = dict_case()
    start = lora_jax.lorafy(case.params, 3, targets=EVERY, init="pissa")
    trained = LoraParams(start.base, jax.tree.map(lambda x: x * 1.1, start.adapter))
    bank = AdapterBank(start, slots=2)
    bank.add("a0", trained)
    own = dataclasses.replace(case, params=start.base)
    x = rows_like(case.x, 2)
    assert_close(served(own, bank, "a0", x), alone(own, {"a0": trained}, ["a0"] * 2, x))
    with pytest.raises(ValueError, match=r"'plain' and the bank are over different .*to_plain|One"):
        AdapterBank(like(case)).add("plain", start)
    with pytest.raises(ValueError, match=r"residual is True here and False there; .*to_plain"):
        AdapterBank(like(case)).add("alone", start.adapter)


def test_what_is_frozen_in_training_does_not_matter():
    case = dict_case()
    bank = AdapterBank(like(case), slots=1)
    adapters = {"a": made(case, 0, 2, targets=EVERY, freeze=("a",))}
    bank.add("a", adapters["a"])
    x = rows_like(case.x, 2)
    assert_close(served(case, bank, "a", x), alone(case, adapters, ["a", "a"], x))


@pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.long), "float8_e4m3fn"]
)
def test_a_bank_of_low_precision(dtype):
    case, adapters = some(2)
    bank = AdapterBank(like(case, full="b1"), slots=2, dtype=dtype)
    full = {"b1": np.full(40, 0.3, np.float32)}
    adapter = dataclasses.replace(adapters["a0"].adapter, full=full)
    adapters["a0"] = LoraParams(case.params, adapter)
    rounded = {}
    for name, p in adapters.items():
        bank.add(name, p)
        own = p.adapter
        cast = lambda x: np.asarray(x).astype(dtype).astype(np.float32)  # noqa: E731
        factors = {
            k: dataclasses.replace(f, a=cast(f.a), b=cast(f.b)) for k, f in own.factors.items()
        }
        rounded[name] = LoraParams(case.params, Adapter(factors, own.full))
        f = bank[name].adapter.factors["w1"]
        assert f.a.dtype == f.b.dtype == jnp.dtype(dtype)
        assert bank[name].adapter.full["b1"].dtype == np.float32  # or the base's would be rounded
        assert f.scale.dtype == np.float32
    x, dtype = rows_like(case.x, 2), jnp.dtype(dtype)
    for name in adapters:
        assert_close(served(case, bank, name, x), alone(case, rounded, [name] * 2, x))
    low = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), adapters["a1"].adapter)
    bank.add("low", low)  # of any dtype
    if dtype != jnp.bfloat16:
        with pytest.raises(ValueError, match=r"a of 'w1' goes up to 1e\+06, too large for float"):
            bank.add("large", broken(adapters["a1"], "w1", "a", 1e6))
    with pytest.raises(ValueError, match=r"a of '.*' is bfloat16, and the bank's float32: make"):
        AdapterBank(like(case)).add("low", low)


def test_like_needs_no_memory_of_its_own():
    case, adapters = some(2)
    for dora in (False, True):
        options = {"rank": 4, "targets": EVERY, "full": "b1", "dora": dora, "init": drawn}
        shapes = jax.eval_shape(lambda p, o=options: lora_jax.lorafy(p, **o), case.params)
        bank = AdapterBank(LoraParams(case.params, shapes.adapter), slots=2)
        one = AdapterBank(lora_jax.lorafy(case.params, **options), slots=2)
        assert bits(bank.lora_params.adapter) == bits(one.lora_params.adapter)
    bank = AdapterBank(LoraParams(case.params, like(case).adapter))
    bank.add("a0", adapters["a0"])
    x = rows_like(case.x, 2)
    assert_close(served(case, bank, "a0", x), alone(case, adapters, ["a0"] * 2, x))


def test_inside_of_jit_it_is_refused_and_as_it_was():
    case, adapters, bank = filled()

    def using(x):
        with bank.using(["a0"]) as (lora_params, ids):
            return lora_jax.many.lora_rows(case.fn)(lora_params, x, lora_ids=ids)

    for verb, fn in (
        ("using", using),
        ("__init__", lambda x: AdapterBank(like(case))),
        ("acquire", lambda x: x + bank.acquire("a0")),
        ("remove", lambda x: bank.remove("a0")),
        ("lora_params", lambda x: bank.lora_params),
    ):
        with pytest.raises(
            RuntimeError, match=rf"AdapterBank\.{verb} was called inside of jax\.jit"
        ):
            jax.jit(fn)(rows_like(case.x, 1))
    assert bank.slots == (None, None)
    x = rows_like(case.x, 2)
    assert_close(served(case, bank, "a1", x), alone(case, adapters, ["a1"] * 2, x))


def test_a_block_that_the_garbage_collector_closes_stops_nobody(monkeypatch):
    *_, bank = filled()
    closed, done = [], threading.Event()

    def stream(during):  # of a client that is gone
        with bank.using(["a0"]):
            try:
                yield
            finally:
                closed.append(during)

    def collects(call):
        """What runs with the bank's lock held, where a collection may come at any line."""

        def collecting(*args):
            gc.collect()
            return call(*args)

        return collecting

    for name in ("acquire", "release"):
        monkeypatch.setattr(bank._names, name, collects(getattr(bank._names, name)))

    def serve():
        for call in (bank.acquire, bank.release):
            cycle = [stream(call.__name__)]
            next(cycle[0])
            cycle.append(cycle)
            del cycle
            call("a1")
        done.set()

    gc.collect()
    gc.freeze()  # what was there before is not looked at: quick
    gc.disable()
    try:
        threading.Thread(target=serve, daemon=True).start()
        assert done.wait(60)
    finally:
        gc.enable()
        gc.unfreeze()
    assert closed == ["acquire", "release"]
    assert "0 in use" in repr(bank)


def test_one_release_too_many_keeps_no_other():
    *_, bank = filled()
    with pytest.raises(ValueError, match="'a0' is not in use"), bank.using(["a0", "a1"]):
        bank.release("a0")
    assert "0 in use" in repr(bank)


def test_what_it_gives_is_the_callers_to_change():
    case, adapters = some(1)
    bank = AdapterBank(like(case), slots=1)
    bank.add("a0", adapters["a0"])
    bank["a0"].adapter.factors.clear()
    bank.lora_params.adapter.factors.clear()
    x = rows_like(case.x, 1)
    assert_close(served(case, bank, "a0", x), alone(case, adapters, ["a0"], x))


# --- misuse ------------------------------------------------------------------------------------


def test_misuse_is_explained():
    case, adapters = some(2)
    p = adapters["a0"]
    for options, error, message in (
        ({"slots": 0}, ValueError, "slots=0: expected at least 1"),
        ({"slots": 2.0}, TypeError, r"slots=2\.0: expected an int"),
        ({"slots": None}, TypeError, "slots=None: expected an int"),
        ({"rank": 0}, ValueError, "rank=0: expected at least 1"),
        ({"rank": True}, TypeError, "rank=True: expected an int"),
        ({"slots": 4, "host": 4}, ValueError, "host=4: expected at least 5"),
        ({"dtype": "int8"}, TypeError, "dtype='int8': expected a floating-point dtype"),
    ):
        with pytest.raises(error, match=f"AdapterBank: {message}"):
            AdapterBank(like(case), **options)
    with pytest.raises(TypeError, match="like is Adapter, expected a LoraParams"):
        AdapterBank(p.adapter)
    with pytest.raises(ValueError, match="AdapterBank: like is a stack"):
        AdapterBank(lora_jax.many.stack([p, p]))
    with pytest.raises(ValueError, match="like changes nothing"):
        AdapterBank(LoraParams(case.params, Adapter({})))
    nan = dataclasses.replace(
        dict_case(), params={**case.params, "b1": np.full(40, np.nan, np.float32)}
    )
    with pytest.raises(ValueError, match="the base's full of 'b1' has NaNs"):
        AdapterBank(like(nan, full="b1"))

    bank = AdapterBank(like(case, rank=2, targets="w1"), slots=2)
    one = made(case, 0, 2, targets="w1")
    bank.add("one", one)
    bank.acquire("one")
    before = bits(bank.lora_params.adapter)
    copied = dataclasses.replace(case, params=jax.device_put(jax.tree.map(np.array, case.params)))
    other = like(copied, 2, targets="w1")
    alien = lora_jax.lorafy({"query": {"kernel": jnp.ones((4, 4))}}, 2, init=drawn)
    turned = like(case, 2, targets="w1", layout={"w1": "oi"})
    for name, x, error, message in (
        (3, one, TypeError, "name=3: expected a str"),
        ("new", 3, TypeError, "'new' is int, expected a LoraParams"),
        ("new", lora_jax.many.stack([one, one]), ValueError, "'new' is a stack"),
        ("new", other, ValueError, "'new' and the bank are over different bases: 'b1' is not one"),
        ("new", alien, ValueError, "'new' and the bank are over different bases: they differ in"),
        ("new", turned, ValueError, "differ at 'w1': layout is 'oi' here and 'io' there; make"),
        (
            "new",
            made(case, 0, 3, targets="w1"),
            ValueError,
            "has rank 3 at 'w1', and the bank 2: "
            r"shrink it, lora_jax.algebra.resize\(adapter, 2\), or leave room, .*rank=3\)",
        ),
        (
            "new",
            made(case, 0, 2, targets=EVERY),
            ValueError,
            "'new' has 1 factors for which the "
            "bank has no room: layers/0/w2. Make a bank with a like= that has them all",
        ),
        ("new", made(case, 0, 2, targets="w1", full="b1"), ValueError, "has 1 full for.*: b1"),
        ("new", jax.eval_shape(lambda: one.adapter), ValueError, "'new' is traced, or shapes"),
        ("one", one, ValueError, "there is an adapter 'one': remove it.*replace=True"),
    ):
        with pytest.raises(error, match=f"AdapterBank.add: .*{message}"):
            bank.add(name, x)
    with pytest.raises(ValueError, match="'query/kernel', and the base has no such leaf"):
        bank.add("new", alien.adapter)
    with pytest.raises(ValueError, match="'new' is traced"):
        jax.jit(lambda x: bank.add("new", x))(one.adapter)
    for call in (bank.acquire, bank.release, bank.remove, bank.__getitem__, bank.__delitem__):
        with pytest.raises(KeyError, match=r"there is no adapter 'two': add it. Nearest: one"):
            call("two")
    with pytest.raises(TypeError, match="using: names='one': expected a name per batch row"):
        bank.using("one").__enter__()
    assert list(bank) == ["one"]
    assert bits(bank.lora_params.adapter) == before
    assert "one" in bank
    assert "two" not in bank
    bank.release("one")
    with pytest.raises(ValueError, match="release: 'one' is not in use: each acquire is released"):
        bank.release("one")
    # ids that are no slots are lora_rows' to refuse
    with pytest.raises(IndexError, match=r"lora_ids has 2, expected -1.* to 1"):
        lora_jax.many.lora_rows(case.fn)(
            bank.lora_params, rows_like(case.x, 1), lora_ids=np.array([2])
        )
