"""Compare the memory that a program needs with that of the devices."""

from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

SHARE = 0.95  # of the memory: what a program does not count lies there, too, and leaves gaps


def limit() -> int | None:
    """Return how many bytes a program may take on every device of all processes.

    None if a device of this process does not tell, as CPUs do not; the processes' devices are
    alike.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if any("bytes_limit" not in x for x in stats):
        return None
    least = min(x["bytes_limit"] for x in stats)
    if jax.process_count() > 1:  # all must decide alike
        least = process_allgather(np.int64(least)).min()
    return int(SHARE * least)


def needed(program: Any) -> int:
    """Return how many bytes a ``jax.stages.Compiled`` takes on a device, with its arguments."""
    memory = program.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return kept - memory.alias_size_in_bytes + memory.temp_size_in_bytes
