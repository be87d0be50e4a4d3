"""Define the plugin of ``--skips FILE``, which fails a run with unexpected skips."""

import re
from pathlib import Path

import pytest


class Skips:
    """Fail the run if a test is skipped that no line of a file matches.

    Otherwise nobody notices a test that is skipped everywhere. Each line of the file is a regular
    expression for the full text ``node id: reason``; lines that begin with ``#`` are comments.
    """

    def __init__(self, path):
        lines = (line.strip() for line in Path(path).read_text().splitlines())
        self.path = path
        self.patterns = [re.compile(line) for line in lines if line and line[0] != "#"]
        self.unforeseen = []

    def pytest_runtest_logreport(self, report):
        """Record a skipped test that is not in the file."""
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        reason = report.longrepr[2].removeprefix("Skipped: ")
        line = f"{report.nodeid}: {reason}"
        if not any(pattern.fullmatch(line) for pattern in self.patterns):
            self.unforeseen.append(line)

    pytest_collectreport = pytest_runtest_logreport  # importorskip at the top of a module

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        """Fail a run that passed."""
        if self.unforeseen and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        """Print the skipped tests, and the file to add them to."""
        if self.unforeseen:
            terminalreporter.section(f"skipped, and not in {self.path}")
            for line in self.unforeseen:
                terminalreporter.write_line(line)
