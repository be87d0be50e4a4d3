"""Plant faults in copies of the package, one at a time, and count those that the tests catch.

Each fault of ``faults.toml`` replaces one snippet of ``lora_jax``. The tests that reach the changed
lines run first, then those that reach the rest of the function and of the file, until one fails. A
failure counts if the test fails again alone and passes without the fault. Run the script from the
repository root::

    python tests/planted/run.py [--reach FILE ...] [--jobs N] [--only NAME ...] [--out FILE.json]

This file is also the pytest plugin ``planted_plugin`` of these runs.
"""

import argparse
import ast
import contextlib
import functools
import importlib.util
import json
import math
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT, CACHE = Path.cwd(), Path.cwd() / ".cache" / "planted"
REACH, SECONDS = CACHE / "coverage", CACHE / "seconds.json"

# The plugin selects and orders tests, and writes a line of JSON per event


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Keep the tests of ``PLANTED_TESTS``, in that order; reject a package outside the copy."""
    spec = importlib.util.find_spec("lora_jax")
    if spec is None or not Path(str(spec.origin)).is_relative_to(Path.cwd()):
        raise pytest.UsageError(f"lora_jax is imported from {spec and spec.origin}")
    if "PLANTED_TESTS" in os.environ:
        tests = json.loads(Path(os.environ["PLANTED_TESTS"]).read_text())
        rank = {name: k for k, name in enumerate(tests)}
        items[:] = sorted((x for x in items if x.nodeid in rank), key=lambda x: rank[x.nodeid])


def pytest_runtest_logstart(nodeid, location):
    """Record that a test begins: a test that kills the process reports nothing else."""
    _log({"test": nodeid})


def pytest_runtest_logreport(report):
    """Record the duration of a phase of a test, and whether it failed."""
    _log({"test": report.nodeid, "failed": report.failed, "seconds": report.duration})


def _log(entry: Mapping[str, Any]) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:  # the controller receives all reports
        with open(os.environ["PLANTED_LOG"], "a") as log:
            log.write(json.dumps(entry) + "\n")


# Runs of pytest


class Run(NamedTuple):
    """A run of pytest: ``failed`` is the first test that failed or ended the process."""

    status: int | None  # None: the time limit was reached
    log: list[Any]
    failed: str | None
    output: str


def run_pytest(
    tree: Path, *options: str, tests: Collection[str] = (), limit: float | None = None, **env: str
) -> Run:
    """Run pytest in a copy of the tree, which comes first on the path of all processes."""
    log, output, chosen, args = (tree.parent / x for x in ("log", "output", "chosen", "args"))
    log.write_text("")
    chosen.write_text(json.dumps(list(tests)))
    args.write_text("\n".join(dict.fromkeys(name.partition("::")[0] for name in tests)))
    path = os.pathsep.join([str(tree), str(tree.parent), os.environ.get("PYTHONPATH", "")])
    env = {"PYTHONPATH": path.rstrip(os.pathsep), "PLANTED_LOG": str(log)} | env
    env |= {"PYTHONDONTWRITEBYTECODE": "1"}  # a stale .pyc would hide a fault of equal size
    env |= {"PLANTED_TESTS": str(chosen)} if tests else {}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not peer", "-p", "planted_plugin"]
    command += ["-p", "no:cacheprovider", "-p", "no:randomly", *options]
    command += [f"@{args}"] if tests else []
    with output.open("w") as out:
        streams: Any = {"stdout": out, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(command, cwd=tree, env=os.environ | env, **streams)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:  # kill children of tests as well
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text().splitlines()  # the last one may be cut off
    entries = [json.loads(line) for line in lines if line.endswith("}")]
    failed = next((x["test"] for x in entries if x.get("failed")), None)
    if failed is None and status is not None and status < 0 and entries:
        failed = entries[-1]["test"]
    return Run(status, entries, failed, output.read_text(errors="replace"))


def record(tree: Path) -> None:
    """Record the lines that tests reach, their durations, and failures without a fault."""
    CACHE.mkdir(parents=True, exist_ok=True)
    options = ["--cov=lora_jax", "--cov-context=test", "--cov-report=", "--cov-fail-under=0"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(min(os.cpu_count() or 1, 8)), "--dist", "loadfile"]
    run = run_pytest(tree, *options, COVERAGE_FILE=str(REACH))
    if run.status not in (0, 1) or not REACH.exists():
        raise RuntimeError(f"the tests do not run without a fault:\n{run.output[-2000:]}")
    seconds: dict[str, float] = Counter()
    for entry in run.log:
        seconds[entry["test"]] += math.inf if entry.get("failed") else entry.get("seconds", 0)
    SECONDS.write_text(json.dumps(seconds))


def copy_tree(folder: Path) -> Path:
    """Copy the files that git tracks or does not ignore, and this plugin next to them."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "tree" / name)
    shutil.copy2(__file__, folder / "planted_plugin.py")
    return folder / "tree"


