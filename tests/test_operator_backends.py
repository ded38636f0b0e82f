"""The backends against the reference: precision, gradients, dtypes, autocast."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import (
    BACKENDS,
    DTYPES,
    KINDS,
    WAYS,
    Call,
    assert_same,
    assert_within_rule,
    calls,
    cotangents,
    forced,
    nearly_weightless,
    random_call,
)
from operator_cases import one_thread as one_thread
from operator_definition import relations
from torch.nn.functional import pad

import fma2d
from fma2d import multipole_attention
from fma2d.kernels import log_counts
from fma2d.ops import torch_backend

on_both = pytest.mark.parametrize("backend", BACKENDS)


def cropped(x):
    """A view into a larger tensor of NaN."""
    large = pad(x, (1, 2) * x.dim(), value=torch.nan)
    return large[tuple(slice(1, 1 + n) for n in x.shape)]


# Differentiable; every one gives a tensor of the same shape, the expanded ones the same values along an axis.
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.movedim(1, -2).contiguous().movedim(-2, 1),
    "channels first": lambda x: x.mT.contiguous().mT,
    "cropped": cropped,
    "one batch": lambda x: x[:1].expand_as(x),
    "one head": lambda x: x[:, :1].expand_as(x),
    "one token": lambda x: x[:, :, :1].expand_as(x),
}
layouts = st.sampled_from(list(LAYOUTS))


def fused(call):
    """The call with q, k and v as a fused projection leaves them."""
    packed = torch.stack([call[name] for name in "qkv"], 1).movedim((1, 2), (-3, -2)).contiguous()
    return Call(call | {name: x.movedim(-2, 1) for name, x in zip("qkv", packed.unbind(-3), strict=True)})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(
    data=st.data(),
    dtype=st.sampled_from((torch.float64, torch.float16, torch.bfloat16)),
    kernel_dtype=st.sampled_from((torch.float32, *DTYPES)),
    layout=st.one_of(st.none(), st.fixed_dictionaries({name: layouts for name in "qkv"})),
    kernel_layout=st.sampled_from(("contiguous", "cropped", "channels first")),
    lse=st.booleans(),
    followed=st.booleans(),
)
def test_torch_backend_equals_reference(kind, way, data, dtype, kernel_dtype, layout, kernel_layout, lse, followed):
    """Out, lse and every gradient, by the error rule; in float64, where truth is no better, to rounding.

    With `followed`, gradients are autograd's own through the backend's forward, as in a second derivative.
    """

    def arrange(call):
        call = call.map(lambda x: x, LAYOUTS[kernel_layout])
        return fused(call) if layout is None else Call(call | {n: LAYOUTS[layout[n]](call[n]) for n in "qkv"})

    call = data.draw(calls((kind,))).to(dtype, kernel_dtype)
    d = [x.to(dtype) for x in cotangents(call)]
    d[1] = d[1] if lse else None
    truth = call.to(torch.float64).results("reference", d, arrange)
    with forced(way):
        x = call.results("followed" if followed else "torch", d, arrange)
    if dtype == kernel_dtype == torch.float64:
        assert_same(x, truth)
    elif dtype == torch.float64:
        assert_same(*({name: y for name, y in results.items() if "kernels" not in name} for results in (x, truth)))
        kernels = [{name: y for name, y in results.items() if "kernels" in name} for results in (x, truth, truth)]
        if kernels[0]:
            assert_within_rule(*kernels, kernel_dtype)
    else:
        assert_within_rule(x, truth, call.results("definition", d, arrange), dtype, kernel_dtype)


@pytest.mark.parametrize("variant", ("linear", "loglinear"))
def test_a_fused_projection_is_aggregated_as_one_tensor(variant):
    """Forward and backward; tensors on their own are aggregated one by one."""
    call, found = random_call((9, 7), 1, 2, batch=2, variant=variant).to(torch.float64), []

    class Noted(torch_backend.Aggregation):
        def __init__(self, call, tokens, kinds, *rest):
            found.append(kinds)
            super().__init__(call, tokens, kinds, *rest)

    with patch.object(torch_backend, "Aggregation", Noted):
        for arrange in (fused, lambda call: call):
            call.results("torch", cotangents(call), arrange)
    one = [2, 0, 1] if variant == "linear" else [0, 1]
    assert found == [one] * 2 + [[kind] for kind in one] * 2


@pytest.mark.parametrize("variant", ("linear", "loglinear"))
def test_kernels_are_a_list_over_levels_or_one_tensor(variant):
    """The same bits, gradients included, and for a tuple too; an empty list is None."""
    call = random_call((19, 11), 2, 2, levels=3, stacked=True, variant=variant).to(torch.float64)
    outputs = [call.run("torch", kernels=form(call["kernels"])) for form in (lambda w: w, list, tuple)]
    grads = [torch.autograd.grad(x, call.leaves(), cotangents(call)) for x in outputs]
    for x in zip(*outputs, strict=True):
        assert all(torch.equal(y, x[0]) for y in x)
    for x in zip(*grads, strict=True):
        assert all(torch.equal(y, x[0]) for y in x)
    start = [call.run("torch", kernels=w)[0] for w in (None, [], (), call["kernels"][:0])]
    assert all(torch.equal(x, start[0]) for x in start)
    assert not torch.allclose(start[0], outputs[0][0])


SINGLE = {
    "1D": random_call((131,), 4, 3, batch=2, head_dim=8),
    "causal": random_call((131,), 4, 2, batch=2, head_dim=8, levels=3, causal=True),
    "1D linear": random_call((131,), 4, 3, batch=2, head_dim=8, variant="linear", mask=0.8),
    "2D": random_call((19, 23), 2, 4, batch=2, head_dim=8, mask=0.8),
    "2D linear": random_call((19, 23), 2, 4, batch=2, head_dim=8, levels=1, variant="linear"),
    "3D": random_call((5, 6, 7), 1, 2, batch=2, head_dim=8),
    "3D linear": random_call((5, 6, 7), 1, 4, batch=2, head_dim=8, variant="linear"),
}


@pytest.mark.parametrize("way", ("as it is", "windows", "rows"))
@pytest.mark.parametrize("case", SINGLE)
def test_torch_backend_keeps_the_error_rule_in_float32(case, way):
    call, d = SINGLE[case].to(torch.float32), [x.float() for x in cotangents(SINGLE[case])]
    truth = call.to(torch.float64).results("reference", d)
    with forced(way):
        results = call.results("torch", d)
    assert_within_rule(results, truth, call.results("definition", d), torch.float32)


def miscount(*arguments):
    """The logarithm of one token more than there is."""
    return log_counts(*arguments).exp().add(1).log()


def flip_one_weight(w):
    """One of a level's query, or else value, kernels with the sign of its largest weight turned."""
    w = w.clone()
    kernel = w[-1, 0, 0, 0, 0]
    kernel[kernel.abs().argmax()] *= -1
    return w


