"""Where a grid has no coarse levels the operator is dense attention: `scaled_dot_product_attention`."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .call import Call


def attention(call: Call) -> Tensor:
    """Out `[B, heads, *grid, head_dim]`, by torch's own kernels and derivatives."""
    options, mask = call.options, call.key_mask
    q, k, v = (x.flatten(2, -2) for x in call[:3])
    if mask is None:
        out = scaled_dot_product_attention(q, k, v, is_causal=options.causal, scale=options.scale)
    else:
        exists = mask.flatten(1)[:, None, :, None]
        q, k, v = (torch.where(exists, x, 0) for x in (q, k, v))  # they may hold NaN
        attended = exists.mT
        if options.causal:
            attended = attended & torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
        # A query that has nothing to attend to is given everything: its result is dropped.
        attended = attended | ~attended.any(-1, keepdim=True)
        out = torch.where(exists, scaled_dot_product_attention(q, k, v, attn_mask=attended, scale=options.scale), 0)
    learned = [w for w in call.kernels if w.requires_grad] if torch.is_grad_enabled() else []
    return (_Unused.apply(out, *learned) if learned else out).unflatten(2, call.grid)


class _Unused(torch.autograd.Function):
    """Hand `out` on, and give kernels that played no part a gradient of zero, not None, as DDP needs it."""

    @staticmethod
    def forward(ctx, out: Tensor, *kernels: Tensor) -> Tensor:
        ctx.save_for_backward(*kernels)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, d_out: Tensor):
        return d_out, *map(torch.zeros_like, ctx.saved_tensors)
