"""The triton backend as a leaf for PyTorch's compilers, run by Triton's interpreter where there is no GPU."""

import pytest
import torch
from operator_cases import one_thread as one_thread

from fma2d import FMA2d, why_not

pytestmark = [
    pytest.mark.skipif(why_not("triton", torch.empty(1, 1, 4, 8)) is not None, reason="needs Triton's interpreter"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]


def small():
    return FMA2d(16, 2, cell_size=4, rank=2, levels=1, backend="triton")


@pytest.mark.slow
def test_compiles_whole_forward_and_backward_under_autocast():
    """Without a graph break, with and without coarse levels, cells cut and whole."""
    module = small()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, height, width in ((5, 9, 13), (2, 17, 7)):
        results = []
        for run in (compiled, module):
            x = torch.randn(batch, height, width, 16, generator=torch.Generator().manual_seed(height))
            x.requires_grad_()
            with torch.autocast("cpu", torch.float16):
                out = run(x)
            results.append((out, *torch.autograd.grad(out.float().square().sum(), [x, *module.parameters()])))
        assert results[0][0].dtype == torch.float16
        for compiled_result, eager in zip(*results, strict=True):
            torch.testing.assert_close(compiled_result, eager)


def test_exports_with_open_sizes():
    module = small().eval()
    sizes = {1: torch.export.Dim("height", min=2, max=64), 2: torch.export.Dim("width", min=2, max=64)}
    program = torch.export.export(module, (torch.randn(1, 12, 17, 16),), dynamic_shapes=(sizes,))
    for height, width in ((12, 17), (5, 9)):
        x = torch.randn(1, height, width, 16)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), module(x))
