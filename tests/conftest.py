"""Eight virtual devices, a fast compiler and strict promotion, set before JAX is imported."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time of these tests is LLVM's; what XLA makes of a program, memory and cost are the
# same at level 0. What the environment says comes last and holds.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    + os.environ.get("XLA_FLAGS", "")
)

import hypothesis
import jax
import pytest

collect_ignore = ["golden"]  # a script that wants PEFT

hypothesis.settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def strict_promotion():
    """The library must not rely on implicit promotion: some users forbid it."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True, scope="module")
def fresh_caches():
    """Compiled programs of one module are of no use to the next, and take gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def standard_promotion():
    """For tests through libraries that mix dtypes: Flax's norms, Optax's schedules."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
