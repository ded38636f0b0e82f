"""Attention modules over a grid of tokens: projections around `multipole_attention`, and the learned kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Proxy, wrap

from .checkpoint import report_layer
from .checks import MOST_LEVELS, check_bool, check_choice, check_dtype, check_integer, check_positive, check_rate
from .geometry import tiling
from .kernels import VARIANTS, adapt_kernels, start_kernels
from .ops import BACKENDS, multipole_attention, portable

wrap("multipole_attention")  # one node of a graph that torch.fx traces
AGGREGATIONS = ("learned", "mean")


class _FMA(nn.Module):
    """Fast Multipole Attention with its projections; `ndim` grid axes.

    All kernels are one parameter `kernels`, `[levels, key | value | query, axis, rank, heads | 1, head_dim, cell_size]`
    (the query kernels in the linear variant only), densities of order 1 at every level, which the operator takes as it
    is. It is None where nothing is learned.
    """

    ndim: int

    def __init__(
        self,
        dim: int,
        num_heads: int,
        cell_size: int,
        rank: int,
        *,
        levels: int,
        variant: str,
        aggregation: str,
        share_heads: bool,
        qkv_bias: bool,
        proj_drop: float,
        backend: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        causal: bool = False,
    ):
        super().__init__()
        for name, value in (("dim", dim), ("num_heads", num_heads)):
            check_positive(name, value)
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim {dim}, got {num_heads}")
        for name, value, known in (
            ("variant", variant, VARIANTS),
            ("aggregation", aggregation, AGGREGATIONS),
            ("backend", backend, ("auto", *BACKENDS)),
        ):
            check_choice(name, value, known)
        for name, value in (("causal", causal), ("share_heads", share_heads), ("qkv_bias", qkv_bias)):
            check_bool(name, value)
        check_rate("proj_drop", proj_drop)
        check_dtype(dtype)
        if causal and variant == "linear":
            raise ValueError("causal needs variant 'loglinear': a summary query would hold later tokens")
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.variant, self.aggregation, self.causal, self.backend = variant, aggregation, causal, backend
        self.share_heads = share_heads
        self._set_cells(cell_size, rank, levels)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self._make_kernels(device, dtype)
        # What the last load_state_dict did to the kernels, beyond copying them: "initialised", "adapted", "dropped".
        self.load_notes: dict[str, str] = {}
        self.is_reported = False  # whether a model around it tells of them
        self.register_load_state_dict_post_hook(report_layer)

    def check_cells(self, cell_size: int, rank: int, levels: int) -> None:
        """Raise TypeError or ValueError for settings that this module cannot have."""
        for name, value in (("cell_size", cell_size), ("rank", rank)):
            check_positive(name, value)
        check_integer("levels", levels, 0, MOST_LEVELS)
        parts = tiling(rank, self.ndim)
        if self.aggregation == "learned" and any(cell_size % p for p in parts):
            raise ValueError(
                f"rank {rank} tiles a cell as {parts}; each must divide cell_size {cell_size} to be learned"
            )

    def _set_cells(self, cell_size: int, rank: int, levels: int) -> None:
        self.check_cells(cell_size, rank, levels)
        self.cell_size, self.rank, self.levels = cell_size, rank, levels

    @property
    def learns_kernels(self) -> bool:
        return self.aggregation == "learned" and self.levels > 0

    def start_kernels(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The start value of `kernels`."""
        dtype = torch.get_default_dtype() if dtype is None else dtype
        heads = 1 if self.share_heads else self.num_heads
        sizes = (1, self.cell_size, self.rank, self.ndim, heads, self.head_dim)
        level = start_kernels(*sizes, variant=self.variant, bins=self.cell_size, dtype=dtype, device=device)
        return level.expand(self.levels, *level.shape).clone()

    def _make_kernels(self, device=None, dtype=None) -> None:
        """Make the parameter `kernels`, at the start value, or set it to None where nothing is learned."""
        self.kernels = nn.Parameter(self.start_kernels(device, dtype)) if self.learns_kernels else None
        # Made without memory: whatever gives it some must give it its value too.
        self.is_empty = self.kernels is not None and self.kernels.is_meta

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the kernels back to their start value, where they are; the projections reset themselves."""
        if self.kernels is None:
            return
        start = self.start_kernels(self.kernels.device, self.kernels.dtype)
        if hasattr(self.kernels, "placements"):  # sharded by FSDP2: every process has its part of what all can compute
            from torch.distributed.tensor import distribute_tensor

            start = distribute_tensor(start, self.kernels.device_mesh, self.kernels.placements)
        self.kernels.copy_(start)
        self.is_empty = self.kernels.is_meta

    def init_non_persistent_buffers(self) -> None:
        """Give kernels that were made without memory, and not loaded since, their start value.

        timm and transformers call this, by this name, on modules that they filled without `load_state_dict`.
        """
        if self.is_empty and not getattr(self.kernels, "_is_hf_initialized", False):
            self.reset_parameters()

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        if self.is_empty and self.kernels is not None and not self.kernels.is_meta:  # after `to_empty`
            self.reset_parameters()
        return self

    def change_cells(self, cell_size: int | None = None, rank: int | None = None, levels: int | None = None) -> None:
        """Change settings (None: as it is); learned kernels are carried over as from a checkpoint.

        `kernels` becomes another parameter: make the optimizer afterwards.

        Raises:
            TypeError, ValueError: for settings that a new module would refuse; nothing is changed then.
        """
        old = self.kernels
        self._set_cells(
            self.cell_size if cell_size is None else cell_size,
            self.rank if rank is None else rank,
            self.levels if levels is None else levels,
        )
        like = self.qkv.weight if old is None else old
        self._make_kernels(like.device, like.dtype)
        if self.kernels is None:
            return
        self.kernels.requires_grad_(like.requires_grad)
        if old is not None:
            self.kernels.data = adapt_kernels(old.detach(), self.kernels.detach())[0]

    def call_options(self) -> dict:
        """Keyword arguments of `multipole_attention`, the learned kernels among them."""
        return dict(
            kernels=self.kernels,
            cell_size=self.cell_size,
            rank=self.rank,
            variant=self.variant,
            causal=self.causal,
            backend=self.backend,
        )

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k and v `[B, heads, *grid, head_dim]` of x `[B, *grid, dim]`; views, channels last in memory."""
        if not isinstance(x, Proxy) and (x.dim() != self.ndim + 2 or x.shape[-1] != self.dim):
            raise ValueError(f"x must have {self.ndim + 2} axes, the last of {self.dim} channels, got {tuple(x.shape)}")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        return q.movedim(-2, 1), k.movedim(-2, 1), v.movedim(-2, 1)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """`[B, *grid, dim]` to the same; `key_mask` bool, broadcastable to `[B, *grid]`, True where a token exists."""
        return self.merge(self.attend(*self.project(x), key_mask))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """The operator on q, k and v `[B, heads, *grid, head_dim]`."""
        return multipole_attention(q, k, v, key_mask=key_mask, **self.call_options())

    def merge(self, out: Tensor) -> Tensor:
        """What the module gives, `[B, *grid, dim]`, from what attention gave, `[B, heads, *grid, head_dim]`."""
        return self.proj_drop(self.proj(out.movedim(1, -2).flatten(-2)))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        self.load_notes = {}
        if (
            self.kernels is not None and "kernels" not in self._parameters
        ):  # parametrised: its parts are loaded as they are
            return super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors
            )
        name = prefix + "kernels"
        stored = state_dict.pop(name, None)
        if self.kernels is None:
            if stored is not None:
                self.load_notes["dropped"] = f"{stored.shape[0]} learned levels"
        elif stored is None or stored.shape[0] == 0:
            if any(key.startswith(prefix) for key in state_dict):  # else nothing of this layer is loaded
                like = state_dict.get(prefix + "qkv.weight", self.qkv.weight)  # with `assign` it takes their place
                state_dict[name] = self.start_kernels(like.device, like.dtype)
                self.load_notes["initialised"] = "all kernels"
        else:
            try:
                state_dict[name], self.load_notes = adapt_kernels(stored, self.start_kernels())
            except ValueError as error:
                errors.append(f"{name}: {error}")
                state_dict[name] = self.kernels.detach()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors)
        if name in state_dict and self.kernels is not None:
            self.is_empty = self.kernels.is_meta

    def extra_repr(self) -> str:
        return (
            f"cell_size={self.cell_size}, rank={self.rank}, levels={self.levels}, variant={self.variant!r}, "
            f"aggregation={self.aggregation!r}, backend={self.backend!r}"
        )


