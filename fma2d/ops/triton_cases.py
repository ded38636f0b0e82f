"""What the triton backend compiles, found out without a GPU: the launches of a call on meta tensors, recorded.

Only for a process without `TRITON_INTERPRET`.
"""

from typing import NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from . import triton_backend
from .options import Options


class Case(NamedTuple):
    """One compilation: what it is called, the kernel, its arguments by name (tensors on meta), warps and stages."""

    name: str
    kernel: JITFunction
    arguments: dict
    compilation: dict

    def source(self, capability: tuple[int, int]) -> tuple[ASTSource, GPUTarget, dict]:
        """What `triton.compile` takes, by the code that a launch uses: `(source, target, options)`."""
        target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
        backend = make_backend(target)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, _ = bind(**self.arguments, **self.compilation)
        options, signature, constants, attributes = self.kernel._pack_args(
            backend, self.compilation, bound, specialization, None
        )
        return ASTSource(self.kernel, signature, constants, attributes), target, options.__dict__


class _Recorded(triton_backend._Call):
    """A call that launches nothing, on tokens without content."""

    def __init__(self, cases: dict[str, Case], capability: tuple[int, int], *arguments):
        super().__init__(*arguments)
        self.cases, self.capability = cases, capability

    def _run(self, kernel, programs: int, arguments: dict, compilation: dict) -> None:
        name = f"{kernel.__name__} {self.far}"
        self.cases[name] = Case(name, kernel, arguments, compilation)

    def summarise(self) -> triton_backend.Lattices:
        lattices = [self._lattice(self.entries)[0].to(self._lattice_dtype()) for _ in self.summarised]
        return triton_backend.Lattices(*[None] * (3 - len(lattices)), *lattices)


def compile_cases(
    head_dim: int,
    dtype: torch.dtype,
    variant: str,
    capability: tuple[int, int],
    *,
    grid: tuple[int, ...] = (64, 64),
    cell_size: int = 8,
    rank: int = 4,
    causal: bool = False,
    masked: bool = False,
) -> list[Case]:
    """The attention kernels of one configuration, forward and backward, but for those of the aggregation.

    Args:
        variant: "linear" or "loglinear".
    """
    shape = (2, *grid, 3, 2, head_dim)
    q, k, v = (x.movedim(-2, 1) for x in torch.empty(shape, dtype=dtype, device="meta").unbind(-3))
    mask = torch.ones(2, *grid, dtype=torch.bool, device="meta") if masked else None
    options = Options(cell_size, rank, causal, True, head_dim**-0.5)
    cases: dict[str, Case] = {}
    call = _Recorded(cases, capability, q, k, v, [], [], [] if variant == "linear" else None, mask, options)
    lattices = call.summarise()
    out, lse = call.near_forward(lattices)
    queries = call.prepare(out, out, lse, lse)
    call.far_backward(lattices, queries)
    extra = [lse.new_empty(out.shape)] * 3
    call.near_dq(lattices, queries, extra[0] if call.linear else None)
    call.near_dkdv(queries, *extra[1:])
    return list(cases.values())
