"""Restrict training to the adapter, by labels or by a split."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax._adapter.params import Adapter, LoraParams, is_lora
from lora_jax._transform.whole import told
from lora_jax._weights.axes import is_array
from lora_jax._weights.paths import PyTree, is_flax


def labels(params: PyTree) -> PyTree:
    """Label every leaf for ``optax.multi_transform``: ``"lora"`` trains, ``"frozen"`` does not.

    The ``a``, ``b``, magnitudes and full leaves of a LoraParams are ``"lora"``; ``scale`` and the
    base, which gets one label for all of it, are ``"frozen"``.

    Args:
        params: from ``lorafy``, or the half of it that ``split`` returns first; a tree with such
            inside, whose other leaves train; or the ``nnx.State`` that ``nnx.Optimizer`` makes of a
            LoraParams of ``nnx.Param``s.

    Returns:
        A tree of strings, a prefix of ``params``.

    Raises:
        TypeError: ``params`` contains no LoraParams.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> lora_params = lora_jax.lorafy({"query": {"kernel": jnp.ones((3, 2))}}, rank=1)
        >>> base, adapter = lora_jax.labels(lora_params)
        >>> base, adapter.factors["query/kernel"].a, adapter.factors["query/kernel"].scale
        ('frozen', 'lora', 'frozen')
    """
    told()
    if is_flax(params, "nnx", "State") and params.keys() == {"base", "adapter"}:
        return _label_state(params)
    nodes, tree = jax.tree.flatten(params, is_leaf=_is_split)
    if not any(map(_is_split, nodes)):
        raise TypeError(
            f"labels: neither a LoraParams nor an Adapter in {type(params).__name__}: every leaf "
            "would train. Pass what lora_jax.lorafy returned"
        )
    return jax.tree.unflatten(tree, [_label(node) if _is_split(node) else "lora" for node in nodes])


def _is_split(x: Any) -> bool:
    return isinstance(x, LoraParams | Adapter)


def _label(x: LoraParams | Adapter) -> LoraParams | Adapter:
    if isinstance(x, LoraParams):
        return LoraParams("frozen", _label(x.adapter))
    factors = {
        path: f.map(lambda name, _, f=f: "lora" if name in f.trainable else "frozen")
        for path, f in x.factors.items()
    }
    return Adapter(factors, {path: None if x is None else "lora" for path, x in x.full.items()})


def _label_state(state: Any) -> Any:
    """Label a LoraParams that has become a State, by the names of its fields."""
    from flax import nnx

    names = ("a", "b", "magnitude")

    def label(path, leaf):
        del leaf
        return "lora" if path[:2] == ("adapter", "full") or path[-1] in names else "frozen"

    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state(
        [(p, label(p, x) if p[0] == "adapter" else "frozen") for p, x in flat]
    )


def optimizer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return an optimizer of a LoraParams that runs ``tx`` on the adapter alone.

    It is ``optax.multi_transform({"lora": tx, "frozen": freeze}, labels)``. Weight decay, clipping
    and moments of ``tx`` apply to ``a``, ``b``, magnitudes and full leaves only, and its state has
    their size. The base and ``scale`` keep every bit. Its ``update`` takes the gradients of
    ``jax.grad`` and those of ``lora_jax.value_and_grad``. Train what ``split`` returns first
    instead, with ``tx`` itself, to keep the base out of the trained state.

    Args:
        tx: any Optax transformation, such as ``optax.adamw(3e-4)``; with ``optax.MultiSteps`` and
            the like inside, so that their state has the adapter's size, too. Arguments of its
            ``update`` beyond the usual ones, as of ``optax.lbfgs``, are reduced to what trains:
            trees like the parameters, and functions of them.

    Returns:
        An Optax transformation over trees of LoraParams' structure.

    Raises:
        TypeError: ``tx`` is no Optax transformation. At ``update``: gradients of the adapter alone
            for parameters whose base has leaves that cannot be added to, such as PRNG keys.

    Example:
        >>> import jax, jax.numpy as jnp, optax, lora_jax
        >>> lora_params = lora_jax.lorafy({"query": {"kernel": jnp.ones((3, 2))}}, rank=1)
        >>> tx = lora_jax.optimizer(optax.adamw(1e-3))
        >>> opt_state = tx.init(lora_params)
        >>> grads = jax.tree.map(jnp.ones_like, lora_params)
        >>> updates, opt_state = tx.update(grads, opt_state, lora_params)
        >>> lora_params = optax.apply_updates(lora_params, updates)
        >>> bool((lora_params.base["query"]["kernel"] == 1).all())
        True

    References:
        Hu et al., arXiv:2106.09685, section 4.1: only A and B are trainable.
    """
    if not (hasattr(tx, "init") and hasattr(tx, "update")):  # optax.MultiSteps is not a subclass
        raise TypeError(
            f"optimizer: expected an Optax transformation such as optax.adamw(3e-4), got {tx!r}"
        )
    told()
    both = optax.multi_transform({"lora": tx, "frozen": _freeze()}, labels)

    def update(updates, state, params=None, **extra):
        if params is not None:
            updates = _lifted(updates, params)
            extra = {name: _restricted(x, params) for name, x in extra.items()}
        return both.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(both.init, update)


