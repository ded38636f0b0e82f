"""Argument checks of the operator: one clear error that names the argument, before any work."""

from sys import float_info

from torch import Tensor, bfloat16, bool, float16, float32, float64

from ..geometry import cell_side, check_grid, check_positive

DTYPES = (float16, bfloat16, float32, float64)


def check_call(
    q, k, v, key_kernels, value_kernels, query_kernels, key_mask, cell_size, rank, causal, scale
) -> Tensor | None:
    """Check a call's arguments and return the mask expanded to `[B, *grid]`.

    Raises:
        TypeError: for an argument of the wrong kind (a dtype that is no float type of the contract, say).
        ValueError: for one that does not fit the others.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if not 4 <= q.dim() <= 6:
        raise ValueError(f"q must be [B, heads, *grid, head_dim] with 1 to 3 grid axes, got shape {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(
                f"{name} must have the shape of q {tuple(q.shape)} (grouped queries and cross-attention are not "
                f"supported), got {tuple(x.shape)}"
            )
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")
    for name, value in (("cell_size", cell_size), ("rank", rank)):
        check_positive(name, value)
    grid = q.shape[2:-1]
    check_grid(grid, cell_size)
    if min(q.shape[1], q.shape[-1]) < 1:
        raise ValueError(f"q must have at least one head and one channel, got shape {tuple(q.shape)}")
    if causal and len(grid) != 1:
        raise ValueError(f"causal needs a grid of one axis, got {tuple(grid)}")
    if causal and query_kernels is not None:
        raise ValueError("causal cannot be combined with query_kernels: a summary query would hold later tokens")
    if scale is not None and not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    if scale is not None and not -float_info.max <= scale <= float_info.max:
        raise ValueError(f"scale must be finite, got {scale}")
    for name, kernels in (("key", key_kernels), ("value", value_kernels), ("query", query_kernels)):
        if kernels is not None or name != "query":
            _check_kernels(f"{name}_kernels", kernels, q, cell_size, rank)
    return _check_mask(key_mask, q)


def _check_kernels(name: str, kernels, q: Tensor, cell_size: int, rank: int) -> None:
    if not isinstance(kernels, (list, tuple)) or not all(isinstance(level, (list, tuple)) for level in kernels):
        raise TypeError(f"{name} must be a list over levels of lists over axes of tensors")
    heads, head_dim, ndim = q.shape[1], q.shape[-1], q.dim() - 3
    for level, axes in enumerate(kernels, 1):
        if len(axes) != ndim:
            raise ValueError(f"{name}: level {level} must have {ndim} kernels, one an axis, got {len(axes)}")
        side = cell_side(level, cell_size)
        for axis, kernel in enumerate(axes):
            at = f"{name}: level {level}, axis {axis}"
            if not isinstance(kernel, Tensor) or kernel.dtype not in DTYPES:
                got = kernel.dtype if isinstance(kernel, Tensor) else type(kernel).__name__
                raise TypeError(f"{at} must be a float16, bfloat16, float32 or float64 tensor, got {got}")
            if kernel.device != q.device:
                raise ValueError(f"{at} must be on the device of q, {q.device}, got {kernel.device}")
            fits = (
                kernel.dim() == 4
                and kernel.shape[0] == rank
                and (kernel.shape[1] == 1 or kernel.shape[1] == heads)
                and (kernel.shape[2] == 1 or kernel.shape[2] == head_dim)
                and kernel.shape[3] > 0
                and side % kernel.shape[3] == 0
            )
            if not fits:
                raise ValueError(
                    f"{at} must be [rank {rank}, heads {heads} or 1, head_dim {head_dim} or 1, bins dividing the cell "
                    f"side {side}], got {tuple(kernel.shape)}"
                )


def _check_mask(key_mask, q: Tensor) -> Tensor | None:
    if key_mask is None:
        return None
    if not isinstance(key_mask, Tensor) or key_mask.dtype != bool:
        got = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
        raise TypeError(f"key_mask must be a bool tensor, True where the token exists, got {got}")
    if key_mask.device != q.device:
        raise ValueError(f"key_mask must be on the device of q, {q.device}, got {key_mask.device}")
    shape = (q.shape[0], *q.shape[2:-1])
    if key_mask.dim() > len(shape) or any(
        m != 1 and m != n for m, n in zip(reversed(key_mask.shape), reversed(shape), strict=False)
    ):
        raise ValueError(f"key_mask must be broadcastable to [B, *grid] = {shape}, got {tuple(key_mask.shape)}")
    return key_mask.expand(shape)
