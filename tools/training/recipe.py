"""Recipes: YAML files of hyper-parameters, and their overrides on the command line.

A recipe holds all that decides what a training ends with, and nothing else: where the data are, how many processes
share the work and what is printed are options of the program.
"""

import argparse
import dataclasses
import types
import typing
from dataclasses import dataclass
from pathlib import Path

import yaml

from . import InputError


def _setting(default, text: str):
    factory = isinstance(default, dict | list)
    value = dict(default_factory=lambda: type(default)(default)) if factory else dict(default=default)
    return dataclasses.field(**value, metadata=dict(help=text))


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of a training; names and meanings are timm's where timm has them."""

    model: str = _setting("fma2d_nano", "timm name of the model")
    attention: str = _setting("fma", "attention of fma2d_* models: fma, or for comparison dense or mit (MiT's own)")
    model_kwargs: dict = _setting({}, "further arguments of the model, e.g. {cell_size: 2}")
    num_classes: int | None = _setting(None, "classes; the data must have as many (null: as many as they have)")
    img_size: int = _setting(224, "pixels a side; for fma2d_* models also sets for which size kernels are learned")
    in_chans: int = _setting(3, "channels: 3 (RGB) or 1 (grey)")
    init_from: str | None = _setting(None, "checkpoint whose weights the training starts from")
    init_head: str = _setting("keep", "its classifier: keep, or new where the classes are others")
    seed: int = _setting(0, "seed of all that is random")

    epochs: int = _setting(300, "epochs in all")
    batch_size: int = _setting(1024, "images an update, over all processes and accumulation steps")
    opt: str = _setting("adamw", "timm's name of the optimizer")
    opt_kwargs: dict = _setting({}, "further arguments of the optimizer, e.g. {betas: [0.9, 0.95]}")
    lr: float = _setting(1e-3, "learning rate at this batch size; it is not scaled")
    weight_decay: float = _setting(0.05, "weight decay; none on biases, norms and aggregation kernels")
    layer_decay: float | None = _setting(None, "factor of the learning rate from a layer to the one below it")
    sched: str = _setting("cosine", "timm's name of the schedule, stepped every update")
    min_lr: float = _setting(1e-6, "learning rate at the end")
    warmup_lr: float = _setting(1e-6, "learning rate at the start of the warm-up")
    warmup_epochs: float = _setting(0, "epochs of warm-up, part of all epochs")
    clip_grad: float | None = _setting(None, "clip gradients at this value")
    clip_mode: str = _setting("norm", "how gradients are clipped: norm, value or agc")
    amp: str | None = _setting(None, "mixed precision: bf16 or fp16 (null: float32)")
    ema_decay: float | None = _setting(None, "decay of a moving average of the weights, which then is what counts")
    eval_every: int = _setting(1, "epochs from one validation to the next; the last one is always followed by one "
                                  "(0: no validation, no data for it needed)")  # fmt: skip

    drop_rate: float = _setting(0.0, "dropout before the classifier")
    drop_path_rate: float = _setting(0.0, "stochastic depth of the last block")
    smoothing: float = _setting(0.1, "label smoothing")
    mixup: float = _setting(0.0, "mixup alpha (0: none)")
    cutmix: float = _setting(0.0, "cutmix alpha (0: none)")
    mixup_prob: float = _setting(1.0, "probability of mixup or cutmix")
    mixup_switch_prob: float = _setting(0.5, "probability of cutmix where both may be")
    mixup_mode: str = _setting("batch", "mix by batch, pair or elem")
    scale: list = _setting([0.08, 1.0], "area of a random crop, as shares of the image")
    ratio: list = _setting([0.75, 1.3333], "width over height of a random crop")
    hflip: float = _setting(0.5, "probability of a horizontal flip")
    vflip: float = _setting(0.0, "probability of a vertical flip")
    color_jitter: float | None = _setting(0.4, "strength of colour jitter (only without auto_augment)")
    auto_augment: str | None = _setting(None, "timm's policy, e.g. rand-m9-mstd0.5-inc1")
    train_interpolation: str = _setting("random", "of training crops: random, bilinear or bicubic")
    reprob: float = _setting(0.0, "probability of random erasing")
    remode: str = _setting("pixel", "what is put there: const, rand or pixel")
    recount: int = _setting(1, "number of erased places")
    mean: list | None = _setting(None, "of the channels, 0 to 1 (null: the model's own)")
    std: list | None = _setting(None, "of the channels (null: the model's own)")
    interpolation: str | None = _setting(None, "in validation (null: the model's own)")
    crop_pct: float | None = _setting(None, "share of the image that validation sees (null: the model's own)")


FIELDS = {field.name: field for field in dataclasses.fields(Recipe)}
TYPES = typing.get_type_hints(Recipe)
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
AT_LEAST = dict(num_classes=1, img_size=1, epochs=1, batch_size=1, eval_every=0, seed=0, lr=0, weight_decay=0)


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """The file, and an option for each of its keys."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="e.g. configs/digits/fma2d_nano.yaml")
    group = parser.add_argument_group("hyper-parameters (they override the recipe; values as in YAML)")
    for name, field in FIELDS.items():
        value = getattr(Recipe(), name)
        shown = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
        text = f"{field.metadata['help']} ({shown})".replace("%", "%%")
        names = dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}"))
        group.add_argument(*names, dest=f"set_{name}", metavar="X", default=argparse.SUPPRESS, help=text)


def recipe_from_arguments(args: argparse.Namespace) -> Recipe:
    """The recipe of the file with the overrides."""
    values = read_values(args.recipe)
    for name in FIELDS:
        if (text := getattr(args, f"set_{name}", None)) is not None:
            try:
                values[name] = yaml.safe_load(text)
            except yaml.YAMLError:
                raise InputError(f"--{name.replace('_', '-')}: {text!r} is not YAML") from None
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
    if unknown := [str(key) for key in values if key not in FIELDS and key != "base"]:
        raise InputError(f"{path}: unknown key {', '.join(unknown)}; the keys are {', '.join(['base', *FIELDS])}")
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
    return recipe


def _checked(name: str, value, where: str):
    kinds = typing.get_args(TYPES[name]) if isinstance(TYPES[name], types.UnionType) else (TYPES[name],)
    if float in kinds and isinstance(value, str):  # YAML takes 1e-3 for a string
        try:
            value = float(value)
        except ValueError:
            pass
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
    """What differs from the stored hyper-parameters, as `name: new (was old)`."""
    now = dataclasses.asdict(recipe)
    names = [name for name in {**now, **stored} if now.get(name) != stored.get(name)]
    return [f"{name} {now.get(name)} (was {stored.get(name)})" for name in names]
