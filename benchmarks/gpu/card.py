"""What a device does at most: matrix products and copies as measured; and which kernel takes how long."""

from collections.abc import Callable, Sequence

import torch

from ..harness import GateError, Task, Work, text_table

NAMES = ("matmul", "copy")


def tasks(sizes: Sequence[int], **setting) -> list[Task]:
    """A product of square matrices and a copy of one, for each size; `setting`: of `Task`."""
    subjects = [dict(benchmark="card", name=name, mode="forward", height=n, width=n) for n in sizes for name in NAMES]
    return [
        Task(f"{__name__}:build", s, s["height"] ** (3 if s["name"] == "matmul" else 2), **setting) for s in subjects
    ]


def build(*, benchmark, name, mode, height, width, device, dtype) -> Work:
    """The work of a row; its `macs` are multiply-adds for a product, elements for a copy."""
    x = torch.randn(height, width, device=device, dtype=getattr(torch, dtype))
    y = torch.empty_like(x)

    def check(result: torch.Tensor) -> None:
        if name == "copy" and not torch.equal(result, x):
            raise GateError("a copy differs")

    macs = height * width * (height if name == "matmul" else 1)
    step = (lambda: torch.mm(x, x, out=y)) if name == "matmul" else (lambda: y.copy_(x))
    return Work(step=step, check=check, facts=lambda: dict(macs=macs))


def table(rows: list[dict]) -> str:
    """TFLOP/s of the products, GB/s (read and written) of the copies."""
    lines = []
    for row in rows:
        rate = "-"
        if row["status"] == "ok":
            per_second = int(row["macs"]) / (float(row["median_ms"]) / 1000)
            size = torch.finfo(getattr(torch, row["dtype"])).bits // 8
            is_product = row["name"] == "matmul"
            rate = f"{2e-12 * per_second:.1f} TFLOP/s" if is_product else f"{2e-9 * size * per_second:.1f} GB/s"
        lines.append([row["name"], row["dtype"], row["height"], row["median_ms"] or row["status"], rate])
    return text_table(["what", "dtype", "side", "ms", "rate"], lines)


def kernel_times(step: Callable[[], object], repeats: int) -> list[dict]:
    """The kernels on the GPU of one call of `step`: name, calls, microseconds, share of the whole."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    events = [e for e in found.key_averages() if e.device_time_total > 0]
    total = sum(e.device_time_total for e in events)
    events.sort(key=lambda e: -e.device_time_total)
    return [
        dict(
            kernel=e.key[:70],
            calls=e.count // repeats,
            us=f"{e.device_time_total / repeats:.1f}",
            share=f"{e.device_time_total / total:.3f}",
        )
        for e in events
    ]
