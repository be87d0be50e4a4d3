"""TPUs that are not there: their descriptions, to compile for.

The compiler for TPUs is in the package libtpu (``pip install '.[tpu-aot]'``), and needs no TPU: it
compiles for the description of one, and says what memory, FLOPs and collectives the program takes.
What it compiles cannot run here.

A program that does so starts with::

    from benchmarks.tpu import slices

    slices.set_environment()

    import jax  # noqa: E402

This is the only module that asks for such descriptions. Without the environment that it sets,
libtpu believes that it is on a cloud machine, and asks the network for minutes who it is.
"""

import functools
import os
import sys
import tempfile
from typing import Any

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # what runs, runs there; a TPU, if there is one, stays free
    "TPU_SKIP_MDS_QUERY": "1",  # ask no metadata server
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # these two keep the log empty, whatever is compiled for
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes at once
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_LOG_DIR": tempfile.gettempdir(),  # must be there; at this level nothing is written
}


def set_environment() -> None:
    """Set what libtpu reads when it is loaded. To be called before ``jax`` is imported.

    Raises:
        RuntimeError: ``jax`` or ``libtpu`` is imported already, without it.
    """
    missing = {name: value for name, value in ENVIRONMENT.items() if os.environ.get(name) != value}
    if missing and (early := [name for name in ("jax", "libtpu") if name in sys.modules]):
        raise RuntimeError(
            f"{' and '.join(early)} was imported before the environment for libtpu was set: "
            f"{sorted(missing)}. Call slices.set_environment() before anything that imports jax, "
            "or start another process"
        )
    os.environ.update(missing)


@functools.cache  # those of another description of the same slice are other devices
def devices(name: str) -> list[Any]:
    """The chips of a slice by its name: ``"v5e:2x2"``, ``"v5p:2x2x1"``, ``"v6e:4x4"``.

    Raises:
        RuntimeError: the environment is not set, or libtpu is not installed.
    """
    set_environment()
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except RuntimeError as error:
        if "TPU support not installed" not in str(error):
            raise
        raise RuntimeError("libtpu is not installed: pip install '.[tpu-aot]'") from error
