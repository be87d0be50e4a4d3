"""Save and load the steps of a training run."""

import operator
import os
import warnings
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from lora_jax._adapter.params import Adapter, LoraParams
from lora_jax._weights.paths import PyTree
from lora_jax.io import _record as records
from lora_jax.io import _state as states
from lora_jax.io.orbax._adapter import read_adapter
from lora_jax.io.orbax._leaves import by_name, by_number, rebuilt
from lora_jax.io.orbax._parts import Shardings, absolute, checkpointables, context


class Restored(NamedTuple):
    """A restored step: the result of :meth:`Checkpointer.load`.

    Attributes:
        step: the number of the step.
        lora_params: the adapter of that step, on the parameters that were passed.
        opt_state: the optimizer's state, or None if it was not asked for.
        extra: the extra state, or None if it was not asked for.
    """

    step: int
    lora_params: Any
    opt_state: Any
    extra: Any


class Checkpointer:
    """A writer of checkpoints in the background of training, one directory per step.

    A process killed at any point leaves all complete steps. One process, or one group of JAX
    processes, writes to a directory; any process may read it.

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
        """Open a directory, and make it if it does not exist.

        Args:
            directory: of the checkpoints.
            every: steps that are multiples of this number are saved.
            keep: how many of the last steps are kept, or None for all.

        Raises:
            ValueError: ``every`` or ``keep`` is not positive.
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
        """Return the checkpointer itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Wait for the save in progress, and close."""
        self.close()

    def save(
        self, step: int, lora_params: Adapter | LoraParams, opt_state: Any = None, extra: Any = None
    ) -> bool:
        """Save a step in the background, if the interval of the policy has passed.

        The arrays are copied before the call returns, so that the next step may donate them, and
        are written afterwards: call :meth:`wait`, or leave the ``with`` block, before you rely on
        them. A save that fails raises there, or at the next save.

        Args:
            step: the number of the step, greater than those saved before.
            lora_params: the LoraParams, or the Adapter. With the two halves of ``lora_jax.split``,
                pass what ``combine`` makes of them.
            opt_state: the state of the optimizer, or any tree; None saves none.
            extra: a tree of everything else that training needs to go on: PRNG keys, positions in
                the data, scales, and what the model has besides parameters, such as running
                statistics. Leaves are arrays, numbers or strings. None warns if the base has
                leaves that are no parameters; ``{}`` does not.

        Returns:
            Whether the step is due, and so is being saved.

        Raises:
            TypeError: an argument or a leaf is of the wrong kind.
            ValueError: this step or a later one was saved before.
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
        if extra is None and (found := states.left_out(base)):
            warnings.warn(
                f"Checkpointer.save: {found}. To save them, pass them in extra; extra={{}} leaves "
                "them out",
                stacklevel=2,
            )
        written = checkpointables(records.record_of(adapter, base, {}, content=False), leaves)
        self._pending = self._orbax.save_checkpointables_async(step, written)
        return True

    def load(
        self,
        params: PyTree | None,
        opt_state: Any = None,
        extra: Any = None,
        *,
        step: int | None = None,
        shardings: Shardings = None,
        finite: bool = True,
    ) -> Restored:
        """Read a saved step.

        Args:
            params: the parameters that the adapter is trained on, or None for the adapter alone.
            opt_state: a tree like the saved one, such as a fresh ``tx.init(...)``, of arrays or
                ``jax.ShapeDtypeStruct``s. Each leaf gets the sharding of its leaf here; without
                one, it goes where the adapter goes by default. None reads none.
            extra: a tree like the saved one, as ``opt_state``. The types of numbers and strings
                must agree, not their values.
            step: the number of the step, or None for the last.
            shardings: of the adapter's arrays, as in :func:`load`.
            finite: whether to reject an adapter with values that are not finite.

        Returns:
            ``Restored(step, lora_params, opt_state, extra)``.

        Raises:
            FileNotFoundError: there is no such step, or none at all.
            ValueError: the step is damaged or belongs to another model than ``params``;
                ``opt_state`` or ``extra`` has another structure, shape or dtype than the saved
                one; or a sharding does not fit.
            UserWarning: the adapter's base had another precision than ``params``.
        """
        step = self._existing(step)
        where = os.path.join(self.directory, str(step))
        trees = {"opt_state": opt_state, "extra": extra}
        targets = {part: by_number(tree, part) for part, tree in trees.items() if tree is not None}
        adapter, record, found = read_adapter(where, params, targets, shardings, finite=finite)
        lora_params = records.on_base(adapter, record, params, where)
        restored = {part: rebuilt(trees[part], found[part]) for part in targets}
        return Restored(step, lora_params, restored.get("opt_state"), restored.get("extra"))

    @property
    def steps(self) -> list[int]:
        """The saved steps in order; a save in progress is awaited.

        A process killed while it deletes an old step may leave a part of it. The step is listed,
        ``load`` refuses it, and the next save deletes it.
        """
        self.wait()
        return [found.step for found in self._orbax.checkpoints]

    @property
    def latest(self) -> int | None:
        """The last of :attr:`steps`, or None."""
        return max(self.steps, default=None)

    def wait(self) -> None:
        """Wait until the save in progress is on the disk; raise its error if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, and release what Orbax holds."""
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
        """Delete what killed processes left, before the first save; readers must not do it."""
        if not self._is_clean and jax.process_index() == 0:
            for partial in self._orbax.directory.glob("*.orbax-checkpoint-tmp*"):
                partial.rmtree()
        self._is_clean = True
