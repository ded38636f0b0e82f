"""The triton backend as a leaf for PyTorch's compilers, on a GPU or in Triton's interpreter (`triton_cases.py`)."""

import random

import pytest
import torch
from triton_cases import DEVICE, on_a_device

from fma2d import FMA2d, ops

pytestmark = on_a_device


def small():
    return FMA2d(16, 2, cell_size=4, rank=2, levels=1, backend="triton").to(DEVICE)


@pytest.mark.slow
def test_compiles_to_one_graph_for_all_sizes_under_autocast(monkeypatch):
    """Forward and backward over 50 sizes, with and without coarse levels, cells cut and whole: compiled once.

    The first sizes run the kernels and are compared. For the others the op, opaque to the compiler, takes the torch
    backend's: the interpreter is slow. (A counter of graphs would count two: the compiler starts over once, for the
    dropout's probability. So it is told to fail where it would compile a second time.)
    """
    draw = random.Random(0)
    sizes = [(2, 9, 5), (3, 4, 7)]
    sizes += [(draw.randint(2, 3), draw.randint(2, 33), draw.randint(2, 33)) for _ in range(48)]
    module = small()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n, (batch, height, width) in enumerate(sizes):
            if n == 2:
                monkeypatch.setitem(ops.library.BACKENDS, "triton", ops.library.BACKENDS["torch"])
            x = torch.randn(batch, height, width, 16, device=DEVICE, requires_grad=True)
            results = []
            for run in (compiled, module) if n < 2 else (compiled,):
                with torch.autocast(DEVICE, torch.float16):
                    out = run(x)
                assert out.dtype == torch.float16
                results.append((out, *torch.autograd.grad(out.float().square().sum(), [x, *module.parameters()])))
            for found, eager in zip(results[0], results[-1], strict=True):
                torch.testing.assert_close(found, eager)


def test_exports_with_open_sizes():
    module = small().eval()
    sizes = {1: torch.export.Dim("height", min=2, max=64), 2: torch.export.Dim("width", min=2, max=64)}
    program = torch.export.export(module, (torch.randn(1, 12, 17, 16, device=DEVICE),), dynamic_shapes=(sizes,))
    for height, width in ((12, 17), (5, 9)):
        x = torch.randn(1, height, width, 16, device=DEVICE)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), module(x))
