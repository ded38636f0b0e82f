"""Image folders, ROOT/CLASS/IMAGE, read in an order and with augmentation that depend on seed, epoch and index only."""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from ..ending import InputError
from .recipe import Recipe
from .seeding import IMAGE, order_at, seed_at

MODES = {1: "L", 3: "RGB"}
WORKERS = min(4, os.cpu_count() or 1)  # processes that read images, unless told otherwise


@dataclass(frozen=True)
class Images:
    """Paths with labels for training and validation, and the class names in the order of the labels."""

    train: list[tuple[str, int]]
    val: list[tuple[str, int]]
    classes: list[str]


def read_images(data_dir: Path, num_classes: int | None, validation: bool) -> Images:
    """The images of `data_dir/train` and, if asked for, of `data_dir/val`; `num_classes` or any number of classes."""
    root = find_split(data_dir, "train")
    train, classes = list_images(root)
    if num_classes not in (None, len(classes)):
        raise InputError(f"num_classes is {num_classes}, but {root} has {len(classes)} class folders")
    hint = "; eval_every: 0 trains without it"
    val = list_images(find_split(data_dir, "val", hint), classes)[0] if validation else []
    return Images(train, val, classes)


def find_split(data_dir: Path, split: str, hint: str = "") -> Path:
    """`data_dir/split`; "val" may be called "validation". The `hint` ends the message if there is none."""
    if not data_dir.is_dir():
        raise InputError(f"there is no folder {data_dir}; --data-dir must hold train/CLASS/IMAGE and val/CLASS/IMAGE")
    names = ("val", "validation") if split == "val" else (split,)
    for name in names:
        if (data_dir / name).is_dir():
            return data_dir / name
    raise InputError(f"{data_dir} has no folder {names[0]}{hint}")


def list_images(root: Path, classes: list[str] | None = None) -> tuple[list[tuple[str, int]], list[str]]:
    """Paths with labels, and the class names in the order of the labels (by name, numbers as numbers).

    Args:
        root: holds a folder for each class.
        classes: those of the training data, for other splits; a class without a folder here is allowed.
    """
    try:
        reader = ReaderImageFolder(str(root))
    except RuntimeError:
        extensions = ", ".join(get_img_extensions())
        raise InputError(f"no image in {root}: it must hold CLASS/IMAGE with one of the endings {extensions}") from None
    for path, _ in reader.samples:
        if os.path.dirname(os.path.dirname(path)) != str(root):
            raise InputError(f"{path} must lie in a class folder of {root}, {root}/CLASS/IMAGE")
    folders = {entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")}
    if empty := sorted(folders - reader.class_to_idx.keys()):
        raise InputError(f"no image in {len(empty)} class folder(s) of {root}: {_some(empty)}; fill or remove them")
    found = list(reader.class_to_idx)
    if classes is None:
        return reader.samples, found
    if unknown := sorted(set(found) - set(classes)):
        raise InputError(f"{root} has {len(unknown)} class folder(s) that training does not know: {_some(unknown)}")
    label = {name: classes.index(name) for name in found}
    return [(path, label[found[index]]) for path, index in reader.samples], classes


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def open_image(path: str, channels: int) -> Image.Image:
    """The decoded image, of 8 bits a channel, turned as its EXIF tag says; of 16 bits the upper 8 are taken.

    Raises:
        InputError: that names the file, if it cannot be decoded to its end, or holds values of 32 bits.
    """
    try:
        # By an open file: Pillow would map one that is named, and garbles TIFFs that lie on their side then.
        with open(path, "rb") as file, Image.open(file) as image:
            wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
            if image.mode in ("I", "F") and not wide:
                raise ValueError("values of 32 bits have no range of their own; write it with 8 or 16 bits a channel")
            image = ImageOps.exif_transpose(image)
            if wide:  # which Pillow would cut at 255, not scale
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
            return image.convert(MODES[channels])
    except Exception as error:  # PIL's decoders raise almost anything on broken files
        raise InputError(f"cannot read the image {path}: {' '.join(str(error).split())}") from None


class ImageFolder(Dataset):
    """Images by key `(epoch, index)`; what is random in the transform depends on the seed and the key alone.

    An image that cannot be read comes out as the `InputError`, for `read` to raise where its message is not buried in
    a worker's traceback.
    """

    def __init__(self, samples: list[tuple[str, int]], channels: int, transform, seed: int):
        self.samples, self.channels, self.transform, self.seed = samples, channels, transform, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int] | InputError:
        epoch, index = key
        path, label = self.samples[index]
        try:
            image = open_image(path, self.channels)
        except InputError as error:
            return error
        seed_at(IMAGE, self.seed, epoch, index)
        return self.transform(image), label


