"""The GPU programme for fifteen minutes: one process, every row on disk at once, what is worth most first.

Started again with the results of an earlier run (`--resume`), it goes on where that was. With `smoke` everything is
tiny and runs on the CPU through Triton's interpreter, so that every line has run before a GPU is there.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import quantiles

import torch

from benchmarks import model_benchmark, operator_benchmark
from benchmarks.harness import GateError, Task, Work, text_table
from benchmarks.records import ROOT, Results, append_rows, new_row, origin
from fma2d import multipole_attention, num_levels

from . import card, device_checks

OURS, GRAPH = "fma2d-triton", "fma2d-triton-graph"
REPEAT_SECONDS = 0.3  # of a row's measurement
GROUP_SECONDS = 0.01  # calls that are timed together last about so long
TEST_SECONDS = 240


@dataclass(frozen=True)
class Part:
    """A part of the programme.

    Attributes:
        seconds: expected on an H200 with 16 processors; `why` says what they are for.
        work: does it; raises `GateError` for a wrong result.
    """

    name: str
    seconds: int
    why: str
    work: Callable[[], None]


class Short:
    """The parts; see the module."""

    def __init__(self, folder: Path, smoke: bool):
        self.folder, self.smoke = folder, smoke
        self.device, self.dtype = ("cpu", "float32") if smoke else ("cuda", "bfloat16")
        self.state = folder / "done.json"

    def parts(self) -> list[Part]:
        return [
            Part("gate", 90, "4 x 18 kernels compiled, about 1 s each; the reference in float64, under 1 s", self.gate),
            Part("operator", 80, "26 rows: 0.3 s of calls, 1 s to build; dense at 512 is 0.1 s a call", self.operator),
            Part("kernels", 20, "4 profiles of 20 calls", self.kernels),
            Part("models", 120, "6 rows: 6 s to build, 5 s for kernels, 1 to 3 s of calls", self.models),
            Part("checks", 30, "graph, stream and repetition: compiled for 4 heads and for 8 more shapes", self.checks),
            Part("peers", 90, "8 rows; FlexAttention compiles for 10 s a size", self.peers),
            Part("log-linear", 30, "6 rows, compiled by the gate", self.loglinear),
            Part("tests", TEST_SECONDS, "40 shapes compiled in 16 processes; stopped after this", self.tests),
        ]  # fmt: skip

    def run(self) -> int:
        """All parts that are not done; 1 if a result is wrong or tests failed."""
        done = self.done()
        for part in self.parts():
            if done.get(part.name) == "done":
                continue
            print(f"== {part.name}, expected {part.seconds} s: {part.why}", flush=True)
            start, outcome = time.monotonic(), "done"
            try:
                part.work()
            except GateError as error:
                outcome = f"wrong: {error}"
            except subprocess.SubprocessError as error:
                outcome = f"failed: {error}"
            done[part.name] = outcome
            self.folder.mkdir(parents=True, exist_ok=True)
            self.state.write_text(json.dumps(done, indent=1) + "\n")
            print(f"-- {part.name}: {outcome}, {time.monotonic() - start:.0f} s\n", flush=True)
            if outcome.startswith("wrong"):
                return 1  # how fast it is does not matter then
        return int(any(outcome != "done" for outcome in done.values()))

    def done(self) -> dict[str, str]:
        return json.loads(self.state.read_text()) if self.state.exists() else {}

    def table(self) -> str:
        """Parts, expected seconds and why."""
        lines = [[part.name, part.seconds, part.why] for part in self.parts()]
        return text_table(["part", "s", "for"], [*lines, ["all", sum(line[1] for line in lines), ""]])

    # Correctness.

    def gate(self) -> None:
        """What ships, forward and gradients, against the reference in float64, by the error rule."""
        sizes = dict(cell_size=4, rank=4) if self.smoke else dict(cell_size=8, rank=4)
        grids = ((9, 3),) if self.smoke else ((64, 64), (69, 52))
        for grid, variant in product(grids, operator_benchmark.VARIANTS):
            gate(self.device, self.dtype, grid, variant, 1 if self.smoke else 2, 8 if self.smoke else 64, **sizes)
            print(f"{variant}, {grid[0]} x {grid[1]}: ok", flush=True)

    def checks(self) -> None:
        for name in ("repetition", "second stream", "CUDA graph"):
            if self.smoke:
                print(f"{name}: needs a GPU")
            else:
                print(f"{name}: {device_checks.CHECKS[name](self.device)}", flush=True)

    def tests(self) -> None:
        files = ["tests/test_triton_aggregation.py", "tests/test_triton_attention.py"]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *files]
        if self.smoke:
            command += ["-k", "what_it_cannot_do or where_they_are"]
        elif find_spec("xdist"):
            command += ["-n", str(min(16, os.cpu_count() or 1))]
        environment = os.environ | {"TRITON_INTERPRET": str(int(self.smoke))}
        subprocess.run(command, cwd=ROOT, timeout=TEST_SECONDS, check=True, env=environment)

    # Speed.

    def operator(self) -> None:
        sides = (12,) if self.smoke else (64, 128, 256, 512)
        modes = ("forward", "forward+backward")
        dense = ("sdpa",) if self.smoke else ("sdpa-cudnn", "sdpa-flash")
        tasks = [t for side in sides for t in self._tasks(side, modes, (OURS, GRAPH, *dense))]
        # Dense attention at 512 a side, with backward, is half a second a call.
        tasks = [t for t in tasks if not (t.subject["height"] == 512 and "sdpa-flash" in str(t))]
        print(operator_benchmark.table(self._rows("operator.csv", tasks)))

    def peers(self) -> None:
        names = ("window",) if self.smoke else ("window", "natten", "flex")
        sides = (12,) if self.smoke else (128, 256)
        modes = ("forward", "forward+backward")
        self._rows("operator.csv", (t for side in sides for t in self._tasks(side, modes, names)))

    def loglinear(self) -> None:
        sides, modes = (12,) if self.smoke else (64, 128, 256), ("forward", "forward+backward")
        self._rows("operator.csv", (t for side in sides for t in self._tasks(side, modes, (OURS,), "loglinear")))

    def _tasks(self, side: int, modes: Iterable[str], names: Iterable[str], variant: str = "linear") -> list[Task]:
        shape = (
            dict(batch=1, heads=1, head_dim=8)
            if self.smoke
            else dict(batch=8 if side < 512 else 2, heads=2, head_dim=64)
        )
        cell, found = 4 if self.smoke else 8, []
        for mode, name in product(modes, names):
            subject = dict(benchmark="operator", name=name, mode=mode, height=side, width=side, **shape)
            if name in (OURS, GRAPH):
                subject |= dict(variant=variant, cell_size=cell, rank=4)
            build = f"{__name__}:build_graph" if name == GRAPH else "benchmarks.operator_benchmark:build"
            extra = {"near_cell": cell} if name in ("window", "natten", "flex") else {}
            found.append(Task(build, subject, 1, self.device, self.dtype, extra=extra))
        return found

    def models(self) -> None:
        size, batch = (64, 1) if self.smoke else (1024, 4)
        names = (
            ("fma2d_nano", "mit_b0")
            if self.smoke
            else ("fma2d_base", "swin_base_patch4_window7_224", "vit_base_patch16_224")
        )
        setting = dict(batch=batch, device=self.device, dtype=self.dtype)
        modes = model_benchmark.MODES[:1] if self.smoke else model_benchmark.MODES
        tasks = [t for mode in modes for t in model_benchmark.tasks(names, [size], [mode], **setting)]
        print(model_benchmark.table(self._rows("model.csv", tasks)))

    def kernels(self) -> None:
        """Microseconds of every kernel of the main shape, one image: to be laid beside the modelled times."""
        for variant, mode in product(operator_benchmark.VARIANTS, ("forward", "forward+backward")):
            side, shape = (
                (12, dict(batch=1, heads=1, head_dim=8)) if self.smoke else (256, dict(batch=1, heads=2, head_dim=64))
            )
            subject = dict(benchmark="operator", name=OURS, mode=mode, variant=variant)
            shape |= dict(height=side, width=side, cell_size=4 if self.smoke else 8)
            step = operator_benchmark.build(**subject, **shape, device=self.device, dtype=self.dtype).step
            if self.smoke:
                step()
                print("the profiler sees no kernels in the interpreter")
                return
            rows = card.kernel_times(step, 20)
            print(
                f"\n{mode}, {variant}\n" + text_table(list(rows[0]), [list(row.values()) for row in rows]), flush=True
            )
            facts = subject | shape | origin(self.device)
            columns = [*subject, *shape, "machine", "torch", "commit", *rows[0]]
            append_rows(self.folder / "kernels.csv", columns, [facts | row for row in rows])

    def _rows(self, file: str, tasks: Iterable[Task]) -> list[dict]:
        """Measure tasks in this process, each on disk at once; those that the file holds are not run again."""
        results, rows = Results(self.folder / file), []
        for task in tasks:
            row = new_row(task.subject, task.device, task.dtype, task.threads)
            known = results.measured(row)
            if known is None:
                known = row | measure(task, 0.0 if self.smoke else REPEAT_SECONDS)
                results.append(known)
            print(
                f"{task}: {known['median_ms'] or known['status']} ms, peak {known['peak_mib'] or '-'} MiB", flush=True
            )
            rows.append(known)
        return rows


def build_graph(**subject) -> Work:
    """The operator's work, captured as a CUDA graph: what is left of the time of launching."""
    work = operator_benchmark.build(**subject)
    if not subject["device"].startswith("cuda"):
        return work  # the rehearsal
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = work.step()

    def replay():
        graph.replay()
        return results

    return Work(replay, work.check, lambda: None, work.facts)


