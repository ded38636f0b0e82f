"""Pictures of what a token attends to: its cover, and attention maps. Drawing needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .backbone import FMA2DBackbone
from .checks import check_integer, check_integers
from .geometry import Grid, cell_side, check_token, cover
from .modules import FMA1d, FMA2d
from .ops import multipole_attention

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@torch.inference_mode(False)  # its gradient is needed
def attention_map(module: FMA2d | FMA1d, x: Tensor, token: tuple[int, ...], key_mask: Tensor | None = None) -> Tensor:
    """How much the query at `token` attends to each token, the same with any backend, in linear memory.

    The probability of a summary token is spread over the existing tokens of its sub-cell, by their overlap with it.
    That is the gradient of the query's output with respect to the values, if those are aggregated by averaging.

    Args:
        module: an attention layer.
        x: its input, `[B, *grid, dim]`.
        token: index of the query, one integer an axis.
        key_mask: bool, broadcastable to `[B, *grid]`, True where a token exists.

    Returns:
        `[B, heads, *grid]` in float32 or wider, nonnegative up to rounding; sums to 1 over the grid, to 0 for a query
        that does not exist.
    """
    if not isinstance(module, FMA2d | FMA1d):
        raise TypeError(f"module must be an FMA2d or an FMA1d, got {type(module).__name__}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dim() != module.ndim + 2 or x.shape[-1] != module.dim:
        raise ValueError(f"x must be [B, *grid, {module.dim}] with {module.ndim} grid axes, got {list(x.shape)}")
    grid = x.shape[1:-1]
    check_token(token, grid)
    with torch.no_grad():
        q, k, _ = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in module.project(x))
    options = module.call_options() | dict(key_mask=key_mask)
    if module.kernels is not None:
        options["kernels"] = module.kernels.detach().clone()
        options["kernels"][:, 1] = module.start_kernels(q.device)[:, 1]
    with torch.enable_grad():
        v = torch.zeros_like(q, requires_grad=True)
        out = multipole_attention(q, k, v, **options)
        # Channels do not mix: one is enough.
        (grad,) = torch.autograd.grad(out[(..., *token, 0)].sum(), v)
    return grad[..., 0]


@torch.inference_mode(False)
def model_attention_map(model: nn.Module, image: Tensor, stage: int, block: int, point: tuple[int, int]) -> Tensor:
    """The attention map of the token at a point of an image, in one block of a backbone.

    Args:
        model: an FMA2D model.
        image: `[B, channels, H, W]`.
        stage, block: where, counted from 0.
        point: row and column in pixels.

    Returns:
        `[B, heads, *grid]`, the grid of that stage.
    """
    if not isinstance(model, FMA2DBackbone):
        raise TypeError(f"model must be an FMA2D model, got {type(model).__name__}")
    if not isinstance(image, Tensor):
        raise TypeError(f"image must be a tensor, got {type(image).__name__}")
    if image.dim() != 4:
        raise ValueError(f"image must be [B, channels, H, W], got {list(image.shape)}")
    check_integer("stage", stage, 0, len(model.stages) - 1)
    check_integer("block", block, 0, len(model.stages[stage].blocks) - 1)
    check_integers("point", point)
    height, width = image.shape[-2:]
    if len(point) != 2 or not (0 <= point[0] < height and 0 <= point[1] < width):
        raise ValueError(f"point must be a row and a column of the image {height} x {width}, got {point}")
    module = model.stages[stage].blocks[block].attn
    if not isinstance(module, FMA2d):
        raise TypeError(f"the attention of stage {stage}, block {block} must be an FMA2d, got {type(module).__name__}")

    class Reached(Exception):
        pass

    def stop(module: nn.Module, args: tuple) -> None:
        raise Reached(args[0])

    handle = module.register_forward_pre_hook(stop)
    try:
        with torch.no_grad():
            model(image)
    except Reached as reached:
        (x,) = reached.args
    finally:
        handle.remove()
    return attention_map(module, x, (point[0] * x.shape[1] // height, point[1] * x.shape[2] // width))


def draw_cover(
    grid: Grid, cell_size: int, token: tuple[int, ...], photo=None, causal: bool = False, ax: Axes | None = None
) -> Axes:
    """Draw what a token attends to: the near field, whose tokens count one by one, and the coarse cells of each level.

    Args:
        grid: token extents, `(H, W)`, or `(N,)` drawn as a strip.
        cell_size: tokens per side of a base cell.
        token: index of the query.
        photo: `[h, w, 3]` or `[h, w]` array laid under it, of any size (two axes only).
        causal: as in `fma2d.cover`.
        ax: where to draw; default: a new figure.

    Returns:
        The axes, in units of tokens: a rectangle for the near field, one for each coarse cell, one for the token.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Rectangle

    near, far = cover(grid, cell_size, token, causal)
    if len(grid) > 2:
        raise ValueError(f"grid must have 1 or 2 axes to be drawn, got {len(grid)}")
    strip = len(grid) == 1
    height, width = (1, *grid) if strip else grid
    if ax is None:
        ax = _new_axes(10, 2) if strip else _new_axes(7, 7 * height / width + 1)
    if photo is not None:
        if strip:
            raise ValueError("photo must be None where the grid has one axis")
        ax.imshow(photo, extent=(0, width, height, 0), cmap="gray")

    def edges(bounds):
        return ((0, 1), *bounds) if strip else bounds

    def rectangle(bounds, **style) -> Rectangle:
        (top, bottom), (left, right) = edges(bounds)
        return ax.add_patch(Rectangle((left, top), right - left, bottom - top, **style))

    def colored(level: int) -> dict:
        return dict(facecolor=(*colors[level], 0.55 if photo is None else 0.25), edgecolor=colors[level])

    by_level: dict[int, list] = {}
    for level, _, bounds in far:
        by_level.setdefault(level, []).append(bounds)
    colors = _level_colors(1 + max(by_level, default=0))

    field = tuple((min(axis), max(axis) + 1) for axis in zip(*near, strict=True))
    handles = [rectangle(field, label=f"near field: {len(near)} tokens", zorder=3, **colored(0))]
    handles += [rectangle([(t, t + 1) for t in token], fc="white", ec="black", label="the token", zorder=4)]
    for level, cells in by_level.items():
        patches = [rectangle(bounds, linewidth=1.2, **colored(level)) for bounds in cells]
        size = "x".join([str(cell_side(level, cell_size))] * len(grid))
        patches[0].set_label(f"level {level}: {len(cells)} cell{'s' * (len(cells) > 1)} of {size} tokens")
        handles.append(patches[0])
    (top, bottom), (left, right) = edges(field)
    between = [[(x, top), (x, bottom)] for x in range(left + 1, right)]
    between += [[(left, y), (right, y)] for y in range(top + 1, bottom)]
    ax.add_collection(LineCollection(between, colors=[(*colors[0], 0.5)], linewidths=0.3, zorder=3))

    ax.set_xlim(0, width)
    ax.set_ylim(height, 0)
    ax.set_aspect("auto" if strip else "equal")
    ax.set_xticks([])
    ax.set_yticks([])
    columns = 3 if strip else 2
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=columns, frameon=False)
    return ax


