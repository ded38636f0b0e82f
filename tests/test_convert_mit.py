"""The converter of MiT checkpoints: every weight arrives, and with one attention both skeletons compute the same."""

import hashlib
import re

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from fma2d.baselines import DenseAttention
from tools import convert_mit

DEPTHS = {"fma2d_nano": (2, 2, 2, 2), "fma2d_tiny": (3, 4, 6, 3), "fma2d_small": (3, 4, 18, 3)}
DIMS = {"fma2d_nano": (32, 64, 160, 256), "fma2d_tiny": (64, 128, 320, 512), "fma2d_small": (64, 128, 320, 512)}
HEADS, REDUCTIONS = (1, 2, 5, 8), (8, 4, 2, 1)


def randomise(model):
    """Give every parameter a value of its own, norms and biases too, and every LayerNorm FMA2D's eps."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.05 if parameter.dim() > 1 else 0.3)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.3)
            module.eps = 1e-6
    return model.eval()


def mmseg_mit(model="fma2d_nano", reductions=REDUCTIONS):
    from mmseg.models.backbones import MixVisionTransformer

    dims, depths = DIMS[model], DEPTHS[model]
    return randomise(MixVisionTransformer(3, dims[0], 4, depths, HEADS, sr_ratios=reductions))


def transformers_mit(model="fma2d_nano", reductions=REDUCTIONS, head="SegformerForImageClassification"):
    import transformers

    config = transformers.SegformerConfig(
        hidden_sizes=DIMS[model],
        depths=DEPTHS[model],
        num_attention_heads=HEADS,
        sr_ratios=reductions,
        num_labels=7,
        drop_path_rate=0.0,
    )
    return randomise(getattr(transformers, head)(config))


def nvlabs(state):
    """The NVlabs names of a state dict of mmseg's MiT, packed as there: q alone, k and v together, linear layers."""
    names = {
        r"layers\.(\d)\.0\.projection\.": r"patch_embed\1.proj.",
        r"layers\.(\d)\.0\.norm\.": r"patch_embed\1.norm.",
        r"layers\.(\d)\.2\.": r"norm\1.",
        r"layers\.(\d)\.1\.(\d+)\.": r"block\1.\2.",
        r"attn\.attn\.out_proj\.": "attn.proj.",
        r"ffn\.layers\.0\.": "mlp.fc1.",
        r"ffn\.layers\.1\.": "mlp.dwconv.dwconv.",
        r"ffn\.layers\.4\.": "mlp.fc2.",
    }
    result = {}
    for key, value in state.items():
        for pattern, name in names.items():
            key = re.sub(pattern, name, key)
        key = re.sub(r"^(patch_embed|norm|block)(\d)", lambda m: m[1] + str(int(m[2]) + 1), key)
        if ".in_proj_" in key:
            dim = len(value) // 3
            result[key.replace("attn.in_proj_", "q.")] = value[:dim]
            result[key.replace("attn.in_proj_", "kv.")] = value[dim:]
        else:
            result[key] = value.flatten(1) if re.search(r"mlp\.fc\d\.weight", key) else value
    return result


def dense(conversion):
    """The converted weights in our skeleton with dense attention."""
    head = conversion.state.get("head.fc.weight")

    def attention(dim, heads, stage, block):
        return DenseAttention(dim, heads)

    model = timm.create_model(conversion.model, num_classes=0 if head is None else len(head), attn_layer=attention)
    model.load_state_dict(conversion.state, strict=True)
    return model.eval()


def assert_complete(conversion, state):
    """Every key of the file is placed or dropped, once, and what is placed is there bit by bit."""
    placed = [key for keys in conversion.sources.values() for key in keys]
    assert sorted([*placed, *conversion.dropped]) == sorted(state)
    assert conversion.sources.keys() == conversion.state.keys()
    for target, keys in conversion.sources.items():
        expected = torch.cat([state[key] for key in keys])
        assert torch.equal(conversion.state[target].flatten(), expected.flatten())
    reduction = [key for key, reason in conversion.dropped.items() if reason == convert_mit.REDUCTION]
    assert len(reduction) == 4 * sum(DEPTHS[conversion.model][:3])  # a convolution and a norm in all but the last stage


def assert_same_features(ours, theirs):
    """Ours are the feature maps of theirs, with dense attention in both, at a size with cut patches."""
    image = torch.randn(2, 3, 70, 101)
    with torch.inference_mode():
        features, expected = ours.forward_intermediates(image, intermediates_only=True), theirs(image)
    assert len(features) == len(expected) == 4
    for x, y in zip(features, expected, strict=True):
        assert x.std() > 0.1
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", ["fma2d_nano", "fma2d_tiny", pytest.param("fma2d_small", marks=pytest.mark.slow)])
def test_mmseg_weights_arrive_and_compute_the_same(model):
    source = mmseg_mit(model)
    state = source.state_dict()
    conversion = convert_mit.convert(state)
    assert (conversion.style, conversion.model) == ("mmsegmentation", model)
    assert_complete(conversion, state)
    theirs = mmseg_mit(model, reductions=(1, 1, 1, 1))
    assert set(theirs.load_state_dict(state, strict=False).unexpected_keys) == set(conversion.dropped)
    assert_same_features(dense(conversion), theirs)


