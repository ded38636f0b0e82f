"""The backbone and its registered timm models."""

import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import fma2d
from fma2d import layers
from fma2d.backbone import FMA2DBackbone
from fma2d.baselines import DenseAttention, SpatialReductionAttention, mit_attention
from research.attention_layers import NearFieldAttention, WindowAttention


@pytest.mark.parametrize("name, millions, kernel_millions", [("base", 87.8, 0.2), ("large", 196.5, 0.3)])
def test_sizes_match_swin(name, millions, kernel_millions):
    with torch.device("meta"):
        model = timm.create_model(f"fma2d_{name}")
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    kernels = sum(size for n, size in sizes.items() if n.endswith("kernels"))
    assert abs((sum(sizes.values()) - kernels) / 1e6 - millions) <= 0.05 * millions
    assert abs(kernels / 1e6 - kernel_millions) < 0.01


def test_without_pooling_every_position_has_logits():
    pooled = timm.create_model("fma2d_nano", num_classes=5).eval()
    model = timm.create_model("fma2d_nano", num_classes=5, global_pool="").eval()
    model.load_state_dict(pooled.state_dict())
    image = torch.randn(2, 3, 96, 50)
    assert model(image).shape == (2, 5, 3, 2)
    torch.testing.assert_close(model(image).mean((2, 3)), pooled(image))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_forward_changes_no_layout(memory_format):
    """Tokens stay channels last from the patch embedding to the features: nothing is copied around the attention."""

    found = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy):
                found.append((func, tuple(args[0].shape)))
            return func(*args, **(kwargs or {}))

    model = timm.create_model("fma2d_nano", features_only=True).eval().to(memory_format=memory_format)
    image = torch.randn(1, 3, 128, 160).to(memory_format=memory_format)
    with torch.no_grad(), Copies():  # inference mode would hide what composite operations do
        model(image)
    assert found == []


