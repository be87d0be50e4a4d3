"""Define the plugin of ``--compile-report``, which counts the programs that each test compiles."""

import time

import jax
import pytest

COMPILED = "/jax/core/compile/backend_compile_duration"
LONGEST = 40


class CompileReport:
    """Print the longest tests and the programs that XLA compiled for them.

    JAX reports every compilation through ``jax.monitoring``. The numbers of a test are in its
    report, so the table is the same in one process and under pytest-xdist. Programs of a fixture
    count for the first test that uses it; child processes are not counted.
    """

    def __init__(self):
        self.count, self.seconds = 0, 0.0  # of the current test
        self.rows = []  # (seconds, programs, seconds compiling, name)
        jax.monitoring.register_event_duration_secs_listener(self.listen)

    def listen(self, event, seconds, **kwargs):
        """Add one compilation to the current test."""
        if event == COMPILED:
            self.count += 1
            self.seconds += seconds

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        """Start counting for a test."""
        self.count, self.seconds, self.start = 0, 0.0, time.perf_counter()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        """Attach the numbers to the last report of a test."""
        report = yield
        if call.when == "teardown":
            total = time.perf_counter() - self.start
            report.user_properties.append(("compiled", (total, self.count, self.seconds)))
        return report

    def pytest_runtest_logreport(self, report):
        """Collect the numbers of a test from any process."""
        for name, row in report.user_properties:
            if name == "compiled":
                self.rows.append((*row, report.nodeid))

    def pytest_terminal_summary(self, terminalreporter):
        """Print the table and the totals."""
        terminalreporter.section("programs compiled by tests")
        totals = tuple(sum(row[i] for row in self.rows) for i in range(3))
        longest = sorted(self.rows, reverse=True)[:LONGEST]
        for *numbers, name in [*longest, (*totals, f"{len(self.rows)} tests in all")]:
            row = "{:8.2f} s, {:5} programs in {:7.2f} s  {}".format(*numbers, name)
            terminalreporter.write_line(row)