class FMA2d(_FMA):
    """Fast Multipole Attention on images: `[B, H, W, dim]` to `[B, H, W, dim]`, any H and W.

    Args:
        dim: channels.
        num_heads: heads, a divisor of dim.
        cell_size: tokens per side of a base cell.
        rank: summary tokens per coarse cell, tiled as `p_1 x p_2`; both must divide `cell_size` to be learned.
        levels: coarse levels with learned kernels; coarser ones use the last one's.
        variant: "linear" (far queries aggregated too) or "loglinear".
        aggregation: "learned" or "mean" (fixed averaging, no parameters).
        share_heads: one set of kernels for all heads.
        qkv_bias: bias of the query, key and value projection.
        proj_drop: dropout after the last projection.
        backend: see `multipole_attention`.
        export_levels: None, or run in operations that ONNX knows, for grids of at most this many levels; see
            `fma2d.ops.portable`. `backend` then plays no part, and a mask is refused.
        device, dtype: of the parameters.
    """

    ndim = 2

    def __init__(
        self,
        dim: int,
        num_heads: int,
        cell_size: int = 8,
        rank: int = 4,
        *,
        levels: int,
        variant: str = "linear",
        aggregation: str = "learned",
        share_heads: bool = False,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        backend: str = "auto",
        export_levels: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            dim,
            num_heads,
            cell_size,
            rank,
            levels=levels,
            variant=variant,
            aggregation=aggregation,
            share_heads=share_heads,
            qkv_bias=qkv_bias,
            proj_drop=proj_drop,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        if export_levels is not None:
            check_integer("export_levels", export_levels, 0, MOST_LEVELS)
        self.export_levels = export_levels

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        if self.export_levels is None:
            if torch.onnx.is_in_onnx_export():
                raise RuntimeError(
                    "ONNX has no operator for FMA2d: make the model with timm.create_model(..., exportable=True)"
                )
            return super().forward(x, key_mask)
        if key_mask is not None:
            raise ValueError("key_mask cannot be given to a module made for export (export_levels)")
        out = portable.attention(
            self.qkv(x),
            [] if self.kernels is None else [self.kernels],
            heads=self.num_heads,
            levels=self.export_levels,
            cell_size=self.cell_size,
            rank=self.rank,
            variant=self.variant,
        )
        return self.proj_drop(self.proj(out))


class FMA1d(_FMA):
    """Fast Multipole Attention on sequences: `[B, N, dim]` to `[B, N, dim]`, any N.

    What is not described here is as in `FMA2d`; `rank` must divide `cell_size` to be learned.

    Args:
        causal: a token attends to nothing on its right (variant "loglinear" only).
        count_bias: whether a summary token counts for as many as it stands for, see `multipole_attention`.
        share_heads: one set of kernels for all heads (the paper's choice in 1D).
    """

    ndim = 1

    def __init__(
        self,
        dim: int,
        num_heads: int,
        cell_size: int = 32,
        rank: int = 4,
        *,
        levels: int,
        causal: bool = False,
        variant: str = "loglinear",
        aggregation: str = "learned",
        share_heads: bool = True,
        count_bias: bool = True,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            dim,
            num_heads,
            cell_size,
            rank,
            levels=levels,
            variant=variant,
            aggregation=aggregation,
            share_heads=share_heads,
            causal=causal,
            qkv_bias=qkv_bias,
            proj_drop=proj_drop,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        check_bool("count_bias", count_bias)
        self.count_bias = count_bias

    def call_options(self) -> dict:
        return super().call_options() | dict(count_bias=self.count_bias)
