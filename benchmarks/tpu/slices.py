"""Describe TPU slices to compile for, without a TPU.

The compiler for TPUs is in the package libtpu (``pip install '.[tpu-aot]'``). It needs no TPU: it
compiles for the description of a slice, and reports the memory, FLOPs and collectives of the
program. The compiled program cannot run here.

A script that uses it starts with::

    from benchmarks.tpu import slices

    slices.set_environment()

    import jax  # noqa: E402

Only this module requests such descriptions. Without the environment that it sets, libtpu takes the
machine for a cloud machine and queries the network for minutes.
"""

import functools
import os
import sys
import tempfile
from typing import Any

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # run on the CPU; a TPU, if there is one, stays free
    "TPU_SKIP_MDS_QUERY": "1",  # query no metadata server
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # these two keep the log empty for all topologies
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes at once
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_LOG_DIR": tempfile.gettempdir(),  # must exist; nothing is written at this log level
}


def set_environment() -> None:
    """Set the environment that libtpu reads when it is loaded; call it before importing ``jax``.

    Raises:
        RuntimeError: ``jax`` or ``libtpu`` was imported without this environment.
    """
    missing = {name: value for name, value in ENVIRONMENT.items() if os.environ.get(name) != value}
    if missing and (early := [name for name in ("jax", "libtpu") if name in sys.modules]):
        raise RuntimeError(
            f"{' and '.join(early)} was imported before the environment for libtpu was set: "
            f"{sorted(missing)}. Call slices.set_environment() before anything that imports jax, "
            "or start another process"
        )
    os.environ.update(missing)


@functools.cache  # two descriptions of one slice have different devices
def devices(name: str) -> list[Any]:
    """Return the chips of a slice by its name: ``"v5e:2x2"``, ``"v5p:2x2x1"``, ``"v6e:4x4"``.

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
