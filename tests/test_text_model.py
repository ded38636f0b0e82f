"""Text models: causality, padding, positions, heads, files."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.nn import functional as F

from fma2d import cover
from fma2d.text import CausalLM, MaskedLM, SequenceClassifier, load_model, save_model
from fma2d.text.attention import KINDS, Attention, rotate

CAUSAL = [name for name in KINDS if name != "fma-linear"]
VOCAB = 11


def randomise(model, std=0.4):
    """Every weight anything, the kernels too, so that nothing holds just because of start values; float64."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.double().eval()


def make(cls=CausalLM, attention="fma", *, classes=3, **options):
    options = dict(dim=8, depth=1, num_heads=2, cell_size=4, rank=2, context=64, attention=attention) | options
    return randomise(cls(VOCAB, classes, **options) if cls is SequenceClassifier else cls(VOCAB, **options))


def random_ids(*shape):
    return torch.randint(VOCAB, shape)


def influence(layer, tokens, dim):
    """`[N, N]`: the largest derivative of an output by an input, both of `dim` channels.

    A row of the batch for each number of the output: one backward pass gives the whole Jacobian.
    """
    x = torch.randn(1, tokens, dim, dtype=torch.float64).expand(tokens * dim, -1, -1).clone().requires_grad_()
    layer(x).view(tokens * dim, tokens * dim).diagonal().sum().backward()
    return x.grad.unflatten(0, (tokens, dim)).abs().amax((1, 3))


def check_influence(attention, tokens, heads=2):
    """Exactly none of later tokens, some of every earlier one, but for `local` that are near."""
    model = make(attention=attention, dim=2 * heads, num_heads=heads, cell_size=3, rank=3)
    found = influence(model.blocks[0].attention, tokens, 2 * heads)
    assert (found.triu(1) == 0).all()
    cell = torch.arange(tokens) // 3
    seen = cell >= cell[:, None] - 1 if attention == "local" else torch.ones_like(found, dtype=torch.bool)
    assert torch.equal(found.tril() > 0, seen.tril())


@pytest.mark.parametrize("attention", CAUSAL)
@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 17, 41, 64])
def test_the_jacobian_is_exactly_zero_towards_later_tokens(attention, tokens):
    check_influence(attention, tokens)


@pytest.mark.slow
def test_the_jacobian_is_exactly_zero_towards_later_tokens_at_every_length():
    for tokens in range(1, 301):
        check_influence("fma", tokens, heads=1)


@pytest.mark.parametrize("cell_size, rank, context", [(4, 2, 20), (9, 3, 300)])
def test_appending_tokens_changes_nothing_at_every_length(cell_size, rank, context):
    """With learned kernels, beyond the learned levels too."""
    model, ids = make(cell_size=cell_size, rank=rank, context=context), random_ids(1, 300)
    with torch.no_grad():
        out = model(ids)
        for tokens in range(1, 300):
            assert torch.allclose(model(ids[:, :tokens]), out[:, :tokens], rtol=0, atol=1e-12)


@given(data=st.data(), tokens=st.integers(1, 300), cell_size=st.integers(1, 9), context=st.integers(1, 300))
def test_later_tokens_change_nothing_before_them(data, tokens, cell_size, context):
    """By perturbation, not by a bit."""
    rank = data.draw(st.sampled_from([p for p in range(1, cell_size + 1) if cell_size % p == 0]))
    model = make(cell_size=cell_size, rank=rank, context=context)
    ids, cut = random_ids(1, tokens), data.draw(st.integers(0, tokens))
    changed = torch.cat((ids[:, :cut], random_ids(1, tokens - cut)), 1)
    with torch.no_grad():
        assert torch.equal(model(ids)[:, :cut], model(changed)[:, :cut])


@pytest.mark.parametrize(
    "cls, attention",
    [
        (cls, attention)
        for cls in (CausalLM, MaskedLM, SequenceClassifier)
        for attention in KINDS
        if cls is not CausalLM or attention != "fma-linear"  # which is refused
    ],
)
def test_padding_changes_nothing_whatever_it_holds(cls, attention):
    model, lengths = make(cls, attention, depth=2), [50, 23, 1, 0]
    mask = torch.arange(50) < torch.tensor(lengths)[:, None]
    ids = random_ids(4, 50)
    out = model(ids.masked_fill(~mask, -100), mask)
    assert out.isfinite().all()
    for row, length in enumerate(lengths[:3]):
        expected = model(ids[row : row + 1, :length])
        got = out[row : row + 1] if cls is SequenceClassifier else out[row : row + 1, :length]
        assert torch.allclose(got, expected, rtol=0, atol=1e-12)
    if cls is SequenceClassifier:
        assert torch.equal(out[3], model.head.bias)
        out.square().sum().backward()
    else:
        out[mask].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 8, 12, 29])
