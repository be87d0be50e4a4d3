"""``lora(fn)``: the same function, over split parameters."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp

from lora_jax import _jax
from lora_jax._adapter.factors import Rows
from lora_jax._adapter.params import Adapter
from lora_jax._transform import rules as rules  # they enter the table
from lora_jax._transform.call import Call, enter
from lora_jax._transform.context import Context, MaterializeError, OnMaterialize, Policy
from lora_jax._transform.interpret import evaluate
from lora_jax._transform.origin import Leaf
from lora_jax._transform.record import Record
from lora_jax._transform.use import Use
from lora_jax._weights.axes import is_array, role_axes
from lora_jax._weights.paths import is_flax
from lora_jax._weights.ranges import part_of

_RETURNED = "is returned by the function"  # why a weight is built
_REST = (
    "return the rest alone, nnx.state(model, nnx.Not(nnx.Param)) of an NNX model; of a Linen model "
    "the collections that change, by mutable=['batch_stats'] instead of mutable=True."
)


def lora(
    fn: Callable[..., Any], *, on_materialize: OnMaterialize = "error", dropout: float = 0.0
) -> Callable[..., Any]:
    """Transform ``fn`` to take a LoraParams, and add each update by a low-rank product.

    The returned function takes what ``fn`` takes, with a ``LoraParams`` wherever ``fn`` takes
    parameters: as an argument, or anywhere inside one. Wherever a target weight ``W`` is used it
    computes::

        x W + scale * (x a) b

    and never builds ``W + scale * a b``. It composes with ``jit``, ``vmap``, ``grad``,
    ``checkpoint``, ``scan``, ``pmap`` and ``shard_map``, inside and outside. No gradient is
    computed for the base or for ``scale``: derivatives with respect to them are zeros.

    Arrays among the arguments are traced; every other leaf (``True``, ``"mean"``, a callable,
    ``method=...``) reaches ``fn`` as it is. Each call traces ``fn``: wrap it in ``jax.jit``.

    With ``dropout``, a call that passes a ``lora_key`` drops entries of the adapters' inputs::

        x W + scale * (drop(x) a) b

    Every weight, every use and every step of a loop drops others; a lookup drops entire rows. To
    evaluate, call without ``lora_key``: nothing is dropped.

    Args:
        fn: a pure function of arrays in pytrees.
        dropout: the share of the adapters' inputs to drop, at calls with ``lora_key=``, a PRNG
            key. Pass a new key at every call: ``jax.debug_key_reuse`` finds those used twice.
        on_materialize: what to do if a weight goes through an operation without a low-rank rule, so
            that the sum must be built: ``"error"``, ``"warn"`` or ``"allow"``.

    Raises:
        TypeError: ``fn`` is not callable.
        ValueError: ``dropout`` is no share, or ``fn`` has an argument ``lora_key`` of its own. At
            the call: ``lora_key`` without ``dropout``, no LoraParams among the arguments, an
            adapter that does not fit its base, adapted weights that ``fn`` does not use, or uses
            against their layout.
        NotImplementedError: at the call: weights would have to be materialized; the message names
            all of them.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> params = {"query": {"kernel": jnp.ones((3, 3))}}
        >>> lora_params = lora_jax.lorafy(params, rank=2)
        >>> lora_jax.lora(lambda p, x: x @ p["query"]["kernel"])(lora_params, jnp.ones((1, 3)))
        Array([[3., 3., 3.]], dtype=float32)
    """
    check_function(fn, "lora", "lora_key", on_materialize)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r}: expected a share, 0 <= dropout < 1")

    @functools.wraps(fn)
    def lora_fn(*args, lora_key=None, **kwargs):
        key = None if lora_key is None else _dropout_key(lora_key, dropout)
        policy = Policy(on_materialize, dropout)
        return run_lora(policy, fn, args, kwargs, functools.partial(enter, key=key))

    return marked(lora_fn)


def marked(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Mark an adapted function, which nothing adapts again."""
    fn.is_adapted = True  # pyright: ignore[reportFunctionMemberAccess]
    return fn


