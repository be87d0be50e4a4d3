"""Write tied tensors apart, or once: as an adapter, and the configuration, have them."""

import re
from collections.abc import Mapping, Set
from typing import Any

import numpy as np

from lora_jax.io._tensor import Tensor
from lora_jax.io.hf._families import FLAG, flag_of, inner_config, ties_family
from lora_jax.io.hf._source import Source
from lora_jax.io.hf._ties import TABLE, Ties, has_own_head
from lora_jax.io.peft._config import HEADED


def are_apart(
    source: Source,
    changed: Set[str],
    written: Mapping[str, Tensor],
    config: Mapping[str, Any] | None,
) -> bool:
    """Return whether tied tensors must be written apart: they are changed, or set to be so.

    Args:
        source: the model.
        changed: the names of the tensors that change.
        written: the tensors as they will be, under all their names.
        config: changes of the configuration.

    Raises:
        ValueError: it is not known what is tied, or the model cannot have the tensors apart.
    """
    ties, flag = Ties.of(source), flag_of(config)
    if changed and (source.config or {}).get("tie_encoder_decoder"):
        raise ValueError(
            f"{source.where}: encoder and decoder are tied (tie_encoder_decoder) and stored once: "
            "an adapter of one would change both. PEFT runs the adapter beside the model"
        )
    tables = [name for name in changed if re.fullmatch(TABLE, name)]
    if not ties.known and flag is None:
        for table in tables:
            _check_head(source, table)
    groups = [group for group in ties.groups if not ties.always.issuperset(group[1:])]
    if flag is False and groups:
        _check_apart(source, ties, groups[0], groups[0][1])
        return True
    for group in ties.groups:
        if not changed & set(group):
            continue
        first, *others = [name for name in group if name in ties.stored]
        for name in others:
            if not _are_equal(source.tensors[first], source.tensors[name]):
                raise ValueError(
                    f"{source.where}: {name!r} is tied to {first!r}, both are stored, and they "
                    "differ: which of the two counts is not known. If both do, pass "
                    f"config={{{FLAG!r}: False}}, or set that in config.json"
                )
        other = [name for name in group[1:] if not _are_equal(written[group[0]], written[name])]
        if other:
            _check_apart(source, ties, group, other[-1])
            if flag is not None:
                raise ValueError(
                    f"config={config!r}: {other[0]!r} is tied to {group[0]!r}, and the adapter "
                    f"changes them apart: leave {FLAG} out"
                )
            return True
    return False


def as_configured(
    tensors: Mapping[str, Tensor], source: Source | None, config: Mapping[str, Any] | None
) -> tuple[dict[str, Tensor], Mapping[str, Any] | None]:
    """Return the tensors to write, and the changes of the configuration, that go together.

    A head that the configuration parts from its table is written, equal to that.

    Args:
        tensors: the tensors, by the names to write.
        source: the model that they are of, or None.
        config: the changes; without a source, all of the configuration.

    Raises:
        ValueError: the configuration ties tensors that differ, or parts those that the model
            cannot have apart, or a head that is not known.
    """
    before = (source.config if source else None) or {}
    after = {**before, **(config or {})}
    whole, written = Source(source.where if source else "params", tensors, after), dict(tensors)
    if ties_family(after) is None:
        if flag_of(after) is False and flag_of(before) and not _has_head(tensors):
            raise ValueError(
                f"config={config!r}: a head is tied in {whole.where}, and would be missing, since "
                "its name is not known: " + _make_known(after, "the.name.of.its.table.weight")
            )
        return written, config
    ties, is_tied = Ties.of(whole, flag=True), Ties.of(whole).is_set
    groups = [
        (g[0], n) for g in ties.groups for n in g[1:] if n not in ties.always and g[0] in written
    ]
    if is_tied:
        for table, head in groups:
            if head in written and not _are_equal(written[table], written[head]):
                raise ValueError(
                    f"{head!r} is tied to {table!r} by config.json, and they differ: transformers "
                    f"would pass over the head. Pass config={{{FLAG!r}: False}}"
                )
        return written, config
    missing = [(table, head) for table, head in groups if head not in written]
    if not missing:
        return written, config
    if source is None:
        _check_needs_no_head(after, missing[0][1])
    elif {head for _, head in missing} & {*Ties.of(source).names}:
        if ties.why is not None:
            raise ValueError(f"config={config!r}: {missing[0][1]!r} is tied: {ties.why}")
        written |= {head: written[table] for table, head in missing}
        return {ties.outside(name): x for name, x in written.items()}, untied(before, config)
    return written, config


def _has_head(tensors: Mapping[str, Tensor]) -> bool:
    return any(has_own_head(tensors, name) for name in tensors if re.fullmatch(TABLE, name))


def _check_needs_no_head(config: Mapping[str, Any], head: str) -> None:
    """Raise if the class of a model has a head, and there is none."""
    kinds = [str(kind) for kind in config.get("architectures") or ()]
    if kinds and any(map(HEADED.fullmatch, kinds)):
        raise ValueError(
            f"config.json has {FLAG} false, and there is no {head!r}, which {kinds[0]} would start "
            "at random: put a head into params, or, if it is tied to the table, set "
            f"{FLAG} to true"
        )


def _are_equal(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and np.array_equal(one.read(), two.read())


def _check_apart(source: Source, ties: Ties, group: tuple[str, ...], name: str) -> None:
    """Raise unless the tensors of a group can be written each for itself."""
    why = f"{name!r} has none of its own in any file" if name in ties.always else ties.why
    if why is not None:
        raise ValueError(
            f"{source.where}: {name!r} is tied to {group[0]!r}, and the two would be different "
            f"tensors, which this model cannot have: {why}. PEFT runs the adapter beside the "
            "model; to merge, train one of other modules, or rows of the table "
            "(trainable_token_indices), which change both"
        )


def _check_head(source: Source, table: str) -> None:
    """Raise unless a model that is not known stores a head of its own beside a changed table."""
    config = source.config or {}
    if config.get(FLAG) or not has_own_head(source.tensors, table):
        kind = config.get("model_type")
        raise ValueError(
            f"{source.where}: the adapter changes {table!r}, and an output head may be tied to it: "
            f"of model_type {kind!r} that is not known. If none is, pass "
            f"config={{{FLAG!r}: False}}, or set that in config.json; if one is, "
            + _make_known(config, table)
        )


def _make_known(config: Mapping[str, Any], table: str) -> str:
    """Tell how to make the head of a type of model known."""
    own = f"hf.Family(tied_head={{'lm_head.weight': {table!r}}})"
    return f"make it known: hf.FAMILIES[{config.get('model_type')!r}] = {own}"


def untied(config: Mapping[str, Any], changes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return changes of a configuration, and that nothing in it is tied."""
    changes = changes or {}
    inner = inner_config({**config, **changes})
    inside = {inner[0]: {**inner[1], FLAG: False}} if inner else {}
    return {**changes, **inside, FLAG: False}
