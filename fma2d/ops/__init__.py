"""The public operator: checks its arguments, chooses a backend, runs it."""

import os
from importlib.util import find_spec
from inspect import signature

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import dense, library, reference
from .call import Call, Kernels, Options, check_call, check_tensor

BACKENDS = ("reference", "torch", "triton")


def multipole_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernels: Kernels | None = None,
    *,
    cell_size: int,
    rank: int,
    variant: str = "loglinear",
    causal: bool = False,
    key_mask: Tensor | None = None,
    count_bias: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Fast Multipole Attention (Kang, Tran, De Sterck, arXiv:2310.11960v4) over a grid of 1, 2 or 3 axes.

    A query attends to the tokens of its base cell and that cell's neighbours one by one, and to everything else
    through `rank` summary tokens per coarse cell, the coarser the farther; `fma2d.cover` lists what that is. A grid of
    at most `2 * cell_size` tokens a side has no coarse levels: the call is `scaled_dot_product_attention` then.

    Args:
        q, k, v: `[B, heads, *grid, head_dim]`, of one shape, dtype (float16, bfloat16, float32 or float64) and device.
        kernels: learned aggregation kernels: a sequence over levels of densities
            `[kinds, axes, rank, heads | 1, head_dim | 1, bins]`, or one tensor with a levels axis in front. The kinds
            are key, value and, in the linear variant, query; `bins` divides the level's cell side
            `cell_size * 2**(level - 1)`; all bins 1 is the mean over the cell. Coarser levels use the last ones.
            None or empty: `start_kernels` at every level, fixed averaging.
        cell_size: tokens per side of a base cell.
        rank: summary tokens per coarse cell.
        variant: "loglinear", or "linear", in which far queries are aggregated too.
        causal: a token attends to nothing on its right (one axis, log-linear variant).
        key_mask: bool, broadcastable to `[B, *grid]`, True where the token exists. Where it is False nothing is read,
            out is 0, lse is -inf and gradients are 0.
        count_bias: a summary token that speaks for `n` tokens gets `log n` added to its score.
        scale: factor of every score; default `head_dim ** -0.5`.
        return_lse: also return the natural log of the sum of the exponentials of all scores, differentiable.
        backend: "auto", "reference" (dense, slow: the definition), "torch" or "triton".

    Returns:
        out, like q; with `return_lse` `(out, lse)`, lse `[B, heads, *grid]` in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: for arguments that do not fit; the message names the argument.
        RuntimeError: if the backend asked for cannot run this call; the message says why.
    """
    q, k, v = _autocast(q, k, v)
    stacks, key_mask = check_call(
        q, k, v, kernels, key_mask, cell_size, rank, variant, causal, count_bias, scale, return_lse
    )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    call = Call(q, k, v, stacks, key_mask, Options(cell_size, rank, variant, causal, count_bias, scale))
    if (reason := why_not(backend, q)) is not None:
        raise RuntimeError(f"backend {backend!r} cannot run this call: {reason}")
    transformed = _is_transformed([q, k, v, *stacks])
    if transformed and backend == "triton":
        raise RuntimeError("backend 'triton' cannot run this call: torch.func and forward mode need backend 'torch'")
    # Its lse would have no derivative, its kernels no transforms, and what is compiled for open sizes has no branches.
    is_open = any(isinstance(n, torch.SymInt) for n in call.grid)
    if backend != "reference" and not (return_lse or transformed or is_open) and call.dense:
        return dense.attention(call)
    if backend == "reference":
        attention = reference.attention
    elif transformed:
        from .torch_backend import forward as attention
    else:
        if backend == "auto":
            backend = "triton" if q.device.type == "cuda" and _why_not_triton(q) is None else "torch"
        out, lse = library.multipole_attention(q, k, v, stacks, key_mask, *call.options, backend)
        return (out, lse) if return_lse else out
    with torch.autocast(q.device.type, enabled=False):
        out, lse = attention(call)
    return (out, lse) if return_lse else out


def why_not(backend: str, q: Tensor, **call_options) -> str | None:
    """Why a backend cannot run `multipole_attention(q, ..., **call_options)`; None if it can.

    Raises:
        ValueError: for an unknown backend.
        TypeError: for a q that is no float tensor, an option that `multipole_attention` does not have.
    """
    if unknown := call_options.keys() - CALL_OPTIONS:
        raise TypeError(f"why_not got options that multipole_attention does not have: {', '.join(sorted(unknown))}")
    if not isinstance(backend, str) or backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
    check_tensor("q", q)
    return _why_not_triton(q) if backend == "triton" else None


CALL_OPTIONS = signature(multipole_attention).parameters.keys() - {"q", "k", "v", "backend"}


def _why_not_triton(q: Tensor) -> str | None:
    if q.dim() == 6:
        return "its kernels are for one and two grid axes"
    if q.dtype == torch.float64:
        return "its kernels compute in float32; float64 needs the torch backend"
    if (reason := _why_no_kernels(q.device)) is not None:
        return reason
    from .triton_backend import tiles

    if q.shape[-1] > tiles.MOST_HEAD_DIM:
        return f"its kernels take a head_dim of at most {tiles.MOST_HEAD_DIM}, got {q.shape[-1]}"
    return None


@torch.compiler.assume_constant_result
def _why_no_kernels(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"q is on {device.type!r}: its kernels run on CUDA devices, elsewhere under TRITON_INTERPRET=1 only"
    from .triton_backend import tiles

    return tiles.why_not(torch.cuda.get_device_capability(device) if device.type == "cuda" else None)


def _is_transformed(tensors: list[Tensor]) -> bool:
    """Whether a transform of `torch.func` or forward-mode autograd is at work, for which the op has no rules."""
    if _has_transforms():
        return True
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


@torch.compiler.assume_constant_result
def _has_transforms() -> bool:
    return torch._C._are_functorch_transforms_active()


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast casts the inputs of `scaled_dot_product_attention`: floats, but not float64."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    castable = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in castable else x for x in tensors)
