"""The cache: decoding token by token gives what the whole sequence gives, and keeps little."""

from math import ceil, log2

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import text_cache as benchmark
from fma2d import FMA2d
from fma2d.text import Cache, CausalLM, MaskedLM
from fma2d.text.attention import Attention


def make(attention="fma", depth=2, **options):
    """Every weight anything, the kernels too; float64."""
    options = dict(attention=attention, cell_size=4, rank=2, context=16) | options
    model = CausalLM(11, 8, depth, 2, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.double().requires_grad_(False)


def check_decoding(model, lengths, steps):
    """Prompts of the given lengths, then one token a call: the whole forward pass at every position."""
    lengths, rows = torch.tensor(lengths), torch.arange(len(lengths))
    ids, prompt = torch.randint(11, (len(lengths), int(lengths.max()) + steps)), int(lengths.max())
    whole, cache, mask = model(ids), model.new_cache(), torch.arange(prompt) < lengths[:, None]
    prefill = model(ids[:, :prompt].masked_fill(~mask, -7), mask, cache)
    assert torch.allclose(prefill[mask], whole[:, :prompt][mask], rtol=0, atol=1e-12)
    for step in range(steps):
        at = rows, lengths + step
        assert torch.allclose(model(ids[at][:, None], cache=cache)[:, 0], whole[at], rtol=0, atol=1e-12)
    assert torch.equal(cache.lengths, lengths + steps)


@given(
    data=st.data(),
    cell_size=st.integers(1, 6),
    levels=st.integers(0, 4),
    prompt=st.integers(1, 40),
    steps=st.integers(1, 60),
    attention=st.sampled_from(["fma", "fma", "mean"]),
    count_bias=st.booleans(),
)
def test_prefill_and_decoding_equal_the_whole_at_every_position(
    data, cell_size, levels, prompt, steps, attention, count_bias
):
    """For rows of different length, any cell size and rank, learned kernels, and beyond the learned levels."""
    rank = data.draw(st.sampled_from([p for p in range(1, cell_size + 1) if cell_size % p == 0]))
    lengths = [prompt, *data.draw(st.lists(st.integers(1, prompt), max_size=2))]
    options = dict(cell_size=cell_size, rank=rank, context=cell_size << levels, count_bias=count_bias)
    check_decoding(make(attention, **options), lengths, steps)


@pytest.mark.parametrize("attention", ["fma", "mean", "local", "full"])
def test_every_kind_decodes_what_it_computes(attention):
    """Through several layers, in `train()` mode too: there is no dropout with a cache."""
    model = make(attention, depth=3, cell_size=3, rank=3, context=24).train()
    check_decoding(model, [30, 7, 1], 60)
    model = make(attention, dropout=0.9).train()
    ids, outs = torch.randint(11, (1, 20)), []
    for _ in range(2):
        cache = model.new_cache()
        outs.append(torch.cat((model(ids[:, :9], cache=cache), model(ids[:, 9:], cache=cache)), 1))
    assert model.training and torch.equal(*outs) and torch.allclose(outs[0], model.eval()(ids), rtol=0, atol=1e-12)


def test_decoding_after_a_long_prompt():
    """Ten levels, with kernels of their own for six; a row ends in the first cell of the last one."""
    check_decoding(make(depth=1, cell_size=2, rank=1, context=128), [1537, 1030, 1], 8)


@pytest.mark.parametrize("attention", ["fma", "local", "full"])
def test_more_tokens_at_once_may_follow_with_padding(attention):
    """A second prompt, of another length in each row, goes on where the first ended."""
    model = make(attention, cell_size=2, rank=1, context=8)
    ids, first, second = torch.randint(11, (3, 40)), torch.tensor([20, 9, 2]), torch.tensor([3, 20, 0])
    whole, cache = model(ids), model.new_cache()
    model(ids[:, :20], torch.arange(20) < first[:, None], cache)
    place = (first[:, None] + torch.arange(20)).clamp(max=39)
    mask = torch.arange(20) < second[:, None]
    out = model(ids.gather(1, place), mask, cache)
    expected = whole.gather(1, place[..., None].expand(-1, -1, 11))
    assert torch.allclose(out[mask], expected[mask], rtol=0, atol=1e-12)
    after = first + second
    last = model(ids[torch.arange(3), after][:, None], cache=cache)[:, 0]
    assert torch.allclose(last, whole[torch.arange(3), after], rtol=0, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_low_precision_decoding_is_as_exact_as_the_whole(dtype, autocast):
    """Twice the error that the whole sequence makes in this precision, against float64, and not more."""
    model, ids = make(depth=1, rank=4, context=64), torch.randint(11, (2, 200))
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    truth = model(ids)
    model.to(dtype)
    cache = model.new_cache()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        whole = model(ids)
        decoded = torch.cat((model(ids[:, :50], cache=cache), model(ids[:, 50:], cache=cache)), 1)
    assert decoded.dtype == whole.dtype
    error = (whole - truth).abs().max()
    assert (decoded - truth).abs().max() <= 2 * error < 0.1 * truth.abs().max()


@pytest.mark.parametrize("cell_size, rank", [(1, 1), (4, 2), (5, 5), (8, 1)])
def test_entries_grow_with_the_logarithm(cell_size, rank):
    """`3r + 4p ceil(log2(ceil(n / r)))`, whether filled at once or token by token; the near field alone keeps `2r`."""
    options = dict(depth=1, cell_size=cell_size, rank=rank)
    far, near, full = (make(attention, **options) for attention in ("fma", "local", "full"))
    steps, ids = [model.new_cache() for model in (far, near, full)], torch.randint(11, (1, 1))
    for tokens in range(1, 150):
        for model, cache in zip((far, near, full), steps, strict=True):
            model(ids, cache=cache)
        expected = 3 * cell_size + 4 * rank * ceil(log2(ceil(tokens / cell_size)))
        assert [cache.entries() for cache in steps] == [expected, 2 * cell_size, tokens]
        if tokens % 7 == 0:
            filled = far.new_cache()
            far(ids.expand(-1, tokens), cache=filled)
            assert filled.entries() == expected
    long = far.new_cache()
    far(ids.expand(-1, 1 << 14), cache=long)
    assert long.entries() <= 3 * cell_size + 4 * rank * 14


def test_caches_that_cannot_be_are_refused():
    options = dict(cell_size=4, rank=2, context=16)
    with pytest.raises(ValueError, match="causal"):
        Cache([Attention(8, 2, causal=False, **options)])
    with pytest.raises(ValueError, match="divides cell_size 4"):
        make("mean", rank=3).new_cache()
    model = make()
    cache = model.new_cache()
    model(torch.randint(11, (2, 5)), cache=cache)
    with pytest.raises(ValueError, match="2 rows, got 3"):
        model(torch.randint(11, (3, 1)), cache=cache)
    with pytest.raises(ValueError, match="hole"):
        model(torch.randint(11, (2, 3)), torch.tensor([[True, False, True]] * 2), cache)
    with pytest.raises(TypeError):
        FMA2d(8, 2, levels=1)(torch.randn(1, 3, 3, 8), cache=cache)
    with pytest.raises(TypeError):
        MaskedLM(11, 8, 1, 2)(torch.randint(11, (1, 3)), cache=cache)


def test_the_benchmark_writes_rows_and_a_figure(tmp_path):
    """A second run adds rows, of which the later count."""
    out, figure = tmp_path / "results" / "cache.csv", tmp_path / "figures" / "cache.png"
    settings = dict(dim=8, depth=2, heads=2, cell_size=4, rank=2, tokens=5, threads=torch.get_num_threads())
    settings |= dict(out=out, figure=figure)
    options = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    for _ in range(2):
        assert benchmark.main(["--positions", "30", "90", *options]) == 0
    assert len(out.read_text().splitlines()) == 9 and figure.stat().st_size > 10_000
    found = {(row["attention"], int(row["position"])): int(row["entries"]) for row in benchmark.read(out)}
    assert found == {("fma", 30): 36, ("fma", 90): 52, ("full", 30): 30, ("full", 90): 90}
    with pytest.raises(SystemExit):
        benchmark.main(["--positions", "30"])
