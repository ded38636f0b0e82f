"""The boundary to PyTorch: one opaque `torch.library` op with its backward, so that compile and export see a leaf.

The kernels of a backend are chosen by name inside; levels, cells and cut edges follow from the sizes of the call, so
that nothing of them reaches a compiler's guards.
"""

import logging
from importlib import import_module

import torch
from torch import Tensor

from ..geometry import count_pairs
from .call import Call, Options

# Schemas in words of their own: before torch 2.7, none could be inferred from `list[Tensor]`.
INPUTS = "Tensor q, Tensor k, Tensor v, Tensor[] kernels, Tensor? key_mask"
SETTINGS = "SymInt cell_size, SymInt rank, str variant, bool causal, bool count_bias, float scale, str backend"
# Module with forward and backward of each backend behind the op; imported when first used.
BACKENDS = {"torch": ".torch_backend", "triton": ".triton_backend"}


def _run(step: str, q: Tensor, k: Tensor, v: Tensor, kernels, key_mask, settings, *others):
    """Run a backend's `forward` or `backward`, without autograd and with autocast's hands off."""
    *settings, backend = settings
    call = Call(q, k, v, kernels or [], key_mask, Options(*settings))  # AOTInductor hands an empty list over as None
    module = import_module(BACKENDS["torch" if call.dense else backend], __package__)  # the kernels need a coarse level
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        return getattr(module, step)(call, *others)


@torch.library.custom_op(
    "fma2d::multipole_attention", mutates_args=(), schema=f"({INPUTS}, {SETTINGS}) -> (Tensor, Tensor)"
)
def multipole_attention(q, k, v, kernels, key_mask, *settings):
    """Attention's result and its log-sum-exp."""
    return _run("forward", q, k, v, kernels, key_mask, settings)


@multipole_attention.register_fake
def _(q, k, v, kernels, key_mask, *settings):
    lse = q.new_empty(q.shape[0], *q.shape[2:-1], q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32))
    return channels_last_like(q), lse.movedim(-1, 1)


@torch.library.custom_op(
    "fma2d::multipole_attention_backward",
    mutates_args=(),
    schema=f"({INPUTS}, Tensor out, Tensor lse, Tensor d_out, Tensor? d_lse, {SETTINGS}) -> Tensor[]",
)
def multipole_attention_backward(q, k, v, kernels, key_mask, out, lse, d_out, d_lse, *settings):
    """Gradients of q, k, v, then of the kernels; `d_lse` is None where nobody asked for the lse."""
    d_tokens, d_kernels = _run("backward", q, k, v, kernels, key_mask, settings, out, lse, d_out, d_lse)
    return [*d_tokens, *d_kernels]


@multipole_attention_backward.register_fake
def _(q, k, v, kernels, key_mask, out, lse, d_out, d_lse, *settings):
    return [
        *map(channels_last_like, (q, k, v)),
        *(torch.empty_like(w, memory_format=torch.contiguous_format) for w in kernels or []),
    ]


def channels_last_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor like x `[B, heads, *grid, head_dim]`, in memory `[B, *grid, heads, head_dim]`."""
    return x.new_empty(x.shape[0], *x.shape[2:-1], x.shape[1], x.shape[-1], dtype=dtype).movedim(-2, 1)


def _setup(ctx, inputs, output):
    q, k, v, kernels, key_mask, *settings = inputs
    ctx.save_for_backward(q, k, v, key_mask, *output, *kernels)
    ctx.settings = settings
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out, d_lse):
    q, k, v, key_mask, out, lse, *kernels = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out
    grads = multipole_attention_backward(q, k, v, kernels, key_mask, out, lse, d_out, d_lse, *ctx.settings)
    return *grads[:3], grads[3:], *[None] * (1 + len(ctx.settings))


multipole_attention.register_autograd(_backward, setup_context=_setup)


def _setup_backward(ctx, inputs, output):
    q, k, v, kernels, key_mask, _, _, d_out, d_lse, *settings = inputs
    ctx.save_for_backward(q, k, v, key_mask, d_out, d_lse, *kernels)
    ctx.settings = settings


def _double_backward(ctx, grads):
    """Differentiate the torch backend's forward twice; `out` and `lse` are functions of the other inputs here."""
    from . import torch_backend

    q, k, v, key_mask, d_out, d_lse, *kernels = ctx.saved_tensors
    with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
        inputs = [x.detach().requires_grad_() for x in (q, k, v, *kernels)]
        cotangents = [x.detach().requires_grad_() for x in (d_out, d_lse) if x is not None]
        outputs = torch_backend.forward(Call(*inputs[:3], inputs[3:], key_mask, Options(*ctx.settings[:-1])))
        outputs = outputs[: len(cotangents)]
        first = torch.autograd.grad(outputs, inputs, cotangents, create_graph=True, materialize_grads=True)
        second = torch.autograd.grad(first, [*inputs, *cotangents], grads, materialize_grads=True)
    d_inputs, d_cotangents = list(second[: len(inputs)]), [*second[len(inputs) :], None][:2]
    return *d_inputs[:3], d_inputs[3:], None, None, None, *d_cotangents, *[None] * len(ctx.settings)


multipole_attention_backward.register_autograd(_double_backward, setup_context=_setup_backward)


def _flops(q, k, v, kernels, key_mask, cell_size, rank, variant, causal, *_, out_shape=None, **__) -> int:
    """Of the scores and their use, one product each; the aggregation is not counted, and no score is masked."""
    batch, heads, *grid, head_dim = q
    pairs = count_pairs(tuple(grid), cell_size, rank, linear=variant == "linear", causal=causal)
    return 4 * batch * heads * head_dim * sum(pairs)


def _backward_flops(q, k, v, kernels, key_mask, out, lse, d_out, d_lse, *settings, out_shape=None, **_) -> int:
    """The scores again and four gradients."""
    return _flops(q, k, v, kernels, key_mask, *settings) * 5 // 2


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