def _lifted(updates: PyTree, params: PyTree) -> PyTree:
    """Give gradients of adapters alone the structure of ``params``; what is frozen gets zeros."""

    def zeros(x: Any) -> jax.Array:
        if is_array(x) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            raise TypeError(
                "optimizer: the base has PRNG keys, which no optimizer can add to. Train the "
                "adapter alone: trainable, frozen = lora_jax.split(lora_params), "
                "tx.update(grads, state, trainable)"
            )
        return jnp.zeros_like(x)

    def lift(x: Any, grads: Any) -> Any:
        if not isinstance(grads, Adapter):
            return grads
        adapter = x.adapter if is_lora(x) else x
        factors = {
            path: f.map(
                lambda name, y, f=f, g=grads.factors[path]: (
                    getattr(g, name) if name in f.trainable else zeros(y)
                )
            )
            for path, f in adapter.factors.items()
        }
        grads = Adapter(factors, grads.full)
        return LoraParams(jax.tree.map(zeros, x.base), grads) if is_lora(x) else grads

    return jax.tree.map(lift, params, updates, is_leaf=_is_split)


def _restricted(x: Any, params: PyTree) -> Any:
    """Reduce an argument of an optimizer to what trains: a tree like ``params``, or a function."""
    marks = labels(params)
    if callable(x):
        return lambda masked, *args, **kwargs: x(_filled(masked, params), *args, **kwargs)
    if any(map(_is_split, jax.tree.leaves(x, is_leaf=_is_split))):
        x = _lifted(x, params)
    if jax.tree.structure(x) != jax.tree.structure(params):
        return x
    return jax.tree.map(lambda mark, y: y if mark == "lora" else optax.MaskedNode(), marks, x)


def _filled(masked: PyTree, params: PyTree) -> PyTree:
    """Put what does not train back into a tree of what does."""

    def is_masked(x):
        return isinstance(x, optax.MaskedNode)

    return jax.tree.map(lambda x, y: y if is_masked(x) else x, masked, params, is_leaf=is_masked)


