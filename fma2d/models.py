"""The registered timm models, their default cfgs, and how weights come into them.

No weights are published: no cfg has a url. Weights that ship with the package go into `PACKAGED`.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import is_scriptable
from timm.models import build_model_with_cfg, generate_default_cfgs, list_pretrained, register_model
from timm.models._builder import resolve_pretrained_cfg
from torch import Tensor, nn

from .backbone import FMA2DBackbone
from .checkpoint import check_state_dict, logger, report_loads, strip_compiled, take_backbone_keys

WEIGHTS = Path(__file__).parent / "weights"
ARCHS = {
    "nano": dict(dims=(32, 64, 160, 256), depths=(2, 2, 2, 2), head_dim=32),
    "tiny": dict(dims=(64, 128, 320, 512), depths=(3, 4, 6, 3), head_dim=64),
    "small": dict(dims=(64, 128, 320, 512), depths=(3, 4, 18, 3), head_dim=64),
    "base": dict(dims=(128, 256, 512, 1024), depths=(2, 2, 18, 2), head_dim=64),
    "large": dict(dims=(192, 384, 768, 1536), depths=(2, 2, 18, 2), head_dim=64),
}
CLASSES = {"in1k": 1000, "in22k": 21841}
DEFAULT_TAG = "in1k"


@dataclass(frozen=True)
class Packaged:
    """Weights in the package: `fma2d/weights/<file>`.

    Attributes:
        file: name of the safetensors file.
        cfg: what differs from the cfg of the default tag (`num_classes`, `input_size`, `mean`, ...).
        settings: arguments of the model that differ from its defaults (`cell_size`, ...).
    """

    file: str
    cfg: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)


# By name and tag, as in "fma2d_nano.digits".
PACKAGED: dict[str, Packaged] = {
    "fma2d_nano.digits": Packaged(
        "fma2d_nano_digits.safetensors",
        cfg=dict(size=32, num_classes=10, input_size=(1, 32, 32), mean=(0.3094,), std=(0.3488,), crop_pct=1.0),
        settings=dict(cell_size=2, rank=1),
    ),
}


def _cfg(size: int = 224, num_classes: int = 1000, **changes) -> dict:
    cfg = dict(
        url="",
        num_classes=num_classes,
        input_size=(3, size, size),
        pool_size=(size // 32, size // 32),
        crop_pct=0.9 if size == 224 else 1.0,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="stages.0.patch_embed.proj",
        classifier="head.fc",
        license="apache-2.0",
    )
    return cfg | changes


def make_default_cfgs(packaged: dict[str, Packaged]) -> dict:
    """timm's default cfgs of all models.

    timm takes the first tag that has weights as what the untagged name means. `pretrained=True` on an untagged name
    must not take weights that solve another task, so the default tag is marked as such (by the `*`), and comes after
    the packaged ones, since timm lets a tag with weights displace an earlier mark.
    """
    cfgs = {name: _cfg(**weights.cfg, file=str(WEIGHTS / weights.file)) for name, weights in packaged.items()}
    for size in ARCHS:
        cfgs[f"fma2d_{size}.{DEFAULT_TAG}*"] = _cfg()
        for data, num_classes in CLASSES.items():
            for pixels in (224, 384, 512):
                tag = data if pixels == 224 else f"{data}_{pixels}"
                if tag != DEFAULT_TAG:
                    cfgs[f"fma2d_{size}.{tag}"] = _cfg(pixels, num_classes)
    return generate_default_cfgs(cfgs)


default_cfgs = make_default_cfgs(PACKAGED)


def _create(
    name: str,
    pretrained: bool = False,
    variant: str | None = None,
    pretrained_cfg: str | dict | None = None,
    pretrained_cfg_overlay: dict | None = None,
    **kwargs,
) -> nn.Module:
    """Build a registered model; `variant` is the attention's (timm's builder calls the model's name that)."""
    if is_scriptable():
        raise RuntimeError(
            f"{name} does not support TorchScript (scriptable=True); use torch.compile, torch.export or tools/export.py"
        )
    cfg = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay)
    has_weights = bool(cfg.has_weights or cfg.state_dict)
    if pretrained and not has_weights:
        raise RuntimeError(
            f"no weights are published for {name}{f'.{cfg.tag}' if cfg.tag else ''}. Weights come from a file "
            "(pretrained=True with pretrained_cfg_overlay=dict(file=...), or checkpoint_path=...): trained with "
            "tools/train_classifier.py or converted from MiT with tools/convert_mit.py. "
            f"Tags with weights: {', '.join(list_pretrained(f'{name}*')) or 'none'}."
        )
    if not pretrained and {"file", "state_dict"} & set(pretrained_cfg_overlay or {}):
        raise ValueError("pretrained_cfg_overlay names weights, which only pretrained=True loads; got pretrained=False")
    packaged = PACKAGED.get(f"{name}.{cfg.tag}")
    defaults = dict(packaged.settings if packaged else {}, img_size=tuple(cfg.input_size[-2:]))
    kwargs = defaults | kwargs
    features_only = kwargs.get("features_only", False)
    if features_only:
        kwargs["num_classes"] = 0  # timm takes the classifier out in the end: so it is not missed in a file
    model = build_model_with_cfg(
        partial(FMA2DBackbone, **({} if variant is None else {"variant": variant})),
        name,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        pretrained_filter_fn=partial(_check_file, has_head=not features_only),
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter", flatten_sequential=True),
        **kwargs,
    )
    if features_only:
        # timm's extractors hide the backbone's own method, by which its optimizers spare the aggregation kernels.
        model.no_weight_decay = partial(
            set, [name for name, _ in model.named_parameters() if name.endswith(".kernels")]
        )
        if isinstance(getattr(model, "model", None), FMA2DBackbone):  # timm's getter has no switch of its own
            model.set_grad_checkpointing = model.model.set_grad_checkpointing
        model._register_load_state_dict_pre_hook(take_backbone_keys, with_module=True)
        if not any(isinstance(m, FMA2DBackbone) for m in model.modules()):
            report_loads(model)
    return model