def measure(task: Task, repeat_seconds: float) -> dict:
    """The result columns of a task; what goes wrong in a known way is a status."""
    on_gpu = task.device.startswith("cuda")
    try:
        module, function = task.build.split(":")
        build = getattr(sys.modules[module], function)
        work = build(**task.subject, device=task.device, dtype=task.dtype, **task.extra)
        if on_gpu:  # the process is warm: what starts once has started with the gate
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
        work.check(work.step())
        peak = (torch.cuda.max_memory_allocated() - base) / 2**20 if on_gpu else None
        calls, least = 1, 1
        if repeat_seconds:  # else one call will do
            _seconds(work.step, 1, on_gpu)
            calls, least = max(1, round(GROUP_SECONDS / _seconds(work.step, 1, on_gpu))), 3
        times = []
        while sum(times) * calls < repeat_seconds or len(times) < least:
            times.append(_seconds(work.step, calls, on_gpu) / calls)
    except ModuleNotFoundError as error:
        return {"status": f"not installed: {error.name}"}
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"status": "out of memory"}
    except RuntimeError as error:
        return {"status": f"failed: {str(error).splitlines()[0]}"[:200]}
    deciles = quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    found = {"status": "ok", "repeats": str(len(times)), "peak_mib": "" if peak is None else f"{peak:.1f}"}
    if on_gpu:
        found["base_mib"] = f"{base / 2**20:.1f}"
    found |= {name: f"{1000 * deciles[i]:.4g}" for name, i in (("q10_ms", 0), ("median_ms", 4), ("q90_ms", 8))}
    return found | {name: str(value) for name, value in work.facts().items()}


