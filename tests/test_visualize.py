"""Attention maps against the reference's, and drawings against `cover`."""

import numpy as np
import pytest
import timm
import torch
from matplotlib.patches import Rectangle

from fma2d import FMA1d, FMA2d, cover
from fma2d.baselines import DenseAttention
from fma2d.ops import reference
from fma2d.ops.call import Call, Options
from fma2d.text.attention import Attention
from fma2d.visualize import attention_map, draw_attention, draw_cover, model_attention_map

# Rank 4 over cells of 8: sub-cells of several tokens. Rank 3 over cells of 4: sub-cells that share tokens, mean only.
MODULES = {
    "linear": (FMA2d, (17, 11), dict(cell_size=2, levels=2)),
    "log-linear": (FMA2d, (11, 17), dict(cell_size=2, levels=1, variant="loglinear")),
    "shared tokens": (FMA2d, (19, 18), dict(cell_size=4, rank=3, levels=0, aggregation="mean")),
    "1d": (FMA1d, (37,), dict(cell_size=4, levels=2)),
    "causal": (FMA1d, (37,), dict(cell_size=4, levels=1, causal=True)),
}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("name", MODULES)
def test_attention_map_is_the_references(name, masked, backend):
    kind, grid, options = MODULES[name]
    module = kind(12, 2, **options, backend=backend).double()
    if module.kernels is not None:
        torch.nn.init.normal_(module.kernels)
    torch.nn.init.normal_(module.qkv.weight)
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    mask = torch.rand(2, *grid) < 0.6 if masked else None
    kernels = [] if module.kernels is None else [module.kernels]
    settings = Options(module.cell_size, module.rank, module.variant, module.causal, True, module.head_dim**-0.5)
    expected = reference.attention_map(Call(*module.project(x), kernels, mask, settings))
    for token in ([0] * len(grid), [n // 2 for n in grid], [n - 1 for n in grid]):
        found = attention_map(module, x, token, mask)
        torch.testing.assert_close(found, expected[(slice(None), slice(None), *token)], rtol=0, atol=1e-13)
        exists = torch.ones(2) if mask is None else mask[(slice(None), *token)]
        torch.testing.assert_close(found.flatten(2).sum(-1), exists.double()[:, None].expand(2, 2))
        assert found.min() > -1e-15
        assert mask is None or (found.movedim(1, 0)[:, ~mask] == 0).all()


def test_maps_can_be_drawn_in_inference_mode():
    model = timm.create_model("fma2d_nano", img_size=64).eval()
    with torch.inference_mode():
        found = model_attention_map(model, torch.randn(1, 3, 64, 64), 0, 1, (20, 40))
    torch.testing.assert_close(found.sum((-1, -2)), torch.ones(1, 1))


def test_attention_map_in_half_precision_is_made_in_float32():
    module = FMA2d(8, 2, cell_size=2, levels=1).to(torch.bfloat16)
    found = attention_map(module, torch.randn(1, 16, 16, 8, dtype=torch.bfloat16), (3, 9))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum((-1, -2)), torch.ones(1, 2))


def test_attention_map_of_a_text_layer_is_the_gradient_of_its_output():
    """Rotary positions were left out of the map: the layer turned its queries and keys where the map did not look."""
    layer = Attention(8, 2, "mean", causal=True, cell_size=4, rank=2, context=37).double()
    with torch.no_grad():  # queries and keys read channels 0 to 3; the first value of head h is channel 4 + h
        layer.qkv.weight.normal_()[:, 4:] = 0
        layer.qkv.weight[16:] = 0
        layer.qkv.weight[16, 4] = layer.qkv.weight[20, 5] = 1
        layer.proj.weight.copy_(torch.eye(8))
    x = torch.randn(1, 37, 8, dtype=torch.float64, requires_grad=True)
    found = attention_map(layer, x, (33,))
    for head in range(2):
        (grad,) = torch.autograd.grad(layer(x)[0, 33, 4 * head], x)
        torch.testing.assert_close(found[0, head], grad[0, :, 4 + head], rtol=0, atol=1e-13)


def test_attention_map_rejects_a_token_outside_the_grid():
    for token in ((3,), (0, 5), (-1, 0)):
        with pytest.raises(ValueError, match="token"):
            attention_map(FMA2d(8, 2, levels=0), torch.zeros(1, 4, 5, 8), token)


def test_model_attention_map_is_that_of_the_blocks_input():
    model = timm.create_model("fma2d_nano").eval()
    image = torch.randn(2, 3, 97, 160)
    inputs = []
    attention = model.stages[1].blocks[1].attn
    handle = attention.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    model(image)
    handle.remove()
    found = model_attention_map(model, image, 1, 1, (96, 80))
    assert found.shape == (2, 2, 13, 20)
    torch.testing.assert_close(found, attention_map(attention, inputs[0], (12, 10)))
    assert not attention._forward_pre_hooks


def test_model_attention_map_rejects_what_it_cannot_show():
    model = timm.create_model("fma2d_nano", attn_layer=lambda dim, heads, *_: DenseAttention(dim, heads))
    with pytest.raises(TypeError, match="DenseAttention"):
        model_attention_map(model, torch.zeros(1, 3, 32, 32), 0, 0, (0, 0))
    with pytest.raises(ValueError, match="point"):
        model_attention_map(model, torch.zeros(1, 3, 32, 32), 0, 0, (32, 0))


@pytest.mark.parametrize(
    ("grid", "token", "causal"),
    [((61, 90), (45, 70), False), ((5, 3), (0, 2), False), ((200,), (90,), False), ((200,), (90,), True)],
)
def test_drawn_cover_has_a_rectangle_for_the_near_field_each_cell_and_the_token(grid, token, causal, tmp_path):
    axes = draw_cover(grid, 8, token, causal=causal, photo=np.zeros((20, 30, 3)) if len(grid) == 2 else None)
    near, far = cover(grid, 8, token, causal)
    drawn = {patch.get_bbox().extents.astype(int).tolist().__str__() for patch in axes.patches}

    def text(rows, columns):
        return str([columns[0], rows[0], columns[1], rows[1]])

    expected = [bounds for _, _, bounds in far] + [[(t, t + 1) for t in token]]
    expected.append([(min(axis), max(axis) + 1) for axis in zip(*near, strict=True)])
    assert drawn == {text(*([(0, 1), *bounds] if len(grid) == 1 else bounds)) for bounds in expected}
    assert len(axes.patches) == len(far) + 2 and all(isinstance(patch, Rectangle) for patch in axes.patches)
    legend = [label.get_text() for label in axes.get_legend().get_texts()]
    assert legend[0] == f"near field: {len(near)} tokens"
    assert len(legend) == 2 + len({level for level, _, _ in far})
    axes.figure.savefig(tmp_path / "cover.png")
    assert (tmp_path / "cover.png").read_bytes().startswith(b"\x89PNG")


def test_drawn_attention_is_in_multiples_of_even_attention(tmp_path):
    attention = torch.rand(3, 8, 6)
    attention /= attention.sum((1, 2), keepdim=True)
    axes = draw_attention(attention, np.zeros((40, 30, 3), dtype=np.uint8), (20, 10))
    shown = axes.images[1]
    np.testing.assert_allclose(shown.get_array(), attention.mean(0) * 48, rtol=1e-6)
    assert shown.get_extent() == [0, 30, 40, 0]
    axes.figure.savefig(tmp_path / "attention.png")
    assert (tmp_path / "attention.png").stat().st_size > 0