def _freeze() -> optax.GradientTransformation:
    """Return an optimizer that changes no bit: ``x + -0.0`` is ``x``; ``-0.0 + 0.0`` is ``0.0``."""

    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda u: -jnp.zeros_like(u), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def split(lora_params: LoraParams) -> tuple[Adapter, LoraParams]:
    """Split a LoraParams into what trains and what does not; ``combine`` is the inverse.

    The trainable half alone is then the first argument of the loss. Any Optax optimizer works on
    it unchanged, and the step neither takes gradients of the base nor returns it.

    Args:
        lora_params: from ``lorafy``.

    Returns:
        ``(trainable, frozen)``: an Adapter of ``a``, ``b``, magnitudes and full leaves, and a
        LoraParams of the base and the scales. Each has None where the other has an array.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> lora_params = lora_jax.lorafy({"query": {"kernel": jnp.ones((3, 2))}}, rank=1)
        >>> trainable, frozen = lora_jax.split(lora_params)
        >>> jax.tree.map(jnp.shape, trainable.factors["query/kernel"])
        Factors(a=(3, 1), b=(1, 2), scale=None, layout='io')
        >>> lora_jax.combine(trainable, frozen)
        LoraParams(1 adapted weights, 0 full leaves; trainable params: 5 || all params: 11 || trainable%: 45.5)
    """  # noqa: E501
    _check_lora(lora_params, "split")
    base, adapter = lora_params

    def keep(trains):
        return {
            path: f.map(lambda name, x, f=f: x if (name in f.trainable) == trains else None)
            for path, f in adapter.factors.items()
        }

    frozen = Adapter(keep(trains=False), dict.fromkeys(adapter.full))
    return Adapter(keep(trains=True), adapter.full), LoraParams(base, frozen)


def combine(trainable: Adapter, frozen: LoraParams) -> LoraParams:
    """Combine the two halves that ``split`` returned.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the halves come from different splits.
    """
    _check_lora(frozen, "combine")
    if not isinstance(trainable, Adapter):
        raise TypeError(
            f"combine: trainable is {type(trainable).__name__}, expected the Adapter that "
            "lora_jax.split returned first"
        )
    other = frozen.adapter
    for name in ("factors", "full"):
        if (ours := getattr(trainable, name).keys()) != (theirs := getattr(other, name).keys()):
            raise ValueError(
                f"combine: trainable.{name} and frozen.adapter.{name} differ in the paths "
                f"{sorted(ours ^ theirs)[:5]}: the halves come from different splits"
            )
    factors = {
        path: replace(other.factors[path], **{name: getattr(f, name) for name in f.trainable})
        for path, f in trainable.factors.items()
    }
    return LoraParams(frozen.base, Adapter(factors, trainable.full))


def value_and_grad(
    fn: Callable[..., Any], *, has_aux: bool = False
) -> Callable[..., tuple[Any, Adapter]]:
    """Return a function that evaluates ``fn`` and its gradient for the adapter alone.

    It is ``jax.value_and_grad`` with respect to ``split(lora_params)[0]``. So the base may contain
    integers, counters and PRNG keys, which ``jax.grad`` of a complete LoraParams refuses.

    Args:
        fn: a scalar function whose first argument is a LoraParams.
        has_aux: whether ``fn`` returns ``(value, aux)``.

    Returns:
        A function of ``fn``'s arguments that returns ``(value, gradient)``, the gradient an
        Adapter with ``scale`` None.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> lora_params = lora_jax.lorafy({"query": {"kernel": jnp.ones((3, 2))}}, rank=1)
        >>> apply = lora_jax.lora(lambda p, x: x @ p["query"]["kernel"])
        >>> loss = lambda lora_params, x: apply(lora_params, x).sum()
        >>> value, grads = lora_jax.value_and_grad(loss)(lora_params, jnp.ones((1, 3)))
        >>> float(value), grads.factors["query/kernel"].b.shape
        (6.0, (1, 2))
    """

    def value_and_grad_fn(lora_params, *args, **kwargs):
        _check_lora(lora_params, "value_and_grad")
        trainable, frozen = split(lora_params)

        def evaluate(trainable):
            return fn(combine(trainable, frozen), *args, **kwargs)

        return jax.value_and_grad(evaluate, has_aux=has_aux)(trainable)

    return value_and_grad_fn


def _check_lora(x: Any, name: str) -> None:
    if not is_lora(x):
        raise TypeError(
            f"{name}: expected a LoraParams as lora_jax.lorafy returns, got {type(x).__name__}"
        )
