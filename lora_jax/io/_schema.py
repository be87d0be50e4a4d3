"""Check that a record is one of ours, of a known version, and complete."""

from typing import Any

from lora_jax._adapter.factors import Factors
from lora_jax._weights.axes import check_layout
from lora_jax.io._state import is_note

VERSIONS = (1, 2, 3)  # 2 has table rows, 3 a state; a record without them is of version 1
_KINDS = {"layout": str, "rank": int, "frozen": list, "residual": bool, "dora": bool}
_ROWS = {"layout": str, "ids": list, "vocabulary": int}


def check_record(record: Any, where: str) -> None:
    """Raise unless a record is one of ours, of a version that we know, and whole.

    Raises:
        ValueError: it is not.
    """

    def bad(what: str) -> ValueError:
        return ValueError(f"{where}: {what}: this is no adapter of lora_jax, or it is damaged")

    kinds = {"format": str, "version": int, "factors": dict, "full": list, "base": dict | None}
    version = record.get("version") if isinstance(record, dict) else None
    kinds |= {"rows": dict} if version in (2, 3) else {}
    kinds |= {"state": dict} if version == 3 else {}
    if not isinstance(record, dict) or record.get("format") != "lora_jax":
        raise bad("it has no record of an adapter")
    if version not in VERSIONS:
        raise ValueError(
            f"{where} has version {version!r}, and this library reads "
            f"{', '.join(map(str, VERSIONS))}: install a newer lora-jax"
        )
    if record.keys() != kinds.keys() or any(
        not isinstance(record[k], kind) for k, kind in kinds.items()
    ):
        raise bad(f"its record has the keys {sorted(record)}, expected {sorted(kinds)}")
    for kind, wanted in (("factors", _KINDS), ("rows", _ROWS)):
        for key, entry in record.get(kind, {}).items():
            if (
                not isinstance(entry, dict)
                or entry.keys() != wanted.keys()
                or any(not isinstance(entry[k], own) for k, own in wanted.items())
                or not set(map(str, entry.get("frozen", ()))) <= {*Factors.TRAINABLE}
                or not all(type(k) is int for k in entry.get("ids", ()))
                or entry.get("ids") == []
            ):
                raise bad(f"its record of {key!r} is {entry!r}")
            check_layout(entry["layout"], f"{key!r} in {where}")
    for path, note in record.get("state", {}).items():
        if not is_note(note):
            raise bad(f"its record of the state's {path!r} is {note!r}")
    if not all(isinstance(path, str) for path in record["full"]):
        raise bad("its record of full leaves is no list of paths")
    if (base := record["base"]) is not None:
        of_base = {"leaves": dict, "content": dict, **({"under": list} if "under" in base else {})}
        if base.keys() != of_base.keys() or any(
            not isinstance(base[k], kind) for k, kind in of_base.items()
        ):
            raise bad("its record of the base is not one")
        for path, entry in base["leaves"].items():
            if (
                not isinstance(entry, list)
                or not entry
                or not isinstance(entry[0], str)
                or not all(isinstance(n, int) for n in entry[1:])
            ):
                raise bad(f"its record of the base's leaf {path!r} is {entry!r}")
        if not base["content"].keys() <= base["leaves"].keys():
            raise bad("its record of the base's contents is of other leaves")
