"""Compiles every Triton kernel ahead of time, without a GPU, and says what each needs of a multiprocessor.

The operator is called on the CPU with its launches recorded in place of run, so that what is compiled is what a call on
a GPU of that architecture would compile. Exit code 1 if a kernel of the main configurations (bfloat16, head_dim 32 and
64, cell size 8, rank 4, no mask) spills registers, or if any kernel needs more shared memory than the architecture has
or has its products serialised by ptxas ("Potential Performance Loss"). With --model, also a time for every launch of
the main shape, from its instructions and bytes: see `issue_model`.
"""

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, astuple, dataclass, fields
from functools import cache
from importlib import import_module
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported; the interpreter compiles nothing

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

from benchmarks.gpu import issue_model
from benchmarks.harness import text_table
from benchmarks.records import write_rows
from fma2d import num_levels
from fma2d.ops import triton_backend
from fma2d.ops.call import Call, Options
from fma2d.ops.triton_backend import tiles

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
OTHER_ARCHITECTURES = (80, 90)  # for all but the main configurations: one of each kind of matrix instruction
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Config:
    """One call of the operator, forward and backward."""

    dtype: str = "bfloat16"
    head_dim: int = 64
    variant: str = "linear"
    grid: tuple[int, ...] = (256, 256)
    cell_size: int = 8
    rank: int = 4
    masked: bool = False
    causal: bool = False

    def __str__(self) -> str:
        marks = [mark for mark in ("masked", "causal") if getattr(self, mark)]
        grid = "x".join(map(str, self.grid))
        return " ".join([f"{self.dtype} d{self.head_dim} r{self.cell_size} p{self.rank} {grid} {self.variant}", *marks])


# Whole grids, and grids with cut cells.
MAIN = [
    Config(head_dim=head_dim, variant=variant, grid=grid)
    for head_dim, variant, grid in product((64, 32), ("linear", "loglinear"), ((256, 256), (41, 36)))
]
OTHER = [
    Config(masked=True),
    Config(variant="loglinear", masked=True),
    Config(grid=(512,), variant="loglinear", cell_size=32, causal=True),
    Config(grid=(500,), cell_size=32),
    Config(dtype="float16"),
    Config(dtype="float32"),
    Config(dtype="float32", variant="loglinear"),
    Config(head_dim=8),
    Config(head_dim=80),
    Config(head_dim=128),
    Config(head_dim=128, variant="loglinear"),
    Config(cell_size=4, rank=1),
    Config(cell_size=7, rank=4, grid=(56, 56)),
    Config(cell_size=16, rank=16, grid=(128, 128)),
]


@dataclass(frozen=True)
class Launch:
    """All that a compilation depends on, hashable and picklable."""

    module: str
    kernel: str
    signature: tuple
    constants: tuple
    attributes: tuple
    options: tuple


@dataclass(frozen=True)
class Measured:
    """What compiling a launch shows.

    Attributes:
        spilled: bytes of a thread, stores and loads.
        shared: bytes of a program.
        serialised: whether ptxas says that it keeps products of matrices from overlapping.
        instructions, loop: of all the code, and of its main loop: the longest without another inside.
    """

    registers: int
    spilled: int
    shared: int
    serialised: bool
    instructions: int
    loop: int


@dataclass
class Row:
    """One line of the report: how a launch is compiled, what that shows (see `Measured`), the memory to share."""

    arch: str
    kernel: str
    config: str
    main: bool
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int
    serialised: bool
    instructions: int
    loop: int
    budget: int

    def faults(self) -> list[str]:
        found = [f"spills {self.spilled} bytes"] if self.main and self.spilled else []
        if self.serialised:
            found.append("has its products serialised by ptxas")
        too_much = f"needs {self.shared} bytes of shared memory, {self.budget} are there"
        return [*found, too_much] if self.shared > self.budget else found


def launches(config: Config, arch: int, batch: int = 2) -> list[tuple[Launch, int]]:
    """What a call launches on an architecture, forward, then backward, and in how many programs; nothing is run."""
    found: list[tuple[Launch, int]] = []

    def record(kernel, *args, grid, warmup, **kwargs):
        backend, binder = _binder(kernel, arch)
        bound, specialization, options = binder(*args, debug=False, **kwargs)
        _, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
        compiled = tuple((name, kwargs[name]) for name in ("num_warps", "num_stages") if name in kwargs)
        parts = [tuple(sorted(x.items())) for x in (signature, constants, attributes)]
        parts[2] = tuple((path, tuple(map(tuple, values))) for path, values in parts[2])
        found.append((Launch(kernel.fn.__module__, kernel.fn.__name__, *parts, compiled), grid[0]))

    capability = divmod(arch, 10)
    patches = (
        patch.object(jit.JITFunction, "run", record),
        patch.object(tiles, "_capability", lambda device: capability),
        patch.object(tiles, "INTERPRETER", {}),
    )
    triton_backend._plan.cache_clear()
    with patches[0], patches[1], patches[2], torch.no_grad():
        _call(config, batch)
    return found


@cache
def _binder(kernel: jit.JITFunction, arch: int):
    backend = make_backend(GPUTarget("cuda", arch, 32))
    return backend, jit.create_function_from_signature(kernel.signature, kernel.params, backend)