# Faults, and the tests that reach them


def read_faults() -> list[dict[str, str]]:
    """Read the table, and find the file of every fault.

    Raises:
        ValueError: a snippet does not occur exactly once, or changes nothing.
        SyntaxError: a faulty file does not compile.
    """
    faults = tomllib.loads(Path(__file__).with_name("faults.toml").read_text())["fault"]
    texts = {str(p.relative_to(ROOT)): p.read_text() for p in ROOT.glob("lora_jax/**/*.py")}
    for fault in faults:
        old, new = fault["old"], fault["new"]
        found = [path for path, text in texts.items() for _ in range(text.count(old))]
        if len(found) != 1 or old == new:
            raise ValueError(
                f"the fault {fault['name']!r}: old occurs {len(found)} times, in {found}, expected "
                "once, and new must differ from it"
            )
        fault["path"] = found[0]
        compile(texts[found[0]].replace(old, new), f"{found[0]}: {fault['name']}", "exec")
    return faults


def lines_of(text: str, old: str, new: str) -> tuple[set[int], set[int]]:
    """Find the lines of the changed statements, and those of the functions around them.

    Both sets are empty for statements that run at import.
    """
    first, kept = text[: text.index(old)].count("\n") + 1, new.splitlines()
    changed = [k for k, line in enumerate(old.splitlines(), first) if line not in kept]
    nodes: list[Any] = [x for x in ast.walk(ast.parse(text)) if isinstance(x, ast.stmt)]
    nodes.sort(key=lambda x: x.lineno)
    statements, functions = set[int](), set[int]()
    for line in changed or [first]:
        around = [x for x in nodes if x.lineno <= line <= x.end_lineno]
        defs = [x for x in around if isinstance(x, ast.FunctionDef)]
        if defs:
            functions |= set(range(defs[-1].body[0].lineno, defs[-1].end_lineno + 1))
        if defs and around[-1] is not defs[-1]:
            body = getattr(around[-1], "body", None)  # only the header of an ``if`` or a loop
            end = body[0].lineno - 1 if body else around[-1].end_lineno
            statements |= set(range(around[-1].lineno, max(end, around[-1].lineno) + 1))
    return statements, functions


class Reach:
    """The tests that reach each line, from coverage databases that pytest-cov recorded."""

    def __init__(self, files: Collection[Path]):
        import coverage

        self._data = [coverage.CoverageData(str(file)) for file in files]
        for file, data in zip(files, self._data, strict=True):
            data.read()
            if not any("|" in context for context in data.measured_contexts()):
                raise ValueError(f"{file} has no contexts: record it with --cov-context=test")

    @functools.cache  # noqa: B019  (one instance per process)
    def lines(self, path: str) -> Mapping[int, set[str]]:
        """Return the tests by line of a file of the package."""
        found = defaultdict[int, set[str]](set)
        for data in self._data:
            for file in data.measured_files():
                if f"/{file}".replace("\\", "/").endswith(f"/{path}"):
                    for line, contexts in data.contexts_by_lineno(file).items():
                        found[line] |= {x.rpartition("|")[0] for x in contexts if "|" in x}
        return found

    def tests(self, fault: Mapping[str, str], seconds: Mapping[str, float]) -> list[list[str]]:
        """Find the tests to run, the nearest to the fault first, without tests that always fail.

        A test may depend on lines that it does not reach: JAX traces a function once, and child
        processes have no contexts. So the tests that reach no line at all come last.
        """
        text, lines = (ROOT / fault["path"]).read_text(), self.lines(fault["path"])
        near = (*lines_of(text, fault["old"], fault["new"]), set(lines))
        tiers = [set().union(*(lines.get(line, set()) for line in x)) for x in near]
        every = {x.rpartition("|")[0] for data in self._data for x in data.measured_contexts()}
        tiers.append(seconds.keys() - every)
        seen = {x for x, cost in seconds.items() if math.isinf(cost)}
        found = []
        for tier in tiers:
            found.append(order_in_turns(tier - seen, seconds))
            seen |= tier
        return [tests for tests in found if tests]


def order_in_turns(tests: Collection[str], seconds: Mapping[str, float]) -> list[str]:
    """Order tests: short ones first, files in turns, each turn twice as long as the last."""
    by_file = defaultdict[str, list[str]](list)
    for name in sorted(tests, key=lambda name: (seconds.get(name, 1.0), name)):
        by_file[name.partition("::")[0]].append(name)
    turns = []
    for names in by_file.values():
        start, size = 0, 1
        while start < len(names):
            cost = sum(seconds.get(name, 1.0) for name in names[: start + size])
            turns.append((cost, names[start : start + size]))
            start, size = start + size, 2 * size
    return [name for _, turn in sorted(turns) for name in turn]