@pytest.mark.parametrize("size", [(224, 224), (512, 683), (97, 33), (32, 32), (4, 260)])
def test_features_of_any_input_size(size):
    model = timm.create_model("fma2d_nano", features_only=True).eval()
    with torch.inference_mode():
        features = model(torch.randn(1, 3, *size))
    reductions, channels = model.feature_info.reduction(), model.feature_info.channels()
    assert reductions == [4, 8, 16, 32] and channels == [32, 64, 160, 256]
    expected = [(1, c, -(-size[0] // s), -(-size[1] // s)) for c, s in zip(channels, reductions, strict=True)]
    assert [tuple(f.shape) for f in features] == expected


def test_batch_entries_never_influence_each_other():
    model = timm.create_model("fma2d_nano", num_classes=7).eval()
    x = torch.randn(3, 3, 70, 90)
    with torch.inference_mode():
        together = model(x)
        alone = torch.cat([model(image[None]) for image in x])
        changed = model(torch.cat((x[:1], torch.randn(2, 3, 70, 90))))
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together[:1], changed[:1], atol=1e-5)


def test_options_reach_the_layers():
    model = timm.create_model(
        "fma2d_nano",
        num_classes=0,
        in_chans=5,
        img_size=512,
        cell_size=(4, 4, 8, 8),
        rank=(1, 2, 4, 4),
        variant=("loglinear", "linear", "linear", "linear"),
        drop_path_rate=0.3,
    )
    attn = [stage.blocks[0].attn for stage in model.stages]
    assert [a.cell_size for a in attn] == [4, 4, 8, 8] and [a.rank for a in attn] == [1, 2, 4, 4]
    assert [a.variant for a in attn] == ["loglinear", "linear", "linear", "linear"]
    assert [a.levels for a in attn] == [
        fma2d.num_levels((512 // s, 512 // s), a.cell_size) for s, a in zip((4, 8, 16, 32), attn, strict=True)
    ]
    assert model.stages[-1].blocks[-1].drop_path2.drop_prob == pytest.approx(0.3)
    assert model(torch.randn(2, 5, 64, 64)).shape == (2, 256)
    assert [s.blocks[0].attn.levels for s in timm.create_model("fma2d_nano", levels=3).stages] == [3, 3, 3, 3]


def test_forward_intermediates_agree_with_features():
    model = timm.create_model("fma2d_nano", num_classes=3).eval()
    x = torch.randn(1, 3, 66, 98)
    with torch.inference_mode():
        final, features = model.forward_intermediates(x)
        (last,) = model.forward_intermediates(
            x, indices=[1], intermediates_only=True, stop_early=True, output_fmt="NHWC"
        )
        assert torch.equal(final, model.forward_features(x)) and torch.equal(final, features[-1])
        assert torch.equal(last.permute(0, 3, 1, 2), features[1])
        assert torch.equal(model.forward_head(final), model(x))
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_mix_ffn_in_bands_is_exact(monkeypatch):
    """At high resolution the hidden features, not attention, would set the peak of memory."""
    ffn = layers.MixFFN(8, 32).double().eval()
    x = torch.randn(2, 23, 11, 8, dtype=torch.float64)
    whole = ffn(x)
    largest = 0

    def record(module, inputs, output):
        nonlocal largest
        largest = max(largest, output.numel())

    ffn.fc1.register_forward_hook(record)
    for band in (1, 2 * 11 * 32 * 5, 10**9):
        monkeypatch.setattr(layers, "BAND", band)
        largest = 0
        with torch.no_grad():
            banded = ffn(x)
        assert torch.allclose(banded, whole, rtol=0, atol=1e-13)
        with torch.no_grad():
            assert ffn(x[:0]).shape == (0, 23, 11, 8)
        assert largest <= max(band, 2 * 11 * 32) + 2 * (2 * 11 * 32)


@pytest.mark.parametrize(
    "attn_layer",
    [
        lambda dim, heads, stage, block: DenseAttention(dim, heads),
        lambda dim, heads, stage, block: WindowAttention(dim, heads, window=7, shift=3 * (block % 2)),
        mit_attention,
    ],
    ids=["dense", "window", "mit"],
)
def test_other_attention_on_the_same_skeleton(attn_layer):
    model = timm.create_model("fma2d_nano", num_classes=4, attn_layer=attn_layer)
    loss = model(torch.randn(2, 3, 64, 96)).square().sum()
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("cls", [DenseAttention, NearFieldAttention, SpatialReductionAttention, WindowAttention])
def test_a_class_is_no_attn_layer(cls):
    """It took the numbers of stage and block for options: no bias in the first stage, dropout 1 in second blocks."""
    with pytest.raises(TypeError, match="positional arguments"):
        timm.create_model("fma2d_nano", attn_layer=cls)


@pytest.mark.parametrize("shift", [0, 2])
def test_window_attention_is_dense_attention_under_its_mask(shift):
    attn = WindowAttention(8, 2, window=4, shift=shift).double()
    height, width = 7, 9
    x = torch.randn(1, height, width, 8, dtype=torch.float64)
    # Windows of the shifted lattice that do not wrap around: token t lies in window (t - shift) // 4 of its axis.
    rows, cols = ((torch.arange(n) - shift).div(4, rounding_mode="floor") for n in (height, width))
    window = (rows[:, None] * 100 + cols).flatten()
    q, k, v = attn.qkv(x).reshape(1, -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=window[:, None] == window)
    expected = attn.proj(out.transpose(1, 2).reshape(x.shape))
    assert torch.allclose(attn(x), expected, atol=1e-12)


def test_a_training_step_with_checkpointing_gives_the_same_gradients():
    model = timm.create_model("fma2d_nano", num_classes=3)
    x = torch.randn(2, 3, 72, 64)
    model(x).square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).square().sum().backward()
    for p, grad in zip(model.parameters(), plain, strict=True):
        assert torch.allclose(p.grad, grad, atol=1e-5, rtol=1e-4)


def test_compiles_to_one_graph_for_all_sizes():
    model = FMA2DBackbone(dims=(16, 32), depths=(1, 1), head_dim=16, cell_size=4, num_classes=3).eval()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for size in ((64, 96), (97, 70), (160, 128)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            assert torch.allclose(compiled(x), model(x), atol=1e-5)
    assert counter.frame_count == 1