def _call(config: Config, batch: int) -> None:
    heads, ndim = 2, len(config.grid)
    dtype = getattr(torch, config.dtype)
    shape = (batch, *config.grid, 3, heads, config.head_dim)
    tokens = torch.zeros(shape, dtype=dtype).movedim(-3, 0).movedim(-2, 2)
    levels, kinds = num_levels(config.grid, config.cell_size), 3 if config.variant == "linear" else 2
    kernels = torch.zeros(levels, kinds, ndim, config.rank, heads, config.head_dim, config.cell_size)
    mask = torch.ones(batch, *config.grid, dtype=torch.bool) if config.masked else None
    options = Options(config.cell_size, config.rank, config.variant, config.causal, True, config.head_dim**-0.5)
    call = Call(*tokens, [kernels], mask, options)
    out, lse = triton_backend.forward(call)
    triton_backend.backward(call, out, lse, torch.zeros_like(out), None)


def measure(launch: Launch, arch: int) -> Measured:
    """Compile a launch and look at it."""
    kernel = getattr(import_module(launch.module), launch.kernel)
    attributes = {path: [list(value) for value in values] for path, values in launch.attributes}
    source = ASTSource(kernel, dict(launch.signature), dict(launch.constants), attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output(BINARIES / "cuobjdump", "--dump-resource-usage", cubin)
        registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
        said = _said(compiled, Path(folder)) if stack or "wgmma" in compiled.asm["ptx"] else ""
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
        counts = issue_model.instructions(_output(BINARIES / "cuobjdump", "-sass", cubin))
        return Measured(registers, spilled, compiled.metadata.shared, "Potential Performance Loss" in said, *counts)


def _said(compiled, folder: Path) -> str:
    """What ptxas says of the code, which Triton does not keep."""
    code = compiled.asm["ptx"]
    target = re.search(r"^\.target (\w+)", code, re.M)[1]
    path = folder / "kernel.ptx"
    path.write_text(code)
    binary = "ptxas-blackwell" if int(re.search(r"\d+", target)[0]) >= 100 else "ptxas"
    return _output(BINARIES / binary, "-v", f"-arch={target}", path, "-o", folder / "again.cubin")


def _output(*command) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def report(calls: list[tuple[int, Config]], jobs: int) -> dict[tuple[int, Launch], Row]:
    """Compile what these configurations launch on these architectures, each different kernel once.

    Raises:
        RuntimeError: at the first that does not compile.
    """
    torch.set_num_threads(1)
    first: dict[tuple[int, Launch], Config] = {}
    for arch, config in tqdm(calls, desc="recording launches", unit="call"):
        for launch, _ in launches(config, arch):
            first.setdefault((arch, launch), config)
    rows = {}
    with ProcessPoolExecutor(jobs) as pool:
        waiting = {pool.submit(measure, launch, arch): (arch, launch) for arch, launch in first}
        for done in tqdm(as_completed(waiting), total=len(waiting), desc="compiling", unit="kernel"):
            arch, launch = waiting[done]
            try:
                measured = done.result()
            except Exception as error:
                pool.shutdown(wait=False, cancel_futures=True)
                raise RuntimeError(f"{launch.kernel} ({first[arch, launch]}) does not compile for sm_{arch}") from error
            options, config = dict(launch.options), first[arch, launch]
            budget = tiles.SHARED_MEMORY[tiles.tier(divmod(arch, 10))]
            rows[arch, launch] = Row(
                f"sm_{arch}", launch.kernel, str(config), config in MAIN, options.get("num_warps", 4),
                options.get("num_stages", 3), *astuple(measured), budget,
            )  # fmt: skip
    return {key: rows[key] for key in first}


def model(variant: str, jobs: int) -> list[dict]:
    """The times of every launch of the main shape, one image, and their sums."""
    config = Config(variant=variant)
    made = launches(config, 90, batch=1)
    compiled = report([(90, config)], jobs)
    calls = [(launch.kernel, programs, compiled[90, launch]) for launch, programs in made]
    return issue_model.times(variant, calls)


def main(argv: list[str] | None = None) -> int:
    """Print the report; 1 if a kernel is at fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arch", nargs="+", type=int, choices=ARCHITECTURES, default=list(ARCHITECTURES), help="(all)")
    add("--main", action="store_true", help="only the main configurations; else these on all, the rest on 80 and 90")
    add("--only", default="", help="only configurations whose name holds this, for example 'd64 r8'")
    add("--jobs", type=int, default=os.cpu_count(), help="processes (one a processor)")
    add("--csv", type=Path, help="also write the table to this file")
    add("--model", type=Path, help="write the times of the main shape on sm_90 to this file, and print them")
    args = parser.parse_args(argv)
    main_configs, others = ([c for c in group if args.only in str(c)] for group in (MAIN, OTHER))
    calls = list(product(args.arch, main_configs))
    if not args.main:
        calls += product([arch for arch in args.arch if arch in OTHER_ARCHITECTURES], others)
    if not calls:
        parser.error(f"no configuration for these architectures has {args.only!r} in its name")
    found = report(calls, args.jobs)
    rows = list(found.values())
    header = [field.name for field in fields(Row)]
    print(text_table(header, [list(asdict(row).values()) for row in rows]))
    if args.csv:
        write_rows(args.csv, header, map(asdict, rows))
    if args.model:
        times = [line for variant in ("linear", "loglinear") for line in model(variant, args.jobs)]
        write_rows(args.model, list(times[0]), times)
        print("\n" + text_table(list(times[0]), [list(line.values()) for line in times]))
    faults = [f"{row.arch} {row.kernel} ({row.config}): {fault}" for row in rows for fault in row.faults()]
    print(f"\n{len(rows)} kernels; " + (f"{len(faults)} at fault:" if faults else "none at fault"), *faults, sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
