"""What the operator computes: the definition, and the properties that the specification promises."""

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import BACKENDS, DTYPES, KINDS, Call, assert_same, calls, cotangents, grids, random_call
from operator_cases import one_thread as one_thread
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from fma2d import num_levels, start_kernels
from fma2d.ops import dense as dense_path
from fma2d.ops import reference

on_both = pytest.mark.parametrize("backend", BACKENDS)
ranks = st.sampled_from((1, 2, 3, 4))
shares = st.sampled_from((None, 0.3, 0.8))  # of the tokens that exist
variants = st.sampled_from(
    ({}, {"causal": True}, {"levels": None, "variant": "linear"}, {"levels": 1, "variant": "linear"})
)
seeds = st.integers(0, 2**20)


def assert_equal_where(exists, results, expected, tolerance):
    """`(out, lse)` equal to `tolerance` where tokens exist; absent tokens give 0 and -inf."""
    (out, lse), exists = results, exists.expand(results[1].shape)
    for x, y in zip(results, expected, strict=True):
        assert_close(x[exists], y[exists], rtol=0, atol=tolerance)
    assert (out[~exists] == 0).all() and (lse[~exists] == -torch.inf).all()


def averaged(call, kind):
    """The kernels of a call at every level of its grid, those of one kind at their start value: a list, or None."""
    if call["kernels"] is None or not len(call["kernels"]):
        return None
    kernels = []
    for level in range(1, num_levels(call.grid, call["cell_size"]) + 1):
        side = call["cell_size"] * 2 ** (level - 1)
        sizes = (level, call["cell_size"], call["rank"], len(call.grid), 1, 1)
        # Levels beyond the last one use its bins as they are.
        w = call["kernels"][min(level, len(call["kernels"])) - 1]
        kernels.append(w.repeat_interleave(side // w.shape[-1], -1))
        kernels[-1][kind] = start_kernels(*sizes, bins=side, dtype=torch.float64)[0]
    return kernels


def dense(q, k, v, exists=None, causal=False):
    """`(out, lse)` of softmax attention to all existing tokens; q, k, v as `[B, heads, tokens, head_dim]`."""
    score = q @ k.mT * q.shape[-1] ** -0.5
    if exists is not None:
        score = score.masked_fill(~exists[..., None, :], -torch.inf)
    if causal:
        score = score.masked_fill(torch.ones_like(score).triu(1) > 0, -torch.inf)
    if exists is not None:  # what an absent query gives is not looked at, but its gradient would be NaN
        score = torch.where(exists[..., None], score, 0)
    return score.softmax(-1) @ v, score.logsumexp(-1)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(st.data())
def test_reference_is_the_definition(kind, data):
    """The anchor of all other tests: outputs, log-sum-exps and all gradients."""
    call = data.draw(calls((kind,)))
    call, d = call.to(torch.float64), cotangents(call)
    assert_same(call.results("reference", d), call.results("definition", d))


@on_both
@settings(max_examples=40)
@given(
    grid=st.sampled_from(((13, 21), (37,), (5, 6, 7), (9, 1))),
    cell_size=st.sampled_from((1, 2, 3)),
    rank=ranks,
    mask=shares,
    causal=st.booleans(),
    learned=st.booleans(),
    seed=seeds,
)
def test_exact_where_keys_are_equal_in_every_coarse_cell(backend, grid, cell_size, rank, mask, causal, learned, seed):
    causal = causal and len(grid) == 1
    call = random_call(grid, cell_size, rank, batch=2, levels=None, causal=causal, mask=mask, seed=seed)
    levels = num_levels(grid, cell_size)
    for axis, extent in enumerate(grid, 2):
        if levels:
            call["k"] = call["k"].index_select(axis, torch.arange(extent) // (cell_size * 2 ** (levels - 1)))
    if learned:
        sizes = (cell_size, rank, len(grid), 2, 1)
        call["kernels"] = [start_kernels(n, *sizes, dtype=torch.float64) for n in range(1, levels + 2)]
    q, k, v = (call[name].flatten(2, -2) for name in "qkv")
    out, lse = dense(q, k, v, call.exists.flatten(2), causal)
    assert_equal_where(call.exists, Call(call).run(backend), (out.view_as(call["q"]), lse.unflatten(2, grid)), 1e-13)


@on_both
@settings(max_examples=40)
@given(
    grid=grids(), variant=variants, mask=shares, scale=st.sampled_from((None, -0.3, 0)), seed=seeds, lse=st.booleans()
)
def test_without_coarse_levels_it_is_dense_attention(backend, grid, variant, mask, scale, seed, lse):
    """Results and gradients, with and without the lse, NaN where tokens are absent; kernels get zeros, never None."""
    grid, cell_size = grid[0], -(-max(grid[0]) // 2)
    variant = {} if len(grid) > 1 and "causal" in variant else variant
    call = random_call(grid, cell_size, 2, batch=2, mask=mask, scale=scale, seed=seed, **variant)
    exists = call.exists
    d = [x.masked_fill(~exists[..., None] if x.dim() > exists.dim() else ~exists, torch.nan) for x in cotangents(call)]
    call = call.map(lambda x: x.masked_fill(~exists[..., None], torch.nan), lambda w: w).to(torch.float64)
    q, k, v = (torch.where(exists[..., None], call[name], 0).flatten(2, -2) for name in "qkv")
    expected = dense(q if scale is None else q * scale * 3**0.5, k, v, exists.flatten(2), call["causal"])
    outputs = call.run(backend) if lse else (call.run_plain(backend),)
    for x, y in zip(outputs, expected, strict=False):
        y = y.view_as(x)
        there = exists.expand(x.shape[: exists.dim()])
        assert (x[~there] == (0 if x is outputs[0] else -torch.inf)).all()
        assert_close(x[there], y[there], rtol=0, atol=1e-13)
    pairs = [(y.view_as(x), c.nan_to_num()) for x, y, c in zip(outputs, expected, d, strict=False)]
    pairs = [(torch.where(exists[..., None] if y.dim() > exists.dim() else exists, y, 0), c) for y, c in pairs]
    tokens = [call[name] for name in "qkv"]
    wanted = torch.autograd.grad([y for y, _ in pairs], tokens, [c for _, c in pairs])
    strict = {} if backend == "torch" else {"materialize_grads": True, "allow_unused": True}
    found = torch.autograd.grad(outputs, call.leaves(), d[: len(outputs)], **strict)
    for x, y in zip(found, wanted, strict=False):
        assert_close(x, y, rtol=0, atol=1e-12)
    assert all((x == 0).all() for x in found[3:])


@pytest.mark.parametrize("backend", ("auto", "torch"))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("masked", (False, True))
def test_without_coarse_levels_torch_does_the_work(backend, causal, masked, monkeypatch):
    """One call of `scaled_dot_product_attention`, and its bits; with the lse, none."""
    calls = []

    def counted(*tensors, **options):
        calls.append(options)
        return scaled_dot_product_attention(*tensors, **options)

    monkeypatch.setattr(dense_path, "scaled_dot_product_attention", counted)
    mask = torch.arange(14) < 11 if masked else None
    call = random_call((14,), 7, 2, batch=2, causal=causal, mask=mask).map(torch.Tensor.float)
    out = call.run_plain(backend)
    (options,) = calls
    q, k, v = (call[name] for name in "qkv")
    expected = scaled_dot_product_attention(q, k, v, **options)
    assert torch.equal(out[:, :, :11], expected[:, :, :11])
    call.run(backend)
    assert len(calls) == 1


@on_both
@given(calls())
def test_value_one_gives_one(backend, call):
    """With fixed averaging of the values, whatever the queries and keys."""
    call = Call(call | {"v": torch.ones_like(call["v"])})
    call["kernels"] = averaged(call, 1)
    out, lse = call.run(backend)
    assert_equal_where(call.exists, (out, lse), (torch.ones_like(out), lse), 1e-13)


@on_both
@given(st.sampled_from((7, 24, 37)), st.sampled_from((1, 2, 3)), ranks, seeds)
def test_appended_tokens_change_nothing_earlier(backend, first, cell_size, rank, seed):
    call = random_call((61,), cell_size, rank, levels=3, causal=True, seed=seed)
    prefix = call.map(lambda x: x[:, :, :first], lambda w: w)
    for x, y in zip(prefix.run(backend), call.run(backend), strict=True):
        assert_close(x, y[:, :, :first], rtol=0, atol=1e-12)


@on_both
def test_causal_gradients_of_later_tokens_are_exactly_zero(backend):
    """Batch entry `i` asks for the gradients of out and lse of token `i` alone."""
    n = 23
    call = random_call((n,), 2, 3, causal=True)
    call = call.map(lambda x: x.repeat(n, 1, 1, 1).requires_grad_(), lambda w: w)
    out, lse = call.run(backend)
    own = torch.eye(n, dtype=torch.float64)[:, None].expand(lse.shape)
    later = torch.ones(n, n).triu(1)[:, None].expand(lse.shape) > 0
    for grad in torch.autograd.grad(
        (out, lse), [call[name] for name in "qkv"], (torch.randn_like(out) * own[..., None], own)
    ):
        assert (grad[later] == 0).all()
        assert (grad[~later] != 0).any()


@on_both
@given(st.data(), grids(), ranks, variants, st.booleans(), seeds)
def test_mask_of_a_leading_box_equals_the_crop(backend, data, grid, rank, variant, count_bias, seed):
    """Outputs and all gradients, NaN in what is masked; the crop may have fewer levels."""
    grid, cell_size = grid
    variant = {} if len(grid) > 1 and "causal" in variant else variant
    box = tuple(data.draw(st.sampled_from(range(1, n + 1)), label="extent") for n in grid)
    index = (slice(None), slice(None), *map(slice, box))
    mask = torch.zeros(grid, dtype=torch.bool)
    mask[index[2:]] = True
    call = random_call(grid, cell_size, rank, mask=mask, count_bias=count_bias, seed=seed, **variant)
    crop = Call(call | {"key_mask": None}).map(lambda x: x[index], lambda w: w).to(torch.float64)
    call = call.map(lambda x: torch.where(mask[..., None], x, torch.nan), lambda w: w).to(torch.float64)
    d = cotangents(call)
    results = call.results(backend, d)
    for name in "qkv":
        grad = results[f"gradient of {name}"].view_as(call[name])
        assert (grad[~mask.expand(grad.shape[:-1])] == 0).all()
        results[f"gradient of {name}"] = grad[index].flatten()
    assert_same(results, crop.results(backend, [x[index] for x in d]))


@on_both
@given(calls())
def test_what_is_masked_is_never_read(backend, call):
    """NaN in absent tokens and in their cotangents changes no bit; their gradients are 0."""
    absent = ~call.exists.expand(call["q"].shape[:-1])
    filled = [call.map(lambda x, f=f: x.masked_fill(absent[..., None], f), lambda w: w) for f in (torch.nan, 0)]
    d = cotangents(call)
    bad = [d[0].masked_fill(absent[..., None], torch.nan), d[1].masked_fill(absent, torch.nan)]
    poisoned, clean = filled[0].to(torch.float64).results(backend, bad), filled[1].to(torch.float64).results(backend, d)
    for name, x in poisoned.items():
        assert x.isfinite().all() and torch.equal(x, clean[name]), name
    for name in "qkv":
        assert (poisoned[f"gradient of {name}"].view_as(call[name])[absent] == 0).all()


@on_both
@pytest.mark.parametrize("shape", ((2, 7, 5), (1, 7, 5), (2, 1, 5), (2, 7, 1), (7, 5), (1, 5), (5,), (1,), ()), ids=str)
def test_masks_broadcast(backend, shape):
    mask = torch.rand(shape) < 0.6 if shape else torch.tensor(True)
    call = random_call((7, 5), 1, 2, batch=2, mask=mask)
    full = Call(call | {"key_mask": mask.expand(2, 7, 5).clone()})
    for x, y in zip(call.run(backend), full.run(backend), strict=True):
        assert torch.equal(x, y)


@on_both
@pytest.mark.parametrize("variant", ("linear", "loglinear"))
@pytest.mark.parametrize(
    "grid, cell_size, rank, order",
    [((7, 11), 1, 4, (1, 0)), ((12, 9), 2, 9, (1, 0)), ((13, 3), 1, 1, (1, 0)), ((4, 5, 6), 1, 8, (1, 2, 0))],
    ids=str,
)
def test_axes_can_be_swapped(backend, variant, grid, cell_size, rank, order):
    """Where all `p_a` are equal: axes, kernels and the index of the summary tokens are permuted alike."""
    call = random_call(grid, cell_size, rank, variant=variant, mask=0.7)
    axes, ndim = (0, 1, *(2 + a for a in order), -1), len(grid)
    parts = (round(rank ** (1 / ndim)),) * ndim

    def swap(w):
        w = w[:, list(order)].unflatten(2, parts)
        return w.permute(0, 1, *(2 + a for a in order), -3, -2, -1).flatten(2, 1 + ndim)

    swapped = call.map(lambda x: x.permute(axes), swap)
    swapped["key_mask"] = call["key_mask"].permute(axes[:1] + tuple(1 + a for a in order))
    out, lse = call.run(backend)
    assert_equal_where(swapped.exists, swapped.run(backend), (out.permute(axes), lse.permute(axes[:-1])), 1e-12)


@on_both
@given(calls(KINDS[:5], masks=False), seeds)
def test_batch_entries_and_heads_are_on_their_own(backend, call, seed):
    """NaN in one of them changes no bit of the others; each is what it is alone; gradients stay in it."""
    batch, heads = call["q"].shape[:2]
    b, h = seed % batch, seed // 2 % heads
    others = torch.ones(batch, heads, dtype=torch.bool)
    others[b, h] = False

    def poison(x):
        return x.masked_fill(~others.view(batch, heads, *(1,) * (x.dim() - 2)), torch.nan)

    alone = call.map(lambda x: x[b : b + 1, h : h + 1], lambda w: w[..., h : h + 1, :, :] if w.shape[-3] > 1 else w)
    call = call.to(torch.float64)
    results = call.run(backend)
    grads = torch.autograd.grad(
        results, [call[x] for x in "qkv"], [torch.where(poison(x).isnan(), 1.0, 0) for x in results]
    )
    poisoned = call.map(poison, lambda w: w).run(backend)
    assert poisoned[0][~others].isnan().all()
    for x, y in zip(results, poisoned, strict=True):
        assert torch.equal(x[others], y[others])
    for x, y in zip(results, alone.run(backend), strict=True):
        assert_close(x[b : b + 1, h : h + 1], y, rtol=1e-12, atol=1e-12)
    for grad in grads:
        assert (grad[others] == 0).all()


@on_both
@pytest.mark.parametrize("causal", (False, True))
def test_results_merge_by_log_sum_exp(backend, causal):
    """Tokens plus prefix tokens attended to apart, merged by lse: the softmax over both, gradients included."""
    call = random_call((9,), 5, 2, batch=2, causal=causal).to(torch.float64)
    prefix = [torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in "kv"]
    q, k, v = (call[name] for name in "qkv")
    (out, lse), (prefix_out, prefix_lse) = call.run(backend), dense(q, *prefix)
    total = torch.logaddexp(lse, prefix_lse)
    merged = out * (lse - total).exp()[..., None] + prefix_out * (prefix_lse - total).exp()[..., None]

    score = torch.cat([q @ k.mT, q @ prefix[0].mT], -1) * 3**-0.5
    if causal:
        score = score.masked_fill(torch.ones_like(score).triu(1).bool() & (torch.arange(13) < 9), -torch.inf)
    joint = score.softmax(-1) @ torch.cat([v, prefix[1]], 2)
    assert_close(merged, joint, rtol=0, atol=1e-13)
    d = torch.randn(joint.shape, dtype=torch.float64)
    for x, y in zip(*(torch.autograd.grad(o, [q, k, v, *prefix], d) for o in (merged, joint)), strict=True):
        assert_close(x, y, rtol=0, atol=1e-12)


@on_both
@settings(max_examples=20)
@given(calls())
def test_attention_map_is_the_gradient_of_the_values(backend, call):
    """Of the output by fixed-average values, found with one-hot values, one token a batch entry."""
    grid, exists = call.grid, call.exists[:1]
    mask = None if call["key_mask"] is None else exists[:, 0]
    call = Call(call | {"kernels": averaged(call, 1), "key_mask": mask}).map(lambda x: x[:1], lambda w: w)
    attention = reference.attention_map(call.op_call())
    attention = attention[0].flatten(-len(grid)).flatten(1, -2)  # [heads, query, key]
    assert (attention >= 0).all()
    rows = exists[0].flatten(1).expand(attention.shape[:2]).double()
    assert_close(attention.sum(-1), rows, rtol=0, atol=1e-13)

    n = prod(grid)
    hot = torch.eye(n, dtype=torch.float64).view(n, 1, *grid, 1)
    many = call.map(lambda x: x.expand(n, *x.shape[1:]), lambda w: w)
    out, _ = many.run(backend, v=hot.expand_as(many["q"]))
    assert_close(attention, out[..., 0].flatten(2).permute(1, 2, 0), rtol=0, atol=1e-12)


@on_both
@pytest.mark.parametrize("mask", (None, torch.ones(8, 8, dtype=torch.bool)), ids=("no mask", "all exist"))
def test_kernels_of_zeros_can_learn(backend, mask):
    """In a full cell the factor of the existence rule is 1, also for a kernel without weight: it keeps its gradient."""
    call = random_call((8, 8), 2, 2, levels=1, variant="linear", mask=mask)
    call["kernels"][0][:, 0].zero_()
    call, d = call.to(torch.float64), cotangents(call)
    results = call.results(backend, d)
    assert results["gradient of value kernels"].abs().max() > 1e-3
    assert_same(results, call.results("definition", d))


@on_both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "variant", ({}, {"causal": True}, {"variant": "linear"}), ids=("log-linear", "causal", "linear")
)
def test_large_scores_choose_one_token(backend, dtype, variant):
    """Scores of up to some 10 000, whose exponentials no dtype holds: the largest takes all, nothing is inf or NaN."""
    call = random_call((37,), 2, 3, batch=2, mask=0.6, **variant)
    call = call.map(lambda x: 60 * x, lambda w: w).to(dtype, torch.float32)
    d = cotangents(call)
    results, truth = call.results(backend, d), call.to(torch.float64).results("definition", d)
    assert truth["lse"].max() > 1000
    for name, x in results.items():
        assert x.isfinite().all(), name
    # Rounded scores, of which a rounding decides between two that are close: most tokens, not all.
    eps = 4 * torch.finfo(dtype).eps
    for name in ("out", "lse"):
        off = (results[name].double() - truth[name]).abs() / truth[name].abs().max()
        assert (off < max(eps, 1e-12)).double().mean() > 0.8, name
