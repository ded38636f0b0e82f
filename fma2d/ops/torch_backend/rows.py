"""Tiles of whole rows, for grids of few cells: the queries of some rows of cells and all keys of those around them.

On a CPU a tile is one call of the kernel behind `scaled_dot_product_attention`, on slices of the tokens as they lie.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .cells import PAIRS, Box, Relation, attend, attend_backward, is_followed

# Fewer queries a tile than this are not worth a call; torch's kernel takes larger blocks from here on.
LEAST_QUERIES = 192
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Row:
    """A tile: the queries of `box`, the keys of `key_box`."""

    def __init__(
        self,
        arrays: tuple[Tensor, ...],
        bias: Tensor | None,
        relation: Relation,
        box: Box,
        key_box: Box,
        scale: float,
        dtype: torch.dtype,
    ):
        self.arrays, self.box, self.key_box, self.scale, self.dtype = arrays, box, key_box, scale, dtype
        q = arrays[0]
        self.addend = relation.pattern(box, key_box, dtype, q.device)[None, None]
        if bias is not None:
            self.addend = self.addend + bias[(slice(None), *key_box)].flatten(1)[:, None, None]
        self.fused = q.device.type == "cpu" and not is_followed()

    def _inputs(self) -> list[Tensor]:
        """q, k and v, `[B, heads, positions, head_dim]`."""
        return [self._take(x, box) for x, box in zip(self.arrays, (self.box, self.key_box, self.key_box), strict=True)]

    def _take(self, x: Tensor, box: Box) -> Tensor:
        x = x[(slice(None), *box)].flatten(1, 3).transpose(1, 2).to(self.dtype)
        return x if x.stride(-1) == 1 else x.contiguous()

    def _give(self, x: Tensor, box: Box) -> Tensor:
        """`[B, heads, positions, ...]` as `[B, *box, heads, ...]`."""
        return x.transpose(1, 2).unflatten(1, [s.stop - s.start for s in box])

    def attend(self) -> tuple[Tensor, Tensor]:
        """Output and lse of these entries, `[B, *box, heads, head_dim]` and `[B, *box, heads]`."""
        q, k, v = self._inputs()
        if self.fused:
            out, lse = _FLASH(q, k, v, attn_mask=self.addend, scale=self.scale)
        else:
            pieces = [attend(*inputs, adjust) for inputs, adjust in self._pieces(q * self.scale, k, v)]
            out, lse = (torch.cat(x).unflatten(0, q.shape[:2]) for x in zip(*pieces, strict=True))
            lse = lse.squeeze(-1)
        return self._give(out, self.box), self._give(lse, self.box)

    def backward(
        self, lse: Tensor, delta: Tensor, d_out: Tensor, out: Tensor | None, d_k: Tensor, d_v: Tensor
    ) -> Tensor:
        """Add to the gradients of keys and values, and return that of the queries, `[B, *box, heads, head_dim]`.

        Args:
            lse, delta: of the box, as in `cells.attend_backward`.
            out: what `delta` is made of, if of nothing else.
        """
        q, k, v = self._inputs()
        lse, delta, d_out = (x.flatten(1, 3).transpose(1, 2) for x in (lse, delta, d_out))
        d_out = d_out.to(self.dtype)
        if self.fused and out is not None:
            out = out.flatten(1, 3).transpose(1, 2).to(self.dtype)
            grads = _FLASH_BACKWARD(d_out, q, k, v, out, lse, 0.0, False, attn_mask=self.addend, scale=self.scale)
        else:
            rest = [x.flatten(0, 1).split(self._entries, 0) for x in (lse[..., None], delta[..., None], d_out)]
            grads = []
            for (inputs, adjust), *more in zip(self._pieces(q * self.scale, k, v), *rest, strict=True):
                weights, d_scores = attend_backward(*inputs, adjust, *more)
                d_q = torch.bmm(d_scores, inputs[1]).mul_(self.scale)
                grads.append((d_q, torch.bmm(d_scores.mT, inputs[0]), torch.bmm(weights.mT, more[-1])))
            grads = [torch.cat(x).unflatten(0, q.shape[:2]) for x in zip(*grads, strict=True)]
        for x, grad in ((d_k, grads[1]), (d_v, grads[2])):
            x[(slice(None), *self.key_box)].add_(self._give(grad, self.key_box))
        return self._give(grads[0], self.box)

    @property
    def _entries(self) -> int:
        return max(1, PAIRS // max(1, self.addend.shape[-1] * self.addend.shape[-2]))

    def _pieces(self, *inputs: Tensor) -> Iterator:
        """Some batch entries and heads at a time: their q, k and v and what adjusts their scores."""
        heads = inputs[0].shape[1]
        addend = self.addend.expand(inputs[0].shape[0], heads, -1, -1).flatten(0, 1) if len(self.addend) > 1 else None
        pieces = zip(*(x.flatten(0, 1).split(self._entries, 0) for x in inputs), strict=True)
        for i, piece in enumerate(pieces):
            own = self.addend[0] if addend is None else addend[i * self._entries :][: len(piece[0])]
            yield piece, lambda scores, own=own: scores.add_(own)


def rows(
    arrays: tuple[Tensor, ...], bias: Tensor | None, relation: Relation, scale: float, dtype: torch.dtype
) -> Iterator[Row]:
    """The tiles of q, k and v; together they hold each query once."""
    q, k = arrays[:2]
    (depth, height, width), key_extents = q.shape[1:4], k.shape[1:4]
    cell_z, cell_y, _ = relation.query_cell
    x, key_x = slice(0, width), slice(0, key_extents[2])
    for z in range(0, depth, cell_z):
        z = slice(z, min(depth, z + cell_z))
        key_z = relation.keys_of(0, z, key_extents[0])
        keys = (key_z.stop - key_z.start) * 3 * relation.key_cell[1] * key_extents[2]
        queries = (z.stop - z.start) * width
        # Whole rows of cells, or a part of one.
        most = max(1, PAIRS // max(1, keys * queries))
        step = cell_y * max(1, min(most // cell_y, -(-LEAST_QUERIES // (queries * cell_y))))
        parts = -(-cell_y // most)
        for start in range(0, height, step):
            stop = min(height, start + step)
            size = -(-(stop - start) // parts)
            for first in range(start, stop, size):
                y = slice(first, min(stop, first + size))
                key_box = (key_z, relation.keys_of(1, y, key_extents[1]), key_x)
                yield Row(arrays, bias, relation, (z, y, x), key_box, scale, dtype)
