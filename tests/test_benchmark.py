"""The harness: what a row says, what becomes a row, what is not measured again; and the two benchmarks on it."""

import csv
import os
import signal

import pytest
import torch

from benchmarks import harness, records, worker
from benchmarks.harness import GateError, Limits, Task, Work
from benchmarks.records import COLUMNS, Results, read_rows

MIB = 1 << 20
HERE = "tests.test_benchmark"
QUICK = Limits(seconds=60, repeat_seconds=0)


# Works for the tests below; they run in processes of their own.


def build_sized(benchmark, name, mode, height, width, device, dtype):
    """Holds `height` MiB, and allocates `width` MiB when it runs."""
    held = torch.ones(height * MIB // 4)
    return Work(step=lambda: torch.ones(width * MIB // 4).sum() + held[0], check=lambda result: None)


def build_killed(**_):
    os.kill(os.getpid(), signal.SIGKILL)


def build_hung(**_):
    signal.pause()


def build_foreign(**_):
    import no_such_package  # noqa: F401


def build_wrong(**_):
    def check(result):
        raise GateError("it is wrong")

    return Work(step=lambda: None, check=check)


def build_broken(**_):
    raise RuntimeError("first line\nthe reason")


def task(build, height=32, width=64, name="x", cost=None):
    subject = dict(benchmark="test", name=name, mode="m", height=height, width=width)
    return Task(f"{HERE}:build_{build}", subject, cost or height * width, threads=1)


def in_this_process(build, monkeypatch):
    """The answer of the worker, run here."""
    monkeypatch.setattr(worker, "_limit_memory", lambda gib: None)
    order = {name: getattr(task(build), name) for name in ("build", "subject", "device", "dtype", "extra")}
    return worker.answer(order | dict(threads=None, memory_gib=None, repeat_seconds=0))


def test_row_says_time_memory_and_where_it_comes_from(tmp_path):
    results = Results(tmp_path / "new" / "rows.csv")
    [row] = harness.run([task("sized")], results, QUICK)
    assert row["status"] == "ok" and tuple(row) == COLUMNS
    assert 0 < float(row["q10_ms"]) <= float(row["median_ms"]) <= float(row["q90_ms"])
    if row["peak_mib"]:
        assert float(row["base_mib"]) == pytest.approx(32, abs=4)
        assert float(row["peak_mib"]) == pytest.approx(64, abs=4)
    assert row["torch"] == torch.__version__.split("+")[0] and row["machine"] and row["timestamp"] and row["command"]
    assert read_rows(results.path) == [row]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the limit of memory is Linux's")
def test_more_memory_than_allowed_is_a_row_and_larger_sizes_are_not_tried(tmp_path):
    tasks = [task("sized", 1, 1 << 14), task("sized", 1, 1 << 15), task("sized", 1, 1, "other")]
    rows = harness.run(tasks, Results(tmp_path / "rows.csv"), Limits(memory_gib=4, repeat_seconds=0))
    assert [row["status"] for row in rows] == ["out of memory", "skipped: a smaller size was out of memory", "ok"]


def test_a_killed_and_a_hung_process_are_rows():
    assert harness.measure(task("killed"), QUICK) == {"status": "out of memory"}
    assert harness.measure(task("hung"), QUICK, seconds_left=1) == {"status": "skipped: not done after 1 s"}


def test_what_goes_wrong_in_the_worker_has_a_name(monkeypatch):
    assert in_this_process("foreign", monkeypatch) == {"status": "not installed: no_such_package"}
    assert in_this_process("wrong", monkeypatch) == {"gate": "it is wrong"}
    with pytest.raises(RuntimeError, match="the reason"):
        in_this_process("broken", monkeypatch)


def test_times_are_the_deciles_of_the_calls_after_the_first(monkeypatch):
    calls = iter([0.0001, *(0.001 * n for n in range(1, 12)), *[0.5] * 1000])
    monkeypatch.setattr(worker, "_timed", lambda *_: (next(calls), None))
    monkeypatch.setattr(worker, "MAX_REPEATS", 11)
    monkeypatch.setattr(worker, "_limit_memory", lambda gib: None)
    order = {name: getattr(task("sized"), name) for name in ("build", "subject", "device", "dtype", "extra")}
    row = worker.answer(order | dict(threads=None, memory_gib=None, repeat_seconds=1.0))
    assert [row[name] for name in ("repeats", "q10_ms", "median_ms", "q90_ms")] == [11, "2", "6", "10"]
    # One that takes longer than it is to be repeated for is the only one.
    calls = iter([2.0, 1.0])
    row = worker.answer(order | dict(threads=None, memory_gib=None, repeat_seconds=1.0))
    assert [row[name] for name in ("repeats", "median_ms")] == [1, "2000"]


def test_the_device_that_runs_is_awaited(monkeypatch):
    """Only the current device was, cuda:0, so that times on another were those of starting the work."""
    awaited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: awaited.append(device))
    worker._timed(lambda: None, "cuda:1")
    assert awaited == ["cuda:1", "cuda:1"]


def test_failed_row_says_its_reason_and_a_failed_gate_ends_the_run(tmp_path, monkeypatch):
    def child(stdout="", stderr="", returncode=0):
        found = lambda *_, **__: harness.subprocess.CompletedProcess([], returncode, stdout, stderr)  # noqa: E731
        monkeypatch.setattr(harness.subprocess, "run", found)

    records.commit()  # asks git, before `run` is replaced
    child(stderr="Traceback\nRuntimeError: the reason\n", returncode=1)
    assert harness.measure(task("sized"), QUICK) == {"status": "failed: RuntimeError: the reason"}
    child(stdout='{"gate": "it is wrong"}')
    with pytest.raises(GateError, match="x 32x64 m: it is wrong"):
        harness.run([task("sized")], Results(tmp_path / "rows.csv"), QUICK)


def test_measured_rows_are_not_measured_again(tmp_path, monkeypatch):
    calls = []
    answers = {"good": {"status": "ok", "median_ms": "1"}, "bad": {"status": "failed: no"}}
    monkeypatch.setattr(harness, "measure", lambda task, *_: calls.append(str(task)) or answers[task.subject["name"]])
    tasks = [task("sized", name=name) for name in ("good", "bad")]
    path = tmp_path / "rows.csv"
    harness.run(tasks, Results(path), QUICK)
    monkeypatch.setattr(records.sys, "argv", ["another.py"])
    again = harness.run(tasks, Results(path), QUICK)
    assert [name.split()[0] for name in calls] == ["good", "bad", "bad"]
    assert [row["status"] for row in again] == ["ok", "failed: no"]
    harness.run(tasks, Results(path), QUICK, fresh=True)
    assert len(calls) == 5
    # Nothing is ever taken out of the file; of rows with one key the last counts.
    assert len(read_rows(path)) == 5 and len(records.latest(read_rows(path))) == 2


def test_tasks_that_would_take_too_long_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "measure", lambda task, *_: {"status": "ok", "median_ms": str(task.cost)})
    tasks = [task("sized", cost=cost, height=cost) for cost in (2_000, 40_000, 70_000)]
    rows = harness.run(tasks, Results(tmp_path / "rows.csv"), QUICK)
    assert [row["status"] for row in rows] == ["ok", "ok", "skipped: would take 70 s or more, allowed are 60"]
    rows = harness.run(tasks, Results(tmp_path / "new.csv"), Limits(seconds=1000, total_seconds=45))
    assert [row["status"][:7] for row in rows] == ["ok", "skipped", "skipped"]


def test_file_with_other_columns_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w") as file:
        csv.writer(file).writerow(["a", "b"])
    with pytest.raises(records.RecordsError, match=r"rows\.csv has other columns"):
        Results(path)


# The operator and the models.


def test_flop_bound_is_the_one_counted_on_paper():
    from benchmarks.operator_benchmark import flop_bound

    row = dict(cell_size="8", rank="4", variant="linear")
    assert flop_bound(row | dict(height="128", width="128")) == pytest.approx(30.9, abs=0.05)
    assert flop_bound(row | dict(height="256", width="256")) == pytest.approx(118.5, abs=0.05)


def test_operator_benchmark_end_to_end(tmp_path, capsys):
    from benchmarks.__main__ import main

    path = tmp_path / "operator.csv"
    options = ["--sizes", "40", "--threads", "1", "--repeat", "0", "--head-dim", "8", "--out", str(path)]
    assert main(["operator", "--modes", "forward+backward", *options]) == 0
    rows = read_rows(path)
    assert [(row["name"], row["status"], row["tokens"]) for row in rows] == [
        ("fma2d-torch", "ok", "1600"),
        ("sdpa", "ok", "1600"),
    ]
    assert int(rows[1]["macs"]) == 7 * 1600**2 * 2 * 8
    printed = capsys.readouterr().out
    assert "bound" in printed and "40x40" in printed
    assert main(["draw", str(path), "--out", str(tmp_path / "figures")]) == 0
    [figure] = (tmp_path / "figures").iterdir()
    assert figure.name == "operator_forward_backward.png" and figure.read_bytes().startswith(b"\x89PNG")


def test_each_size_has_its_batch(monkeypatch):
    from benchmarks import operator_benchmark
    from benchmarks.__main__ import parse, plan

    tasks = plan(parse(["model", "--models", "fma2d_nano", "--sizes", "512", "224", "--batch", "1", "4"]))
    assert [(task.subject["height"], task.subject["batch"]) for task in tasks] == [(224, 4), (512, 1)]
    monkeypatch.setattr(operator_benchmark, "gate", lambda *_: None)
    found = dict.fromkeys((t.subject["width"], t.subject["batch"]) for t in plan(parse(["operator", "--table"])))
    assert tuple(found) == operator_benchmark.TABLE
    with pytest.raises(SystemExit):
        parse(["model", "--sizes", "64", "96", "128", "--batch", "1", "4"])


def test_ratios_are_of_dense_attention_in_the_same_place():
    from benchmarks.operator_benchmark import ratios

    place = dict(height="8", width="8", heads="2", head_dim="64", device="cpu", dtype="float32", status="ok")
    own, dense = dict(name="fma2d-torch", variant="linear"), dict(name="sdpa", variant="")
    rows = [
        place | kind | dict(batch=batch, mode=mode, median_ms=ms)
        for batch, mode, times in (("4", "forward", "28"), ("4", "backward", "21"), ("1", "backward", "96"))
        for kind, ms in zip((own, dense), times, strict=True)
    ]
    lines = [line.split() for line in ratios(rows).splitlines()]
    assert lines[0] == ["tokens", "batch", "name", "variant", "forward", "backward"]
    assert lines[2:] == [["8x8", "4", *own.values(), "4.00", "0.50"], ["8x8", "1", *own.values(), "-", "0.67"]]


def test_wrong_operator_is_not_timed(tmp_path, capsys, monkeypatch):
    from benchmarks import operator_benchmark
    from benchmarks.__main__ import main

    def slightly_wrong(*args, backend, **options):
        return true(*args, backend=backend, **options) * (1.0001 if backend == "torch" else 1)

    true = operator_benchmark.multipole_attention
    monkeypatch.setattr(operator_benchmark, "multipole_attention", slightly_wrong)
    assert main(["operator", "--sizes", "16", "--out", str(tmp_path / "rows.csv")]) == 1
    errors = capsys.readouterr().err.strip()
    assert errors.startswith("error: torch backend, linear, float32, cpu: out is") and "\n" not in errors
    assert not (tmp_path / "rows.csv").exists()


def test_interrupted_benchmark_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    from benchmarks.__main__ import main

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "measure", interrupt)
    words = ["model", "--models", "fma2d_nano", "--sizes", "64", "--out", str(tmp_path / "rows.csv")]
    assert main(words) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; the same command goes on where it stopped"


