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
from lora_jax.many._host import empty_member, host_member, placed, places_of
from lora_jax.many._lru import Lru, Stats


class AdapterBank:
    """A bank of adapters of one base: all in the host's memory, those in use in device slots.

    The slots are the members of one stack, for :func:`lora_rows`. Its shapes are fixed: adapters
    of any ranks up to the bank's come, go and change, and nothing compiles. The program that loads
    an adapter is compiled when the bank is made. An adapter is checked, padded and cast in NumPy
    when it is added, so loading it is one transfer of arrays known to be good.

    An adapter in use keeps its slot. The least recently used of the other adapters is evicted if a
    slot is needed. A slot that is empty, or whose adapter was removed, contains zeros: the base.

    Every method may be called from any thread, but not inside ``jax.jit``: the compiled program
    would keep the adapters that were in the slots when it was compiled. If several processes share
    a base, each has its own bank. All of them add, acquire and release the same adapters in the
    same order, from one thread, as they run the same programs.

    Args:
        like: a LoraParams that gives the base, and the weights that adapters may change, with
            layouts, ranks and dtypes. The values of its adapter are not used, so shapes will do:
            ``LoraParams(params, jax.eval_shape(lora_jax.lorafy, params).adapter)``.
        slots: the number of adapters on the device; at least the number that a batch may mix.
        rank: the rank of all factors; None: like's. Table rows that train on their own keep theirs.
        dtype: the dtype of the factors. Adapters of any dtype are cast to it, and their full leaves
            to like's dtype. None: like's, which all adapters must have.
        host: the number of adapters in the host's memory, more than ``slots``. One more drops the
            least recently used. None: no limit.
        donate: whether loading overwrites the stack in place, instead of copying it. A stack that
            :attr:`lora_params` or :meth:`using` gave before is deleted then, but none while a block
            of :meth:`using` is open. A stack that nobody has seen is overwritten in any case.
        replicate: axes of the base's mesh along which factors are replicated, as in
            :func:`shardings`. Pass those of FSDP, or every batch moves the factors of its members.

    Raises:
        TypeError: ``like`` is not a LoraParams, or an argument has the wrong type.
        ValueError: ``like`` is a stack or changes nothing; a number is too small; or
            ``replicate`` names an axis that the base's mesh does not have.

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

        Adapters may be added while the bank serves, from this library's files or PEFT's, too:

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
                "lora_jax.lorafy returns: it gives the base and the weights"
            )
        slots = check_int(slots, "AdapterBank: slots", 1)
        rank = None if rank is None else check_int(rank, "AdapterBank: rank", 1)
        host = None if host is None else check_int(host, "AdapterBank: host", slots + 1)
        if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"AdapterBank: dtype={dtype!r}: expected a floating-point dtype")
        self._base, self._is_cast, self._donate = like.base, dtype is not None, donate
        self._empty = empty_member(like, rank, dtype)
        self._lock = threading.RLock()  # the garbage collector may close a block while it is held
        self._names = Lru(slots, host, self._load)  # this and the rest only with the lock held
        self._open = 0  # open blocks of using()
        self._is_seen = False  # whether a caller has the stack

        places, self._places = places_of(self._base, self._empty, replicate)
        repeat = lambda x: jnp.broadcast_to(x, (slots, *x.shape))  # noqa: E731
        make = jax.jit(lambda member: jax.tree.map(repeat, member), out_shardings=places)
        self._copy = jax.jit(_write, out_shardings=places)
        self._overwrite = jax.jit(_write, donate_argnums=0, out_shardings=places)
        empty = placed(self._empty, self._places)
        self._stack: Adapter = make(empty)
        for write in (self._copy, self._overwrite):  # compiled now, not while it serves
            self._stack = write(self._stack, empty, np.int32(0))

    def add(self, name: str, adapter: LoraParams | Adapter, *, replace: bool = False) -> None:
        """Copy an adapter to the host's memory. Nothing is loaded yet.

        Missing entries are filled in as by :func:`stack`. An adapter that does not fit, or is not
        finite, is refused here, and the bank does not change.

        Args:
            name: the name to acquire it by.
            adapter: a LoraParams over the same arrays as the bank's base, or an Adapter for it;
                with ranks up to the bank's.
            replace: whether it may replace an adapter of this name. An adapter in use is not
                replaced, as its users would continue with another one.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: the name exists; or the adapter has another base or layout, a larger rank,
                a dtype that does not fit, or an entry that ``like`` lacks; is traced, or is not
                finite.
            RuntimeError: the adapter to replace is in use.
        """
        if not isinstance(name, str):
            raise TypeError(f"AdapterBank.add: name={name!r}: expected a str")
        what = f"AdapterBank.add: {name!r}"
        member = host_member(adapter, what, self._base, self._empty, is_cast=self._is_cast)
        with self._locked("add"):
            self._names.add(name, member, replace=replace)

    def remove(self, name: str) -> None:
        """Remove an adapter, and empty its slot.

        Raises:
            KeyError: there is no adapter of this name.
            RuntimeError: it is in use.
        """
        with self._locked("remove"):
            self._names.remove(name)

    __delitem__ = remove

    def acquire(self, name: str) -> int:
        """Give an adapter a slot, load it if needed, and keep it there until it is released.

        Requests that begin and end independently, as in continuous batching, acquire and release
        their adapters equally often; the stack for a step is :attr:`lora_params`.

        Returns:
            The slot, for ``lora_ids``.

        Raises:
            KeyError: there is no adapter of this name.
            RuntimeError: all slots are in use.
        """
        with self._locked("acquire"):
            return self._names.acquire([name], "acquire")[name]

    def release(self, name: str) -> None:
        """Undo one :meth:`acquire`. The adapter stays in its slot until the slot is needed.

        Raises:
            KeyError: there is no adapter of this name.
            ValueError: it is not in use.
        """
        with self._lock:
            self._names.release(name)

    @contextlib.contextmanager
    def using(self, names: Iterable[str | None]) -> Iterator[tuple[LoraParams, np.ndarray]]:
        """Acquire the adapters of a batch while the block is open.

        Args:
            names: the adapter's name per batch row, perhaps repeated; None for the base alone.

        Yields:
            The stack, and ``lora_ids``: int32 ``[rows]``.

        Raises:
            TypeError: ``names`` is a single name.
            KeyError: there is no adapter of a name.
            RuntimeError: too few slots are free; none is taken then.
        """
        if isinstance(names, str):
            raise TypeError(f"AdapterBank.using: names={names!r}: expected a name per batch row")
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
        """The base and the stack of the slots: a snapshot that later loads do not change.

        With ``donate`` the next load deletes it: read it anew at each step.
        """
        with self._locked("lora_params"):
            return self._seen()

    @property
    def slots(self) -> tuple[str | None, ...]:
        """The name of the adapter in each slot; None for an empty slot."""
        with self._lock:
            return tuple(self._names.slots)

    @property
    def stats(self) -> Stats:
        """The numbers so far of hits, misses, evictions, and adapters dropped from a full host."""
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
        """Return an adapter as the bank has it, padded and cast, in read-only NumPy arrays."""
        with self._lock:
            return LoraParams(self._base, _copied(self._names.entry(name, "[...]").member))

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

    def _load(self, member: Adapter | None, slot: int) -> None:
        is_ours = not self._is_seen or (self._donate and not self._open)
        write = self._overwrite if is_ours else self._copy
        member = placed(self._empty if member is None else member, self._places)
        self._stack = write(self._stack, member, np.int32(slot))
        self._is_seen = False


def _write(stack: Adapter, member: Adapter, slot: jax.Array) -> Adapter:
    return jax.tree.map(lambda members, x: members.at[slot].set(x), stack, member)


def _check_outside(verb: str) -> None:
    """Raise inside a trace. The program for this check, too, is compiled with the bank."""
    if not is_concrete(jnp.zeros(())):
        raise RuntimeError(
            f"AdapterBank.{verb} was called inside of jax.jit, which would compile in what is in "
            "the slots now. Call it outside, and pass the stack and the ids as arguments"
        )


def _copied(adapter: Adapter) -> Adapter:
    """Return the same arrays in new dicts, which the caller may change."""
    return Adapter(dict(adapter.factors), dict(adapter.full))
