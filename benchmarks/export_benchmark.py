"""Exports beside those of Swin-T and of MiT's layout: nodes, seconds, file sizes, time, differences.

    python -m benchmarks.export_benchmark --sizes 512 1024

Every model is written as ONNX for a fixed size and run in onnxruntime, in OpenVINO where that is installed, and in
PyTorch: as it is, under bfloat16 autocast, and with int8 weights where torchao is installed. All that is made of one
size takes turns, so that whatever else happens on the machine happens to all. Processor seconds stand beside the clock.
"""

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import timm
import torch
from torch import Tensor, nn

import fma2d  # noqa: F401  (registers the models)
from fma2d.baselines import mit_attention

from .harness import text_table
from .records import append_rows, origin, version

RESULTS = Path(__file__).parent / "results" / "export.csv"
SUBJECT = ("name", "height", "width", "runtime", "dtype")
RESULT = ("nodes", "export_seconds", "file_mib", "median_ms", "least_ms", "cpu_ms", "repeats", "difference", "status")
ORIGIN = ("machine", "threads", "torch", "timm", "onnxruntime", "openvino", "torchao", "python", "fma2d", "timestamp")
COLUMNS = (*SUBJECT, *RESULT, *ORIGIN, "commit", "command")
MODELS = ("fma2d_nano", "mit_nano", "fma2d_tiny", "mit_tiny", "swin_tiny_patch4_window7_224")


def create(name: str, size: int, **options) -> nn.Module:
    """A model with random weights; `mit_nano` is fma2d_nano's skeleton with MiT's attention."""
    torch.manual_seed(0)
    if name.startswith("mit_"):
        options |= dict(attn_layer=mit_attention)
    return timm.create_model(name.replace("mit_", "fma2d_"), img_size=size, **options).eval()


def write(name: str, size: int, path: Path) -> dict:
    """Write the ONNX file of a model; columns of what that took."""
    from tools import export

    start = time.process_time()
    program = export.export_fixed(create(name, size, exportable=True), (size, size))
    nodes = export.write_onnx(program, path)
    seconds = time.process_time() - start
    return dict(nodes=nodes, export_seconds=f"{seconds:.1f}", file_mib=f"{path.stat().st_size / 2**20:.1f}")


def openvino_runner(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    """The file in OpenVINO on the CPU, in float32."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(path, "CPU", settings)
    return lambda x: torch.from_numpy(compiled(x.numpy())[0])


def int8_weights(model: nn.Module) -> nn.Module:
    """A copy whose linear layers hold int8 weights."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = copy.deepcopy(model)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def bfloat16(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model under autocast."""

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    return run


def runners(name: str, size: int, path: Path, threads: int) -> dict[tuple[str, str], Callable[[], Callable]]:
    """By runtime and dtype what makes the function to be timed; the first is the measure of differences."""
    from tools import export

    model = create(name, size)
    found = {
        ("pytorch", "float32"): lambda: model,
        ("pytorch", "bfloat16 autocast"): lambda: bfloat16(model),
        ("onnxruntime", "float32"): lambda: export.onnx_runner(path),
    }
    if find_spec("torchao"):
        found["pytorch", "int8 weights"] = lambda: int8_weights(model)
    if find_spec("openvino"):
        found["openvino", "float32"] = lambda: openvino_runner(path, threads)
    return found


def measure(size: int, models: list[str], repeats: int, threads: int, folder: Path) -> list[dict]:
    """Rows of one size, all runs taking turns."""
    rows, works = [], []
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    for name in models:
        path = folder / f"{name}_{size}.onnx"
        written, expected = write(name, size, path), None
        for (runtime, dtype), make in runners(name, size, path, threads).items():
            row = dict.fromkeys(COLUMNS, "") | dict(name=name, height=size, width=size, runtime=runtime, dtype=dtype)
            row |= written if runtime != "pytorch" else {}
            rows.append(row)
            try:
                run = make()
                with torch.inference_mode():
                    out = run(x)
            except Exception as error:  # a row tells of it, and the others go on
                row["status"] = f"failed: {str(error).strip().splitlines()[-1]}"[:200]
                continue
            expected = out if expected is None else expected
            row |= dict(status="ok", difference=f"{((out - expected).abs().max() / expected.abs().max()).item():.1e}")
            works.append((row, run, [], []))
    for _ in range(repeats):
        for _, run, clock, processor in works:
            start = time.perf_counter(), time.process_time()
            with torch.inference_mode():
                run(x)
            clock.append(1000 * (time.perf_counter() - start[0]))
            processor.append(1000 * (time.process_time() - start[1]))
    for row, _, clock, processor in works:
        row |= dict(repeats=repeats, median_ms=f"{median(clock):.1f}", least_ms=f"{min(clock):.1f}")
        row |= dict(cpu_ms=f"{median(processor):.1f}")
    return rows


def table(rows: list[dict]) -> str:
    """The rows of a run, times beside PyTorch's of the same model."""
    eager = {(r["name"], r["height"]): r for r in rows if (r["runtime"], r["dtype"]) == ("pytorch", "float32")}
    lines = []
    for row in rows:
        if row["status"] != "ok":
            lines.append([row["name"], row["height"], row["runtime"], row["dtype"], *[row["status"]], *[""] * 6])
            continue
        own = eager[row["name"], row["height"]]
        lines.append([row[c] for c in ("name", "height", "runtime", "dtype", "nodes", "export_seconds", "file_mib")])
        lines[-1] += [row["median_ms"], row["cpu_ms"], f"{float(row['median_ms']) / float(own['median_ms']):.2f}"]
        lines[-1] += [row["difference"]]
    header = ["model", "pixels", "runtime", "dtype", "nodes", "export s", "MiB", "ms", "cpu ms", "time/PyTorch"]
    return text_table([*header, "difference"], lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and append to the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="timm names, or mit_nano, mit_tiny, ...")
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 1024], help="pixels a side")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each")
    parser.add_argument("--threads", type=int, help="of every runtime; default: torch's own choice")
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV file, appended to")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    threads, rows = torch.get_num_threads(), []
    facts = origin("cpu", threads) | {name: version(name) for name in ("onnxruntime", "openvino", "torchao")}
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            found = measure(size, args.models, args.repeats, threads, Path(folder))
            found = [row | {name: facts[name] for name in COLUMNS if name in facts} for row in found]
            append_rows(args.out, COLUMNS, found)
            rows += found
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