@pytest.mark.parametrize("mode", ["inference", "training step"])
def test_model_benchmark_builds_and_checks(mode):
    from benchmarks.model_benchmark import build

    subject = dict(benchmark="model", mode=mode, height=64, width=64, batch=2)
    for name, options in (("fma2d_nano", dict(variant="loglinear", cell_size=4, rank=1)), ("mit_b0", {})):
        work = build(name=name, **subject, device="cpu", dtype="float32", **options)
        work.warm_up()
        logits = work.step()
        work.check(logits)
        with pytest.raises(GateError, match="finite"):
            work.check(logits * torch.nan)
        facts = work.facts()
        assert facts["tokens"] == 2 * 16 * 16 and facts["params"] > 3e6 and facts["macs"] > 5e7


def test_models_are_compared_with_the_swin_of_their_size_and_batch():
    from benchmarks.figures import cost_figure
    from benchmarks.model_benchmark import table

    blank = dict.fromkeys(COLUMNS, "") | dict(benchmark="model", mode="inference", dtype="float32", device="cpu")
    blank |= dict(height="64", width="64", tokens="256", params="2000000", macs="3000000000", status="ok")
    measured = (
        ("swin_tiny_patch4_window7_224", "1", "200", "10", "30"),
        ("fma2d_tiny", "1", "100", "20", "60"),
        ("swin_tiny_patch4_window7_224", "4", "400", "10", "90"),
        ("fma2d_tiny", "4", "800", "20", "30"),
    )
    names = ("name", "batch", "median_ms", "base_mib", "peak_mib")
    rows = [blank | dict(zip(names, values, strict=True)) for values in measured]
    rows[1]["variant"] = rows[3]["variant"] = "linear"
    lines = [line.split() for line in table(rows).splitlines()[2:]]
    assert [line[-7:] for line in lines if line[2] == "fma2d_tiny"] == [
        ["3.0", "100", "10.00", "20", "60", "0.50", "2.00"],
        ["3.0", "800", "5.00", "20", "30", "2.00", "0.50"],
    ]
    time, memory = cost_figure(rows[:2]).axes
    assert [line.get_ydata()[0] for line in time.lines] == [0.2, 0.1]
    assert [line.get_ydata()[0] for line in memory.lines] == [40, 80]


