"""Recipes: YAML files of hyper-parameters, and their overrides on the command line.

A recipe holds all that decides what a training ends with, and nothing else: where the data are, how many processes
share the work and what is printed are options of the program.
"""

import argparse
import contextlib
import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

import yaml

from ..ending import InputError


@dataclass(frozen=True, kw_only=True)
class CommonRecipe:
    """What every training has: names and meanings are timm's where timm has them.

    Its subclasses add what they train and on what, checks of it (`check`), and to the tables their own entries.
    """

    CHOICES: ClassVar[dict] = dict(clip_mode=("norm", "value", "agc"), amp=(None, "bf16", "fp16"))
    AT_LEAST: ClassVar[dict] = dict(epochs=1, batch_size=1, eval_every=0, seed=0, warmup_epochs=0) | dict.fromkeys(
        ("lr", "min_lr", "warmup_lr", "weight_decay", "clip_grad"), 0
    )
    SHARES: ClassVar[tuple] = ("layer_decay", "ema_decay")  # from 0 to 1

    seed: Annotated[int, "seed of all that is random"] = 0

    epochs: Annotated[int, "epochs in all"] = 300
    batch_size: Annotated[int, "samples an update, over all processes and accumulation steps"] = 1024
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

    def check(self, where: str) -> None:
        """Raise InputError for values that do not fit together; `where` they come from begins the message."""
        if self.warmup_epochs >= self.epochs:
            raise InputError(f"{where}: warmup_epochs {self.warmup_epochs} must be less than epochs {self.epochs}")


@dataclass(frozen=True, kw_only=True)
class Recipe(CommonRecipe):
    """The hyper-parameters of a training on images."""

    CHOICES: ClassVar[dict] = CommonRecipe.CHOICES | dict(
        attention=("fma", "dense", "mit"),
        init_head=("keep", "new"),
        in_chans=(1, 3),
        mixup_mode=("batch", "pair", "elem"),
        train_interpolation=("random", "bilinear", "bicubic"),
        remode=("const", "rand", "pixel"),
    )
    AT_LEAST: ClassVar[dict] = CommonRecipe.AT_LEAST | dict(
        num_classes=1, img_size=1, mixup=0, cutmix=0, color_jitter=0, recount=1
    )
    SHARES: ClassVar[tuple] = (
        *CommonRecipe.SHARES,
        *("drop_rate", "drop_path_rate", "smoothing", "mixup_prob", "mixup_switch_prob"),
        *("hflip", "vflip", "reprob", "crop_pct"),
    )

    model: Annotated[str, "timm name of the model"] = "fma2d_nano"
    attention: Annotated[str, "attention of fma2d_* models: fma, or for comparison dense or mit (MiT's own)"] = "fma"
    model_kwargs: Annotated[dict, "further arguments of the model, e.g. {cell_size: 2}"] = field(default_factory=dict)
    num_classes: Annotated[int | None, "classes; the data must have as many (null: as many as they have)"] = None
    img_size: Annotated[int, "pixels a side; for fma2d_* models also sets for which size kernels are learned"] = 224
    in_chans: Annotated[int, "channels: 3 (RGB) or 1 (grey)"] = 3
    init_from: Annotated[str | None, "checkpoint whose weights the training starts from"] = None
    init_head: Annotated[str, "its classifier: keep, or new where the classes are others"] = "keep"

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

    def check(self, where: str) -> None:
        super().check(where)
        for name in ("scale", "ratio"):
            pair = getattr(self, name)
            if len(pair) != 2 or not 0 < pair[0] <= pair[1] < math.inf:
                raise InputError(f"{where}: {name} must be two positive numbers, the smaller first, got {pair}")
        if self.crop_pct == 0:
            raise InputError(f"{where}: crop_pct must be above 0, got 0")
        for name in ("mean", "std"):
            if (value := getattr(self, name)) is not None and len(value) != self.in_chans:
                raise InputError(f"{where}: {name} needs {self.in_chans} value(s), one a channel, got {value}")


def types_of(kind: type[CommonRecipe]) -> dict[str, type]:
    """Types of a recipe's keys."""
    hints = typing.get_type_hints(kind)
    return {one.name: hints[one.name] for one in dataclasses.fields(kind)}


