"""Model, optimizer and schedule of a recipe."""

import difflib
from collections.abc import Callable
from pathlib import Path

import timm
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

import fma2d  # noqa: F401  registers its models
from fma2d.baselines import DenseAttention, mit_attention

from ..ending import InputError
from .checkpoints import load_weights
from .recipe import Recipe

# What `attention` may be other than fma: an `attn_layer`.
OTHER_ATTENTION = dict(dense=lambda dim, num_heads, stage, block: DenseAttention(dim, num_heads), mit=mit_attention)


def no_model(name: str) -> str:
    """That timm has no such model, and which are meant perhaps."""
    near = difflib.get_close_matches(name, timm.list_models(), cutoff=0.8)
    return f"timm has no model {name}" + (f"; near it are {', '.join(near)}" if near else "")


def build_model(
    name: str, model_kwargs: dict, *, num_classes: int, in_chans: int, img_size: int, attention: str = "fma", **rates
) -> nn.Module:
    """A timm model; `rates` are those of dropout.

    Raises:
        InputError: for an unknown model, or arguments that it does not take.
    """
    if not timm.is_model(name):
        raise InputError(no_model(name))
    kwargs = dict(model_kwargs)
    if name.startswith("fma2d_"):
        kwargs.setdefault("img_size", img_size)
    if attention != "fma":
        if not name.startswith("fma2d_"):
            raise InputError(f"attention {attention} can be chosen for fma2d_* models only, not for {name}")
        kwargs["attn_layer"] = OTHER_ATTENTION[attention]
    if taken := [key for key in ("num_classes", "in_chans", "attn_layer", *rates) if key in model_kwargs]:
        raise InputError(f"model_kwargs {', '.join(taken)} have keys of their own in a recipe")
    try:
        return timm.create_model(name, num_classes=num_classes, in_chans=in_chans, **rates, **kwargs)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"cannot build {name} with {model_kwargs}: {error}") from None


def recipe_model(recipe: Recipe, num_classes: int, say: Callable[[str], object] = print) -> nn.Module:
    """The recipe's model, with the weights of `init_from`, of which it may `say` something."""
    model = build_model(
        recipe.model,
        recipe.model_kwargs,
        num_classes=num_classes,
        in_chans=recipe.in_chans,
        img_size=recipe.img_size,
        attention=recipe.attention,
        drop_rate=recipe.drop_rate,
        drop_path_rate=recipe.drop_path_rate,
    )
    if recipe.init_from:
        load_weights(model, Path(recipe.init_from), recipe.model, new_head=recipe.init_head == "new", say=say)
    elif recipe.init_head == "new":
        raise InputError("init_head new needs init_from, the checkpoint to start from")
    return model


def data_config(recipe: Recipe, model: nn.Module) -> dict:
    """Size, mean, std, crop and interpolation of the images: the recipe's, else the model's."""
    mean, std = recipe.mean, recipe.std
    if recipe.in_chans == 1 and len(model.pretrained_cfg["mean"]) != 1 and (mean is None or std is None):
        raise InputError("in_chans 1 needs mean and std, one value each: the model's own are for 3 channels")
    own = dict(mean=mean, std=std, interpolation=recipe.interpolation, crop_pct=recipe.crop_pct)
    size = (recipe.in_chans, recipe.img_size, recipe.img_size)
    return resolve_data_config(dict(input_size=size, **own), model=model)


def build_optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    """timm's optimizer; no weight decay on vectors nor on what the model excepts."""
    try:
        return create_optimizer_v2(
            model,
            recipe.opt,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            layer_decay=recipe.layer_decay,
            **recipe.opt_kwargs,
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise InputError(f"cannot build the optimizer {recipe.opt} with {recipe.opt_kwargs}: {error}") from None


def build_scheduler(recipe: Recipe, optimizer: Optimizer, updates_per_epoch: int) -> Scheduler:
    """timm's schedule, to be stepped every update."""
    try:
        scheduler, epochs = create_scheduler_v2(
            optimizer,
            recipe.sched,
            num_epochs=recipe.epochs,
            min_lr=recipe.min_lr,
            warmup_lr=recipe.warmup_lr,
            warmup_epochs=recipe.warmup_epochs,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise InputError(f"cannot build the schedule {recipe.sched}: {error}") from None
    if scheduler is None or epochs != recipe.epochs:
        raise InputError(f"the schedule {recipe.sched} does not take {recipe.epochs} epochs as a whole; try cosine")
    return scheduler
