"""What timm asks of a model, over every registered name; timm's own `tests/test_models.py` goes through the same.

Structure is checked without memory, on the meta device, for all sizes and tags; values on the smaller models, those of
base and large among the slow tests.
"""

import copy
import math

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import (
    FeatureInfo,
    generate_default_cfgs,
    get_notrace_modules,
    group_parameters,
    list_pretrained,
    save_for_hf,
)
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import fma2d
from fma2d import models
from fma2d.backbone import ATTENTION, FMA2DBackbone
from fma2d.baselines import DenseAttention

NAMES = [f"fma2d_{size}" for size in ("base", "large", "nano", "small", "tiny")]
TAGS = ["in1k", "in1k_384", "in1k_512", "in22k", "in22k_384", "in22k_512"]
ON_CPU = [
    "fma2d_nano",
    "fma2d_tiny",
    *(pytest.param(f"fma2d_{size}", marks=pytest.mark.slow) for size in ("small", "base", "large")),
]
FEATURE_CLASSES = ["getter", "list", "dict", "hook", "fx"]


def create(name="fma2d_nano", **kwargs):
    return timm.create_model(name, **kwargs).eval()


def on_meta(name, **kwargs):
    """A model without memory."""
    return create(name, device="meta", dtype=torch.float32, **kwargs)


def test_five_models_and_their_tags():
    assert timm.list_models("fma2d*") == NAMES
    tagged = timm.list_models("fma2d*", include_tags=True)
    assert {f"{name}.{tag}" for name in NAMES for tag in TAGS} <= set(tagged)


