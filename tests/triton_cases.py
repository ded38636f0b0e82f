"""Where the tests of the Triton kernels run, on a GPU or in Triton's interpreter (`conftest.py`) on the CPU, and calls
at the boundary that every backend has, held to the reference in float64."""

from types import SimpleNamespace

import pytest
import torch

from fma2d import why_not
from fma2d.ops import reference
from fma2d.ops.call import Call, Options

triton = pytest.importorskip("triton")

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

if INTERPRETED:
    # Two thirds of the interpreter's time, and nothing of ours: a look for overflow after every operation of integers,
    # and the language made ready anew at every call within a kernel. Once is enough.
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter._patch_lang(SimpleNamespace(__globals__=dict(tl=triton.language, core=triton.language.core)))
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)

on_a_device = [
    pytest.mark.skipif(
        why_not("triton", torch.empty(1, 1, 4, 8, device=DEVICE)) is not None,
        reason="needs a GPU or Triton's interpreter",
    ),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """For the module that imports it: what is allocated and not written holds NaN."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def poisoned(*args, allocate=allocate, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        monkeypatch.setattr(torch, name, poisoned)


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch):
    """The interpreter keeps bfloat16 as bit patterns and multiplies those: cast the factors up."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    create_dot = interpreter.InterpreterBuilder.create_dot

    def dot(self, a, b, d, *rest):
        if a.dtype == interpreter.tl.bfloat16:
            a, b = (self.cast_impl(x, interpreter.tl.float32) for x in (a, b))
        return create_dot(self, a, b, d, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def a_call(
    grid, cell_size, rank, variant="linear", *, learned=(1,), bins=None, batch=1, heads=1, head_dim=8,
    share_heads=False, dtype=torch.float32, mask=None, causal=False, count_bias=True, scale=None,
):  # fmt: skip
    """A random call, tokens as a fused projection leaves them.

    Args:
        learned: levels of each stack; `bins` of all, default `cell_size`.
        mask: the share of tokens that exist; the others hold NaN.
    """
    random = torch.Generator().manual_seed(1)
    tokens = torch.randn(batch, *grid, 3, heads, head_dim, generator=random).to(dtype).movedim(-3, 0).movedim(-2, 2)
    shape = (3 if variant == "linear" else 2, len(grid), rank, 1 if share_heads else heads, head_dim, bins or cell_size)
    stacks = [torch.rand(levels, *shape, generator=random) * 2 - 1 for levels in learned if levels]
    stacks = [(w + w.sign()) / 2 for w in stacks]  # none near 0: at cut edges they are divided by what is left
    exists = None if mask is None else torch.rand(batch, *grid, generator=random) < mask
    if exists is not None:
        tokens = torch.where(exists[:, None, ..., None], tokens, torch.nan)
    options = Options(cell_size, rank, variant, causal, count_bias, head_dim**-0.5 if scale is None else scale)
    return Call(*tokens, stacks, exists, options)


def moved(call, device=DEVICE, dtype=None, kernels=None):
    """The call on a device, in other dtypes of tokens and kernels, its tensors new leaves."""
    tokens = [x.detach().to(device, dtype or x.dtype) for x in call[:3]]
    stacks = [w.detach().to(device, kernels or w.dtype) for w in call.kernels]
    mask = None if call.key_mask is None else call.key_mask.to(device)
    return Call(*tokens, stacks, mask, call.options)


def cotangents(call):
    """Of out and lse."""
    random = torch.Generator().manual_seed(2)
    return [torch.randn(s, generator=random).to(call.q.dtype) for s in (call.q.shape, call.q.shape[:-1])]


def of_reference(call, d_out, d_lse):
    """Results of the reference in the dtype of q; d_lse None: nothing asks for the lse."""
    leaves = [x.detach().requires_grad_() for x in (*call[:3], *call.kernels)]
    out, lse = reference.attention(Call(*leaves[:3], leaves[3:], *call[4:]))
    outputs, given = [out], [d_out.to(out.dtype)]
    if d_lse is not None:
        seen = lse.isfinite()
        outputs.append(lse[seen])
        given.append(d_lse.to(lse.dtype)[seen])
    grads = torch.autograd.grad(outputs, leaves, given, allow_unused=True, materialize_grads=True)
    return named(out.detach(), lse.detach(), grads)


def of_backend(module, call, d_out, d_lse):
    """Results of a backend's two functions."""
    with torch.no_grad():
        out, lse = module.forward(call)
        if d_lse is not None:
            d_lse = torch.where(lse.isfinite(), d_lse.float(), 0)
        d_tokens, d_kernels = module.backward(call, out, lse, d_out, d_lse)
    assert [d.dtype for d in d_kernels] == [w.dtype for w in call.kernels]
    return named(out, lse, [*d_tokens, *d_kernels])


def named(out, lse, grads):
    names = ["dq", "dk", "dv", *(f"gradient of stack {i}" for i in range(len(grads) - 3))]
    return {"out": out, "lse": lse} | dict(zip(names, grads, strict=True))


def assert_within_rule(found, truth, plain, dtype):
    """`max|x - truth| <= 2 max|plain - truth| + 4 eps max|truth|` for every result."""
    for name, x in found.items():
        exact, simple = truth[name], plain[name].double()
        x = x.cpu().double()
        assert x.shape == exact.shape, name
        assert torch.equal(x.isneginf(), exact.isneginf()), name
        x, exact, simple = (t.masked_fill(t.isneginf(), 0) for t in (x, exact, simple))
        eps = torch.finfo(dtype).eps
        allowed = 2 * (simple - exact).abs().max() + 4 * eps * exact.abs().max()
        assert (x - exact).abs().max() <= allowed, (name, (x - exact).abs().max(), allowed)


def assert_equals_the_definition(module, asks_lse=True, **settings):
    """All results of a backend by the error rule."""
    call = a_call(**settings)
    d_out, d_lse = cotangents(call)
    given = (d_out, d_lse if asks_lse else None)
    truth = of_reference(moved(call, "cpu", torch.float64, torch.float64), *given)
    plain = of_reference(call, *given)
    found = of_backend(module, moved(call), *(x if x is None else x.to(DEVICE) for x in given))
    assert_within_rule(found, truth, plain, call.q.dtype)