def add_recipe_arguments(
    parser: argparse.ArgumentParser,
    kind: type[CommonRecipe] = Recipe,
    example: str = "configs/digits/fma2d_nano.yaml",
) -> None:
    """The file, and an option for each of its keys."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help=f"e.g. {example}")
    hints = typing.get_type_hints(kind, include_extras=True)
    group = parser.add_argument_group("hyper-parameters (they override the recipe; values as in YAML)")
    for name, value in dataclasses.asdict(kind()).items():
        shown = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
        text = f"{hints[name].__metadata__[0]} ({shown})".replace("%", "%%")
        group.add_argument(option(name), dest=f"set_{name}", metavar="X", default=argparse.SUPPRESS, help=text)


def option(name: str) -> str:
    """The option for a key."""
    return "--" + name.replace("_", "-")


def recipe_from_arguments(args: argparse.Namespace, kind: type[CommonRecipe] = Recipe) -> CommonRecipe:
    """The recipe of the file with the overrides."""
    values = read_values(args.recipe, kind)
    for name in types_of(kind):
        if (text := getattr(args, f"set_{name}", None)) is not None:
            try:
                values[name] = yaml.safe_load(text)
            except yaml.YAMLError:
                raise InputError(f"{option(name)}: {text!r} is not YAML") from None
    return make_recipe(values, str(args.recipe), kind)


def read_values(path: Path, kind: type[CommonRecipe] = Recipe, above: tuple[Path, ...] = ()) -> dict:
    """The keys of a file; the file named by its key `base` comes first, path relative to the file."""
    path = Path(path)
    if path.resolve() in above:
        raise InputError(f"{path} is its own base")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must be a mapping of keys to values")
    known = ["base", *types_of(kind)]
    if unknown := [str(key) for key in values if key not in known]:
        raise InputError(f"{path}: unknown key {', '.join(unknown)}; the keys are {', '.join(known)}")
    base = values.pop("base", None)
    return (read_values(path.parent / base, kind, (*above, path.resolve())) if base else {}) | values


def make_recipe(values: dict, where: str, kind: type[CommonRecipe] = Recipe) -> CommonRecipe:
    """A recipe of checked values; `where` they come from begins the message of an error."""
    recipe = kind(**{name: _checked(name, value, where, kind) for name, value in values.items()})
    recipe.check(where)
    return recipe


def _checked(name: str, value, where: str, kind: type[CommonRecipe]):
    wanted = types_of(kind)[name]
    kinds = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if float in kinds and isinstance(value, str):  # YAML takes 1e-3 for a string
        with contextlib.suppress(ValueError):
            value = float(value)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join("null" if one is types.NoneType else one.__name__ for one in kinds)
        raise InputError(f"{where}: {name} must be {names}, got {value!r}")
    if isinstance(value, list) and not all(isinstance(x, int | float) and not isinstance(x, bool) for x in value):
        raise InputError(f"{where}: {name} must be a list of numbers, got {value!r}")
    if name in kind.CHOICES and value not in kind.CHOICES[name]:
        shown = ", ".join("null" if choice is None else str(choice) for choice in kind.CHOICES[name])
        raise InputError(f"{where}: {name} must be one of {shown}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where}: {name} must be finite, got {value}")
    if value is not None and name in kind.AT_LEAST and value < kind.AT_LEAST[name]:
        raise InputError(f"{where}: {name} must be at least {kind.AT_LEAST[name]}, got {value}")
    if value is not None and name in kind.SHARES and not 0 <= value <= 1:
        raise InputError(f"{where}: {name} must be from 0 to 1, got {value}")
    return value


def to_yaml(recipe: CommonRecipe) -> str:
    """The recipe as a file that `read_values` takes."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, default_flow_style=None)


def differences(recipe: CommonRecipe, stored: dict) -> list[str]:
    """What differs from the stored hyper-parameters, as `name new (was old)`; keys added since have their default."""
    now, stored = dataclasses.asdict(recipe), dataclasses.asdict(type(recipe)()) | stored
    names = [name for name in {**now, **stored} if now.get(name) != stored.get(name)]
    return [f"{name} {now.get(name)} (was {stored.get(name)})" for name in names]