@pytest.mark.parametrize("name, tag", [(name, "in1k") for name in NAMES] + [("fma2d_nano", tag) for tag in TAGS[1:]])
def test_cfg_describes_the_model(name, tag):
    model = on_meta(f"{name}.{tag}")
    cfg, state = model.default_cfg, model.state_dict()
    size = int(tag.partition("_")[2] or 224)
    assert model.num_classes == cfg["num_classes"] == (1000 if tag.startswith("in1k") else 21841)
    assert cfg["input_size"] == (3, size, size) and model.in_chans == 3
    assert resolve_model_data_config(model)["input_size"] == (3, size, size)
    assert f"{cfg['classifier']}.weight" in state and f"{cfg['first_conv']}.weight" in state
    levels = [fma2d.num_levels((size // s, size // s), 8) for s in (4, 8, 16, 32)]
    assert [stage.blocks[0].attn.levels for stage in model.stages] == levels

    x = torch.randn(1, 3, size, size, device="meta")
    features = model.forward_features(x)
    assert features.shape == (1, model.num_features, *cfg["pool_size"])
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (1, model.head_hidden_size)
    assert model(x).shape == (1, model.num_classes)
    assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    model.reset_classifier(0)
    assert model.num_classes == 0 and model(x.bfloat16()).shape == pooled.shape
    model.reset_classifier(0, "")
    assert model(x.bfloat16()).shape == features.shape
    model.reset_classifier(2)
    assert model(x.bfloat16()).shape == (1, 2, *features.shape[2:])
    assert model.get_classifier().weight.dtype == torch.bfloat16 and model.get_classifier().weight.is_meta


@pytest.mark.parametrize("name", NAMES)
def test_frozen_weights_stay_frozen_and_every_weight_is_placed(name):
    model = on_meta(name).requires_grad_(False)
    model.reset_classifier(0)
    model.set_input_size((448, 448))
    assert model.stages[2].blocks[0].attn.kernels is not None
    assert not [n for n, p in model.named_parameters() if p.requires_grad or not p.is_meta]


@pytest.mark.parametrize("name", ON_CPU)
def test_forward_backward_and_checkpointing(name):
    model = create(name, num_classes=42, drop_path_rate=0.1)
    x = torch.randn(2, 3, 96, 80)
    plain = model(x)
    assert plain.shape == (2, 42) and plain.isfinite().all()
    assert torch.allclose(model(x.to(memory_format=torch.channels_last)), plain, atol=1e-5)
    model.set_grad_checkpointing()
    assert torch.allclose(model(x), plain, atol=1e-5)
    model.train()(x).mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize("name", ON_CPU)
def test_intermediates_and_pruning(name):
    model = create(name, num_classes=5)
    x = torch.randn(2, 3, 70, 66)
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    with torch.no_grad():
        final, features = model.forward_intermediates(x)
        assert torch.equal(final, model.forward_features(x)) and torch.equal(final, features[-1])
        sizes = [
            (c, math.ceil(70 / r), math.ceil(66 / r)) for c, r in zip(info.channels(), info.reduction(), strict=True)
        ]
        assert [tuple(f.shape[1:]) for f in features] == sizes
        logits = model(x)
        whole = copy.deepcopy(model)
        assert whole.prune_intermediate_layers([3], prune_head=False) == [3] and torch.equal(whole(x), logits)
    for i in (0, 2, 3):
        pruned = copy.deepcopy(model)
        take = pruned.prune_intermediate_layers([i], prune_norm=True)
        final, kept = pruned.forward_intermediates(x, indices=take)
        assert torch.equal(kept[0], features[i]) and torch.equal(final, features[i])
        kept[0].sum().backward()
        assert not [n for n, p in pruned.named_parameters() if p.grad is None]
        pruned.reset_classifier(3, "avg")
        assert pruned(x).shape == (2, 3)


@pytest.mark.parametrize("feature_cls", FEATURE_CLASSES)
def test_features_only_in_every_class(feature_cls):
    reference = create(num_classes=4)
    x = torch.randn(1, 3, 72, 96)
    with torch.no_grad():
        expected = reference.forward_intermediates(x, intermediates_only=True)
    for out_indices in ((0, 1, 2, 3), (1, 2)):
        model = create(num_classes=4, features_only=True, feature_cls=feature_cls, out_indices=out_indices)
        model.load_state_dict(reference.state_dict())
        with torch.no_grad():
            features = model(x)
        features = list(features.values()) if isinstance(features, dict) else features
        assert model.feature_info.channels() == [expected[i].shape[1] for i in out_indices]
        assert all(torch.equal(f, expected[i]) for f, i in zip(features, out_indices, strict=True))


def test_fx_gives_the_same_values():
    model = create(num_classes=4)
    x = torch.randn(1, 3, 64, 96)
    options = dict(leaf_modules=get_notrace_modules(), param_shapes_constant=True)
    _, nodes = get_graph_node_names(model, tracer_kwargs=options)
    traced = create_feature_extractor(
        model, eval_return_nodes=nodes[-1:], train_return_nodes=nodes[-1:], tracer_kwargs=options
    )
    with torch.no_grad():
        assert torch.equal(next(iter(traced(x).values())), model(x))


@pytest.mark.parametrize("name", NAMES)
def test_layer_decay_and_weight_decay(name):
    """Later layers learn faster, a stage's norm with its last block, the classifier fastest; kernels have no decay."""
    model = on_meta(name)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    depth = sum(len(stage.blocks) for stage in model.stages)
    order = [
        layers[f"stages.{i}.blocks.{j}.attn.qkv.weight"]
        for i, s in enumerate(model.stages)
        for j in range(len(s.blocks))
    ]
    assert order == list(range(1, depth + 1)) and layers["stages.0.patch_embed.proj.weight"] == 0
    assert layers["stages.3.norm.weight"] == depth and layers["head.fc.weight"] == depth + 1
    assert layers["stages.1.patch_embed.proj.weight"] == layers["stages.1.blocks.0.attn.qkv.weight"]
    assert len(set(group_parameters(model, model.group_matcher(coarse=True), reverse=True).values())) == 6

    kernels = {n for n, _ in model.named_parameters() if n.endswith(".kernels")}
    assert model.no_weight_decay() == kernels and kernels
    features = create(features_only=True, out_indices=(0, 1))
    groups = param_groups_weight_decay(features, 0.05, no_weight_decay_list=features.no_weight_decay())
    spared = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    assert {name for name, p in features.named_parameters() if p.dim() > 1 and id(p) in spared} == {
        name for name, _ in features.named_parameters() if name.endswith("kernels")
    }
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    parameters = dict(model.named_parameters())
    assert not [n for n in kernels if id(parameters[n]) in decayed] and id(parameters["head.fc.weight"]) in decayed
    scales = {layers[n]: g["lr_scale"] for g in groups for p in g["params"] for n, q in parameters.items() if q is p}
    assert scales == {layer: 0.5 ** (depth + 1 - layer) for layer in range(depth + 2)}


@pytest.mark.parametrize("name", ["fma2d_nano", "fma2d_base.in22k_384"])
def test_pretrained_without_weights_says_where_they_come_from(name):
    for options in ({}, dict(features_only=True), dict(num_classes=7)):
        with pytest.raises(RuntimeError, match=rf"{name}.*train_classifier.*convert_mit"):
            timm.create_model(name, pretrained=True, device="meta", **options)


def test_packaged_weights_are_never_what_the_untagged_name_means():
    """timm makes the first tag that has weights the default; see `make_default_cfgs`."""
    weights = models.Packaged("digits.safetensors", dict(num_classes=10), dict(cell_size=2))
    default = models.make_default_cfgs({"fma2d_nano.digits": weights})["fma2d_nano"]
    assert default.default_with_tag[0] == "in1k" and not default.default.has_weights
    assert default.cfgs["digits"].has_weights and default.cfgs["digits"].num_classes == 10
    # Without the mark, timm would choose the one with weights.
    plain = {"m.in1k": dict(url=""), "m.digits": dict(file="x"), "m.other": dict(url="")}
    assert generate_default_cfgs(plain)["m"].tags[0] == "digits"
    for name in list_pretrained("fma2d*"):
        assert name in models.PACKAGED


@pytest.mark.parametrize(
    "options, word",
    [
        (dict(window_size=7), "window_size"),
        (dict(cell_size=(8, 8)), "cell_size"),
        (dict(variant="dense"), "variant"),
        (dict(head_dim=48), "head_dim"),
        (dict(head_dim=0), "head_dim"),
        (dict(backend="cuda"), "backend"),
        (dict(img_size=(64, 0)), "img_size"),
        (dict(img_size=224.0), "img_size"),
        (dict(img_size="224"), "img_size"),
        (dict(scriptable=True), "TorchScript"),
        (dict(pretrained_cfg_overlay=dict(file="x.safetensors")), "pretrained=True"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(options, word):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=word):
        timm.create_model("fma2d_nano", **options)


@pytest.mark.parametrize("name", [*ATTENTION, "levels"])
def test_settings_of_fma2d_are_refused_beside_another_attention(name):
    values = dict(variant="linear", aggregation="mean", backend="torch", share_heads=False, qkv_bias=True)
    with pytest.raises(ValueError, match=name):
        create(attn_layer=lambda dim, heads, *_: DenseAttention(dim, heads), **{name: values.get(name, 4)})
    if name in ("cell_size", "rank"):
        dense = create(attn_layer=lambda dim, heads, *_: DenseAttention(dim, heads), img_size=64)
        with pytest.raises(ValueError, match=name):
            dense.set_input_size(**{name: 4})
        dense.set_input_size(96)


def test_set_input_size_carries_kernels_over_as_loading_does():
    model = create(num_classes=3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.3)
    loaded = create(num_classes=3, img_size=160, cell_size=4, rank=(1, 4, 2, 2))
    loaded.load_state_dict(model.state_dict())
    model.set_input_size(160, cell_size=4, rank=(1, 4, 2, 2))
    assert model.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    x = torch.randn(1, 3, 160, 120)
    assert torch.equal(model(x), loaded(x))
    state = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="rank"):
        model.set_input_size(cell_size=(4, 4, 4, 2), rank=(4, 4, 4, 9))
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("safe", [True, False])
def test_hub_round_trip(tmp_path, safe):
    model = create(num_classes=5, img_size=96, cell_size=4, variant="loglinear", in_chans=2)
    model.set_input_size((128, 64), rank=(1, 2, 4, 4))
    model.reset_classifier(6, "max")
    save_for_hf(model, tmp_path, safe_serialization=safe)
    restored = create(f"local-dir:{tmp_path}", pretrained=True)
    assert restored.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(1, 2, 128, 64)
    with torch.no_grad():
        assert torch.equal(restored(x), model(x))
    features = create(f"local-dir:{tmp_path}", pretrained=True, features_only=True)
    with torch.no_grad():
        assert torch.equal(features(x)[-1], model.forward_features(x))


def test_seeded_logits_are_what_they_were():
    """Guards against a change of the function that all backends and refactorings share."""
    torch.manual_seed(0)
    model = FMA2DBackbone(dims=(8, 16), depths=(1, 1), head_dim=8, cell_size=2, rank=2, img_size=64, num_classes=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.rand(p.shape, generator=generator) - 0.5)
        logits = model.double().eval()(torch.rand(1, 3, 60, 52, generator=generator).double())
    assert torch.allclose(logits, logits.new_tensor([[0.4725945, -0.2075908, -0.5313348]]), atol=1e-6)
