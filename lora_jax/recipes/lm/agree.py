"""Check that all processes are about to run the same program."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather


def agree(facts: Mapping[str, Any]) -> None:
    """Compare facts with those of all other processes; all must call it, or it waits.

    Processes that run different programs wait for each other forever, or train nonsense.

    Args:
        facts: values that JSON can encode, by name.

    Raises:
        ValueError: a fact differs on some process; every process raises.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(facts, sort_keys=True).encode()
    digests = process_allgather(np.frombuffer(hashlib.sha256(text).digest(), np.uint8))
    if (digests == digests[0]).all():
        return
    sizes = process_allgather(np.int32(len(text)))
    padded = np.frombuffer(text.ljust(sizes.max()), np.uint8)
    everyone = [json.loads(line.tobytes()) for line in process_allgather(padded)]
    differing = []
    for name in dict.fromkeys(name for theirs in everyone for name in theirs):
        processes: dict[str, list[str]] = {}
        for k, theirs in enumerate(everyone):
            processes.setdefault(json.dumps(theirs.get(name)), []).append(str(k))
        if len(processes) > 1:
            values = (f"{value} on {', '.join(where)}" for value, where in processes.items())
            differing.append(f"{name} is {' and '.join(values)}")
    raise ValueError(
        f"the processes do not agree: {'; '.join(differing[:4])}. Start all of them with the same "
        "command, except for --process, and with the same files and versions"
    )