def test_transformers_weights_arrive_and_compute_the_same(tmp_path):
    source = transformers_mit()
    source.save_pretrained(tmp_path)
    published = load_file(tmp_path / "model.safetensors")
    assert "segformer.encoder.block.0.0.attention.self.query.weight" in published
    theirs = transformers_mit(reductions=(1, 1, 1, 1))
    theirs.load_state_dict(source.state_dict(), strict=False)
    for style, state in (("transformers", published), ("transformers 5, modules in memory", source.state_dict())):
        conversion = convert_mit.convert(state)
        assert (conversion.style, conversion.model) == (style, "fma2d_nano")
        assert_complete(conversion, state)
        ours = dense(conversion)
        assert_same_features(ours, lambda x: theirs(x, output_hidden_states=True).hidden_states)
        image = torch.randn(1, 3, 64, 96)
        with torch.inference_mode():
            torch.testing.assert_close(ours(image), theirs(image).logits, rtol=1e-5, atol=1e-5)


def test_nvlabs_names_and_wrapped_models_convert_to_the_same():
    state = mmseg_mit().state_dict()
    expected = convert_mit.convert(state).state
    original = nvlabs(state)
    assert {"block1.0.attn.kv.weight", "patch_embed4.norm.bias", "block3.1.mlp.dwconv.dwconv.bias"} <= original.keys()
    head = {"head.weight": torch.randn(11, 256), "head.bias": torch.randn(11)}
    conversion = convert_mit.convert(original | head)
    assert conversion.style == "NVlabs/SegFormer"
    assert_complete(conversion, original | head)
    assert torch.equal(conversion.state.pop("head.fc.weight"), head["head.weight"])
    assert torch.equal(conversion.state.pop("head.fc.bias"), head["head.bias"])
    decoder = {
        "decode_head.conv_seg.weight": torch.randn(19, 4, 1, 1),
        "auxiliary_head.bn.num_batches_tracked": torch.ones(()),
    }
    for wrapped in (original, state):
        for prefix in ("backbone.", "module.backbone."):
            segmentor = convert_mit.convert({prefix + key: value for key, value in wrapped.items()} | decoder)
            assert decoder.keys() <= segmentor.dropped.keys()
            for key, value in expected.items():
                assert torch.equal(segmentor.state[key], value) and torch.equal(conversion.state[key], value)


def test_the_tool_writes_a_file_that_every_road_loads(tmp_path, capsys):
    source, output = tmp_path / "mit_b0.pth", tmp_path / "mit_b0.fma2d_nano.safetensors"
    state = nvlabs(mmseg_mit().state_dict())
    torch.save({"state_dict": state | {"head.weight": torch.randn(11, 256), "head.bias": torch.randn(11)}}, source)
    convert_mit.main([str(source)])
    printed = capsys.readouterr().out
    for word in (
        "MiT-B0 -> fma2d_nano",
        "32  block*.*.attn.q + block*.*.attn.kv",
        "attn.sr",
        "kernels",
        "non-commercial",
    ):
        assert word in printed
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    assert metadata["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert metadata["format_version"] == "1"
    assert "non-commercial" in metadata["license"] and metadata["architecture"] == "fma2d_nano"

    expected = load_file(output)
    overlay = dict(file=str(output), num_classes=11)
    features = timm.create_model("fma2d_nano", pretrained=True, features_only=True, pretrained_cfg_overlay=overlay)
    models = [
        features,
        timm.create_model("fma2d_nano", pretrained=True, num_classes=11, img_size=512, pretrained_cfg_overlay=overlay),
        timm.create_model("fma2d_nano", checkpoint_path=str(output), num_classes=11, variant="loglinear"),
    ]
    for model in models:
        loaded = {key.removeprefix("model."): value for key, value in model.state_dict().items()}
        for key, value in expected.items():
            if model is not features or not key.startswith("head"):
                assert torch.equal(loaded[key], value)
    for path, words in (
        (output, "there already"),
        (tmp_path / "nowhere" / "x.safetensors", "No such file or directory"),
    ):
        assert convert_mit.main([str(source), str(path)]) == 1
        assert words in capsys.readouterr().err


def test_what_is_no_readable_mit_is_refused(tmp_path, capsys):
    state = mmseg_mit().state_dict()
    b1 = {
        key: value
        for key, value in transformers_mit("fma2d_tiny").state_dict().items()
        if not re.search(r"stages\.\d\.blocks\.([2-9]|1\d)\.", key)
    }
    without = {key: value for key, value in state.items() if key != "layers.2.1.1.attn.attn.in_proj_bias"}
    longer = state | {"layers.3.2.weight": torch.zeros(5)}
    cases = [
        (b1, r"MiT-B1.*fma2d_tiny"),
        ({key: value for key, value in state.items() if not key.startswith("layers.3.1.1.")}, r"no MiT.*MiT-B0"),
        (without, r"lacks 1 .*stages\.2\.blocks\.1\.attn\.qkv\.bias"),
        (longer, r"layers\.3\.2\.weight has shape \(5,\).*\(256,\)"),
        (state | {"layers.0.1.0.attn.lora.weight": torch.zeros(1)}, r"1 keys .*lora"),
        (timm.create_model("resnet18").state_dict(), r"no key.*conv1\.weight"),
    ]
    for bad, words in cases:
        with pytest.raises(ValueError, match=words):
            convert_mit.convert(bad)

    (tmp_path / "text.pth").write_text("weights")
    (tmp_path / "text.safetensors").write_text("weights")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "plain.pt")
    for name, words in (
        ("text.pth", "not a checkpoint of tensors and plain values"),
        ("text.safetensors", "not a checkpoint of tensors and plain values"),
        ("list.pt", "not a checkpoint of tensors and plain values"),
        ("plain.pt", "plain.pt holds no state dict: epoch is no tensor"),
        ("none.pth", "there is no file"),
        (".", "there is no file"),
    ):
        assert convert_mit.main([str(tmp_path / name)]) == 1
        assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("*fma2d*"))
