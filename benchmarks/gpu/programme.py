"""Everything that a GPU is needed for, in one command; see --help.

In order: correctness on the device, what the card can do at most; at the main shape alone, the operator against its
peers, which kernel takes how long, and the models; then the longer tests; then all sizes of the operator and of the
models. Each piece takes at most eight minutes and is recorded when it is done: the same command started again goes on
with the next, and within a piece with the next row. With --short, what is worth most in fifteen minutes. A gate that
shows a wrong result ends the programme; tests that fail are recorded, named at the end, and run again by --piece only.
Results are CSV files in one folder; `python -m benchmarks draw` draws them.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from tempfile import mkdtemp

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if __name__ == "__main__":  # read when triton is imported, here and in the processes of the rows
    os.environ["TRITON_INTERPRET"] = str(int("--smoke" in sys.argv))

import torch

from benchmarks import model_benchmark, operator_benchmark, peers
from benchmarks.gpu import card, device_checks, short
from benchmarks.harness import GateError, Limits, run, text_table
from benchmarks.records import ROOT, Results, append_rows, commit, origin

PIECE_SECONDS = 480
MARGIN = 40  # of a piece's time, for what comes before and after its rows
BACKEND = "fma2d-triton"
MAIN_GRID = (256, 256)
FAILED = "failed"


class TestsFailed(Exception):
    """Tests failed, or were not done in time."""


@dataclass(frozen=True)
class Piece:
    """A part of the programme.

    Attributes:
        work: returns whether it is done, False to be called again. It may raise `GateError`, which ends the programme,
            or `TestsFailed`.
    """

    name: str
    work: Callable[[], bool]


class Programme:
    """The pieces, on a GPU or, tiny, on the CPU through Triton's interpreter."""

    def __init__(self, folder: Path, smoke: bool, fresh: bool):
        self.folder, self.smoke, self.fresh = folder, smoke, fresh
        self.device = "cpu" if smoke else "cuda"
        self.state = folder / "done.json"

    def pieces(self) -> list[Piece]:
        operator, models = self._operator(), self._models()
        first = [operator.pop(0), Piece("kernels", self._kernels), models.pop(0)]
        tests = [self._tests("not slow", name) for name in ("attention", "aggregation")]
        slow = [] if self.smoke else [self._tests("slow", "attention")]
        return [*self._gates(), *tests, Piece("card", self._card), *first, *slow, *operator, *models]

    # Correctness.

    def _gates(self) -> list[Piece]:
        found = []
        for dtype in ("float32",) if self.smoke else ("bfloat16", "float32", "float16"):
            found.append(Piece(f"gate: operator in {dtype}", lambda dtype=dtype: self._gate(dtype)))
        for name in [] if self.smoke else device_checks.CHECKS:
            found.append(Piece(f"gate: {name}", lambda name=name: self._check(name)))
        return found

    def _tests(self, marked: str, name: str) -> Piece:
        return Piece(f"tests: {name}, {marked}", lambda: self._pytest(marked, name))

    def _pytest(self, marked: str, name: str) -> bool:
        """A file of the kernels' tests: on a GPU in several processes, as compiling takes most of their time."""
        command = [sys.executable, "-m", "pytest", "-q", "-m", marked, f"tests/test_triton_{name}.py"]
        if self.smoke:
            command += ["-k", "row or limits"]
        elif find_spec("xdist"):
            command += ["-n", str(min(16, os.cpu_count() or 1))]
        try:
            status = subprocess.run(command, cwd=ROOT, timeout=PIECE_SECONDS).returncode
        except subprocess.TimeoutExpired:
            raise TestsFailed(f"not done after {PIECE_SECONDS} s; what was compiled is kept, try again") from None
        if status:
            raise TestsFailed(f"exit code {status} of pytest")
        return True

    def _gate(self, dtype: str) -> bool:
        operator_benchmark.gate(
            self.device, dtype, "triton", ("linear",) if self.smoke else operator_benchmark.VARIANTS
        )
        return True

    def _check(self, name: str) -> bool:
        try:
            found = device_checks.CHECKS[name](self.device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            found = "skipped: out of memory"
        print(f"{name}: {found}")
        return True

    # Speed.

    def _rows(self, file: str, tasks: list, table: Callable[[list[dict]], str]) -> bool:
        limits = Limits(seconds=60, repeat_seconds=0.0 if self.smoke else 1.0, total_seconds=PIECE_SECONDS - MARGIN)
        rows = run(tasks, Results(self.folder / file), limits, self.fresh)
        print(table(rows))
        # What was left out for want of time gets its turn in the next call.
        return not any("are left" in row["status"] for row in rows)

    def _setting(self, dtype: str) -> dict:
        return dict(device=self.device, dtype=dtype, threads=1 if self.smoke else None)

    def _card(self) -> bool:
        sizes = (64,) if self.smoke else (8192,)
        dtypes = ("float32",) if self.smoke else ("bfloat16", "float16")
        tasks = [task for dtype in dtypes for task in card.tasks(sizes, **self._setting(dtype))]
        return self._rows("card.csv", tasks, card.table)

    def _operator(self) -> list[Piece]:
        if self.smoke:
            subjects = [(["forward+backward"], "float32", "linear", [(12, 12)])]
            shape = dict(batch=1, heads=1, head_dim=8, cell_size=4)
        else:
            grids = [(n, n) for n in (32, 64, 128, 256, 512, 1024)]
            modes, variants = ("forward", "forward+backward", "backward"), operator_benchmark.VARIANTS
            subjects = [(modes[:2], "bfloat16", "linear", [MAIN_GRID])]
            subjects += [([m], d, v, grids) for d in ("bfloat16", "float16") for v in variants for m in modes]
            shape = dict(batch=8, heads=2, head_dim=64)

        def work(modes, dtype, variant, grids):
            # Peers have no variant: they are measured once, beside the linear one.
            names = peers.PEERS if variant == "linear" else ()
            options = dict(modes=modes, variants=[variant], backend="triton", peers=names)
            tasks = operator_benchmark.tasks(grids, **options, **shape, **self._setting(dtype))
            return self._rows("operator.csv", tasks, operator_benchmark.table)

        found = []
        for subject in subjects:
            modes, dtype, variant, grids = subject
            sides = " to ".join(dict.fromkeys(str(height) for height, _ in (grids[0], grids[-1])))
            name = f"operator: {', '.join(modes)}, {dtype}, {variant}, {sides} tokens a side"
            found.append(Piece(name, lambda subject=subject: work(*subject)))
        return found

    def _kernels(self) -> bool:
        if self.smoke:
            print("skipped: the profiler sees no kernels in the interpreter")
            return True
        (height, width), repeats = MAIN_GRID, 20
        for variant, mode in product(operator_benchmark.VARIANTS, ("forward", "forward+backward")):
            subject = dict(benchmark="operator", name=BACKEND, mode=mode, variant=variant)
            shape = dict(height=height, width=width, batch=8, heads=2, head_dim=64)
            step = operator_benchmark.build(**subject, **shape, device=self.device, dtype="bfloat16").step
            rows = card.kernel_times(step, repeats)
            if not rows:
                print("skipped: the profiler sees no kernels here")
                return True
            total = sum(float(row["us"]) for row in rows)
            called, replayed = _call_times(step, repeats)
            print(f"\n{mode}, {variant}, {height} x {width} tokens, batch 8, 2 heads of 64, bfloat16")
            print(text_table(list(rows[0]), [list(row.values()) for row in rows]))
            print(f"all kernels {total:.0f} us; a call {called:.0f} us, replayed from a CUDA graph {replayed:.0f} us")
            facts = subject | shape | origin(str(self.device))
            columns = [*subject, *shape, "machine", "torch", "commit", *rows[0]]
            append_rows(self.folder / "kernels.csv", columns, [facts | row for row in rows])
        return True

    def _models(self) -> list[Piece]:
        if self.smoke:
            subjects = [(("fma2d_nano", "mit_b0"), "inference", 64, 1)]
        else:
            groups = [group for group in model_benchmark.CLASSES_OF_SIZE if "fma2d_small" not in group]
            groups.sort(key=lambda group: "fma2d_base" not in group)
            batches = {1024: 4, 2048: 1, 512: 16, 224: 64, 4096: 1}
            subjects = [(g, m, n, b) for n, b in batches.items() for m in model_benchmark.MODES for g in groups]

        def work(models, mode, size, batch):
            options = dict(modes=[mode], batch=batch, **self._setting("float32" if self.smoke else "bfloat16"))
            tasks = model_benchmark.tasks(models, [size], **options)
            return self._rows("model.csv", tasks, model_benchmark.table)

        return [
            Piece(f"models: {mode} at {size} px, {models[1]} and peers", lambda s=(models, mode, size, batch): work(*s))
            for models, mode, size, batch in subjects
        ]

    # Order.

    def done(self) -> dict[str, str]:
        """Pieces that are done, with the commit that they were done at, and how they failed if they did."""
        return json.loads(self.state.read_text()) if self.state.exists() else {}

    def call(self, piece: Piece) -> bool:
        """Do a piece, or as much of it as there is time for, and record it if it is done."""
        start, outcome = time.monotonic(), commit()
        try:
            finished = piece.work()
        except TestsFailed as error:
            finished, outcome = True, f"{outcome}, {FAILED}: {error}"
        self.fresh = False
        said = outcome if FAILED in outcome else "done" if finished else "more to do"
        print(f"-- {piece.name}: {said}, {time.monotonic() - start:.0f} s\n", flush=True)
        if finished:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.state.write_text(json.dumps(self.done() | {piece.name: outcome}, indent=1) + "\n")
        return finished


def _call_times(step: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Microseconds of a call, launched from Python and replayed from a CUDA graph: what launching costs shows."""
    stream, captured = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(captured, stream=stream):
        step()
    times = []
    for call in (step, captured.replay):
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - start) / repeats)
    return times[0], times[1]


def _missing_for_launchers() -> str | None:
    """What Triton lacks here to compile with."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "C compiler: install gcc or name one in CC"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python.h: install Python's headers (python3-dev)"
    return None


def main(argv: list[str] | None = None) -> int:
    """Run the programme or a piece of it; 1 if a result is wrong or tests failed, 3 if a piece has more to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--list", action="store_true", help="list the pieces, with those done, and end")
    add("--piece", type=int, metavar="N", help="only the piece of this number in the list, done or not")
    add("--smoke", action="store_true", help="everything tiny, on the CPU through Triton's interpreter; no GPU needed")
    add(
        "--short",
        action="store_true",
        help="fifteen minutes: the gate, then numbers in the order of their worth, then tests",
    )
    add("--resume", type=Path, metavar="FOLDER", help="with --short: results of an earlier run, to go on from")
    add("--fresh", action="store_true", help="also what is done already")
    add("--out", type=Path, help="folder of results (benchmarks/results/gpu; a temporary one with --smoke)")
    args = parser.parse_args(argv)
    folder = args.out or (Path(mkdtemp(prefix="fma2d-smoke-")) if args.smoke else ROOT / "benchmarks/results/gpu")
    brief = short.Short(folder, args.smoke)
    if args.short and args.list:
        print(brief.table())
        return 0
    programme = Programme(folder, args.smoke, args.fresh)
    pieces, done = programme.pieces(), {} if args.fresh else programme.done()
    if args.list:
        for number, piece in enumerate(pieces):
            print(f"{number:3}  {piece.name}" + (f"  (done at {done[piece.name]})" if piece.name in done else ""))
        return 0
    if not args.smoke and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --smoke tries the programme on the CPU")
    if not args.smoke and (missing := _missing_for_launchers()):
        parser.error(f"Triton compiles the launcher of each kernel when it is first run, and there is no {missing}")
    if args.short:
        if args.resume:
            short.resume(args.resume, folder)
        return brief.run()
    if args.piece is not None and not 0 <= args.piece < len(pieces):
        parser.error(f"--piece must be from 0 to {len(pieces) - 1}; --list shows them")
    chosen = [p for p in pieces if p.name not in done] if args.piece is None else [pieces[args.piece]]
    finished = True
    try:
        for number, piece in enumerate(chosen, 1):
            programme.fresh = args.fresh
            print(f"== {number} of {len(chosen)}: {piece.name}", flush=True)
            finished = programme.call(piece)
            while not finished and args.piece is None:
                finished = programme.call(piece)
    except GateError as error:
        print(f"gate failed: {error}", file=sys.stderr)
        return 1
    print(f"results in {folder}" + ("" if finished else "; the piece has more to do: start it again"))
    failed = {name: outcome for name, outcome in programme.done().items() if FAILED in outcome}
    for name, outcome in failed.items():
        print(f"{name}: {outcome}", file=sys.stderr)
    return 3 if not finished else 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
