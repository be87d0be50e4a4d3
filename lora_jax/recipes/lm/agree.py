"""Whether all processes are about to run the same program."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather


def agree(facts: Mapping[str, Any]) -> None:
    """Compare facts with those of all other processes; all of them call it, or it waits.

    Processes that run different programs wait for each other forever, or train nonsense.

    Args:
        facts: a name and what JSON can say, each.

    Raises:
        ValueError: on every process, where a fact is another one on some.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(facts, sort_keys=True).encode()
    digests = process_allgather(np.frombuffer(hashlib.sha256(text).digest(), np.uint8))
    if (digests == digests[0]).all():
        return
    sizes = process_allgather(np.int32(len(text)))
    padded = np.frombuffer(text.ljust(sizes.max()), np.uint8)
    rows = [json.loads(row.tobytes()) for row in process_allgather(padded)]
    differing = []
    for name in dict.fromkeys(name for row in rows for name in row):
        processes: dict[str, list[str]] = {}
        for k, row in enumerate(rows):
            processes.setdefault(json.dumps(row.get(name)), []).append(str(k))
        if len(processes) > 1:
            values = (f"{value} on {', '.join(where)}" for value, where in processes.items())
            differing.append(f"{name} is {' and '.join(values)}")
    raise ValueError(
        f"the processes do not agree: {'; '.join(differing[:4])}. Start all of them by one "
        "command, but for --process, with the same files and versions"
    )
