"""The suite's own tools: tolerances, foreseen skips, the report of what compiles."""

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import missing
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


def run_under_missing(error):
    """What becomes of a test that raises."""
    running = missing.Missing().pytest_pyfunc_call()
    next(running)
    with pytest.raises(BaseException) as stop:  # noqa: PT011
        running.throw(error)
    return stop.value


def test_float16_is_missing_only_where_xla_compiles_none(monkeypatch):
    error = jax.errors.JaxRuntimeError("INTERNAL: Failed to materialize symbols: { f }")
    other = jax.errors.JaxRuntimeError("INTERNAL: something else")
    monkeypatch.setattr(missing, "has_float16", lambda: True)
    assert run_under_missing(error) is error
    monkeypatch.setattr(missing, "has_float16", lambda: False)
    assert "XLA compiles no float16" in str(run_under_missing(error))
    assert run_under_missing(other) is other


@pytest.mark.parametrize("package", ["tokenizers", "numpyx"])
def test_a_file_without_its_package_is_skipped_wherever_it_lies(package, tmp_path):
    """In a folder that no conftest is for; a package that no extra has is an error."""
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(
        f"raise ModuleNotFoundError(\"No module named '{package}'\")"
    )
    (tmp_path / "module.py").write_text(f"import {package}\n")
    command = [sys.executable, "-m", "pytest", "-q", "-rsE", "-p", "no:cacheprovider"]
    command += ["--doctest-modules", "-p", "missing_here", "--rootdir", tmp_path, "module.py"]
    (tmp_path / "missing_here.py").write_text(
        "from missing import Missing\n"
        "def pytest_configure(config):\n    config.pluginmanager.register(Missing())\n"
    )
    path = os.pathsep.join([str(tmp_path), os.path.dirname(__file__)])
    env = os.environ | {"PYTHONPATH": path}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    is_ours = package == "tokenizers"
    assert ("SKIPPED" in run.stdout and f"{package} is not installed" in run.stdout) == is_ours
    assert ("ERROR module.py" in run.stdout) != is_ours
