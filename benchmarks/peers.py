"""Other attentions over a grid of tokens: dense by each backend of torch, windows, NATTEN, FlexAttention.

A peer takes q, k, v `[B, heads, H, W, head_dim]` as the operator does; what it needs to bring them into its own order
is part of its time. One that is not installed or does not run on a device fails when it is made or called.
"""

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

WINDOW = 16

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`scaled_dot_product_attention` over all tokens."""
    return F.scaled_dot_product_attention(*(x.flatten(2, 3) for x in (q, k, v))).view(q.shape)


def _dense_by(backend: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return dense(q, k, v)

    return attend


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Within windows of `WINDOW x WINDOW` tokens; a grid that they do not divide is padded."""
    height, width = q.shape[2:4]
    cells = [_by_cell(F.pad(x, (0, 0, 0, -width % WINDOW, 0, -height % WINDOW)), WINDOW) for x in (q, k, v)]
    # [B * cells, heads, tokens, head_dim]
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2).flatten(0, 1) for x in cells))
    out = out.unflatten(0, (q.shape[0], -1)).transpose(1, 2)
    return _from_cells(out, height, width, WINDOW)


def _by_cell(x: Tensor, side: int) -> Tensor:
    """`[B, heads, H, W, head_dim]` to `[B, heads, cells, side * side, head_dim]`."""
    x = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))
    return x.transpose(3, 4).flatten(4, 5).flatten(2, 3)


def _from_cells(x: Tensor, height: int, width: int, side: int) -> Tensor:
    x = x.unflatten(2, (-(-height // side), -1)).unflatten(4, (side, side)).transpose(3, 4)
    return x.flatten(4, 5).flatten(2, 3)[:, :, :height, :width]


def natten(cell_size: int) -> Attend:
    """NATTEN with the near field's cover: kernels of three cells a side that move by a cell."""
    from natten import na2d

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = na2d(*(x.movedim(1, -2).contiguous() for x in (q, k, v)), kernel_size=3 * cell_size, stride=cell_size)
        return out.movedim(-2, 1)

    return attend


def flex(cell_size: int, height: int, width: int, device: str) -> Attend:
    """FlexAttention with the near field's cover, on tokens in the order of their cells; compiled on a GPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    padded = [-(-n // cell_size) * cell_size for n in (height, width)]
    across, tokens = padded[1] // cell_size, cell_size * cell_size

    def near(batch, head, query, key):
        cell, own, place = key // tokens, query // tokens, key % tokens
        down, right = cell // across - own // across, cell % across - own % across
        y, x = cell // across * cell_size + place // cell_size, cell % across * cell_size + place % cell_size
        return (down.abs() <= 1) & (right.abs() <= 1) & (y < height) & (x < width)

    on_gpu = device.startswith("cuda")
    make = torch.compile(create_block_mask, dynamic=False) if on_gpu else create_block_mask
    mask = make(near, None, None, prod(padded), prod(padded), device=device)
    run = torch.compile(flex_attention, dynamic=False) if on_gpu else flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pads = (0, 0, 0, padded[1] - width, 0, padded[0] - height)
        cells = [_by_cell(F.pad(x, pads), cell_size).flatten(2, 3).contiguous() for x in (q, k, v)]
        return _from_cells(run(*cells, block_mask=mask).unflatten(2, (-1, tokens)), height, width, cell_size)

    return attend


def peer(name: str, *, height: int, width: int, cell_size: int, device: str) -> Attend:
    """A peer by its name in the results.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    if name == "natten":
        return natten(cell_size)
    if name == "flex":
        return flex(cell_size, height, width, device)
    by_backend = {"sdpa-cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}
    return {"sdpa": dense, "window": window}.get(name) or _dense_by(by_backend[name])


def pairs(name: str, height: int, width: int, near: int) -> int:
    """Pairs of a query and a key that a peer computes; `near`: those of the near field."""
    if name.startswith("sdpa"):
        return (height * width) ** 2
    return height * width * WINDOW**2 if name == "window" else near


PEERS = ("sdpa", "sdpa-cudnn", "sdpa-flash", "window", "natten", "flex")