def test_local_attention_is_the_near_field_of_the_cover(causal, tokens):
    options = dict(causal=causal, cell_size=4, rank=1, context=8)
    local, full = Attention(8, 2, "local", **options), Attention(8, 2, "full", **options)
    q, k, v = torch.randn(3, 2, 2, tokens, 4, dtype=torch.float64)
    near = torch.zeros(tokens, tokens, dtype=torch.bool)
    for token in range(tokens):
        near[token, [j for (j,) in cover((tokens,), 4, (token,), causal)[0]]] = True
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=near)
    assert torch.allclose(local.attend(q, k, v, None), expected, rtol=0, atol=1e-12)
    if tokens <= 8:
        assert torch.allclose(full.attend(q, k, v, None), expected, rtol=0, atol=1e-12)


def test_a_product_of_turned_vectors_depends_on_their_distance():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(-1, -1, -1, 30, -1)
    scores = rotate(q, torch.arange(30)[None]) @ rotate(k, torch.arange(30)[None]).mT
    for distance in (0, 3, 7):
        diagonal = scores[0, 0].diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5)
    assert scores[0, 0, 0].std() > 0.1


def test_the_kinds_of_attention_have_equal_parameters_but_for_kernels():
    counts = {}
    for attention in KINDS:
        model = MaskedLM(256, 64, 2, 2, attention=attention)
        counts[attention] = sum(p.numel() for name, p in model.named_parameters() if not name.endswith("kernels"))
        assert ("blocks.0.attention.kernels" in model.state_dict()) == attention.startswith("fma")
    assert len(set(counts.values())) == 1
    heads = [name for name in MaskedLM(256, 64, 1, 2).state_dict() if not name.startswith(("blocks", "norm"))]
    assert heads == ["embed.weight"]  # tied


@pytest.mark.parametrize("attention", ["fma", "full"])
def test_a_few_steps_learn_a_periodic_text(attention):
    """The start values train: the loss falls from about log(vocabulary) far below log(period)."""
    model = CausalLM(32, 32, 2, 2, attention=attention, cell_size=4, rank=2, context=32, dropout=0.05)
    ids = torch.randperm(32)[:7].repeat(8)[None, :33]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - 3.47) < 0.3 and losses[-1] < 0.8


@pytest.mark.parametrize(
    "options, error, words",
    [
        (dict(attention="sparse"), ValueError, "attention must be one of"),
        (dict(attention="fma-linear"), ValueError, "fma-linear"),
        (dict(dim=9), ValueError, "dim"),
        (dict(num_heads=3), ValueError, "num_heads"),
        (dict(rank=3), ValueError, "rank"),
        (dict(context=0), ValueError, "context"),
        (dict(depth=2.0), TypeError, "depth"),
        (dict(dim=6), ValueError, "must be even, got 6/2"),
        (dict(dropout=1.0), ValueError, "dropout"),
        (dict(window=3), TypeError, "window"),
    ],
)
def test_options_that_make_no_sense_are_named(options, error, words):
    with pytest.raises(error, match=words):
        CausalLM(**dict(vocab_size=VOCAB, dim=8, depth=1, num_heads=2, cell_size=4, rank=2) | options)


def test_wrong_ids_and_masks_are_named():
    model, ids = make(), random_ids(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    hole = mask.clone()
    hole[1, 4] = False
    left = torch.arange(9).expand(2, -1) > 3
    for args, error, words in [
        ((ids.int(),), TypeError, "int64"),
        ((ids.tolist(),), TypeError, "int64 tensor, got list"),
        ((ids[0],), ValueError, r"\[B, N\]"),
        ((ids[:, :0],), ValueError, "at least one token"),
        ((ids + VOCAB,), ValueError, f"0 to {VOCAB - 1}, got"),
        ((ids - VOCAB,), ValueError, f"0 to {VOCAB - 1}, got -"),
        ((ids, mask.float()), TypeError, "bool"),
        ((ids, mask[:, :8]), ValueError, "shape of ids"),
        ((ids, hole), ValueError, "hole"),
        ((ids, left), ValueError, "hole"),
    ]:
        with pytest.raises(error, match=words):
            model(*args)


@pytest.mark.parametrize("cls", [CausalLM, MaskedLM, SequenceClassifier])
def test_files_hold_the_whole_model(tmp_path, cls):
    model = make(cls, "mean" if cls is MaskedLM else "fma", count_bias=False, depth=2).float()
    save_model(tmp_path / "model.safetensors", model, tokens="bytes", steps=3)
    loaded = load_model(tmp_path / "model.safetensors")
    assert type(loaded) is cls and loaded.options == model.options and not loaded.training
    assert loaded.note == dict(tokens="bytes", steps=3)
    ids = random_ids(2, 40)
    assert torch.equal(loaded(ids), model(ids))


def test_foreign_and_damaged_files_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError):
        load_model(path)
    path.write_bytes(b"not a model at all")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_model(path)
    model = make().float()
    save_file(model.state_dict(), path)
    with pytest.raises(ValueError, match="save_model did not write it"):
        load_model(path)

    def metadata(**options):
        texts = dict(options=json.dumps(model.options | options), note="{}")
        return dict(texts, architecture="CausalLM")

    for options, words in [(dict(window=3), "no such CausalLM"), (dict(depth=2), "lacks weights of its CausalLM")]:
        save_file(model.state_dict(), path, metadata(**options))
        with pytest.raises(ValueError, match=words):
            load_model(path)
    with pytest.raises(TypeError, match="model must be one of"):
        save_model(path, torch.nn.Linear(2, 2))
