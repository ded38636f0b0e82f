"""Every kernel compiled ahead of time, in processes without Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("fma2d.ops.triton_backend")
ROOT = Path(__file__).resolve().parents[1]


def python(*arguments, timeout=900):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def check(*arguments, timeout=900):
    done = python("benchmarks/gpu/kernel_report.py", *arguments, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_no_spill_and_no_budget_overrun_in_the_main_configuration(tmp_path):
    path = tmp_path / "report.csv"
    printed = check("--main", "--only", "d64 r8 p4 256x256 linear", "--arch", "86", "90", "--csv", path)
    assert "none at fault" in printed
    lines = path.read_text().splitlines()
    for kernel in ("near_forward", "near_dkdv", "summarise", "product_gradient"):
        assert {line.split(",")[0] for line in lines if f",{kernel}," in line} == {"sm_86", "sm_90"}


@pytest.mark.slow
def test_all_configurations():
    check(timeout=3600)


def test_a_name_that_fits_no_configuration_is_refused():
    done = python("benchmarks/gpu/kernel_report.py", "--only", "d65")
    assert done.returncode == 2 and "'d65'" in done.stderr


@pytest.mark.slow  # the other look at it: tests/test_triton_attention.py, at 50 sizes
def test_sizes_of_images_cause_no_compilation():
    """Over 16 sizes of three levels each kernel is compiled as often as it has reasons of other kinds.

    These are whole cells for the near field, and for the aggregation whether it reads tokens or block sums and whether
    cells are cut.
    """
    script = """
import collections, json, random, sys
from benchmarks.gpu import kernel_report
draw, found = random.Random(0), set()
for _ in range(16):
    config = kernel_report.Config(grid=(draw.randint(65, 128), draw.randint(20, 128)))
    found.update(launch for launch, _ in kernel_report.launches(config, 90))
print(json.dumps(collections.Counter(launch.kernel for launch in found)))
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout)
    reasons = dict(near_forward=2, near_dq=2, near_dkdv=2, summarise=4, source_gradient=6, product_gradient=4)
    assert set(counts) > set(reasons)
    assert {kernel: count for kernel, count in counts.items() if count > reasons.get(kernel, 1)} == {}


def test_spills_in_the_main_configuration_and_overruns_and_serialised_products_anywhere_are_faults():
    script = """
import json, sys
from benchmarks.gpu.kernel_report import Row
shapes = [dict(main=main, spilled=s, shared=m) for main in (True, False) for s, m in ((0, 100), (8, 100), (0, 101))]
shapes.append(dict(main=False, spilled=0, shared=100, serialised=True))
same = dict(arch="sm_90", kernel="k", config="c", warps=4, stages=2, registers=255, budget=100, instructions=9, loop=1)
same["serialised"] = False
print(json.dumps([row.faults() for row in (Row(**same | shape) for shape in shapes)]))
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr[-3000:]
    spill, overrun = ["spills 8 bytes"], ["needs 101 bytes of shared memory, 100 are there"]
    serialised = ["has its products serialised by ptxas"]
    assert json.loads(done.stdout) == [[], spill, overrun, [], [], overrun, serialised]