def check_function(fn: Any, name: str, reserved: str, on_materialize: Any) -> None:
    """Raise unless ``name`` can wrap this function, and add the argument ``reserved``."""
    if not callable(fn):
        raise TypeError(f"{name}: expected a function, got {type(fn).__name__} {fn!r}")
    if getattr(fn, "is_adapted", False):
        raise ValueError(
            f"{name}: the function is adapted already: it takes a LoraParams where the original "
            f"takes parameters. Pass the original function to {name}"
        )
    if on_materialize not in get_args(OnMaterialize):
        raise ValueError(
            f"on_materialize={on_materialize!r}: expected one of {get_args(OnMaterialize)}"
        )
    if reserved in _parameters(fn):
        raise ValueError(
            f"{name}: the function has an argument {reserved!r}, which the adapted function keeps "
            f"for itself. Rename it: lambda ..., other: fn(..., {reserved}=other)"
        )


def run_lora(
    policy: Policy,
    fn: Callable[..., Any],
    args: Any,
    kwargs: Any,
    enter: Callable[..., Any] = enter,
) -> Any:
    """Call the adapted function once; weights enter it by ``enter``, as in ``Call.of``."""
    call = Call.of(args, kwargs, enter)
    try:
        jaxpr, untrimmed, consts, out = call.trace(fn)
    except Exception as error:
        _explain(error, call)
        raise
    values = [*consts, *call.values]
    ctx = Context(policy)
    try:
        with jax.disable_jit(False):  # else loops would be unrolled into slices of the weights
            results = leave(ctx, jaxpr, values)
    except MaterializeError:
        raise NotImplementedError(_complaints(rehearse(jaxpr, values))) from None

    read = _jax.read_inputs(jaxpr)[len(consts) :]
    for owner, node in call.lora_params.items():
        leaves = call.leaves[owner]
        _check_used(ctx.record, owner, node.adapter, leaves, call.paths_read(owner, read), consts)
        # A gradient for the input alone may need a weight's transpose only: the forward use,
        # which shows its layout, is in the part that no output needs.
        if _misread(ctx.record, owner, node.adapter, leaves):
            wrong = _misread(rehearse(untrimmed, values), owner, node.adapter, leaves)
            if wrong:
                raise ValueError("\n".join(wrong))
    return jax.tree.unflatten(out, results)


def _explain(error: Exception, call: Call) -> None:
    """Add to an error of the function what it may not know of its arguments."""
    for node in call.lora_params.values():
        if is_flax(node.base, "nnx", "Module"):
            error.add_note(
                f"lora(fn): the function gets the base of a LoraParams as it is, here the NNX "
                f"module {type(node.base).__name__}, to be called: module(x). A function that "
                "merges a state, nnx.merge(graphdef, state), wants the state adapted: graphdef, "
                "state = nnx.split(module); lora_jax.lorafy(state)"
            )


def _parameters(fn: Callable[..., Any]) -> Collection[str]:
    try:
        return inspect.signature(fn).parameters
    except (TypeError, ValueError):  # of a builtin
        return ()


def _dropout_key(key: Any, dropout: float) -> jax.Array:
    if not dropout:
        raise ValueError(
            "lora_key is given, and nothing is dropped: wrap the function with "
            "lora(fn, dropout=...), or leave the key out"
        )
    if not isinstance(key, jax.Array):
        raise TypeError(
            f"lora_key is {type(key).__name__}, expected a key such as jax.random.key(0)"
        )
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.shape:
        raise ValueError(
            f"lora_key has shape {key.shape}, expected one key; for one an example call through "
            "jax.vmap"
        )
    (key,) = jax.random.split(key, 1)  # the key is used up
    return key


def leave(ctx: Context, jaxpr: Any, values: list[Any]) -> list[Any]:
    """Return the outputs of the function as plain arrays."""
    return ctx.plain(evaluate(ctx, jaxpr, values), _RETURNED)


def rehearse(jaxpr: Any, values: list[Any]) -> Record:
    """Evaluate on shapes alone, with every materialization allowed; return what was seen."""
    ctx = Context(Policy("allow"))
    with jax.disable_jit(False):
        jax.eval_shape(lambda values: leave(ctx, jaxpr, values), values)
    return ctx.record