def _seconds(step, calls: int, on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        step()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def gate(device, dtype, grid, variant, heads, head_dim, cell_size, rank) -> None:
    """Out and all gradients within the error rule, tokens as a fused projection leaves them.

    Raises:
        GateError: with the result that breaks it.
    """
    low, kinds = getattr(torch, dtype), 3 if variant == "linear" else 2
    torch.manual_seed(0)
    tokens = torch.randn(1, *grid, 3, heads, head_dim).to(device, low).movedim(-3, 0).movedim(-2, 2)
    # Of both signs and none near 0: at cut edges a kernel is divided by what is left of it.
    kernels = torch.rand(num_levels(grid, cell_size), kinds, 2, rank, heads, head_dim, cell_size) * 2 - 1
    kernels = ((kernels + kernels.sign()) / 2).to(device)
    d_out = torch.randn(1, heads, *grid, head_dim).to(device, low)

    def results(backend: str, dtype: torch.dtype, kernel_dtype: torch.dtype) -> dict[str, torch.Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in tokens] + [kernels.to(kernel_dtype).requires_grad_()]
        out = multipole_attention(*leaves, cell_size=cell_size, rank=rank, variant=variant, backend=backend)
        grads = torch.autograd.grad(out, leaves, d_out.to(dtype))
        return dict(zip(("out", "dq", "dk", "dv", "d_kernels"), (out.detach(), *grads), strict=True))

    found, plain = results("triton", low, torch.float32), results("reference", low, torch.float32)
    for name, truth in results("reference", torch.float64, torch.float64).items():
        error, simple = ((x[name].double() - truth).abs().max() for x in (found, plain))
        eps = torch.finfo(torch.float32 if name == "d_kernels" else low).eps
        allowed = 2 * simple + 4 * eps * truth.abs().max()
        if not error <= allowed:
            raise GateError(f"{variant}, {grid}: {name} is {error:.3g} off, allowed are {allowed:.3g}")


def resume(folder: Path, out: Path) -> None:
    """Bring the results of an earlier run into the folder of this one."""
    out.mkdir(parents=True, exist_ok=True)
    for path in [*folder.glob("*.csv"), folder / "done.json"]:
        if path.exists() and not (out / path.name).exists():
            shutil.copy(path, out)
