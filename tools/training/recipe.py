"""Recipes: YAML files of hyper-parameters, and their overrides on the command line.

A recipe holds all that decides what a training ends with, and nothing else: where the data are, how many processes
share the work and what is printed are options of the program.
"""

import argparse
import contextlib
import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import yaml

from . import InputError


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of a training; names and meanings are timm's where timm has them."""

    model: Annotated[str, "timm name of the model"] = "fma2d_nano"
    attention: Annotated[str, "attention of fma2d_* models: fma, or for comparison dense or mit (MiT's own)"] = "fma"
    model_kwargs: Annotated[dict, "further arguments of the model, e.g. {cell_size: 2}"] = field(default_factory=dict)
    num_classes: Annotated[int | None, "classes; the data must have as many (null: as many as they have)"] = None
    img_size: Annotated[int, "pixels a side; for fma2d_* models also sets for which size kernels are learned"] = 224
    in_chans: Annotated[int, "channels: 3 (RGB) or 1 (grey)"] = 3
    init_from: Annotated[str | None, "checkpoint whose weights the training starts from"] = None
    init_head: Annotated[str, "its classifier: keep, or new where the classes are others"] = "keep"
    seed: Annotated[int, "seed of all that is random"] = 0

    epochs: Annotated[int, "epochs in all"] = 300
    batch_size: Annotated[int, "images an update, over all processes and accumulation steps"] = 1024
    opt: Annotated[str, "timm's name of the optimizer"] = "adamw"
    opt_kwargs: Annotated[dict, "further arguments of the optimizer, e.g. {betas: [0.9, 0.95]}"] = field(
        default_factory=dict
    )
    lr: Annotated[float, "learning rate at this batch size; it is not scaled"] = 1e-3
    weight_decay: Annotated[float, "weight decay; none on biases, norms and aggregation kernels"] = 0.05
    layer_decay: Annotated[float | None, "factor of the learning rate from a layer to the one below it"] = None
    sched: Annotated[str, "timm's name of the schedule, stepped every update"] = "cosine"
    min_lr: Annotated[float, "learning rate at the end"] = 1e-6
    warmup_lr: Annotated[float, "learning rate at the start of the warm-up"] = 1e-6
    warmup_epochs: Annotated[float, "epochs of warm-up, part of all epochs"] = 0
    clip_grad: Annotated[float | None, "clip gradients at this value"] = None
    clip_mode: Annotated[str, "how gradients are clipped: norm, value or agc"] = "norm"
    amp: Annotated[str | None, "mixed precision: bf16 or fp16 (null: float32)"] = None
    ema_decay: Annotated[float | None, "decay of a moving average of the weights, which then is what counts"] = None
    eval_every: Annotated[
        int, "epochs from one validation to the next, and one at the end (0: never, without data)"
    ] = 1

    drop_rate: Annotated[float, "dropout before the classifier"] = 0.0
    drop_path_rate: Annotated[float, "stochastic depth of the last block"] = 0.0
    smoothing: Annotated[float, "label smoothing"] = 0.1
    mixup: Annotated[float, "mixup alpha (0: none)"] = 0.0
    cutmix: Annotated[float, "cutmix alpha (0: none)"] = 0.0
    mixup_prob: Annotated[float, "probability of mixup or cutmix"] = 1.0
    mixup_switch_prob: Annotated[float, "probability of cutmix where both may be"] = 0.5
    mixup_mode: Annotated[str, "mix by batch, pair or elem"] = "batch"
    scale: Annotated[list, "area of a random crop, as shares of the image"] = field(default_factory=lambda: [0.08, 1.0])
    ratio: Annotated[list, "width over height of a random crop"] = field(default_factory=lambda: [0.75, 1.3333])
    hflip: Annotated[float, "probability of a horizontal flip"] = 0.5
    vflip: Annotated[float, "probability of a vertical flip"] = 0.0
    color_jitter: Annotated[float | None, "strength of colour jitter (only without auto_augment)"] = 0.4
    auto_augment: Annotated[str | None, "timm's policy, e.g. rand-m9-mstd0.5-inc1"] = None
    train_interpolation: Annotated[str, "of training crops: random, bilinear or bicubic"] = "random"
    reprob: Annotated[float, "probability of random erasing"] = 0.0
    remode: Annotated[str, "what is put there: const, rand or pixel"] = "pixel"
    recount: Annotated[int, "number of erased places"] = 1
    mean: Annotated[list | None, "of the channels, 0 to 1 (null: the model's own)"] = None
    std: Annotated[list | None, "of the channels (null: the model's own)"] = None
    interpolation: Annotated[str | None, "in validation (null: the model's own)"] = None
    crop_pct: Annotated[float | None, "share of the image that validation sees (null: the model's own)"] = None


