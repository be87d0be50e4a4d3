"""What the compiler for TPUs makes of our programs; each compiles in a process of its own."""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from benchmarks import hlo
from benchmarks.tpu import aot, slices

ROOT = Path(__file__).parent.parent

SMALL = {"topology": "v5e:2x2", "model": "tiny", "length": 128, "rank": 8}


def python(*arguments, **environment):
    """Run a script without the environment that libtpu wants, but for what is given."""
    # JAX itself sets some of it, and where the library is.
    inherited = {k: v for k, v in os.environ.items() if not re.search("TPU|JAX_PLATFORMS", k)}
    path = os.pathsep.join([str(ROOT), *filter(None, [inherited.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *arguments],
        env=inherited | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def need_libtpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the compiler for TPUs, libtpu, is not installed: pip install '.[tpu-aot]'")


@functools.cache
def measured(**case):
    """What a case of benchmarks/tpu/programs.py takes."""
    need_libtpu()
    done = python("-m", "benchmarks.tpu.programs", json.dumps(SMALL | case))
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def moved(row):
    """``[(kind, bytes)]`` of its collectives."""
    return [(x["kind"], x["bytes"]) for x in row["collectives"] for _ in range(x["times"])]


def test_one_module_only_asks_for_descriptions_of_tpus():
    name = "get_topology" + "_desc"
    folders = [ROOT / folder for folder in ("lora_jax", "benchmarks", "examples", "tests", ".ci")]
    found = {p for folder in folders for p in folder.rglob("*.py") if name in p.read_text()}
    assert found == {ROOT / "benchmarks/tpu/slices.py"}


def test_the_environment_comes_before_jax(monkeypatch):
    for name, value in slices.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    slices.set_environment()  # JAX is here already, but so is the environment
    for name in slices.ENVIRONMENT:
        with monkeypatch.context() as patch:
            patch.delenv(name)
            with pytest.raises(RuntimeError, match=rf"jax.* imported before .*\['{name}'\]"):
                slices.set_environment()


LATE = """
import jax
from benchmarks.tpu import slices
try:
    slices.devices("v5e:2x2")
except RuntimeError as error:
    print(error)
print("libtpu" in open("/proc/self/maps").read())
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc to see libraries in")
def test_libtpu_is_not_loaded_without_its_environment():
    # The variable that keeps it off the network is set all the same, should this ever fail.
    done = python("-c", LATE, TPU_SKIP_MDS_QUERY="1", JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr
    said, loaded = done.stdout.splitlines()
    assert "Call slices.set_environment() before anything that imports jax" in said
    assert loaded == "False"


def test_a_missing_libtpu_is_named():
    code = (
        "import sys; from benchmarks.tpu import slices; slices.set_environment(); "
        "sys.modules['libtpu'] = None; slices.devices('')"
    )
    done = python("-c", code)
    assert "RuntimeError: libtpu is not installed: pip install '.[tpu-aot]'" in done.stderr


def test_an_error_of_the_compiler_is_not_taken_for_a_size():
    errors = [
        "required for HLO temporaries (19.24G) exceeds available HBM (15.75G)",
        "Ran out of memory in memory space hbm. Used 19.24G of 15.75G hbm.",
        "disk full",
    ]
    code = f"from benchmarks.tpu import programs as p\nfor e in {errors!r}: print(p.sizes_of(e))"
    done = python("-c", code)
    assert [*map(json.loads, done.stdout.splitlines())] == [[19.24 * 2**30, 15.75 * 2**30]] * 2
    message = "ValueError: the compiler's error does not contain the memory needed: disk full"
    assert message in done.stderr


def test_a_case_that_fails_is_named():
    with pytest.raises(RuntimeError, match=r"'colour': 'blue'.* failed:\n(.|\n)*argument 'colour'"):
        aot.measure({"colour": "blue"})


def test_what_does_not_fit_has_a_line_in_the_table():
    row = {
        **{"topology": "v5e:2x2", "spread": "pmap", "program": "train", "method": "full"},
        **{"jax": "1", "libtpu": "2", "fits": False, "seconds": 2.4},
        **{"needs": 92.76 * 2**30, "has": 15.75 * 2**30},
    }
    line = aot.markdown([row]).splitlines()[-1]
    assert line.startswith("| v5e:2x2 | pmap | train | full | - |")
    assert line.endswith("| does not fit: 92.76 of 15.75 GiB | 2 s |")
    assert line.count("|") == aot.markdown([row]).splitlines()[-2].count("|")


@pytest.mark.devices(8)
def test_collectives_and_products_count_as_often_as_their_loops_run():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    specs = {"in_specs": (P(), P("x")), "out_specs": P(), "check_vma": False}

    @functools.partial(jax.shard_map, mesh=mesh, **specs)
    def fn(w, x):
        def body(x, w):
            return lax.psum(x @ w, "x"), None

        return lax.psum(lax.scan(body, x, w)[0], "x")

    x = np.ones((32, 16), np.float32)
    compiled = jax.jit(fn).lower(np.ones((6, 16, 16), np.float32), x).compile()
    found = hlo.collectives(compiled.as_text())
    assert {x.kind for x in found} == {"all-reduce"}
    assert sum(x.times * x.bytes for x in found) == (6 + 1) * 4 * 16 * 4
    assert hlo.matmul_flops(compiled.as_text()) == 6 * 2 * 4 * 16 * 16


COUNTED = """\
HloModule m

%body (p: (u32[], f32[2,2], u32[])) -> (u32[], f32[2,2], u32[]) {
  %p = (u32[]{:T(128)}, f32[2,2]{1,0}, u32[]{:T(128)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[2,2]{1,0} get-tuple-element(%p), index=1
  %by = u32[]{:T(128)} get-tuple-element(%p), index=2
  %next = u32[]{:T(128)} add(%i, %by)
  %y = f32[2,2]{1,0} convolution(%x, %x), dim_labels=bf_io->bf
  ROOT %t = (u32[]{:T(128)}, f32[2,2]{1,0}, u32[]{:T(128)}) tuple(%next, %y, %by)
}

%condition (q: (u32[], f32[2,2], u32[])) -> pred[] {
  %q = (u32[]{:T(128)}, f32[2,2]{1,0}, u32[]{:T(128)}) parameter(0)
  %j = u32[]{:T(128)} get-tuple-element(%q), index=0
  %end = u32[]{:T(128)} constant(8)
  ROOT %lt = pred[]{:T(512)} compare(%j, %end), direction=LT
}

ENTRY %main (x: f32[2,2]) -> (u32[], f32[2,2], u32[]) {
  %x.1 = f32[2,2]{1,0} parameter(0)
  %one = u32[]{:T(128)} constant(1)
  %start = u32[]{:T(128)} copy(%one)
  %two = u32[]{:T(128)} constant(2)
  %state = (u32[]{:T(128)}, f32[2,2]{1,0}, u32[]{:T(128)}) tuple(%start, %x.1, %two)
  ROOT %w = (u32[], f32[2,2]{1,0}, u32[]) while(%state), condition=%condition, body=%body
}
"""


def test_a_loop_that_counts_by_two_runs_half_as_often():
    assert hlo.matmul_flops(COUNTED) == 4 * 2 * 2**3  # at 1, 3, 5 and 7
    for changed in (("LT", "GT"), ("constant(2)", "parameter(0)"), ("add(%i, %by)", "copy(%i)")):
        with pytest.raises(ValueError, match="trip count of the loop 'w' cannot be read"):
            hlo.matmul_flops(COUNTED.replace(*changed))


def test_a_loop_without_a_count_is_not_guessed():
    fn = jax.jit(lambda x: lax.while_loop(lambda x: (x @ x).sum() < 10, lambda x: x @ x, x))
    with pytest.raises(ValueError, match=r"trip count of the loop 'while.* cannot be read"):
        hlo.matmul_flops(fn.lower(np.ones((4, 4), np.float32)).compile().as_text())
    with pytest.raises(ValueError, match="has no ENTRY"):
        hlo.collectives("HloModule nothing")


# The parts of one all-gather that runs beside other work, and a reduce-scatter, as a TPU has them.
BESIDE = """\
HloModule m

%start (p: f32[4]) -> f32[8] {
  %p = f32[4]{0:T(128)} parameter(0)
  %all-gather.1 = f32[8]{0:T(128)} all-gather(%p), channel_id=3, dimensions={0}
  ROOT %c = f32[8]{0} custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%middle (p.2: f32[4]) -> f32[8] {
  %p.2 = f32[4]{0:T(128)} parameter(0)
  ROOT %all-gather.2 = f32[8]{0:T(128)} all-gather(%p.2), channel_id=3, dimensions={0}
}

%all-reduce-scatter.2 (p: bf16[8,2]) -> bf16[4,2] {
  %p.1 = bf16[8,2]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.7 = bf16[8,2]{1,0:T(8,128)(2,1)} all-reduce(%p.1), channel_id=4, to_apply=%add
  ROOT %d = bf16[4,2]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.7), dynamic_slice_sizes={4,2}
}

ENTRY %main (x: f32[4], y: bf16[8,2]) -> f32[8] {
  %x = f32[4]{0:T(128)} parameter(0)
  %y = bf16[8,2]{1,0:T(8,128)(2,1)} parameter(1)
  %s = f32[8]{0} fusion(%x), kind=kCustom, calls=%start
  %t = f32[8]{0} fusion(%x), kind=kCustom, calls=%middle
  %permute = (f32[4]{0}, f32[4]{0}, u32[]) collective-permute-start(%x), channel_id=5
  %another = (f32[4]{0}, f32[4]{0}, u32[]) collective-permute-start(%x), channel_id=5
  %r = bf16[4,2]{1,0:T(8,128)(2,1)} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.2
  ROOT %g = f32[8]{0} copy(%t)
}
"""


def test_a_collective_beside_other_work_counts_once():
    found = [(x.kind, x.bytes, x.times) for x in hlo.collectives(BESIDE)]
    assert sorted(found) == [
        ("all-gather", 32, 1),
        ("collective-permute", 16, 1),
        ("collective-permute", 16, 1),
        ("reduce-scatter", 32, 1),
    ]


@pytest.mark.tpu
@pytest.mark.parametrize(("spread", "dtype"), [("pmap", "bfloat16"), ("data", "float32")])
def test_one_all_reduce_of_the_gradients_is_all_that_crosses_chips(spread, dtype):
    row = measured(spread=spread, dtype=dtype, full=".*v_proj/bias")
    ((kind, size),) = moved(row)
    assert kind == "all-reduce"
    assert row["trainable"] <= size <= row["trainable"] + 64
    assert row["trainable"] < row["argument"] / 10


@pytest.mark.tpu
def test_jit_reduces_gradients_in_the_dtype_of_their_products():
    # The partitioner reduces before the gradients of a bfloat16 model become float32.
    row = measured(spread="data", full=".*v_proj/bias")
    assert {kind for kind, _ in moved(row)} == {"all-reduce"}
    assert len(moved(row)) <= 2
    assert sum(size for _, size in moved(row)) <= row["trainable"] + 64


@pytest.mark.tpu
@pytest.mark.parametrize("spread", ["pmap", "fsdp", "fsdp+tp"])
def test_the_trained_state_is_donated(spread):
    row = measured(spread=spread, full=".*v_proj/bias")
    assert 0 <= row["output"] - row["alias"] <= 1024  # the loss
    assert row["alias"] > row["trainable"] / 4


@pytest.mark.tpu
def test_no_gradient_of_the_base_is_computed():
    lora, full = (measured(spread="pmap", method=m)["matmul_flops"] for m in ("lora", "full"))
    weights = 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512) + 256 * 512
    gradients = 2 * 128 * weights
    assert lora < full - 0.85 * gradients


@pytest.mark.tpu
@pytest.mark.parametrize("spread", ["data", "fsdp", "fsdp+tp"])
def test_merge_keeps_one_layer_at_a_time_and_moves_nothing(spread):
    row = measured(model="scanned", program="merge", spread=spread)
    layer = 4 * 1024 * 2048 // (1 if spread == "data" else 4)
    assert row["temp"] <= 3 * layer
    assert moved(row) == []
    assert 0 <= row["output"] - row["alias"] <= 1024  # the table of the outputs


@pytest.mark.tpu
@pytest.mark.parametrize("case", [{"chips": 1}, {"spread": "fsdp+tp"}])
def test_attention_by_the_kernel_takes_less_memory(case):
    by_kernel, by_xla = (measured(length=2048, attention=a, **case) for a in ("auto", "xla"))
    assert by_kernel["kernels"] == 2 * 4  # in each layer: forth, again, and two back
    assert by_xla["kernels"] == 0
    assert by_kernel["temp"] < 0.9 * by_xla["temp"]


@pytest.mark.tpu
def test_what_does_not_fit_says_so():
    row = measured(model="8b", spread="pmap", length=2048)
    assert not row["fits"]
    assert row["needs"] > 16 * 2**30 > row["has"] > 15 * 2**30


@pytest.mark.tpu
def test_the_benchmark_keeps_what_it_measured(tmp_path):
    need_libtpu()
    kept, page = tmp_path / "kept.json", tmp_path / "page.md"
    script = ["-m", "benchmarks.tpu.aot", "--quick", "--json", kept, "--markdown", page]
    done = python(*script, COLUMNS="200")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(kept.read_text())
    assert (row["model"], row["spread"], row["fits"]) == ("tiny", "pmap", True)
    assert "all-reduce 1 → 1:" in page.read_text()
    row["seconds"] = 12345
    kept.write_text(json.dumps([row]))
    assert python(*script).returncode == 0
    assert "12345 s" in page.read_text()  # not compiled again


@pytest.mark.tpu
def test_an_unknown_slice_is_the_compilers_to_refuse():
    need_libtpu()
    done = python("-c", "from benchmarks.tpu import slices; slices.devices('v5e:3x5x7')")
    assert done.returncode != 0
    assert "not installed" not in done.stderr
