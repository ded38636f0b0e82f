"""Whoever builds, fills, trains or traces a model: kernels are right, loads are checked, nothing is silently wrong."""

import copy

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import load_checkpoint
from torch import nn

import fma2d
from fma2d import FMA1d, FMA2d, visualize
from fma2d.checkpoint import save_checkpoint
from fma2d.text import CausalLM

IMAGE = torch.zeros(1, 9, 9, 8)
SMALL = dict(dims=(8, 16, 16, 16), depths=(1, 1, 1, 1), head_dim=8, cell_size=4)


def create(**options):
    return timm.create_model("fma2d_nano", **dict(num_classes=3, img_size=96) | SMALL | options)


def trained(**options):
    """A model of three classes whose kernels are away from their start value."""
    model = create(**options)
    for layer in layers(model):
        nn.init.uniform_(layer.kernels, 0.5, 1.5)
    return model


def layers(model):
    return [m for m in model.modules() if isinstance(m, FMA2d) and m.kernels is not None]


def at_start(model):
    found = layers(model)
    return bool(found) and all(torch.equal(m.kernels, m.start_kernels().to(m.kernels)) for m in found)


def wrapper(transformers, options):
    """A class of model and a config, as TimmWrapper has them."""
    args = {name: list(v) if isinstance(v, tuple) else v for name, v in (SMALL | options).items()}
    config = transformers.TimmWrapperConfig(architecture="fma2d_nano", num_labels=3, model_args=args, do_pooling=True)
    return transformers.TimmWrapperForImageClassification, config


def backbone(transformers, options):
    """A class and a config of a model around a TimmBackbone, which is no model to save by itself."""

    class Detector(transformers.PreTrainedModel):
        config_class = transformers.TimmBackboneConfig

        def __init__(self, config):
            super().__init__(config)
            self.backbone = transformers.TimmBackbone(config, **SMALL, **options)
            self.post_init()

        def forward(self, x):
            return self.backbone(x)

    config = transformers.TimmBackboneConfig(backbone="fma2d_nano", use_pretrained_backbone=False, out_indices=[0, 3])
    return Detector, config


def without_kernels(folder):
    path = folder / "model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if not n.endswith("kernels")}, path, metadata=dict(format="pt"))


CHANGES = {
    "nothing": {},
    "no kernels": {},
    "img_size": dict(img_size=192),  # more levels: transformers asks to be told that shapes may differ
    "aggregation": dict(aggregation="learned"),
}


@pytest.mark.parametrize("build", [wrapper, backbone])
@pytest.mark.parametrize("change", CHANGES)
def test_transformers_fills_kernels_that_a_file_lacks(build, change, tmp_path):
    """It makes models without memory and fills them past `load_state_dict`: kernels were whatever memory held."""
    transformers = pytest.importorskip("transformers")
    options = dict(img_size=96) | (dict(aggregation="mean") if change == "aggregation" else {})
    model_class, config = build(transformers, options)
    model = model_class(config).eval()
    for layer in layers(model):
        nn.init.uniform_(layer.kernels, 0.5, 1.5)
    model.save_pretrained(tmp_path)
    if change == "no kernels":
        without_kernels(tmp_path)
    model_class, config = build(transformers, options | CHANGES[change])
    found = model_class.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=change == "img_size").eval()
    stored = load_file(tmp_path / "model.safetensors")
    for name, tensor in found.state_dict().items():
        if name in stored and stored[name].shape == tensor.shape:
            assert torch.equal(tensor, stored[name]), name
        else:
            layer = found.get_submodule(name.rpartition(".")[0])
            assert torch.equal(tensor, layer.start_kernels()), name
    assert len(layers(found)) >= 2
    out = found(torch.randn(1, 3, 96, 96))
    assert all(t.isfinite().all() for t in (out.feature_maps if build is backbone else [out.logits]))


def test_made_without_memory_and_walked_through():
    """`to_empty` and `reset_parameters` of every module, as FSDP does it."""
    with torch.device("meta"):
        model = create()
    model.to_empty(device="cpu")
    assert at_start(model)
    for layer in layers(model):
        nn.init.constant_(layer.kernels, float("nan"))
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert at_start(model) and model.eval()(torch.randn(1, 3, 64, 64)).isfinite().all()
    layer = FMA1d(8, 2, 4, 2, levels=2, device="meta", dtype=torch.float64).to_empty(device="cpu")
    assert torch.equal(layer.kernels, layer.start_kernels(dtype=torch.float64))


