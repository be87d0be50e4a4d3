"""Orbax checkpoints: an adapter alone, training as it goes on, merged parameters.

The adapter, the optimizer's state and whatever else training needs are checkpointables of their
own: each is read without the others and without the base, which is never written. Orbax loads a
changed bit as it is; the record beside them, in JSON, has a checksum of every array and a SHA-256
of itself.
"""

import operator
import os
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from lora_jax._params import Adapter, LoraParams
from lora_jax._paths import PyTree
from lora_jax.io import _record as records
from lora_jax.io._leaves import by_name, by_number, has_entries, kind_of, labeled, own_tree, rebuilt
from lora_jax.io._orbax_files import (
    Places,
    absolute,
    agreed,
    checkpointables,
    config_of,
    context,
    default_place,
    placed,
    read,
    write,
)


def save(
    path: str | os.PathLike[str], adapter: Adapter | LoraParams, *, content: bool = False
) -> None:
    """Write an adapter as a new Orbax checkpoint.

    Orbax writes it aside and renames it: a process killed at any point leaves no checkpoint, or a
    whole one. An existing one is never replaced, since Orbax would delete it first.

    Args:
        path: of the checkpoint, a directory that does not exist.
        adapter: with a LoraParams, the record also says which base it is of: the names, shapes
            and dtypes of its leaves.
        content: whether to note a checksum of every leaf of the base, which reads all of it.

    Raises:
        TypeError: ``adapter`` is of the wrong kind.
        ValueError: it is of a base that an initializer changed and that is not given.
        FileExistsError: there is something at ``path``.

    Example:
        >>> import jax.numpy as jnp, lora_jax, tempfile
        >>> from lora_jax.io import orbax
        >>> params = {"query": {"kernel": jnp.ones((3, 2))}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     orbax.save(f"{folder}/adapter", lora_jax.lorafy(params, rank=1))
        ...     list(orbax.load(f"{folder}/adapter", params).adapter.factors)
        ['query/kernel']
    """
    adapter, base = records.parts_of(adapter, "orbax.save")
    record = records.record_of(adapter, base, content=content)
    leaves = {"adapter": by_name(records.arrays_of(adapter))}
    write(path, checkpointables(record, leaves))


def load(
    path: str | os.PathLike[str],
    params: PyTree | None = None,
    *,
    shardings: Places = None,
    finite: bool = True,
) -> Any:
    """Read the adapter of a checkpoint of :func:`save`, or of a step of a :class:`Checkpointer`.

    Args:
        path: of the checkpoint; of a step, ``directory/step``.
        params: the parameters it was trained on, or None.
        shardings: where the arrays go: one sharding for all, or a function of an array's name,
            such as ``layers_0/query/kernel.a``, and its shape. None puts a copy on every device
            of the mesh of ``params``, or, if they have none, all on the default device.
        finite: whether to refuse values that are not.

    Returns:
        A LoraParams of ``params``; without them the Adapter alone.

    Raises:
        FileNotFoundError: there is no checkpoint at ``path``.
        ValueError: it is damaged, is no adapter, or is one of another model than ``params``; or
            a sharding does not fit.
        UserWarning: ``params`` are of another precision than its base was.
    """
    where = absolute(path)
    record, notes = config_of(where)
    records.check_record(record, where)
    found = read(where, notes, {"adapter": placed(notes["adapter"], shardings, params)})
    arrays = labeled(notes["adapter"], found["adapter"])
    adapter = records.adapter_of(record, arrays, where, finite=finite)
    return records.on_base(adapter, record, params, where)


class Restored(NamedTuple):
    """What :meth:`Checkpointer.load` returns.

    Attributes:
        step: that was saved.
        lora_params: the adapter of that step, on the parameters that were given.
        opt_state: the optimizer's state, or None if it was not asked for.
        extra: whatever else was saved, or None if it was not asked for.
    """

    step: int
    lora_params: Any
    opt_state: Any
    extra: Any


