"""The boundary to PyTorch: one opaque `torch.library` op with its backward, so that compile and export see a leaf.

Kernels cross it as a flat list, level by level and axis by axis, first the key, then the value, then the query
kernels; `levels` holds the number of levels of each, `[key, value]` or, for the linear variant, `[key, value, query]`.
The kernels of a backend are chosen by name inside; levels, cells and cut edges follow from the sizes of the call, so
that nothing of them reaches a compiler's guards.
"""

import logging
from importlib import import_module

import torch
from torch import Tensor

from ..geometry import count_pairs
from .options import Call, Options

# Schemas in words of their own: before torch 2.7, none could be inferred from `list[Tensor]`.
INPUTS = "Tensor q, Tensor k, Tensor v, Tensor[] kernels, SymInt[] levels, Tensor? key_mask"
SETTINGS = "SymInt cell_size, SymInt rank, bool causal, bool count_bias, float scale, str backend"
# Module with forward and backward of each backend behind the op; imported when first used.
BACKENDS = {"torch": ".blocked", "triton": ".triton_backend"}


def flatten_kernels(key_kernels, value_kernels, query_kernels) -> tuple[list[Tensor], list[int]]:
    """Kernels as the op takes them: the flat list and the number of levels of each."""
    groups = [g for g in (key_kernels, value_kernels, query_kernels) if g is not None]
    return [w for group in groups for level in group for w in level], [len(group) for group in groups]


def _unflatten_kernels(flat: list[Tensor], levels: list[int], ndim: int):
    rest = iter(flat)
    groups = [[[next(rest) for _ in range(ndim)] for _ in range(count)] for count in levels]
    return (*groups, None) if len(levels) == 2 else tuple(groups)


def _run(step: str, q: Tensor, k: Tensor, v: Tensor, kernels, levels, key_mask, settings, *saved: Tensor):
    """Run a backend's `forward` or `backward`, without autograd and with autocast's hands off."""
    *settings, backend = settings
    module, options = import_module(BACKENDS[backend], __package__), Options(*settings)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        groups = _unflatten_kernels(kernels, levels, q.dim() - 3)
        return getattr(module, step)(Call(q, k, v, *groups, key_mask, options), *saved)


@torch.library.custom_op(
    "fma2d::multipole_attention", mutates_args=(), schema=f"({INPUTS}, {SETTINGS}) -> (Tensor, Tensor)"
)
def multipole_attention(q, k, v, kernels, levels, key_mask, *settings):
    """Attention's result and its log-sum-exp."""
    return _run("forward", q, k, v, kernels, levels, key_mask, settings)


@multipole_attention.register_fake
def _(q, k, v, kernels, levels, key_mask, *settings):
    channels_last = (q.shape[0], *q.shape[2:-1], q.shape[1])
    out = q.new_empty(*channels_last, q.shape[-1]).movedim(-2, 1)
    return out, q.new_empty(channels_last, dtype=torch.promote_types(q.dtype, torch.float32)).movedim(-1, 1)


@torch.library.custom_op(
    "fma2d::multipole_attention_backward",
    mutates_args=(),
    schema=f"({INPUTS}, Tensor out, Tensor lse, Tensor d_out, Tensor d_lse, {SETTINGS}) -> Tensor[]",
)
def multipole_attention_backward(q, k, v, kernels, levels, key_mask, out, lse, d_out, d_lse, *settings):
    """Gradients of q, k, v, then of the flat kernels."""
    if q.shape[2:-1].numel() == 1:
        return [*_one_token_backward(q, k, v, key_mask, d_out, d_lse, settings[-2]), *map(torch.zeros_like, kernels)]
    d_tokens, d_kernels = _run("backward", q, k, v, kernels, levels, key_mask, settings, out, lse, d_out, d_lse)
    return [*d_tokens, *flatten_kernels(*d_kernels)[0]]


@multipole_attention_backward.register_fake
def _(q, k, v, kernels, levels, key_mask, out, lse, d_out, d_lse, *settings):
    return [*map(_new_gradient, (q, k, v)), *map(torch.empty_like, kernels)]