def _check_file(state_dict: dict[str, Tensor], model: FMA2DBackbone, has_head: bool) -> dict[str, Tensor]:
    """Check the names in a file before timm adapts it to other channels or classes and loads, loosely, what is left."""
    strip_compiled(model, state_dict)
    check_state_dict(model, state_dict, optional=r"head\.", shapes=False)
    stored, expected = state_dict.get("head.fc.weight"), model.pretrained_cfg["num_classes"]
    if has_head and stored is not None and model.num_classes not in (0, expected):
        logger.warning(
            "the file's classifier (%d classes) is dropped: the model has %d classes, its pretrained_cfg %d; to keep a "
            "classifier that fits, give num_classes in pretrained_cfg_overlay too",
            len(stored),
            model.num_classes,
            expected,
        )
    return state_dict


@register_model
def fma2d_nano(pretrained: bool = False, **kwargs) -> FMA2DBackbone:
    """MiT-B0's skeleton."""
    return _create("fma2d_nano", pretrained, **(ARCHS["nano"] | kwargs))


@register_model
def fma2d_tiny(pretrained: bool = False, **kwargs) -> FMA2DBackbone:
    """MiT-B2's skeleton."""
    return _create("fma2d_tiny", pretrained, **(ARCHS["tiny"] | kwargs))


@register_model
def fma2d_small(pretrained: bool = False, **kwargs) -> FMA2DBackbone:
    """MiT-B3's skeleton."""
    return _create("fma2d_small", pretrained, **(ARCHS["small"] | kwargs))


@register_model
def fma2d_base(pretrained: bool = False, **kwargs) -> FMA2DBackbone:
    """The paper's FMA2D-B; its size matched to Swin-B's."""
    return _create("fma2d_base", pretrained, **(ARCHS["base"] | kwargs))


@register_model
def fma2d_large(pretrained: bool = False, **kwargs) -> FMA2DBackbone:
    """The paper's FMA2D-L; its size matched to Swin-L's."""
    return _create("fma2d_large", pretrained, **(ARCHS["large"] | kwargs))
