"""What only a GPU can show of the triton backend: sizes beyond 32 bits, streams, graphs, a second device, repetition.

Each check returns what it did or why it was skipped, and raises `GateError` where a result is wrong.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fma2d import multipole_attention, num_levels, start_kernels

from ..harness import GateError

CELL_SIZE, RANK, HEADS, HEAD_DIM = 8, 4, 4, 64


def _call(batch: int, side: int, device: str, variant: str = "linear", seed: int = 0) -> list[Tensor]:
    """q, k, v in bfloat16 as a fused projection leaves them, then the kernels of all levels, all to be learned."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (batch, side, side, 3, HEADS, HEAD_DIM)
    tokens = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
    sizes = (CELL_SIZE, RANK, 2, HEADS, HEAD_DIM)
    levels = range(1, num_levels((side, side), CELL_SIZE) + 1)
    stack = [start_kernels(n, *sizes, variant=variant, bins=CELL_SIZE, device=device) for n in levels]
    return [x.detach().requires_grad_() for x in (*tokens.movedim(-3, 0).movedim(-2, 2), torch.stack(stack))]


def _run(leaves: list[Tensor], variant: str = "linear", learn: bool = True) -> list[Tensor]:
    """Out and, with `learn`, the gradients of its sum weighted by itself."""
    with torch.set_grad_enabled(learn):
        options = dict(cell_size=CELL_SIZE, rank=RANK, variant=variant, backend="triton")
        out = multipole_attention(*leaves, **options)
    return [out.detach(), *(torch.autograd.grad(out, leaves, out.detach()) if learn else [])]


def _same(found: list[Tensor], expected: list[Tensor], what: str) -> None:
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        if not torch.equal(x.to(y.device), y):
            raise GateError(f"{what}: result {i} differs by {(x.to(y.device).double() - y.double()).abs().max():.3g}")


def repetition(device: str) -> str:
    """Two runs agree bitwise, gradients of tokens and kernels included."""
    for variant in ("linear", "loglinear"):
        leaves = _call(2, 96, device, variant)
        _same(_run(leaves, variant), _run(leaves, variant), f"a second run, {variant}")
    return "ok"


def beyond_32_bits(device: str) -> str:
    """The last image of a batch of more than 2**31 elements comes out as it does alone; so do its gradients."""
    side = 1024
    one = side * side * HEADS * HEAD_DIM
    batch = 2**31 // one + 2
    free = torch.cuda.mem_get_info(device)[0]
    for learn, copies in ((False, 16), (True, 50)):  # bytes an element, roughly
        if free < copies * batch * one:
            return f"skipped{' for the gradients' if learn else ''}: needs {copies * batch * one >> 30} GiB"
        leaves = _call(batch, side, device)
        last = [x[-1:].detach().clone().requires_grad_() for x in leaves[:3]] + leaves[3:]
        count = 4 if learn else 1  # kernels' gradients are of the whole batch
        _same(
            [x[-1:] for x in _run(leaves, learn=learn)[:count]], _run(last, learn=learn)[:count], "above 2**31 elements"
        )
        del leaves, last
        torch.cuda.empty_cache()
    return "ok"


def second_stream(device: str) -> str:
    """A run on another stream gives the same."""
    leaves = _call(2, 96, device)
    expected, stream = _run(leaves), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        found = _run(leaves)
    torch.cuda.synchronize(device)
    _same(found, expected, "on a second stream")
    return "ok"


def graph(device: str) -> str:
    """Forward and backward captured as a CUDA graph, replayed on other tokens."""
    leaves = _call(2, 96, device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            _run(leaves)
    torch.cuda.synchronize(device)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=stream):
        found = _run(leaves)
    other = _call(2, 96, device, seed=1)
    with torch.no_grad():
        for x, y in zip(leaves, other, strict=True):
            x.copy_(y)
    captured.replay()
    torch.cuda.synchronize(device)
    _same(found, _run(other), "replayed from a CUDA graph")
    return "ok"


def second_device(device: str) -> str:
    """A run on a device that is not the current one gives the same."""
    if torch.cuda.device_count() < 2:
        return "skipped: there is one GPU"
    expected = _run(_call(2, 96, "cuda:0"))
    leaves = [x.detach().to("cuda:1").requires_grad_() for x in _call(2, 96, "cuda:0")]
    with torch.cuda.device(0):
        _same(_run(leaves), expected, "on a second device")
    return "ok"


CHECKS: dict[str, Callable[[str], str]] = {
    "repetition": repetition,
    "second stream": second_stream,
    "CUDA graph": graph,
    "second device": second_device,
    "more than 2**31 elements": beyond_32_bits,
}
