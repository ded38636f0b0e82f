"""The process of one row: `python -m benchmarks.worker`, an order in JSON on stdin, columns in JSON on stdout.

Memory is what torch has allocated on a GPU, else the resident set of this process, known on Linux only.
"""

import ctypes
import importlib
import json
import re
import sys
import time
from functools import partial
from pathlib import Path
from statistics import quantiles

import torch

from .harness import OUT_OF_MEMORY, GateError

MIB = 1 << 20
MAX_REPEATS = 100
# On a GPU, calls that are timed together last about this long, so that starting and awaiting them does not count.
GPU_SECONDS = 0.02


def answer(order: dict) -> dict:
    """Columns of the row; what goes wrong in a known way is an answer too."""
    if order["threads"]:
        torch.set_num_threads(order["threads"])
    if order["device"] == "cpu":
        _limit_memory(order["memory_gib"])
    try:
        return _measured(order)
    except GateError as error:
        return {"gate": str(error)}
    except ModuleNotFoundError as error:
        return {"status": f"not installed: {error.name}"}
    except (MemoryError, RuntimeError) as error:
        # On a CPU torch has no exception of its own for this.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        return {"status": OUT_OF_MEMORY}


def _measured(order: dict) -> dict:
    """Columns of the row: the first call gives memory, and time too if it takes long, else the calls after it do."""
    module, function = order["build"].split(":")
    build = getattr(importlib.import_module(module), function)
    device = order["device"]
    memory = _GpuMemory(device) if device.startswith("cuda") else _CpuMemory()

    before = memory.now()
    work = build(**order["subject"], device=device, dtype=order["dtype"], **order["extra"])
    work.warm_up()
    base = memory.now()
    memory.reset_peak()
    first, result = _timed(work.step, device)
    peak = memory.peak()
    work.check(result)
    del result

    times, long_enough = [first], order["repeat_seconds"]
    if first <= long_enough:
        times, calls = [], 1
        if device.startswith("cuda"):
            _timed(work.step, device)  # the first call compiled
            calls = max(1, round(GPU_SECONDS / _timed(work.step, device)[0]))
        while len(times) < 3 or (calls * sum(times) < long_enough and len(times) < MAX_REPEATS):
            times.append(_timed(work.step, device, calls)[0] / calls)
    deciles = quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    row = {"status": "ok", "repeats": len(times)}
    row |= {name: f"{1000 * deciles[i]:.4g}" for name, i in (("q10_ms", 0), ("median_ms", 4), ("q90_ms", 8))}
    if peak is not None:
        row |= {"base_mib": f"{(base - before) / MIB:.1f}", "peak_mib": f"{(peak - base) / MIB:.1f}"}
    return row | work.facts()


def _timed(step, device: str, calls: int = 1) -> tuple[float, object]:
    synchronize = partial(torch.cuda.synchronize, device) if device.startswith("cuda") else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        result = step()
    synchronize()
    return time.perf_counter() - start, result


def _limit_memory(gib: float | None) -> None:
    """Let this process allocate `gib`, or nine tenths of what is free; beyond that, allocation fails. Linux only."""
    if sys.platform != "linux":
        return
    import resource

    free = int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    limit = int(0.9 * free if gib is None else gib * (1 << 30))
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


class _CpuMemory:
    """The resident set of this process."""

    def now(self) -> int | None:
        # What the C library keeps of freed memory is not in use, and the next call would use it unseen.
        if trim := sys.platform == "linux" and getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)
        return self._status("VmRSS")

    def reset_peak(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._peak_is_known = True
        except OSError:
            self._peak_is_known = False

    def peak(self) -> int | None:
        return self._status("VmHWM") if self._peak_is_known else None

    def _status(self, name: str) -> int | None:
        status = Path("/proc/self/status")
        return int(re.search(rf"{name}:\s*(\d+)", status.read_text())[1]) * 1024 if status.exists() else None


class _GpuMemory:
    """Memory that torch has allocated on a GPU."""

    def __init__(self, device: str):
        self._device = device

    def now(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.memory_allocated(self._device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.stdin.read()))))