def _complaints(record: Record) -> str:
    """Return one message for all the weights that would have to be built."""
    returned = [use for use in record.materialized if use.why == _RETURNED]
    if len(returned) > 1:
        others = [use for use in record.materialized if use.why != _RETURNED]
        return "\n".join([_whole_state(returned), *_each(others)])
    message = _each(record.materialized)
    if returned:
        message += [f"If it belongs to a state that the function returns: {_REST}"]
    return "\n".join(message)


def _each(uses: Sequence[Use]) -> list[str]:
    """Return the lines about weights that would have to be built, whatever the reasons."""
    if not uses:
        return []
    first, *rest = uses
    message = [first.complaint]
    if rest:
        shown = [f"  {use.leaf.path!r} {use.form} {use.reason}" for use in rest[:20]]
        shown += [f"  ... and {len(rest) - 20} more"] if len(rest) > 20 else []
        paths = list(dict.fromkeys(use.leaf.path for use in uses))
        message += ["So would others:", *shown]
        message += [f"To keep all of them out: lorafy(..., exclude={paths!r})"]
    return message


def _whole_state(returned: Sequence[Use]) -> str:
    """Return the message about a function that returns weights as it got them."""
    paths = ", ".join(repr(use.leaf.path) for use in returned[:5])
    more = f" and {len(returned) - 5} more" if len(returned) > 5 else ""
    return (
        f"lora: {len(returned)} adapted weights are returned by the function: {paths}{more}. A "
        f"call does not change parameters: {_REST} If the sums W + (alpha / rank) A B are meant: "
        "lora(fn, on_materialize='allow')."
    )


def _check_used(
    record: Record,
    owner: int,
    adapter: Adapter,
    leaves: Mapping[str, Any],
    read: set[str],
    consts: Sequence[Any],
) -> None:
    """Raise if no leaf of the adapter is used; ``read`` are the paths that any equation reads."""
    used = {use.leaf.path for use in record.uses if use.leaf.owner == owner}
    if used or read.intersection(adapter.full):
        return
    paths = [*adapter.factors, *adapter.full]
    held = {id(const) for const in consts}
    closed = [path for path, leaf in leaves.items() if is_array(leaf) and id(leaf) in held]
    hint = (
        f"It holds {closed[0]!r} itself as a constant, in a closure. Weights must come in as "
        "arguments"
        if closed
        else "Are these another model's parameters, or do the weights come in by a closure? They "
        "must come in as arguments"
    )
    raise ValueError(
        f"lora(fn): the function uses none of the {len(paths)} adapted leaves: "
        f"{', '.join(paths[:5])}{', ...' if len(paths) > 5 else ''}. Training would change "
        f"nothing. {hint}"
    )


def _misread(record: Record, owner: int, adapter: Adapter, leaves: Mapping[str, Any]) -> list[str]:
    """Return a message for each weight that is used only against its layout."""
    messages = []
    for key, f in adapter.factors.items():
        path = part_of(key, leaves).path
        shape = tuple(leaves[path].shape)
        big = {i for i, size in enumerate(shape) if size != 1}
        inputs, batch, outputs = (big.intersection(role_axes(f.layout, r)) for r in "ibo")
        uses = [use for use in record.uses_of(Leaf(owner, path)) if use.why or use.has_roles]
        if not (uses and inputs and outputs) or any(use.why for use in uses):
            continue  # which axes are read is not known, or makes no difference
        if isinstance(f, Rows):  # a table reads the rows that train; an output head writes them
            heads = [use for use in uses if use.primitive == "dot_general"]
            found = [inputs <= use.contracted for use in uses]
            found += [inputs <= use.free for use in heads]
        else:
            found = [(big & use.contracted) - batch == inputs for use in uses]
        if not any(found):
            use = uses[0]
            seen = "".join(
                letter if i not in big else use.role(i) for i, letter in enumerate(f.layout)
            )
            messages.append(
                f"the weight {path!r} of shape {shape} has layout {f.layout!r}, but "
                f"{use.primitive!r} at {use.source} uses it as one of layout {seen!r}: a would "
                "not read the input, nor b write the output. Build the adapter with "
                f"lorafy(..., layout={{{path!r}: {seen!r}}}), or with layout=lora_jax.layout_of("
                "fn, params, *args)"
            )
    return messages
