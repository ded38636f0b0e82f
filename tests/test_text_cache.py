"""The caches: decoding token by token gives what the whole sequence gives, and keeps little."""

from math import ceil, log2

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import text_cache as benchmark
from fma2d import FMA1d, FMA2d
from fma2d.text import CausalLM, MaskedLM, MultipoleCache


def make_layer(cell_size=4, rank=2, levels=2, **options):
    layer = FMA1d(8, 2, cell_size, rank, levels=levels, causal=True, **options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer.double().requires_grad_(False)


def decode(layer, x, lengths, cache, steps):
    """What a layer gives after prompts of the given lengths, `[B, steps, dim]`, one token a call."""
    rows, outs = torch.arange(len(x)), []
    for step in range(steps):
        outs.append(layer(x[rows, lengths + step][:, None], cache=cache))
    return torch.cat(outs, 1)


@given(
    data=st.data(),
    cell_size=st.integers(1, 6),
    levels=st.integers(0, 4),
    prompt=st.integers(1, 40),
    steps=st.integers(1, 60),
    aggregation=st.sampled_from(["learned", "learned", "mean"]),
    share_heads=st.booleans(),
)
def test_prefill_and_decoding_equal_the_whole_at_every_position(
    data, cell_size, levels, prompt, steps, aggregation, share_heads
):
    """For rows of different length, any cell size and rank, learned kernels, and beyond the learned levels."""
    rank = data.draw(st.sampled_from([p for p in range(1, cell_size + 1) if cell_size % p == 0]))
    layer = make_layer(cell_size, rank, levels, aggregation=aggregation, share_heads=share_heads)
    lengths = torch.tensor([prompt, *data.draw(st.lists(st.integers(1, prompt), max_size=2))])
    x = torch.randn(len(lengths), prompt + steps, 8, dtype=torch.float64)
    whole, cache = layer(x), MultipoleCache.of(layer)
    mask = torch.arange(prompt) < lengths[:, None]
    prefill = layer(x[:, :prompt].masked_fill(~mask[..., None], torch.nan), mask, cache)
    assert torch.allclose(prefill[mask], whole[:, :prompt][mask], rtol=0, atol=1e-12)
    decoded = decode(layer, x, lengths, cache, steps)
    expected = torch.stack([row[n : n + steps] for row, n in zip(whole, lengths, strict=True)])
    assert torch.allclose(decoded, expected, rtol=0, atol=1e-12)
    assert torch.equal(cache.lengths, lengths + steps)


@pytest.mark.parametrize("position", ["sinusoidal", "rotary"])
@pytest.mark.parametrize("attention", ["fma", "mean", "local", "full"])
def test_models_decode_what_they_compute(attention, position):
    """Every kind of attention, through several layers, whose cache is shared in part; with a convolution or not."""
    options = dict(attention=attention, position=position, cell_size=3, rank=3, context=24, share_heads=False)
    if position == "rotary":
        options |= dict(conv_reach=3, count_bias=False)
    model = CausalLM(11, 8, 3, 2, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.double()
    ids, lengths = torch.randint(11, (3, 90)), torch.tensor([30, 7, 1])
    whole, cache = model(ids), model.new_cache()
    model(ids[:, :30], torch.arange(30) < lengths[:, None], cache)
    for step in range(60):
        at = torch.arange(3), lengths + step
        assert torch.allclose(model(ids[at][:, None], cache=cache)[:, 0], whole[at], rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", ["fma", "local", "full"])
def test_more_tokens_at_once_may_follow_with_padding(attention):
    """A second prompt, of another length in each row, goes on where the first ended."""
    model = CausalLM(11, 8, 2, 2, attention=attention, cell_size=2, rank=1, context=8, conv_reach=4).double()
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
    layer = make_layer(4, 4, 3)
    x = torch.randn(2, 200, 8, dtype=dtype)
    for parameter in layer.parameters():
        parameter.copy_(parameter.to(dtype))
    truth = layer(x.double())
    layer.to(dtype)
    cache = MultipoleCache.of(layer)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        whole = layer(x)
        decoded = torch.cat((layer(x[:, :50], cache=cache), decode(layer, x, torch.tensor([50, 50]), cache, 150)), 1)
    assert decoded.dtype == whole.dtype
    error = (whole - truth).abs().max()
    assert (decoded - truth).abs().max() <= 2 * error < 0.1 * truth.abs().max()


@pytest.mark.parametrize("cell_size, rank", [(1, 1), (4, 2), (5, 5), (8, 1)])
def test_entries_grow_with_the_logarithm(cell_size, rank):
    """`3r + 4p ceil(log2(ceil(n / r)))`, whether filled at once or token by token; the near field alone keeps `2r`."""
    layer, far, near = make_layer(cell_size, rank), [], []
    steps, local = MultipoleCache.of(layer), MultipoleCache(cell_size)
    x = torch.randn(1, 1, 8, dtype=torch.float64)
    for tokens in range(1, 150):
        layer(x, cache=steps)
        layer(x, cache=local)
        far.append(3 * cell_size + 4 * rank * ceil(log2(ceil(tokens / cell_size))))
        near.append(2 * cell_size)
        assert steps.entries() == far[-1] == steps.slots.shape[3] and local.entries() == near[-1]
        if tokens % 7 == 0:
            filled = MultipoleCache.of(layer)
            layer(x.expand(-1, tokens, -1), cache=filled)
            assert filled.entries() == far[-1]
    long = MultipoleCache.of(layer)
    layer(x.expand(-1, 1 << 14, -1), cache=long)
    assert long.entries() <= 3 * cell_size + 4 * rank * 14


def test_no_tokens_may_follow_and_a_layer_that_looks_ahead_has_no_cache():
    layer = make_layer()
    cache, x = MultipoleCache.of(layer), torch.randn(1, 9, 8, dtype=torch.float64)
    layer(x, cache=cache)
    assert layer(x[:, :0], cache=cache).shape == (1, 0, 8) and cache.longest == 9
    with pytest.raises(ValueError, match="causal"):
        FMA1d(8, 2, 4, 2, levels=2).double()(x, cache=MultipoleCache.of(layer))


def test_a_full_cache_holds_every_token():
    model = CausalLM(11, 8, 1, 2, attention="full")
    (cache,) = caches = model.new_cache()
    for tokens in range(1, 20):
        model(torch.randint(11, (1, 1)), cache=caches)
        assert cache.entries() == tokens


def test_caches_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="causal"):
        MultipoleCache.of(FMA1d(8, 2, 4, 2, levels=1))
    with pytest.raises(ValueError, match="divides cell_size 4"):
        MultipoleCache.of(FMA1d(8, 2, 4, 3, levels=0, causal=True, aggregation="mean"))
    model = CausalLM(11, 8, 1, 2)
    caches = model.new_cache()
    model(torch.randint(11, (2, 5)), cache=caches)
    with pytest.raises(ValueError, match="2 rows, got 3"):
        model(torch.randint(11, (3, 1)), cache=caches)
    with pytest.raises(TypeError):
        FMA2d(8, 2, levels=1)(torch.randn(1, 3, 3, 8), cache=MultipoleCache(4))
    with pytest.raises(TypeError):
        MaskedLM(11, 8, 1, 2)(torch.randint(11, (1, 3)), cache=[])
    layer = make_layer()
    cache = MultipoleCache.of(layer)
    layer(torch.randn(2, 5, 8).double(), cache=cache)
    with pytest.raises(ValueError, match="2 rows, got 3"):
        layer(torch.randn(3, 1, 8).double(), cache=cache)
    with pytest.raises(ValueError, match="hole"):
        layer(torch.randn(2, 3, 8).double(), torch.tensor([True, False, True]), cache)


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