def test_macs_of_attention_are_counted_by_its_pairs():
    from benchmarks.model_benchmark import count_macs
    from fma2d import FMA2d
    from fma2d.geometry import count_pairs

    module, x = FMA2d(16, 2, cell_size=2, levels=1), torch.zeros(1, 9, 12, 16)
    projections = 9 * 12 * 16 * 16 * 4
    assert count_macs(module, x) == projections + 2 * 16 * sum(count_pairs((9, 12), 2, 4, linear=True))


@pytest.mark.slow
def test_demo(tmp_path, capfd):
    from PIL import Image

    from tools import demo

    assert demo.main(["--sizes", "64", "--out", str(tmp_path)]) == 0
    pictures = {"attention.png", "cover.png", "model_inference.png", "scene.png"}
    assert {path.name for path in tmp_path.iterdir()} == pictures | {"demo.csv", "segmentation"}
    rows = read_rows(tmp_path / "demo.csv")
    assert [(row["name"], row["status"]) for row in rows] == [(name, "ok") for name in demo.MODELS]
    scene, overlay = (Image.open(tmp_path / name) for name in ("scene.png", "segmentation/scene_overlay.png"))
    assert scene.size == overlay.size and scene.tobytes() != overlay.tobytes()
    printed = capfd.readouterr().out
    assert all(f"{name} " in printed for name in demo.MODELS)
