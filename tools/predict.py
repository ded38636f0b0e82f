"""Segments images with a trained model: overlays, class maps, a legend, and the area of each class.

  python tools/predict.py photo.jpg                      # the model trained on generated scenes that comes along
  python tools/predict.py photos/ --config configs/ade20k/segformer_fma2d-base_8xb2-160k_ade20k-512x512.py \\
      --checkpoint work_dirs/segformer_fma2d-base_8xb2-160k_ade20k-512x512/iter_160000.pth

For photo.jpg it writes photo_overlay.png, photo_classes.png (one channel, labels as in the data set's annotations);
and for all images together legend.png and areas.csv. Images of one name in several folders keep their folders. One that
cannot be read is left out, and told at the end, with status 1.
"""

import argparse
import csv
import glob
import os
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import MODELS
from mmseg.datasets.transforms import LoadImageFromNDArray
from PIL import Image
from torch import nn
from tqdm import tqdm

from fma2d.mmseg import CheckpointError, load_model
from fma2d.mmseg.tiled import segment, smallest_integer
from tools.arguments import device, positive, share
from tools.check_dataset import first_line, too_large
from tools.config_names import check_inference
from tools.ending import InputError, ending, output_folder
from tools.mmseg_runs import add_options, annotation_labels, files_of, read_config, replace_sync_bn, result_names

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs/scenes/segformer_fma2d-nano_1xb4-1200_scenes-128x128.py"
CHECKPOINT = ROOT / "checkpoints/segformer_fma2d-nano_scenes.safetensors"
LOADER = LoadImageFromFile()
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class Predictor:
    """A model with its classes: pictures as `read` gives them to `[H, W]` labels.

    Args:
        cfg: a segmentation config.
        checkpoint: weights of its whole model.
        mode: "whole", in tiles of the result so that any size fits, or "slide", mmsegmentation's sliding window.
        full_size: leave out the resizing of the config's test pipeline.
        tile: of the whole mode, see `fma2d.mmseg.tiled.segment`.
        device: cpu, cuda or cuda:N.
    """

    def __init__(
        self,
        cfg: Config,
        checkpoint: Path,
        mode: str = "whole",
        full_size: bool = False,
        tile: int = 256,
        device: str = "cpu",
    ):
        replace_sync_bn(cfg.model)
        cfg.model.test_cfg.mode = mode
        check_inference(cfg)
        self.model: nn.Module = MODELS.build(cfg.model).eval().to(device)
        load_model(self.model, str(checkpoint))
        # The tiles are of heads that resize as most do; others run as mmsegmentation has them.
        self.in_tiles, self.tile = mode == "whole" and not self.model.decode_head.align_corners, tile
        dataset = files_of(cfg)[0]
        self.labels = annotation_labels(dataset)
        self.names = [name.strip() for name in dataset.metainfo["classes"]]
        self.palette = np.array(dataset.metainfo["palette"], np.uint8)
        skipped = ("LoadAnnotations", *(["Resize"] if full_size else []))
        steps = [step for step in dataset.pipeline.transforms if type(step).__name__ not in skipped]
        loaders = [step for step in steps if type(step).__name__.startswith("Load")]
        self.loader = loaders[0] if loaders else LOADER
        rest = [step for step in steps if step not in loaders]
        self.pipeline = Compose([LoadImageFromNDArray(to_float32=self.loader.to_float32), *rest])

    def read(self, path: Path) -> np.ndarray:
        """A picture, as the test pipeline of the config loads it: `read_picture`."""
        return read_picture(path, self.loader)

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """The class of every pixel, uint8 or int16, counted from 0."""
        data = self.pipeline(dict(img=flipped(picture)))
        data = {name: [value] for name, value in data.items()}
        if not self.in_tiles:
            with torch.inference_mode():
                (sample,) = self.model.test_step(data)
            return sample.pred_sem_seg.data[0].to(smallest_integer(len(self.names))).cpu().numpy()
        image = self.model.data_preprocessor(data)["inputs"]
        bar = partial(tqdm, desc="tiles", unit="tile", leave=False, dynamic_ncols=True)
        return segment(self.model, image, picture.shape[:2], self.tile, bar).numpy()

    def overlay(self, picture: np.ndarray, classes: np.ndarray, opacity: float = 0.5) -> Image.Image:
        """The picture with the colours of its classes laid over it."""
        seen = picture if picture.ndim == 3 else picture[..., None]
        seen = seen[..., :3] if seen.shape[2] >= 3 else seen[..., :1].repeat(3, 2)
        seen = Image.fromarray(np.ascontiguousarray(seen.clip(0, 255).astype(np.uint8)))
        return Image.blend(seen, Image.fromarray(self.palette[classes]), opacity)

    def legend(self, classes: list[int], title: str) -> Figure:
        """Colours and names of some classes."""
        columns = 1 + (len(classes) - 1) // 20
        figure = Figure(figsize=(2.4 * columns + 0.4, 0.25 * min(20, len(classes)) + 0.8))
        patches = [Patch(facecolor=self.palette[c] / 255, edgecolor="black", label=self.names[c]) for c in classes]
        figure.legend(handles=patches, loc="center", ncols=columns, frameon=False, title=title)
        return figure