def test_init_weights_draws_anew_and_sets_kernels_back():
    model = trained()
    old = copy.deepcopy(model)
    nn.init.constant_(model.stages[0].norm.weight, 7)
    model.init_weights()
    assert at_start(model) and (model.stages[0].norm.weight == 1).all()
    assert not torch.equal(model.head.fc.weight, old.head.fc.weight)


@pytest.mark.parametrize("made", ["as ever", "to_empty", "assign", "converted"])
def test_what_was_learned_is_never_set_back(made):
    """timm's helper calls `init_non_persistent_buffers` of every module of a model, whatever was done to it before."""
    if made == "converted":
        model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
        model = fma2d.convert_attention(model, cell_size=2, rank=1, levels=2)
    else:
        with torch.device("cpu" if made == "as ever" else "meta"):
            model = create()
    if made == "to_empty":
        model.to_empty(device="cpu")
    if made in ("to_empty", "assign"):
        model.load_state_dict(trained().state_dict(), assign=made == "assign")
    else:
        for layer in layers(model):
            nn.init.uniform_(layer.kernels, 0.5, 1.5)
    before = copy.deepcopy(model.state_dict())
    for module in model.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("road", ["torch", "load_checkpoint", "checkpoint_path", "overlay", "features_only", "mmseg"])
def test_names_of_compiled_models_load_by_every_road(road, tmp_path):
    """torch.compile puts `_orig_mod.` before the names of what it wraps, whole models or their parts."""
    source = trained()
    state = {
        "_orig_mod." + name.replace("stages.1.", "stages.1._orig_mod."): t for name, t in source.state_dict().items()
    }
    path = tmp_path / "x.safetensors"
    save_file(state, path)
    if road == "mmseg":
        pytest.importorskip("mmengine")
        from fma2d.mmseg import FMA2D

        model = FMA2D(SMALL, img_size=96)
        model.load_pretrained(str(path))
        segmentor = nn.ModuleDict(dict(backbone=FMA2D(SMALL, img_size=96)))
        segmentor.load_state_dict({f"backbone.{name}": t for name, t in state.items() if "head" not in name})
        assert all(torch.equal(a, b) for a, b in zip(segmentor.parameters(), model.parameters(), strict=True))
    elif road == "features_only":
        model = create(features_only=True)
        model.load_state_dict(load_file(path))
    elif road == "checkpoint_path":
        model = create(checkpoint_path=path)
    elif road == "overlay":
        model = create(pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=3))
    else:
        model = create()
        if road == "torch":
            model.load_state_dict(state)
        else:
            load_checkpoint(model, path)
    for name, tensor in model.state_dict().items():
        plain = name.removeprefix("model.").replace("stages_", "stages.")
        assert torch.equal(tensor, source.state_dict()[plain]), name


def test_parts_wrapped_in_place_take_plain_names():
    source, model = trained(), create()
    model.stages[1] = torch.compile(model.stages[1])
    model.load_state_dict(source.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))


def around(kind):
    """A model with the layers of fma2d somewhere in it, and names of weights that are decayed all the same."""
    if kind == "backbone":
        return create(), {"stages.0.patch_embed.proj.weight", "head.fc.weight"}
    if kind == "segmentor":
        model = nn.ModuleDict(dict(backbone=create(num_classes=0), decoder=nn.Conv2d(16, 3, 1)))
        return model, {"backbone.stages.1.blocks.0.attn.qkv.weight", "decoder.weight"}
    if kind == "text":
        return nn.Sequential(CausalLM(9, 8, 2, 2, cell_size=4, rank=2, context=32)), {"0.embed.weight"}
    if kind == "parametrised":
        model = create()
        nn.utils.parametrize.register_parametrization(layers(model)[0], "kernels", nn.Softplus())
        return model, {"head.fc.weight"}
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3)
    model = nn.ModuleDict(dict(vit=fma2d.convert_attention(vit, cell_size=2, rank=1, levels=2)))
    return model, {"vit.head.weight", "vit.blocks.0.attn.qkv.weight"}


@pytest.mark.parametrize("kind", ["backbone", "segmentor", "text", "parametrised", "vit"])
def test_no_weight_decay_on_kernels_norms_and_biases(kind):
    model, decayed = around(kind)
    groups = fma2d.param_groups(model, 0.05)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters())) == sum(len(group["params"]) for group in groups)
    found = {name: decay[id(p)] for name, p in model.named_parameters()}
    spared = {n for n, p in model.named_parameters() if ".kernels" in n or p.dim() == 1 or "_token" in n or "pos_" in n}
    assert any(".kernels" in n for n in spared) and {n for n, rate in found.items() if rate == 0} == spared
    assert decayed <= {n for n, rate in found.items() if rate == 0.05}