class TrainBatches:
    """Batch sampler: the keys of one process's share of each update of an epoch, in `accum` pieces.

    An update takes the next `batch_size` images of the epoch's order, whatever the number of processes and pieces;
    the last, incomplete one is left out.
    """

    def __init__(self, count: int, batch_size: int, accum: int, rank: int, world: int, seed: int, unit: str = "images"):
        if batch_size % (accum * world):
            raise InputError(
                f"batch_size {batch_size} cannot be shared by {world} process(es) x {accum} accumulation step(s)"
            )
        if batch_size > count:
            raise InputError(f"batch_size {batch_size} is more than the {count} {unit} for training")
        self.count, self.batch_size, self.accum, self.seed = count, batch_size, accum, seed
        self.rank, self.world, self.piece = rank, world, batch_size // (accum * world)
        self.updates = count // batch_size
        self.epoch = 0

    def __len__(self) -> int:
        return self.updates * self.accum

    def order(self) -> list[int]:
        """The indices of the epoch."""
        return order_at(self.seed, self.epoch, self.count)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = self.order()
        for step in range(len(self)):
            start = (step * self.world + self.rank) * self.piece
            yield [(self.epoch, index) for index in order[start : start + self.piece]]


class EvalBatches:
    """Batch sampler: each image once, dealt to the processes in turn."""

    def __init__(self, count: int, batch_size: int, rank: int = 0, world: int = 1):
        keys = [(0, index) for index in range(rank, count, world)]
        self.batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)


def _collate(items: list) -> list[torch.Tensor] | InputError:
    broken = [item for item in items if isinstance(item, InputError)]
    return broken[0] if broken else default_collate(items)


def make_loader(dataset: ImageFolder, batches, workers: int, device: torch.device) -> DataLoader:
    """A loader whose workers stay alive between epochs."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )


def read(loader: DataLoader, device: torch.device) -> Iterator[tuple[torch.Tensor, ...]]:
    """The loader's batches, here images `[B, C, H, W]` and labels `[B]`, on the device; raises the `InputError` of an
    image."""
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield tuple(tensor.to(device, non_blocking=True) for tensor in batch)


def train_transform(recipe: Recipe, data_config: dict):
    """timm's training transform; `data_config` from `model.data_config`."""
    return create_transform(
        data_config["input_size"],
        is_training=True,
        scale=tuple(recipe.scale),
        ratio=tuple(recipe.ratio),
        hflip=recipe.hflip,
        vflip=recipe.vflip,
        color_jitter=recipe.color_jitter,
        auto_augment=recipe.auto_augment,
        interpolation=recipe.train_interpolation,
        mean=data_config["mean"],
        std=data_config["std"],
        re_prob=recipe.reprob,
        re_mode=recipe.remode,
        re_count=recipe.recount,
    )


def eval_transform(data_config: dict):
    """timm's validation transform."""
    keys = ("interpolation", "mean", "std", "crop_pct", "crop_mode")
    return create_transform(data_config["input_size"], **{key: data_config[key] for key in keys})


def broken_images(paths: list[str], workers: int) -> list[str]:
    """The messages of all images that cannot be read to their end."""
    with ProcessPoolExecutor(max(1, workers)) as pool:
        messages = pool.map(_message, paths, chunksize=64)
        return [text for text in tqdm(messages, "images read", len(paths), unit="") if text]


def _message(path: str) -> str | None:
    try:
        open_image(path, 3)
    except InputError as error:
        return str(error)
    return None
