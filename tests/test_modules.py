"""Modules around the operator, and what loading a state dict does to learned kernels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from fma2d import FMA1d, FMA2d, start_kernels
from fma2d.geometry import count_pairs, tiling
from fma2d.kernels import resample_bins, share_parts


def perturb(module):
    """Move the kernels off their start value, so that copying them is told from starting anew."""
    torch.nn.init.normal_(module.kernels, 1.0, 0.3)
    return module


@pytest.mark.parametrize("variant", ["linear", "loglinear"])
@pytest.mark.parametrize("aggregation", ["learned", "mean"])
@pytest.mark.parametrize("share_heads", [False, True])
def test_fma2d_runs_on_any_grid_and_every_parameter_gets_a_gradient(variant, aggregation, share_heads):
    module = FMA2d(
        16, 2, cell_size=4, rank=4, levels=2, variant=variant, aggregation=aggregation, share_heads=share_heads
    )
    for grid in [(1, 1), (5, 3), (1, 37), (40, 17)]:
        x = torch.randn(2, *grid, 16)
        out = module(x)
        assert out.shape == x.shape and out.isfinite().all()
        module.zero_grad()
        out.square().sum().backward()
        assert all(p.grad is not None for p in module.parameters())
    heads = 1 if share_heads else 2
    kinds = 3 if variant == "linear" else 2
    expected = (2, kinds, 2, 4, heads, 8, 4) if aggregation == "learned" else None
    assert (module.kernels if expected is None else tuple(module.kernels.shape)) == expected


def test_a_new_module_equals_fixed_averaging():
    """Learned kernels start as the sub-cell mean, in every level and variant."""
    x = torch.randn(1, 45, 50, 16)
    for variant in ("linear", "loglinear"):
        learned = FMA2d(16, 2, cell_size=4, rank=2, levels=2, variant=variant)
        mean = FMA2d(16, 2, cell_size=4, rank=2, levels=2, variant=variant, aggregation="mean")
        mean.load_state_dict(learned.state_dict())
        assert torch.allclose(learned(x), mean(x), atol=1e-6)


def test_fma1d_is_causal_and_honours_its_mask():
    module = perturb(FMA1d(16, 2, cell_size=4, rank=2, levels=3, causal=True))
    x = torch.randn(2, 61, 16)
    assert torch.allclose(module(x)[:, :40], module(x[:, :40]), atol=1e-6)
    both = perturb(FMA1d(16, 2, cell_size=4, rank=2, levels=3))
    mask = torch.arange(61) < 40
    assert torch.allclose(both(x, key_mask=mask)[:, :40], both(x[:, :40]), atol=1e-6)


@pytest.mark.parametrize(
    "settings, word",
    [
        (dict(num_heads=3), "num_heads"),
        (dict(cell_size=0), "cell_size"),
        (dict(rank=0), "rank"),
        (dict(rank=9), "rank"),
        (dict(levels=-1), "levels"),
        (dict(backend="cuda"), "backend"),
        (dict(variant="quadratic"), "variant"),
        (dict(aggregation="max"), "aggregation"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, word):
    with pytest.raises(ValueError, match=word):
        FMA2d(16, **{"num_heads": 2, "levels": 1, "cell_size": 8, "rank": 4, **settings})
    with pytest.raises(TypeError, match="levels"):
        FMA2d(16, 2, levels=True)
    with pytest.raises(TypeError):
        FMA2d(16, 2, levels=1, window_size=7)


def test_causal_linear_and_wrong_inputs_are_refused():
    with pytest.raises(ValueError, match="causal"):
        FMA1d(16, 2, levels=1, causal=True, variant="linear")
    module = FMA2d(16, 2, levels=1)
    for shape in [(2, 5, 16), (2, 16, 5, 5), (2, 3, 5, 5, 16)]:
        with pytest.raises(ValueError, match="x must have"):
            module(torch.randn(shape))


@given(old=st.integers(1, 16), new=st.integers(1, 16), old_rank=st.integers(1, 12), new_rank=st.integers(1, 12))
def test_resampling_keeps_sums_and_shares_are_means(old, new, old_rank, new_rank):
    assert torch.allclose(resample_bins(old, new).sum(1), torch.ones(new, dtype=torch.float64))
    assert torch.allclose(resample_bins(old, old), torch.eye(old, dtype=torch.float64))
    for ndim in (1, 2, 3):
        share = share_parts(old_rank, new_rank, ndim)
        assert share.shape == (new_rank, old_rank)
        assert torch.allclose(share.sum(1), torch.ones(new_rank, dtype=torch.float64))


def load(module, source):
    """Load strictly, as every road does, and return the notes."""
    result = module.load_state_dict(source.state_dict(), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    return module.load_notes


def test_same_settings_copy_and_say_nothing():
    source, module = perturb(FMA2d(16, 2, levels=2)), FMA2d(16, 2, levels=2)
    assert load(module, source) == {}
    assert torch.equal(module.kernels, source.kernels)


def test_levels_take_the_stored_level_of_the_nearest_side():
    source = perturb(FMA2d(16, 2, cell_size=8, levels=3))
    more = FMA2d(16, 2, cell_size=8, levels=5)
    assert "adapted" in load(more, source)
    assert torch.equal(more.kernels, source.kernels[[0, 1, 2, 2, 2]])
    fewer = FMA2d(16, 2, cell_size=8, levels=1)
    assert "levels 2, 3" in load(fewer, source)["dropped"]
    assert torch.equal(fewer.kernels, source.kernels[:1])
    # Sides 4, 8, 16 from sides 8, 16, 32; bins are halved, densities averaged over pairs.
    smaller = FMA2d(16, 2, cell_size=4, levels=3)
    load(smaller, source)
    pairs = source.kernels.unflatten(-1, (4, 2)).mean(-1)
    assert torch.allclose(smaller.kernels, pairs[[0, 0, 1]], atol=1e-6)
    # Side 6 is nearer to 8 than to 4 in log2; 8 bins become 6 by integrating the density.
    source = perturb(FMA1d(16, 2, cell_size=4, rank=1, levels=2))
    target = FMA1d(16, 2, cell_size=6, rank=1, levels=1)
    load(target, source)
    shares = torch.tensor([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0.5, 0.5], [0, 0, 0, 1]])
    assert torch.allclose(target.kernels, source.kernels[1:] @ shares.T, atol=1e-6)


def test_resampled_kernels_compute_the_same_summaries():
    """A density constant over the coarse bins is the same function on finer ones."""
    source = perturb(FMA2d(16, 2, cell_size=4, rank=4, levels=3))
    finer = FMA2d(16, 2, cell_size=8, rank=4, levels=2)
    load(finer, source)
    assert torch.allclose(finer.kernels, source.kernels[1:].repeat_interleave(2, -1), atol=1e-6)


def test_another_rank_of_the_start_value_is_averaging_again():
    source, module = FMA2d(16, 2, cell_size=8, rank=4, levels=1), FMA2d(16, 2, cell_size=8, rank=1, levels=1)
    perturb(module)
    load(module, source)
    assert torch.allclose(module.kernels, FMA2d(16, 2, cell_size=8, rank=1, levels=1).kernels)
    assert tiling(4, 2) == (2, 2)


def test_variants_load_into_each_other():
    linear, loglinear = perturb(FMA2d(16, 2, levels=2)), perturb(FMA2d(16, 2, levels=2, variant="loglinear"))
    target = perturb(FMA2d(16, 2, levels=2))
    notes = load(target, loglinear)
    assert notes["initialised"] == "query kernels"
    assert torch.equal(target.kernels[:, :2], loglinear.kernels)
    assert torch.equal(target.kernels[:, 2], FMA2d(16, 2, levels=2).kernels[:, 2])
    notes = load(FMA2d(16, 2, levels=2, variant="loglinear"), linear)
    assert notes["dropped"] == "query kernels"


def test_no_learned_level_on_either_side_is_no_missing_key():
    learned, none = perturb(FMA2d(16, 2, levels=2)), FMA2d(16, 2, levels=0)
    assert load(FMA2d(16, 2, levels=0), learned) == {"dropped": "2 learned levels"}
    target = perturb(FMA2d(16, 2, levels=2))
    assert load(target, none) == {"initialised": "all kernels"}
    start = start_kernels(1, 8, 4, 2, 2, 8, variant="linear")
    assert torch.equal(target.kernels, start.expand_as(target.kernels))
    # With `assign`, new kernels are in the dtype, and on the device, of what was loaded.
    target.load_state_dict(none.to(torch.bfloat16).state_dict(), assign=True)
    assert {p.dtype for p in target.parameters()} == {torch.bfloat16}


def test_kernels_that_cannot_be_carried_over_are_an_error():
    with pytest.raises(RuntimeError, match="kernels"):
        FMA2d(16, 4, levels=1).load_state_dict(FMA2d(16, 2, levels=1).state_dict())
    shared = perturb(FMA2d(16, 2, levels=1, share_heads=True))
    target = FMA2d(16, 2, levels=1)
    load(target, shared)
    assert torch.equal(target.kernels, shared.kernels.expand_as(target.kernels))


def test_flops_are_counted_forward_and_backward():
    """torch's counter sees the projections and the operator's pairs: two products forward, five backward."""
    module, x = FMA2d(16, 2, cell_size=2, levels=1), torch.randn(1, 9, 12, 16)
    with FlopCounterMode(display=False) as counter:
        module(x).sum().backward()
    counts = {str(op): flops for op, flops in counter.flop_counts["Global"].items()}
    once = 2 * 16 * sum(count_pairs((9, 12), 2, 4, linear=True))
    assert counts["fma2d.multipole_attention"] == 2 * once
    assert counts["fma2d.multipole_attention_backward"] == 5 * once


def test_runs_on_meta_tensors():
    x = torch.empty(2, 9, 7, 16, device="meta")
    assert FMA2d(16, 2, levels=1).to("meta")(x).shape == x.shape