def _new_gradient(x: Tensor) -> Tensor:
    """An empty tensor for the gradient of `[B, heads, *grid, head_dim]`, channels last in memory as all of them are."""
    return x.new_empty(x.shape[0], *x.shape[2:-1], x.shape[1], x.shape[-1]).movedim(-2, 1)


def _one_token_backward(q, k, v, key_mask, d_out, d_lse, scale: float) -> list[Tensor]:
    """Gradients of q, k and v of a grid of one token, whose weight is 1 whatever its score.

    The backends' `d_out . v - delta` is rounded twice, and where it should vanish, what is left is all of the gradient.
    """
    d_score = scale * d_lse[..., None]
    grads = [d_score * k, d_score * q, d_out]
    if key_mask is not None:
        grads = [torch.where(key_mask[:, None, ..., None], d, 0) for d in grads]
    return [_new_gradient(x).copy_(d) for x, d in zip((q, k, v), grads, strict=True)]


def _setup(ctx, inputs, output):
    q, k, v, kernels, levels, key_mask, *settings = inputs
    ctx.save_for_backward(q, k, v, key_mask, *output, *kernels)
    ctx.levels, ctx.settings = levels, settings
    ctx.set_materialize_grads(True)


def _backward(ctx, d_out, d_lse):
    q, k, v, key_mask, out, lse, *kernels = ctx.saved_tensors
    grads = multipole_attention_backward(q, k, v, kernels, ctx.levels, key_mask, out, lse, d_out, d_lse, *ctx.settings)
    return *grads[:3], grads[3:], None, *[None] * (1 + len(ctx.settings))


multipole_attention.register_autograd(_backward, setup_context=_setup)


def _setup_backward(ctx, inputs, output):
    q, k, v, kernels, levels, key_mask, _, _, d_out, d_lse, *settings = inputs
    ctx.save_for_backward(q, k, v, key_mask, d_out, d_lse, *kernels)
    ctx.levels, ctx.settings = levels, settings


def _double_backward(ctx, grads):
    """Differentiate the torch backend's forward twice; `out` and `lse` are functions of the other inputs here."""
    from . import blocked

    q, k, v, key_mask, d_out, d_lse, *kernels = ctx.saved_tensors
    options = Options(*ctx.settings[:-1])
    with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
        inputs = [x.detach().requires_grad_() for x in (q, k, v, *kernels)]
        cotangents = [x.detach().requires_grad_() for x in (d_out, d_lse)]
        groups = _unflatten_kernels(inputs[3:], ctx.levels, q.dim() - 3)
        outputs = blocked.forward(Call(*inputs[:3], *groups, key_mask, options))
        first = torch.autograd.grad(outputs, inputs, cotangents, create_graph=True, materialize_grads=True)
        second = torch.autograd.grad(first, [*inputs, *cotangents], grads, materialize_grads=True)
    *d_inputs, dd_out, dd_lse = second
    nothing = [None] * len(ctx.settings)
    return *d_inputs[:3], d_inputs[3:], None, None, None, None, dd_out, dd_lse, *nothing


multipole_attention_backward.register_autograd(_double_backward, setup_context=_setup_backward)


def _flops(q, k, v, kernels, levels, key_mask, cell_size, rank, causal, *_, out_shape=None, **__) -> int:
    """Of the scores and their use, one product each; the aggregation is not counted, and no score is masked."""
    batch, heads, *grid, head_dim = q
    pairs = count_pairs(tuple(grid), cell_size, rank, linear=len(levels) == 3, causal=causal)
    return 4 * batch * heads * head_dim * sum(pairs)


def _backward_flops(q, k, v, kernels, levels, key_mask, out, lse, d_out, d_lse, *settings, out_shape=None, **_) -> int:
    """The scores again and four gradients."""
    return _flops(q, k, v, kernels, levels, key_mask, *settings) * 5 // 2


def _register_flops() -> None:
    # Where triton is missing the import would say so, which is no news here: nothing of it is needed.
    log = logging.getLogger("torch.utils.flop_counter")
    level = log.level
    log.setLevel(logging.ERROR)
    from torch.utils.flop_counter import register_flop_formula

    log.setLevel(level)
    register_flop_formula(torch.ops.fma2d.multipole_attention)(_flops)
    register_flop_formula(torch.ops.fma2d.multipole_attention_backward)(_backward_flops)


_register_flops()
