"""Counts what a call launches on a GPU and times the Python around it, without one; see --help.

The kernels are compiled, and their launches and those of torch are counted and not made: arrays lie on the CPU, and the
driver is a mock. Times are of Python alone, on this machine, and say something only where nothing else runs.
"""

import argparse
import os
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.harness import text_table
from fma2d import num_levels
from fma2d.ops import triton_backend
from fma2d.ops.call import Call, Options
from fma2d.ops.triton_backend import tiles

# Operations of torch that launch nothing on a GPU, beside views.
FREE = ("empty", "empty_strided", "empty_like", "new_empty", "detach")


class Counter(TorchDispatchMode):
    """Counts launches, of Triton in `kernels` and of torch in `operations`, by name."""

    def __init__(self):
        super().__init__()
        self.kernels: list[str] = []
        self.operations: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and name not in FREE:
            self.operations.append(name)
        return func(*args, **kwargs or {})


class _Driver:
    """Enough of a GPU's driver to compile and to launch nothing."""

    def __init__(self, launched: list[str], capability: int):
        self.launched, self.target = launched, GPUTarget("cuda", capability, 32)
        self.utils, self.launcher_cls = self, self._launcher

    def _launcher(self, source, metadata):
        def launch(grid_x, grid_y, grid_z, stream, function, *arguments):
            self.launched.append(source.fn.__name__ if hasattr(source, "fn") else metadata.name)

        return launch

    def load_binary(self, name, *_):
        return (0, name, 64, 0, 1024)[: 5 if tiles.version(triton.__version__) > (3, 4) else 4]

    def get_device_properties(self, device):
        return dict(max_shared_mem=232448, multiprocessor_count=132, warpSize=32, max_num_regs=65536)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target


@contextmanager
def no_gpu(capability: int = 90):
    """Run the backend on CPU tensors as on a GPU of this capability, launching nothing; gives the names launched."""
    launched: list[str] = []
    before = driver._active
    with ExitStack() as stack:
        stack.enter_context(patch.object(tiles, "_capability", lambda device: divmod(capability, 10)))
        stack.enter_context(patch.object(tiles, "INTERPRETER", {}))
        driver.set_active(_Driver(launched, capability))
        triton_backend._plan.cache_clear()
        try:
            yield launched
        finally:
            driver._active = before
            triton_backend._plan.cache_clear()


def a_call(side: int, variant: str, batch: int = 1) -> Call:
    """bfloat16 tokens as a fused projection leaves them, 2 heads of 64, cell size 8, rank 4, all levels learned."""
    tokens = torch.zeros(batch, side, side, 3, 2, 64, dtype=torch.bfloat16).movedim(-3, 0).movedim(-2, 2)
    kinds = 3 if variant == "linear" else 2
    kernels = torch.zeros(num_levels((side, side), 8), kinds, 2, 4, 2, 64, 8)
    return Call(*tokens, [kernels], None, Options(8, 4, variant, False, True, 0.125))


def steps(call: Call):
    """Forward and backward of a call, as functions."""
    out, lse = triton_backend.forward(call)
    do = torch.zeros_like(out)
    return lambda: triton_backend.forward(call), lambda: triton_backend.backward(call, out, lse, do, None)


def count(step, launched: list[str]) -> Counter:
    """What a step launches, once its plan is made."""
    step()
    launched.clear()
    with Counter() as counter:
        step()
    counter.kernels = list(launched)
    return counter


def milliseconds(step, repeats: int = 40) -> float:
    """The least time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", type=int, default=[56, 128, 256], help="tokens a side (56 128 256)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    lines = []
    with no_gpu() as launched, torch.no_grad():
        for variant in ("linear", "loglinear"):
            for side in args.sides:
                for name, step in zip(("forward", "backward"), steps(a_call(side, variant)), strict=True):
                    found = count(step, launched)
                    others = " ".join(found.operations) or "-"
                    lines.append([variant, side, name, len(found.kernels), len(found.operations), others])
                    lines[-1].append(f"{milliseconds(step):.2f}")
    print(text_table(["variant", "side", "pass", "Triton", "torch", "which", "Python ms"], lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
