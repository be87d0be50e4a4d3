"""Damage files, and kill processes while they write."""

import os
import subprocess
import sys
import textwrap

import hypothesis
from hypothesis import strategies as st

NIGHTLY = os.environ.get("LORA_JAX_MUTATIONS")  # the number of files to damage
EXAMPLES = int(NIGHTLY or 200)

EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "drop", "repeat", "overwrite", "header"]),
        st.one_of(st.integers(0, 2**13), st.integers(0, 2**17)),
        st.integers(1, 40),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=3,
)
fuzz = hypothesis.settings(
    max_examples=EXAMPLES,
    derandomize=not NIGHTLY,
    database=None,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


def damaged(data, edits):
    """Return a file with bits flipped, bytes lost, repeated or overwritten, or a changed header."""
    data = bytearray(data)
    for kind, place, size, new in edits:
        start = place % max(1, len(data))
        match kind:
            case "flip" if data:
                data[start] ^= 1 << size % 8
            case "cut":
                del data[start:]
            case "drop":
                del data[start : start + size]
            case "repeat":
                data[start:start] = data[start : start + size]
            case "overwrite":
                data[start : start + len(new)] = new
            case "header":
                data[:8] = new.ljust(8, b"\0")
    return bytes(data)


def run_script(script, *args):
    """Run a script in a process, and return what it prints."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def kill_while_saving(program, folder, kills):
    """Kill a program at random moments, each time in a new folder ``folder/i``.

    Args:
        program: defines ``save(path, k)``, which writes numbers that are all ``k`` to ``path``.
        folder: an existing folder.
        kills: the number of kills.

    Returns:
        The number of complete saves in each folder before the killed one; at least one. The file
        is ``folder/i/a``.
    """
    harness = """
import os, random, signal, sys, time, warnings
os.environ["JAX_PLATFORMS"] = "cpu"
warnings.simplefilter("ignore")
"""
    harness += textwrap.dedent(program)
    harness += """
random.seed(0)
for i in range(int(sys.argv[2])):
    folder = os.path.join(sys.argv[1], str(i))
    os.mkdir(folder)
    reading, report = os.pipe()
    if (child := os.fork()) == 0:  # JAX does not run in the parent
        for k in range(10**6):
            save(os.path.join(folder, "a"), k)
            os.write(report, b".")
    done = len(os.read(reading, 1))
    time.sleep(0.1 * random.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(report)
    while more := os.read(reading, 4096):
        done += len(more)
    os.close(reading)
    print(done, flush=True)
"""
    counts = list(map(int, run_script(harness, folder, kills).split()))
    assert len(counts) == kills
    partial = (p for i in range(kills) for p in (folder / str(i)).glob(".*.partial"))
    assert any(partial), "all kills happened between saves"
    return counts