class Checkpointer:
    """Checkpoints of a training, one directory a step, written while it goes on.

    A process killed at any point leaves every step that was whole. One process, or one group of
    JAX processes, writes to a directory; any may read it.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax, optax, tempfile
        >>> from lora_jax.io import orbax
        >>> params = {"query": {"kernel": jnp.ones((3, 2))}}
        >>> lora_params = lora_jax.lorafy(params, rank=1)
        >>> tx = lora_jax.optimizer(optax.adamw(1e-3))
        >>> state = tx.init(lora_params)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with orbax.Checkpointer(folder, every=5, keep=1) as checkpointer:
        ...         for step in range(12):
        ...             saved = checkpointer.save(step, lora_params, state, {"seen": 32 * step})
        ...     with orbax.Checkpointer(folder) as checkpointer:
        ...         found = checkpointer.load(params, tx.init(lora_params), {"seen": 0})
        >>> found.step, found.extra
        (10, {'seen': 320})
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, every: int = 1, keep: int | None = None
    ):
        """Open a directory, and make it if it is not there.

        Args:
            directory: of the checkpoints.
            every: which steps are saved: its multiples.
            keep: how many of the last ones are kept, or None for all.

        Raises:
            ValueError: ``every`` or ``keep`` is no positive number.
        """
        for name, n in (("every", every), ("keep", keep)):
            if n is not None and n < 1:
                raise ValueError(f"Checkpointer: {name}={n}, expected at least 1")
        self.directory = absolute(directory)
        due: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(every)
        kept: Any = keep and ocp.training.preservation_policies.LatestN(keep)
        self._orbax = ocp.training.Checkpointer(
            self.directory, context=context(), save_decision_policy=due, preservation_policy=kept
        )
        self._pending: Any = None  # the save in progress
        self._is_clean = False

    def __enter__(self) -> "Checkpointer":
        """The checkpointer itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Wait for what is being written, and close."""
        self.close()

    def save(
        self, step: int, lora_params: Adapter | LoraParams, opt_state: Any = None, extra: Any = None
    ) -> bool:
        """Save a step, if it is due, while training goes on.

        The arrays are copied before it returns, so that the next step may donate them, and written
        thereafter: call :meth:`wait`, or leave the ``with`` block, before you rely on them. A save
        that fails raises then, or at the next save.

        Args:
            step: its number, greater than those saved before.
            lora_params: with the two halves of ``lora_jax.split``, what ``combine`` makes of them.
            opt_state: the state of the optimizer, or any tree; None saves none.
            extra: a tree of whatever else is needed to go on: PRNG keys, positions in the data,
                scales. Leaves are arrays, numbers or strings.

        Returns:
            Whether the step is due, and so is being saved.

        Raises:
            TypeError: an argument or a leaf is of the wrong kind.
            ValueError: a later step, or this one, has been saved before.
        """
        if (step := operator.index(step)) < 0:
            raise ValueError(f"Checkpointer.save: step={step}, expected at least 0")
        if not self._orbax.should_save(step):
            if (last := self._orbax.latest) is not None and step <= last.step:
                raise ValueError(
                    f"Checkpointer.save: step={step}, and {self.directory} has step {last.step}: "
                    "go on from there, with load(), or save to another directory"
                )
            return False
        self.wait()
        self._remove_partial()
        adapter, base = records.parts_of(lora_params, "Checkpointer.save")
        leaves = {"adapter": by_name(records.arrays_of(adapter))}
        trees = {"opt_state": opt_state, "extra": extra}
        leaves |= {part: by_number(tree, part) for part, tree in trees.items() if tree is not None}
        written = checkpointables(records.record_of(adapter, base, content=False), leaves)
        self._pending = self._orbax.save_checkpointables_async(step, written)
        return True

    def load(
        self,
        params: PyTree | None,
        opt_state: Any = None,
        extra: Any = None,
        *,
        step: int | None = None,
        shardings: Places = None,
        finite: bool = True,
    ) -> Restored:
        """Read a step that was saved.

        Args:
            params: the parameters that the adapter is trained on, or None for the adapter alone.
            opt_state: a tree like the one that was saved, such as a fresh ``tx.init(...)``, of
                arrays or ``jax.ShapeDtypeStruct``s. Each leaf comes back with the sharding of the
                one given here; where that has none, as the adapter by default. None reads none.
            extra: likewise. Of numbers and strings the type is looked at, not the value.
            step: the number, or None for the last.
            shardings: of the adapter's arrays, as in :func:`load`.
            finite: whether to refuse an adapter with values that are not.

        Returns:
            ``Restored(step, lora_params, opt_state, extra)``.

        Raises:
            FileNotFoundError: there is no such step, or none at all.
            ValueError: it is damaged, is of another model than ``params``, or ``opt_state`` or
                ``extra`` has another structure, shape or dtype than what was saved; or a sharding
                does not fit.
            UserWarning: ``params`` are of another precision than the adapter's base was.
        """
        step = self._existing(step)
        where = os.path.join(self.directory, str(step))
        record, notes = config_of(where)
        records.check_record(record, where)
        places = {"adapter": placed(notes["adapter"], shardings, params)}
        wanted = {"opt_state": opt_state, "extra": extra}
        wanted = {part: by_number(tree, part) for part, tree in wanted.items() if tree is not None}
        for part, leaves in wanted.items():
            places[part] = agreed(leaves, notes.get(part), part, default_place(params), where)
        found = read(where, notes, places)
        arrays = labeled(notes["adapter"], found["adapter"])
        adapter = records.adapter_of(record, arrays, where, finite=finite)
        lora_params = records.on_base(adapter, record, params, where)
        trees = (
            None if tree is None else rebuilt(tree, found[part])
            for part, tree in (("opt_state", opt_state), ("extra", extra))
        )
        return Restored(step, lora_params, *trees)

    @property
    def steps(self) -> list[int]:
        """The steps that are saved, in order; it waits for one that is being written.

        Of an old step, a process killed while deleting it may leave a part: it is listed, ``load``
        refuses it, and the next save deletes it.
        """
        self.wait()
        return [found.step for found in self._orbax.checkpoints]

    @property
    def latest(self) -> int | None:
        """The last of :attr:`steps`, or None."""
        return max(self.steps, default=None)

    def wait(self) -> None:
        """Wait until what is being written is on the disk; raise what went wrong there."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, and give back what Orbax holds."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _existing(self, step: int | None) -> int:
        steps = self.steps
        if not steps:
            raise FileNotFoundError(f"{self.directory} has no checkpoint yet: latest is None")
        if step is not None and step not in steps:
            raise FileNotFoundError(f"{self.directory} has no step {step}, but {steps}")
        return steps[-1] if step is None else step

    def _remove_partial(self) -> None:
        """What killed processes left: before the first save only, since readers must not."""
        if not self._is_clean and jax.process_index() == 0:
            for partial in self._orbax.directory.glob("*.orbax-checkpoint-tmp*"):
                partial.rmtree()
        self._is_clean = True