@pytest.mark.parametrize("wrong", ["0.05", True, None, float("nan"), -0.1, torch.tensor(0.1)])
def test_a_wrong_weight_decay_is_refused(wrong):
    with pytest.raises((TypeError, ValueError), match="weight_decay"):
        fma2d.param_groups(nn.Linear(2, 2), wrong)


def test_checkpointing_of_feature_extractors():
    """timm's getter, the default, has no switch of its own; a copy must switch its own stages."""
    model = create(features_only=True)
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    assert all(stage.grad_checkpointing for stage in other.model.stages)
    assert not any(stage.grad_checkpointing for stage in model.model.stages)
    other(torch.randn(1, 3, 64, 64))[-1].sum().backward()


def test_fx_traces_with_no_module_named_a_leaf():
    """`create_feature_extractor` of torchvision and quantization by FX stopped at branches on shapes."""
    model, x = create().eval(), torch.randn(1, 3, 72, 96)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x))
    torch.testing.assert_close(traced(x[..., :50]), model(x[..., :50]))


WRONG = [
    (lambda v: fma2d.FMA2d(8, 2, levels=1, **v), dict(proj_drop=4), dict(share_heads="no"), dict(qkv_bias=1)),
    (lambda v: fma2d.FMA2d(8, 2, **dict(levels=1) | v), dict(levels=10**9), dict(levels=1.0), dict(dtype=torch.int64)),
    (lambda v: fma2d.FMA1d(8, 2, levels=1, **v), dict(causal="no"), dict(count_bias=0), dict(variant=[])),
    (lambda v: create(**v), dict(drop_path_rate=2), dict(drop_rate=float("nan")), dict(mlp_ratio=-1), dict(eps="x")),
    (
        lambda v: create(**v),
        dict(in_chans=-1),
        dict(num_classes=True),
        dict(global_pool="mean"),
        dict(depths=(1, 0, 1, 1)),
    ),
    (lambda v: create(**v), dict(img_size=True), dict(attn_layer="mit"), dict(proj_drop_rate="0.1")),
    (lambda v: fma2d.num_levels(cell_size=4, **v), dict(grid=20), dict(grid=(None, 20)), dict(grid=(2.0, 3))),
    (lambda v: fma2d.cover((20, 20), 4, **v), dict(token=5), dict(token=(1.0, 1)), dict(token=("1", 1))),
    (lambda v: CausalLM(9, 8, 1, 1, **v), dict(mlp_ratio="4"), dict(dropout="x"), dict(dropout=1), dict(count_bias=1)),
    (
        lambda v: CausalLM(9, 8, 1, 1).generate(torch.ones(1, 3, dtype=torch.int64), 2, **v),
        dict(temperature=1e-50),
        dict(temperature=10**400),
        dict(lengths="4"),
        dict(lengths={}),
    ),
    (lambda v: CausalLM(9, 8, 1, 1)(torch.ones(1, 3, dtype=torch.int64), **v), dict(cache=[])),
    (
        lambda v: visualize.attention_map(**dict(module=fma2d.FMA2d(8, 1, levels=0), x=IMAGE, token=(1, 1)) | v),
        dict(module=nn.Linear(8, 8)),
        dict(x=[1]),
        dict(x=IMAGE[0]),
        dict(token=3),
        dict(token=(1, 9)),
    ),
    (
        lambda v: visualize.model_attention_map(
            **dict(model=create(), image=IMAGE.movedim(-1, 1)[:, :3], stage=0, block=0, point=(1, 1)) | v
        ),
        dict(model=nn.Identity()),
        dict(image=IMAGE[0]),
        dict(stage=4),
        dict(block=-1),
        dict(point=(1.5, 1)),
        dict(point=(1, 1, 1)),
    ),
    (
        lambda v: visualize.draw_attention(**dict(attention=IMAGE[0, ..., 0], photo=IMAGE[0], point=(1, 1)) | v),
        dict(attention=[1]),
        dict(attention=IMAGE),
        dict(photo=3),
        dict(point=1),
    ),
    (
        lambda v: save_checkpoint(**dict(model=nn.Linear(1, 1), path="nowhere.safetensors") | v),
        dict(model={}),
        dict(path=3),
        dict(path="weights.pth"),
        dict(metadata={1}),
    ),
]


@pytest.mark.parametrize("call, wrong", [(call, wrong) for call, *values in WRONG for wrong in values])
def test_wrong_arguments_are_named_at_the_call(call, wrong):
    (name,) = wrong
    with pytest.raises((TypeError, ValueError), match=name):
        call(wrong)
