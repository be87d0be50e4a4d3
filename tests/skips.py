"""Fail a run whose skips were not foreseen: the plugin behind ``--skips FILE``."""

import re
from pathlib import Path

import pytest


class Skips:
    """Fail the run where a test is skipped that no line of a file foresees.

    A test that is skipped everywhere tests nothing, and nobody notices. Each line of the file is a
    regular expression for ``node id: reason``, matched in full; lines with ``#`` are comments.
    """

    def __init__(self, path):
        lines = (line.strip() for line in Path(path).read_text().splitlines())
        self.path = path
        self.patterns = [re.compile(line) for line in lines if line and line[0] != "#"]
        self.unforeseen = []

    def pytest_runtest_logreport(self, report):
        """Note a skipped test that is not in the file."""
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        reason = report.longrepr[2].removeprefix("Skipped: ")
        line = f"{report.nodeid}: {reason}"
        if not any(pattern.fullmatch(line) for pattern in self.patterns):
            self.unforeseen.append(line)

    pytest_collectreport = pytest_runtest_logreport  # importorskip at the top of a module

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        """Turn a green run into a failed one."""
        if self.unforeseen and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        """Name the skipped tests, and the file to add them to."""
        if self.unforeseen:
            terminalreporter.section(f"skipped, and not in {self.path}")
            for line in self.unforeseen:
                terminalreporter.write_line(line)