def forget_a_cell(grid, *rest):
    """The cover without the first far cell that each token sees."""
    near, far = relations(grid, *rest)
    far = {level: seen.clone() for level, seen in far.items()}
    for token in range(len(near)):
        seen = next((seen[token] for seen in far.values() if seen[token].any()), None)
        if seen is not None:
            seen[seen.int().argmax()] = False
    return near, far


FAULTS = {
    "scale off by 1 %": lambda call: call.run("torch", scale=1.01 * call["q"].shape[-1] ** -0.5),
    "count off by one token": patch("fma2d.ops.torch_backend.log_counts", miscount),
    "a far cell left out": patch("operator_definition.relations", forget_a_cell),
    "sign of one weight of one kernel": lambda call: call.map(lambda x: x, flip_one_weight).run("torch"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("case", SINGLE)
def test_the_error_rule_finds_wrong_formulas(case, fault):
    """Small faults, by their outputs alone: the twin of the test above."""
    call = SINGLE[case].map(torch.Tensor.float)
    truth, plain = call.map(torch.Tensor.double).results("reference"), call.results("definition")
    fault = FAULTS[fault]
    if callable(fault) and not hasattr(fault, "__enter__"):
        out, lse = fault(call)
        exists = call.exists.expand(lse.shape)
        results = {"out": out[exists].flatten(), "lse": lse[exists]}
    else:
        with fault:
            results = call.results("definition" if fault.attribute == "relations" else "torch")
    with pytest.raises(AssertionError, match="allowed"):
        assert_within_rule(results, truth, plain, torch.float32)


@on_both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_of_the_results(backend, dtype):
    """Out as q, lse in float32 or wider, gradients as their tensors; and without lse a plain tensor."""
    call = random_call((9, 7), 2, 2, variant="linear")
    for kernel_dtype in DTYPES:
        leaves = call.to(dtype, kernel_dtype)
        out, lse = leaves.run(backend)
        assert out.dtype == dtype and out.shape == call["q"].shape
        assert lse.dtype == torch.promote_types(dtype, torch.float32) and lse.shape == call["q"].shape[:-1]
        grads = torch.autograd.grad(out.sum() + lse.sum(), leaves.leaves())
        assert [g.dtype for g in grads] == [x.dtype for x in leaves.leaves()]
    assert torch.equal(multipole_attention(**leaves, backend=backend), out)


def test_auto_is_the_torch_backend_on_cpu():
    call = random_call((9, 7), 1, 2).to(torch.float32)
    for x, y in zip(call.run("auto"), call.run("torch"), strict=True):
        assert torch.equal(x, y)


def test_torch_backend_repeats_every_bit():
    call = random_call((19, 17), 2, 4, batch=2, variant="linear", mask=0.7).to(torch.float32)
    first, second = (call.results("torch", cotangents(call)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@on_both
@pytest.mark.parametrize("cell_size", [2, 8])
def test_empty_batch(backend, cell_size):
    """Of large cells, the torch backend cuts slabs: there it failed."""
    call = random_call((29, 7), cell_size, 2, variant="linear").map(lambda x: x[:0], lambda w: w).to(torch.float64)
    out, lse = call.run(backend)
    assert out.shape == call["q"].shape and lse.shape == out.shape[:-1]
    grads = torch.autograd.grad((out, lse), call.leaves(), (out.detach(), lse.detach()))
    assert all((g == 0).all() and g.shape == x.shape for g, x in zip(grads, call.leaves(), strict=True))


@on_both
@pytest.mark.parametrize("masked", [False, True])
def test_cells_left_with_next_to_no_weight(backend, masked):
    """A summary that stands for no token made inf, and the whole result NaN."""
    call = nearly_weightless(masked)
    truth = call.to(torch.float64).results("reference", cotangents(call))
    results = call.results(backend, cotangents(call))
    assert all(x.isfinite().all() for x in results.values())
    for name in ("out", "lse", "gradient of q", "gradient of k", "gradient of v"):
        assert torch.allclose(results[name].double(), truth[name], rtol=1e-5, atol=1e-5), name


SMALL = {
    "1D": random_call((7,), 1, 2, heads=1, head_dim=2),
    "causal": random_call((7,), 1, 2, heads=1, head_dim=2, levels=3, causal=True),
    "1D linear": random_call((7,), 1, 3, heads=1, head_dim=2, variant="linear", mask=torch.arange(7) != 2),
    "2D": random_call((2, 5), 1, 2, heads=2, head_dim=1, mask=torch.arange(5) != 1),
    "2D linear": random_call((5, 3), 1, 2, heads=1, head_dim=2, levels=1, variant="linear", count_bias=False),
    "3D": random_call((3, 1, 2), 1, 4, heads=1, head_dim=1, levels=1, scale=0.6),
    "no level": random_call((3, 2), 2, 2, heads=1, head_dim=2, levels=1, mask=torch.arange(6).view(3, 2) != 4),
}


def function_of_leaves(call, backend):
    """The call as a function of its leaves, and the leaves; weights of 0 replaced, for there is a kink."""
    call = call.map(lambda x: x, lambda w: torch.where(w == 0, 0.6, w)).to(torch.float64)

    def function(*leaves):
        out, lse = call.with_leaves(leaves).run(backend)
        return out, lse[call.exists.expand(lse.shape)]

    return function, call.leaves()


@on_both
@pytest.mark.parametrize("case", SMALL)
def test_gradcheck(backend, case):
    """Out and lse, together and either alone."""
    assert torch.autograd.gradcheck(*function_of_leaves(SMALL[case], backend))


@pytest.mark.parametrize("way", ("as it is", "windows in many tiles"))
@pytest.mark.parametrize("case", SMALL)
def test_gradgradcheck(case, way):
    with forced(way):
        assert torch.autograd.gradgradcheck(*function_of_leaves(SMALL[case], "torch"), fast_mode=True)


@on_both
@pytest.mark.parametrize("stacked", (False, True), ids=("list", "tensor"))
@pytest.mark.parametrize("lse", (False, True), ids=("out", "out and lse"))
@pytest.mark.parametrize("cell_size", (1, 5), ids=("levels", "no level"))
@pytest.mark.parametrize("variant", ("linear", "loglinear"))
def test_kernels_of_unused_levels_get_gradients_of_zero(backend, variant, cell_size, lse, stacked):
    """Never None, so that DistributedDataParallel finds every parameter used."""
    call = random_call((9, 7), cell_size, 2, levels=5, variant=variant, stacked=stacked).to(torch.float32)
    (sum(x.sum() for x in call.run(backend)) if lse else call.run_plain(backend).sum()).backward()
    kernels = call["kernels"]
    grads = kernels.grad if stacked else [w.grad for w in kernels]
    used = fma2d.num_levels((9, 7), cell_size)
    for level, grad in enumerate(grads, 1):
        assert grad is not None and grad.isfinite().all(), f"level {level}"
        for kind, own in enumerate(grad):
            assert (own != 0).any() == (level <= used), f"level {level}, kind {kind}"


@on_both
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_gradients_of_half_precision_kernels_are_summed_in_float32(backend, dtype):
    """Over the levels that share a kernel too: the gradient is that of the kernel in float32, rounded once."""
    call = random_call((67,), 1, 2, batch=2, levels=1, variant="linear")
    half = call.to(torch.float32, dtype)
    single = half.map(lambda x: x, lambda w: w.detach().float().requires_grad_())
    d = [x.float() for x in cotangents(call)]
    grads = [torch.autograd.grad(c.run(backend), c.leaves()[3:], d) for c in (half, single)]
    for x, y in zip(*grads, strict=True):
        assert x.dtype == dtype and torch.equal(x, y.to(dtype))


@on_both
def test_one_argument_alone_can_need_a_gradient(backend):
    full = random_call((9, 7), 2, 2, variant="linear").to(torch.float64)
    expected = torch.autograd.grad(full.run(backend)[0].square().sum(), full.leaves())
    for i, grad in enumerate(expected):
        leaves = [x.detach() for x in full.leaves()]
        leaves[i].requires_grad_()
        out, _ = full.with_leaves(leaves).run(backend)
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), leaves[i])[0], grad, rtol=0, atol=1e-13)


@on_both
def test_autocast_casts_tokens_and_not_kernels(backend):
    call = random_call((9, 7), 2, 2, batch=2, variant="linear", mask=0.8)
    single = call.to(torch.float32)
    half = single.map(lambda x: x.to(torch.bfloat16), lambda w: w)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = single.run(backend)
    expected = half.run(backend)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    d = torch.randn(out.shape).to(out.dtype)
    for x, y in zip(*(torch.autograd.grad(o, single.leaves(), d) for o in (out, expected[0])), strict=True):
        assert x.dtype == torch.float32 and torch.equal(x, y)


@on_both
def test_autocast_leaves_float64_alone(backend):
    call = random_call((9, 7), 2, 2, variant="linear")
    expected = call.run(backend)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = call.run(backend)
    assert out.dtype == lse.dtype == torch.float64
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