def draw_attention(attention: Tensor, photo, point: tuple[int, int], ax: Axes | None = None) -> Axes:
    """Lay an attention map over a photo, in multiples of even attention.

    Args:
        attention: `[H, W]`, or `[heads, H, W]`, of which the mean is shown.
        photo: `[h, w, 3]` array.
        point: row and column of the query, in pixels of the photo.
        ax: where to draw; default: a new figure.
    """
    import numpy as np

    if not isinstance(attention, Tensor):
        raise TypeError(f"attention must be a tensor, got {type(attention).__name__}")
    if attention.dim() not in (2, 3):
        raise ValueError(f"attention must be [H, W] or [heads, H, W], got {list(attention.shape)}")
    photo = np.asarray(photo)
    if photo.ndim not in (2, 3):
        raise ValueError(f"photo must be [h, w] or [h, w, 3], got {list(photo.shape)}")
    check_integers("point", point)
    if len(point) != 2:
        raise ValueError(f"point must be a row and a column, got {tuple(point)}")
    height, width = photo.shape[:2]
    if ax is None:
        ax = _new_axes(7, 6 * height / width)
    if attention.dim() == 3:
        attention = attention.mean(0)
    relative = (attention * attention.numel()).double().cpu().numpy()
    gray = photo[..., :3].mean(-1) if photo.ndim == 3 else photo
    ax.imshow(gray, cmap="gray", extent=(0, width, height, 0))
    low, high = np.quantile(relative, (0.01, 0.99))
    shown = ax.imshow(
        relative, cmap="viridis", vmin=low, vmax=high, alpha=0.65, extent=(0, width, height, 0), interpolation="nearest"
    )
    ax.plot(point[1] + 0.5, point[0] + 0.5, marker="o", markersize=7, color="cyan", markeredgecolor="black")
    ax.set_xlim(0, width)
    ax.set_ylim(height, 0)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.figure.colorbar(shown, ax=ax, fraction=0.046, pad=0.02)
    return ax


def _new_axes(width: float, height: float) -> Axes:
    """Axes alone in a figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, min(14, max(2, height))), layout="constrained").add_subplot()


def _level_colors(count: int) -> list[tuple[float, float, float]]:
    """Colours of the near field and the levels, far apart for any two that touch."""
    from matplotlib import colormaps

    palette = colormaps["tab10"].colors
    order = (3, 0, 2, 1, 4, 9, 6, 8)
    return [palette[order[i % len(order)]] for i in range(count)]