def judge(
    fault: Mapping[str, str], tiers: list[list[str]], tree: Path, limit: float
) -> dict[str, Any]:
    """Plant a fault in a copy, run the tests tier by tier, and remove the fault."""
    file, start, done = tree / fault["path"], time.monotonic(), set[str]()
    clean = file.read_text()
    faulty = clean.replace(fault["old"], fault["new"])
    env = {
        # one folder per job: JAX writes files in place, so another job could read half a file
        "JAX_COMPILATION_CACHE_DIR": str(CACHE / "jax" / tree.parent.name),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def run(tests: list[str], text: str, limit: float) -> Run:
        file.write_text(text)
        try:
            return run_pytest(tree, "-x", tests=tests, limit=limit, **env)
        finally:
            file.write_text(clean)

    def make_row(result: str, test: str | None = None, cause: str = "") -> dict[str, Any]:
        about = {"kind": fault["kind"], "name": fault["name"], "path": fault["path"]}
        counts = {"run": len(done), "tests": sum(map(len, tiers)), "seconds": round(taken, 1)}
        return about | {"result": result, "test": test} | counts | {"cause": cause}

    taken = 0.0
    for left in tiers:
        while left and taken < limit:
            found = run(left, faulty, limit - taken)
            taken = time.monotonic() - start
            done |= {entry["test"] for entry in found.log if "seconds" in entry}
            if (name := found.failed) is None:
                if found.status not in (0, 5, None):
                    return make_row("broken", cause="\n".join(found.output.splitlines()[-15:]))
                break
            # The order of tests or JAX's cache may be the cause, and not the fault.
            if run([name], faulty, limit).failed and run([name], clean, limit).status == 0:
                return make_row("caught", name)
            left = left[left.index(name) + 1 :]
    return make_row("survived", cause="" if tiers else "no test reaches it")


def show(x: Mapping[str, Any]) -> None:
    """Print the result of a fault."""
    what = f"caught by {x['test']}" if x["test"] else x["result"].upper()
    numbers = f"in {x['seconds']:.0f} s, {x['run']} of {x['tests']} tests"
    print(f"{x['kind']}: {x['name']}: {what} {numbers}", flush=True)
    for line in x["cause"].splitlines():
        print(f"    {line}", flush=True)


def main() -> int:
    """Run the command; return 0 if every fault is caught, 1 if not."""
    parser = argparse.ArgumentParser(description="Count the planted faults that the tests catch.")
    parser.add_argument("--reach", nargs="+", type=Path, help="coverage databases with contexts")
    parser.add_argument(
        "--record", action="store_true", help="record the lines that tests reach again"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="only faults of these names or kinds"
    )
    parser.add_argument(
        "--seconds", type=float, default=300, help="limit for the tests of one fault"
    )
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    faults = read_faults()
    if unknown := set(args.only or ()) - {fault[x] for fault in faults for x in ("name", "kind")}:
        parser.error(f"--only: no fault has the name or kind {sorted(unknown)}")
    if args.only:
        faults = [fault for fault in faults if {fault["name"], fault["kind"]} & set(args.only)]
    results = []
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        names = [str(k) for k in range(max(1, min(args.jobs, len(faults))))]
        trees: queue.Queue[Path] = queue.Queue()
        for name in names:
            trees.put(copy_tree(Path(folder, name)))
        if args.record or not (args.reach or REACH.exists()):
            record(trees.queue[0])
        reach = Reach(args.reach or [REACH])
        seconds = json.loads(SECONDS.read_text()) if SECONDS.exists() else {}
        tests = {fault["name"]: reach.tests(fault, seconds) for fault in faults}

        def judge_in_tree(fault: Mapping[str, str]) -> dict[str, Any]:
            tree = trees.get()
            try:
                return judge(fault, tests[fault["name"]], tree, args.seconds)
            finally:
                trees.put(tree)

        with ThreadPoolExecutor(len(names)) as pool:
            for future in as_completed([pool.submit(judge_in_tree, fault) for fault in faults]):
                results.append(future.result())
                show(results[-1])
    every = Counter(x["kind"] for x in results)
    caught = Counter(x["kind"] for x in results if x["result"] == "caught")
    for kind in dict.fromkeys(fault["kind"] for fault in faults):
        print(f"{kind:24} {caught[kind]} of {every[kind]}")
    print(f"{'all':24} {caught.total()} of {every.total()}")
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n")
    return 0 if caught == every else 1


if __name__ == "__main__":
    sys.exit(main())
