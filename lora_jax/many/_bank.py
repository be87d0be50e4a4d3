"""``AdapterBank``: a few adapters on the device, many more in the host's memory, for serving."""

import contextlib
import threading
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.factors import is_concrete
from lora_jax._adapter.params import Adapter, LoraParams
from lora_jax._weights.numbers import check_int
from lora_jax.many._host import empty_row, host_row, placed, places_of
from lora_jax.many._lru import Lru, Stats


class AdapterBank:
    """Adapters of one base: all in the host's memory, those in use in slots of the device.

    The slots are one stack, for :func:`lora_rows`. It keeps its shapes, so that adapters come, go
    and change, of any ranks up to the bank's, and nothing compiles: what loads an adapter is
    compiled when the bank is made, and an adapter is checked, padded and cast in NumPy when it is
    added. Loading it is one transfer then, of arrays known to be good.

    An adapter in use has its slot to itself. Of the others, the least recently used makes way. A
    slot that is empty, or whose adapter was removed, holds zeros: the base.

    Every method may be called from any thread, outside of ``jax.jit``: a program with a bank inside
    would go on with what was in the slots when it was compiled. Of a base that several processes
    share, each has a bank of its own: all of them add, acquire and release the same adapters in the
    same order, from one thread, as they run the same programs.

    Args:
        like: a LoraParams: the base, and which weights adapters of it may change, with layouts,
            ranks and dtypes. Its values do not matter, nor whether it has any: without memory it
            is ``LoraParams(params, jax.eval_shape(lora_jax.lorafy, params).adapter)``.
        slots: how many adapters the device holds; at least as many as a batch may mix.
        rank: of all factors; None: like's. Rows that train on their own keep theirs.
        dtype: of the factors. Adapters of any dtype are cast to it, and their leaves that are
            trained whole to like's. None: like's, and adapters have to have it.
        host: how many adapters the host's memory holds, more than slots; one more, and the least
            recently used is dropped. None: all.
        donate: whether loading overwrites the stack where it is, instead of copying it beside the
            old one. What :attr:`lora_params` gave before is deleted then, but for what
            :meth:`using` gave while any of its blocks is open. A stack that nobody has seen is
            overwritten in any case.
        replicate: axes of the base's mesh along which factors are whole, as of :func:`shardings`:
            those of FSDP, or every batch moves the factors of its rows.

    Raises:
        TypeError: ``like`` is no LoraParams, or an argument is of the wrong kind.
        ValueError: ``like`` is a stack or changes nothing; a number is too small; or the base's
            mesh has no axis that ``replicate`` says.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> params = {"query": {"kernel": jnp.ones((8, 6))}}
        >>> bank = lora_jax.many.AdapterBank(lora_jax.lorafy(params, rank=4), slots=2)
        >>> for name, rank in {"math": 4, "poetry": 2, "law": 1}.items():
        ...     bank.add(name, lora_jax.lorafy(params, rank))
        >>> apply = jax.jit(lora_jax.many.lora_rows(lambda p, x: x @ p["query"]["kernel"]))
        >>> with bank.using(["law", None, "math"]) as (lora_params, ids):
        ...     y = apply(lora_params, jnp.ones((3, 8)), lora_ids=ids)
        >>> ids, bank.slots
        (array([ 0, -1,  1], dtype=int32), ('law', 'math'))
        >>> bank
        AdapterBank(2 slots: 0 in use, 2 idle, 0 empty; 3 adapters)

        Adapters come from anywhere, while the bank serves, files of ours and of PEFT's included:

        >>> import tempfile
        >>> from lora_jax.io import peft
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     peft.save(f"{folder}/code", lora_jax.lorafy(params, rank=3))
        ...     bank.add("code", peft.load(f"{folder}/code", params))
        >>> list(bank)
        ['math', 'poetry', 'law', 'code']

    References:
        Sheng et al., S-LoRA: Serving Thousands of Concurrent LoRA Adapters, arXiv:2311.03285.
    """

    def __init__(
        self,
        like: LoraParams,
        slots: int = 8,
        *,
        rank: int | None = None,
        dtype: Any = None,
        host: int | None = None,
        donate: bool = False,
        replicate: Collection[str] = (),
    ):
        _check_outside("__init__")
        if not isinstance(like, LoraParams):
            raise TypeError(
                f"AdapterBank: like is {type(like).__name__}, expected a LoraParams as "
                "lora_jax.lorafy returns: it says which base and which weights"
            )
        slots = check_int(slots, "AdapterBank: slots", 1)
        rank = None if rank is None else check_int(rank, "AdapterBank: rank", 1)
        host = None if host is None else check_int(host, "AdapterBank: host", slots + 1)
        if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"AdapterBank: dtype={dtype!r}: expected one of floating numbers")
        self._base, self._is_cast, self._donate = like.base, dtype is not None, donate
        self._empty = empty_row(like, rank, dtype)
        self._lock = threading.RLock()  # the garbage collector may close a block while it is held
        self._names = Lru(slots, host, self._put)  # all that follows with the lock held
        self._open = 0  # blocks of using()
        self._is_seen = False  # the stack, by anyone but us

        places, self._places = places_of(self._base, self._empty, replicate)
        spread = lambda x: jnp.broadcast_to(x, (slots, *x.shape))  # noqa: E731
        make = jax.jit(lambda row: jax.tree.map(spread, row), out_shardings=places)
        self._copy = jax.jit(_put, out_shardings=places)
        self._overwrite = jax.jit(_put, donate_argnums=0, out_shardings=places)
        empty = placed(self._empty, self._places)
        self._stack: Adapter = make(empty)
        for put in (self._copy, self._overwrite):  # compiled now, not while it serves
            self._stack = put(self._stack, empty, np.int32(0))

    def add(self, name: str, adapter: LoraParams | Adapter, *, replace: bool = False) -> None:
        """Add an adapter, which is copied to the host's memory. Nothing is loaded yet.

        What it lacks beside ``like`` is filled in as :func:`stack` does it. If it does not fit, or
        is broken, that is said here, and the bank is as it was.

        Args:
            name: by which it is asked for.
            adapter: a LoraParams over the bank's very base, or an Adapter for it; of ranks up to
                the bank's.
            replace: whether the name may be there already. An adapter in use is not replaced, as
                what uses it would go on with another.

        Raises:
            TypeError: an argument is of the wrong kind.
            ValueError: the name is there; or the adapter is of another base or layout, has a
                larger rank or dtype, has what ``like`` lacks, is traced, or is not finite.
            RuntimeError: the adapter to be replaced is in use.
        """
        if not isinstance(name, str):
            raise TypeError(f"AdapterBank.add: name={name!r}: expected a str")
        what = f"AdapterBank.add: {name!r}"
        row = host_row(adapter, what, self._base, self._empty, is_cast=self._is_cast)
        with self._locked("add"):
            self._names.add(name, row, replace=replace)

    def remove(self, name: str) -> None:
        """Forget an adapter; its slot is empty then.

        Raises:
            KeyError: there is none of this name.
            RuntimeError: it is in use.
        """
        with self._locked("remove"):
            self._names.remove(name)

    __delitem__ = remove

    def acquire(self, name: str) -> int:
        """Give an adapter a slot, loading it if need be, and keep it there until it is released.

        Requests that come and go on their own, as of continuous batching, acquire and release
        theirs, each as often; the stack of a step is :attr:`lora_params`.

        Returns:
            The slot, for ``lora_ids``.

        Raises:
            KeyError: there is no adapter of this name.
            RuntimeError: all slots are in use.
        """
        with self._locked("acquire"):
            return self._names.acquire([name], "acquire")[name]

    def release(self, name: str) -> None:
        """Take back one :meth:`acquire`. The adapter stays in its slot until that is needed.

        Raises:
            KeyError: there is no adapter of this name.
            ValueError: it is not in use.
        """
        with self._lock:
            self._names.release(name)

    @contextlib.contextmanager
    def using(self, names: Iterable[str | None]) -> Iterator[tuple[LoraParams, np.ndarray]]:
        """Acquire the adapters of a batch for as long as the block is open.

        Args:
            names: of the adapter of each row, perhaps repeated; None for the base alone.

        Yields:
            The stack, and ``lora_ids``: int32 ``[rows]``.

        Raises:
            TypeError: ``names`` is one name.
            KeyError: there is no adapter of a name.
            RuntimeError: there are too few slots that are not in use; none is taken then.
        """
        if isinstance(names, str):
            raise TypeError(f"AdapterBank.using: names={names!r}: expected one for each row")
        names = list(names)
        with self._locked("using"):
            slots = self._names.acquire([name for name in names if name is not None], "using")
            self._open += 1
            lora_params = self._seen()
        ids = [-1 if name is None else slots[name] for name in names]
        try:
            yield lora_params, np.array(ids, np.int32)
        finally:
            with self._lock:
                self._open -= 1
                self._names.release(*slots)

    @property
    def lora_params(self) -> LoraParams:
        """The base, and the stack of what is in the slots: a value, which no load changes.

        With ``donate`` the next load deletes it: ask for it at each step.
        """
        with self._locked("lora_params"):
            return self._seen()

    @property
    def slots(self) -> tuple[str | None, ...]:
        """The name of what is in each slot; None where it is empty."""
        with self._lock:
            return tuple(self._names.slots)

    @property
    def stats(self) -> Stats:
        """Hits, misses and evictions so far."""
        with self._lock:
            return self._names.stats

    def __contains__(self, name: object) -> bool:
        with self._lock:
            return name in self._names.entries

    def __len__(self) -> int:
        with self._lock:
            return len(self._names.entries)

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(list(self._names.entries))

    def __getitem__(self, name: str) -> LoraParams:
        """An adapter as the bank has it, padded and cast, in NumPy arrays that are read-only."""
        with self._lock:
            return LoraParams(self._base, _copied(self._names.entry(name, "[...]").row))

    def __repr__(self) -> str:
        with self._lock:
            slots, entries = self._names.slots, self._names.entries
            held = [entries[name].pins for name in slots if name is not None]
            used, empty = sum(map(bool, held)), len(slots) - len(held)
            return (
                f"AdapterBank({len(slots)} slots: {used} in use, {len(held) - used} idle, "
                f"{empty} empty; {len(entries)} adapters)"
            )

    @contextlib.contextmanager
    def _locked(self, verb: str) -> Iterator[None]:
        _check_outside(verb)
        with self._lock:
            yield

    def _seen(self) -> LoraParams:
        self._is_seen = True
        return LoraParams(self._base, _copied(self._stack))

    def _put(self, row: Adapter | None, slot: int) -> None:
        is_ours = not self._is_seen or (self._donate and not self._open)
        put = self._overwrite if is_ours else self._copy
        row = placed(self._empty if row is None else row, self._places)
        self._stack = put(self._stack, row, np.int32(slot))
        self._is_seen = False


def _put(stack: Adapter, row: Adapter, slot: jax.Array) -> Adapter:
    return jax.tree.map(lambda rows, x: rows.at[slot].set(x), stack, row)


def _check_outside(verb: str) -> None:
    """Raise inside of a trace; compiled when the bank is made, as all it needs."""
    if not is_concrete(jnp.zeros(())):
        raise RuntimeError(
            f"AdapterBank.{verb} was called inside of jax.jit, where what is in the slots now "
            "would be compiled in. Call it outside, and pass the stack and the ids on as arguments"
        )


def _copied(adapter: Adapter) -> Adapter:
    """The same arrays in dicts that are the caller's."""
    return Adapter(dict(adapter.factors), dict(adapter.full))
