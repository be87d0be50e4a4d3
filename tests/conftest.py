"""Set eight virtual devices, a fast compiler and strict promotion before JAX is imported."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# These tests spend most of their time in LLVM. At level 0 XLA makes the same program, with the same
# memory and cost. Flags of the environment come last and win.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_gpu_autotune_level=0 " + os.environ.get("XLA_FLAGS", "")
)
if os.environ["JAX_PLATFORMS"].split(",")[0] != "cpu":
    os.environ["JAX_PLATFORMS"] += ",cpu"  # callbacks run on the CPU
    # By default GPUs and TPUs multiply float32 in fewer bits, and one process takes all memory.
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "float32")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import cli_fixtures
import hypothesis
import jax
import pytest
from compile_report import CompileReport
from missing import Missing
from skips import Skips

collect_ignore = ["golden", "planted"]  # scripts, not tests

hypothesis.settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("default")


def pytest_addoption(parser):
    parser.addoption(
        "--compile-report",
        action="store_true",
        help="print the longest tests, and the number of programs compiled for each",
    )
    parser.addoption(
        "--skips", metavar="FILE", help="fail if a test is skipped that FILE does not list"
    )


def pytest_configure(config):
    config.pluginmanager.register(Missing())
    config.pluginmanager.register(cli_fixtures)
    if config.getoption("--compile-report"):
        config.pluginmanager.register(CompileReport())
    if path := config.getoption("--skips"):
        config.pluginmanager.register(Skips(path))


def pytest_runtest_setup(item):
    """Skip tests marked ``devices(n)`` on fewer devices."""
    for mark in item.iter_markers("devices"):
        if (count := jax.device_count()) < mark.args[0]:
            pytest.skip(f"needs {mark.args[0]} devices; {jax.default_backend()} has {count}")


@pytest.fixture(autouse=True)
def strict_promotion():
    """Forbid implicit promotion, as some users do."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True, scope="module")
def fresh_caches():
    """Clear compiled programs after a module: they take gigabytes, and the next has its own."""
    yield
    jax.clear_caches()


@pytest.fixture
def standard_promotion():
    """Allow promotion, for libraries that mix dtypes: Flax's norms, Optax's schedules."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def in_float64():
    """Compute in float64, for Adam: it divides by small moments, which magnifies rounding.

    In float32 a gradient near zero gives a step of either sign.
    """
    with jax.enable_x64(True):
        yield
