"""A short convolution at the input of a text model, and what generation keeps for it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TokenConvolution(nn.Module):
    """Adds to each token a sum over its neighbours, a weight for each channel and place: `[B, N, dim]` to the same.

    Who its neighbours are, a token then knows before any attention: in a key, too, which can so be found by what comes
    before it. Primer (So et al., arXiv:2109.08668) has such convolutions behind the projections of every layer; one at
    the input serves all layers here, and generation has to keep no more than `reach` tokens for it.

    Args:
        dim: channels.
        reach: neighbours on the left, and unless `causal` as many on the right.
    """

    def __init__(self, dim: int, reach: int, causal: bool):
        super().__init__()
        self.reach, self.sides = reach, (reach, 0 if causal else reach)
        self.conv = nn.Conv1d(dim, dim, 1 + sum(self.sides), groups=dim, bias=False)

    def forward(self, x: Tensor, key_mask: Tensor | None = None, cache: "RecentTokens | None" = None) -> Tensor:
        """x `[B, N, dim]`; `key_mask` bool `[B, N]`, True where a token exists; `cache` (causal): what came before."""
        if key_mask is not None:
            x = torch.where(key_mask[..., None], x, 0)
        near = F.pad(x, (0, 0, *self.sides)) if cache is None else cache.extend(x, key_mask)
        return x + self.conv(near.mT).mT

    def new_cache(self) -> "RecentTokens":
        return RecentTokens(self.reach)


class RecentTokens:
    """The last `count` tokens of each row, zeros where there were fewer."""

    def __init__(self, count: int):
        self.count = count
        self.tokens: Tensor | None = None

    @torch.no_grad()
    def extend(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        """x `[B, N, dim]` behind the tokens before it: `[B, count + N, dim]`; absent tokens of x are not kept."""
        if self.tokens is None:
            self.tokens = x.new_zeros(x.shape[0], self.count, x.shape[2])
        joined = torch.cat((self.tokens, x), 1)
        if key_mask is None:
            self.tokens = joined[:, x.shape[1] :]
        else:
            last = key_mask.sum(1, keepdim=True) + torch.arange(self.count, device=x.device)
            self.tokens = joined.gather(1, last[..., None].expand(-1, -1, x.shape[2]))
        return joined