def save_params(path: str | os.PathLike[str], params: PyTree) -> None:
    """Write parameters, such as ``merge`` returns, as a new Orbax checkpoint.

    They are the checkpointable ``params``, in their own tree: ``ocp.load(path, like)`` of Orbax
    reads them too. Only where keys contain dots, which Orbax confuses with nested ones, is it
    nested dicts instead, with ``%2E`` for ``.`` and ``%25`` for ``%``. Typed PRNG keys are
    written as their data.

    Args:
        path: of the checkpoint, a directory that does not exist.
        params: a tree of arrays.

    Raises:
        TypeError: a leaf is no array, or has size zero, which Orbax does not write.
        FileExistsError: there is something at ``path``.

    Example:
        >>> import jax.numpy as jnp, tempfile
        >>> from lora_jax.io import orbax
        >>> params = {"a.b": jnp.zeros(2), "a": {"b": jnp.ones(2)}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     orbax.save_params(f"{folder}/merged", params)
        ...     orbax.load_params(f"{folder}/merged", params)["a"]["b"]
        Array([1., 1.], dtype=float32)
    """
    leaves = by_number(params, "params")
    if not leaves:
        raise TypeError(f"save_params: params={params!r} has no arrays")
    for label, x in leaves.values():
        if not has_entries(kind_of(x, label)):
            what = f"an array of shape {x.shape}" if hasattr(x, "shape") else type(x).__name__
            raise TypeError(f"save_params: {label} is {what}, expected an array with entries")
    written = checkpointables({"format": "lora_jax params", "version": 1}, {"params": leaves})
    write(path, written | {"params": own_tree(params, written.get("params", {}))})


def load_params(path: str | os.PathLike[str], like: PyTree) -> PyTree:
    """Read parameters that :func:`save_params` wrote.

    Args:
        path: of the checkpoint.
        like: a tree of the same structure, shapes and dtypes, of arrays or of
            ``jax.ShapeDtypeStruct``s. Each array comes back with the sharding of the one given
            here; where that has none, a copy on every device of the mesh of the others, or on the
            default device if there is no mesh.

    Returns:
        The parameters.

    Raises:
        FileNotFoundError: there is no checkpoint at ``path``.
        ValueError: it is damaged, is one of something else, or not of the structure, shapes and
            dtypes of ``like``; or a sharding does not fit.
    """
    where = absolute(path)
    _, notes = config_of(where)
    leaves = by_number(like, "params")
    places = agreed(leaves, notes.get("params"), "params", default_place(like), where)
    names = own_tree(like, {name: name for name in places})
    found = read(where, notes, {"params": places}, {"params": names})
    return rebuilt(like, found["params"])
