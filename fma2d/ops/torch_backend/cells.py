"""What the parts of the torch backend speak of: how positions see each other, and the softmax of one tile.

Arrays have three grid axes here, `[B, Z, Y, X, heads, channels]`; a grid of fewer has leading axes of one position.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.autograd import forward_ad

# Stands for -inf, so that no inf - inf arises; what is below half of it has attended to nothing.
ABSENT = -1e30
# Scores are held for about this many (query, key) pairs at a time.
PAIRS = 1 << 19

Box = tuple[slice, slice, slice]  # positions along Z, Y and X


class Relation(NamedTuple):
    """Which keys a level's queries see: those of the own cell and of its neighbours.

    Attributes:
        query_cell, key_cell: positions per cell, an axis each. Of a coarse level, the cells are parents.
        far: children of parents that are next to each other do not see each other: a finer level sees to them.
        causal: keys to the right are not seen (along X).
    """

    query_cell: tuple[int, int, int]
    key_cell: tuple[int, int, int]
    far: bool
    causal: bool

    @property
    def after(self) -> int:
        """Cells after the own one that are seen."""
        return 0 if self.causal else 1

    def keys_of(self, axis: int, queries: slice, extent: int) -> slice:
        """The keys of an axis of `extent` keys that may be seen by some queries."""
        cell, key_cell = self.query_cell[axis], self.key_cell[axis]
        first, last = queries.start // cell - 1, (queries.stop - 1) // cell + self.after
        return slice(max(0, first * key_cell), min(extent, (last + 1) * key_cell))

    def pattern(self, queries: Box, keys: Box, dtype: torch.dtype, device: torch.device) -> Tensor:
        """0 where a query sees a key and `ABSENT` elsewhere: `[queries, keys]`, row-major positions of the boxes."""
        spans = []
        for cell, key_cell, q, k in zip(self.query_cell, self.key_cell, queries, keys, strict=True):
            own = q.start // cell  # what is seen depends on the distance only
            spans.append((q.start - own * cell, q.stop - own * cell, k.start - own * key_cell, k.stop - own * key_cell))
        # What is large is made anew, or some calls would hold on to all memory.
        size = 1
        for q0, q1, k0, k1 in spans:
            size *= (q1 - q0) * (k1 - k0)
        make = _pattern if size <= PAIRS else _pattern.__wrapped__
        return make(self, tuple(spans), dtype, device)


@lru_cache(maxsize=24)
@torch.inference_mode(False)  # what is kept serves calls of every mode
def _pattern(relation: Relation, spans: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    seen = next_to = None
    for axis, (q0, q1, k0, k1) in enumerate(spans):
        cell, key_cell = relation.query_cell[axis], relation.key_cell[axis]
        query = torch.arange(q0, q1, device=device)[:, None]
        key = torch.arange(k0, k1, device=device)
        children = [max(1, c // 2) if relation.far else c for c in (cell, key_cell)]
        step = torch.div(key, children[1], rounding_mode="floor") - torch.div(query, children[0], rounding_mode="floor")
        parents = torch.div(key, key_cell, rounding_mode="floor") - torch.div(query, cell, rounding_mode="floor")
        inside, near = parents.abs() <= 1, step.abs() <= 1
        if relation.causal and axis == 2:
            inside = inside & (step < 0 if relation.far else key <= query)
        seen = inside if seen is None else _outer(seen, inside)
        next_to = near if next_to is None else _outer(next_to, near)
    if relation.far:
        seen = seen & ~next_to
    return torch.where(seen, 0.0, ABSENT).to(dtype)


def _outer(pattern: Tensor, axis: Tensor) -> Tensor:
    """Both true, of `[queries, keys]` so far and of one more axis, whose positions are the faster ones."""
    return (pattern[:, None, :, None] & axis[None, :, None, :]).flatten(2).flatten(0, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, adjust: Callable[[Tensor], None]) -> tuple[Tensor, Tensor]:
    """Attention of `[N, queries, C]` to `[N, keys, C]`, its output and its lse `[N, queries, 1]`.

    Args:
        q: scaled.
        adjust: changes the scores `[N, queries, keys]` in place.
    """
    scores = torch.bmm(q, k.mT)
    adjust(scores)
    top = scores.detach().amax(-1, keepdim=True)  # results do not depend on it, so no gradient passes through it
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    return torch.bmm(weights, v) / total, total.log() + top


def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, adjust: Callable[[Tensor], None], lse: Tensor, delta: Tensor, d_out: Tensor
) -> tuple[Tensor, Tensor]:
    """The probabilities and the gradient of the scores, `[N, queries, keys]`.

    Args:
        lse: of the whole softmax that these entries are part of, `[N, queries, 1]`.
        delta: `sum(d_out * out) - d_lse`, likewise.
    """
    scores = torch.bmm(q, k.mT)
    adjust(scores)
    weights = scores.sub_(lse).exp_()
    return weights, torch.bmm(d_out, v.mT).sub_(delta).mul_(weights)


def is_followed() -> bool:
    """Whether autograd or torch.func follows what is computed: no buffer may be overwritten then."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


@contextmanager
def followed() -> Iterator[None]:
    """Have autograd follow what is computed, also inside a `torch.library` op, which is dispatched below it."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in (DispatchKey.AutogradFunctionality, DispatchKey.AutogradOther, DispatchKey.AutogradNestedTensor):
        exclude = exclude - DispatchKeySet(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude), torch.enable_grad():
        yield
