"""The suite's own tools: tolerances, foreseen skips, the report of what compiles."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compile_report import CompileReport
from conftest import pytest_runtest_setup
from helpers import assert_close, error, normal, tolerance
from skips import Skips


def report(name, reason=None, **more):
    longrepr = reason and ("file.py", 1, f"Skipped: {reason}")
    return SimpleNamespace(nodeid=name, skipped=bool(reason), longrepr=longrepr, **more)


def test_a_skip_that_no_line_foresees_fails_the_run(tmp_path):
    (tmp_path / "skips").write_text("# why\n\ntests/test_x\\.py::.*: foo is not installed\n")
    skips = Skips(tmp_path / "skips")
    session = SimpleNamespace(exitstatus=pytest.ExitCode.OK)
    for foreseen in (
        report("tests/test_x.py::test_a", "foo is not installed"),
        report("tests/test_y.py::test_b"),
        report("tests/test_y.py::test_c", "fails as expected", wasxfail="yes"),
    ):
        skips.pytest_runtest_logreport(foreseen)
    skips.pytest_sessionfinish(session)
    assert session.exitstatus == pytest.ExitCode.OK
    skips.pytest_runtest_logreport(report("tests/test_x.py::test_a", "foo is not installed today"))
    skips.pytest_collectreport(report("tests/test_z.py", "no foo"))
    skips.pytest_sessionfinish(session)
    assert session.exitstatus == pytest.ExitCode.TESTS_FAILED
    assert skips.unforeseen == [
        "tests/test_x.py::test_a: foo is not installed today",
        "tests/test_z.py: no foo",
    ]


def test_a_compilation_is_counted_for_the_test_that_runs():
    counted = CompileReport()
    running = counted.pytest_runtest_protocol(None)
    next(running)
    jax.jit(lambda x: x * 1.2345)(np.float32(1))
    counted.listen("another event", 5.0)
    assert counted.count >= 1
    assert 0 < counted.seconds < 60
    finished = counted.pytest_runtest_makereport(None, SimpleNamespace(when="teardown"))
    next(finished)
    with pytest.raises(StopIteration) as stop:
        finished.send(report("a test", user_properties=[]))
    counted.pytest_runtest_logreport(stop.value.value)
    ((seconds, count, compiling, name),) = counted.rows
    assert (count, compiling, name) == (counted.count, counted.seconds, "a test")
    assert seconds >= compiling
    jax.monitoring.unregister_event_duration_listener(counted.listen)


def test_a_tolerance_lets_rounding_pass_and_nothing_else():
    x, w = normal(0, (32, 256)), normal(1, (256, 16))
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    assert_close(x @ w, exact, depth=1)
    assert_close(jnp.asarray(exact, jnp.bfloat16), exact, depth=1)
    with pytest.raises(AssertionError):
        assert_close((1 + 1e-4) * x @ w, exact)
    with pytest.raises(AssertionError):
        assert_close((x @ w).astype(jnp.bfloat16), exact, dtype=jnp.float32)
    with pytest.raises(AssertionError):
        assert_close(x @ w, jnp.asarray(exact, jnp.bfloat16))
    with pytest.raises(AssertionError):
        assert_close(jnp.arange(3), jnp.array([0, 1, 3]))
    assert error(jnp.array([jnp.nan]), np.zeros(1)) == np.inf
    assert tolerance(length=1, depth=1) < 1e-6 < tolerance() < 1e-4
    assert tolerance(jnp.float64) == 1e-9
    assert tolerance(jnp.bfloat16, length=4096) == tolerance(jnp.bfloat16)


def test_too_few_devices_skip_by_name():
    wanted = jax.device_count() + 1
    item = SimpleNamespace(iter_markers=lambda name: [pytest.mark.devices(wanted).mark])
    with pytest.raises(pytest.skip.Exception, match=f"needs {wanted} devices; .* has {wanted - 1}"):
        pytest_runtest_setup(item)
    pytest_runtest_setup(SimpleNamespace(iter_markers=lambda name: [pytest.mark.devices(1).mark]))