def find_images(inputs: list[str]) -> list[Path]:
    """The images that files, folders and globs name, each once; hidden files of a folder are none."""
    found = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            names = (p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
            paths = sorted(p for p in names if p.is_file())
            if not paths:
                raise InputError(f"the folder {path} holds no image ({', '.join(sorted(SUFFIXES))})")
        else:
            matches = [text] if path.is_file() else sorted(glob.glob(text, recursive=True))
            paths = [match for match in map(Path, matches) if match.is_file()]
            if not paths:
                raise InputError(f"there is no image {text}")
        found += paths
    return list({os.path.abspath(path): path for path in found}.values())


def flipped(picture: np.ndarray) -> np.ndarray:
    """RGB to BGR, which mmsegmentation's pipelines work on, and back; of 4 channels the last stays."""
    if picture.ndim == 3 and picture.shape[2] in (3, 4):
        picture = picture[..., [2, 1, 0, 3][: picture.shape[2]]]
    return np.ascontiguousarray(picture)


def read_picture(path: Path, loader: LoadImageFromFile = LOADER) -> np.ndarray:
    """An image as a step of a pipeline loads it, as in training; by default `[H, W, 3]`, 8 bits, RGB, the right way up.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        picture = loader(dict(img_path=str(path)))
    except Exception as error:  # the decoders raise almost anything
        reason = "it is too large: cut it into parts" if too_large(error) else first_line(error)
        raise InputError(f"{path} cannot be read as an image: {reason}") from None
    if picture is None:
        raise InputError(f"{path} cannot be read as an image")
    return flipped(picture["img"])


def peak_memory(device: str) -> str:
    """The largest memory so far, of this process on the CPU (Windows does not tell), of tensors on a GPU."""
    if device.startswith("cuda"):
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB of GPU memory"
    try:
        import resource
    except ImportError:
        return "not known"
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", nargs="+", help="files, folders or globs")
    add("--config", type=Path, default=CONFIG, help="the model's config (of the generated scenes)")
    add("--checkpoint", type=Path, help="its weights, .pth or .safetensors (of the generated scenes)")
    add("--out", type=Path, default=Path("out/predict"), help="folder of the results (out/predict)")
    add("--mode", choices=("whole", "slide"), default="whole", help="whole image, or sliding window (whole)")
    add("--full-size", action="store_true", help="no resizing before the network, whatever the config does")
    add("--opacity", type=share, default=0.5, help="of the colours in the overlay, 0 to 1 (0.5)")
    add("--tile", type=positive, default=256, help="pixels a side that the head works on at a time, whole mode (256)")
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=device, default=gpu, help="cpu, cuda, cuda:N (cuda if there)")
    add_options(parser)
    args = parser.parse_args(argv)
    if "model.test_cfg.mode" in (args.cfg_options or {}):
        parser.error("--cfg-options model.test_cfg.mode: --mode says it")
    if args.checkpoint is None:
        if args.config != CONFIG:
            parser.error("--config needs the --checkpoint that belongs to it")
        args.checkpoint = CHECKPOINT
        print("using the model that was trained on generated scenes; on photographs it only shows that things run")
    return args


def predict(args: argparse.Namespace) -> None:
    """Segment each image and write what was found; what cannot be is left out, and told at the end."""
    paths = find_images(args.images)
    cfg = read_config(args.config, args.cfg_options)
    results = {path: args.out / name for path, name in result_names(paths).items()}
    given = set(map(os.path.abspath, paths))
    for path in results.values():
        if taken := given & {os.path.abspath(f"{path}_{kind}.png") for kind in ("overlay", "classes")}:
            raise InputError(f"--out {args.out}: a result would overwrite the image {taken.pop()}")
    output_folder(args.out)
    predictor = Predictor(cfg, args.checkpoint, args.mode, args.full_size, args.tile, args.device)
    seen, failed, started = set(), [], time.monotonic()
    # In UTF-8 whatever the locale, and names that are no text as their bytes; each row is written when it is known.
    with open(args.out / "areas.csv", "w", newline="", encoding="utf-8", errors="surrogateescape", buffering=1) as file:
        table = csv.writer(file)
        table.writerow(("image", "label", "class", "pixels", "share"))
        for path, result in tqdm(results.items(), desc="images", unit="image", dynamic_ncols=True):
            try:
                classes = predict_one(predictor, path, result, args.opacity)
            except InputError as error:
                failed.append(error)
                continue
            pixels = np.bincount(classes.reshape(-1))
            for i in sorted(np.flatnonzero(pixels), key=lambda i: -pixels[i]):
                share = f"{pixels[i] / classes.size:.6f}"
                table.writerow((path, predictor.labels[i], predictor.names[i], pixels[i], share))
                seen.add(int(i))
    if seen:
        predictor.legend(sorted(seen), args.config.stem).savefig(args.out / "legend.png", bbox_inches="tight")
    seconds, done = time.monotonic() - started, len(paths) - len(failed)
    if done:
        print(f"{done} images in {seconds:.1f} s, peak memory {peak_memory(args.device)}; results in {args.out}")
    if failed:
        *others, last = failed
        print(*(f"left out: {error}" for error in others), sep="\n", end="\n" if others else "", file=sys.stderr)
        raise InputError(last if len(paths) == 1 else f"{len(failed)} of {len(paths)} images left out: {last}")


def predict_one(predictor: Predictor, path: Path, result: Path, opacity: float) -> np.ndarray:
    """Segment an image and write its pictures to `result`_*.png; its classes."""
    try:
        picture = predictor.read(path)
        classes = predictor(picture)
        result.parent.mkdir(parents=True, exist_ok=True)
        predictor.overlay(picture, classes, opacity).save(f"{result}_overlay.png")
        Image.fromarray(predictor.labels[classes]).save(f"{result}_classes.png")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise InputError(f"{path} is too large for the memory here: cut it, or leave out --full-size") from None
        raise
    return classes


@ending(CheckpointError)
def main(argv: list[str] | None = None) -> None:
    """Predict."""
    predict(parse(argv))


if __name__ == "__main__":
    sys.exit(main())