TYPES = typing.get_type_hints(Recipe)
HELP = {name: hint.__metadata__[0] for name, hint in typing.get_type_hints(Recipe, include_extras=True).items()}
CHOICES = dict(
    attention=("fma", "dense", "mit"),
    init_head=("keep", "new"),
    clip_mode=("norm", "value", "agc"),
    amp=(None, "bf16", "fp16"),
    in_chans=(1, 3),
    mixup_mode=("batch", "pair", "elem"),
    train_interpolation=("random", "bilinear", "bicubic"),
    remode=("const", "rand", "pixel"),
)
AT_LEAST = dict(num_classes=1, img_size=1, epochs=1, batch_size=1, eval_every=0, seed=0, warmup_epochs=0)


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """The file, and an option for each of its keys."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="e.g. configs/digits/fma2d_nano.yaml")
    group = parser.add_argument_group("hyper-parameters (they override the recipe; values as in YAML)")
    for name, value in dataclasses.asdict(Recipe()).items():
        shown = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
        text = f"{HELP[name]} ({shown})".replace("%", "%%")
        group.add_argument(option(name), dest=f"set_{name}", metavar="X", default=argparse.SUPPRESS, help=text)


def option(name: str) -> str:
    """The option for a key."""
    return "--" + name.replace("_", "-")


def recipe_from_arguments(args: argparse.Namespace) -> Recipe:
    """The recipe of the file with the overrides."""
    values = read_values(args.recipe)
    for name in TYPES:
        if (text := getattr(args, f"set_{name}", None)) is not None:
            try:
                values[name] = yaml.safe_load(text)
            except yaml.YAMLError:
                raise InputError(f"{option(name)}: {text!r} is not YAML") from None
    return make_recipe(values, str(args.recipe))


def read_values(path: Path, above: tuple[Path, ...] = ()) -> dict:
    """The keys of a file; the file named by its key `base` comes first, path relative to the file."""
    path = Path(path)
    if path.resolve() in above:
        raise InputError(f"{path} is its own base")
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must be a mapping of keys to values")
    if unknown := [str(key) for key in values if key not in TYPES and key != "base"]:
        raise InputError(f"{path}: unknown key {', '.join(unknown)}; the keys are {', '.join(['base', *TYPES])}")
    base = values.pop("base", None)
    return (read_values(path.parent / base, (*above, path.resolve())) if base else {}) | values


def make_recipe(values: dict, where: str) -> Recipe:
    """A recipe of checked values; `where` they come from begins the message of an error."""
    checked = {name: _checked(name, value, where) for name, value in values.items()}
    recipe = Recipe(**checked)
    for name in ("scale", "ratio"):
        pair = getattr(recipe, name)
        if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
            raise InputError(f"{where}: {name} must be two positive numbers, the smaller first, got {pair}")
    for name in ("mean", "std"):
        if (value := getattr(recipe, name)) is not None and len(value) != recipe.in_chans:
            raise InputError(f"{where}: {name} needs {recipe.in_chans} value(s), one a channel, got {value}")
    if recipe.warmup_epochs >= recipe.epochs:
        raise InputError(f"{where}: warmup_epochs {recipe.warmup_epochs} must be less than epochs {recipe.epochs}")
    return recipe


def _checked(name: str, value, where: str):
    kinds = typing.get_args(TYPES[name]) if isinstance(TYPES[name], types.UnionType) else (TYPES[name],)
    if float in kinds and isinstance(value, str):  # YAML takes 1e-3 for a string
        with contextlib.suppress(ValueError):
            value = float(value)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in kinds)
        raise InputError(f"{where}: {name} must be {names}, got {value!r}")
    if isinstance(value, list) and not all(isinstance(x, int | float) and not isinstance(x, bool) for x in value):
        raise InputError(f"{where}: {name} must be a list of numbers, got {value!r}")
    if name in CHOICES and value not in CHOICES[name]:
        shown = ", ".join("null" if choice is None else str(choice) for choice in CHOICES[name])
        raise InputError(f"{where}: {name} must be one of {shown}, got {value!r}")
    if value is not None and name in AT_LEAST and value < AT_LEAST[name]:
        raise InputError(f"{where}: {name} must be at least {AT_LEAST[name]}, got {value}")
    return value


def to_yaml(recipe: Recipe) -> str:
    """The recipe as a file that `read_values` takes."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, default_flow_style=None)


def differences(recipe: Recipe, stored: dict) -> list[str]:
    """What differs from the stored hyper-parameters, as `name new (was old)`; keys added since have their default."""
    now, stored = dataclasses.asdict(recipe), dataclasses.asdict(Recipe()) | stored
    names = [name for name in {**now, **stored} if now.get(name) != stored.get(name)]
    return [f"{name} {now.get(name)} (was {stored.get(name)})" for name in names]
