"""Segments images with a trained model: overlays, class maps, a legend, and the area of each class.

  python tools/predict.py photo.jpg                      # the model trained on generated scenes that comes along
  python tools/predict.py photos/ --config configs/ade20k/segformer_fma2d-base_8xb2-160k_ade20k-512x512.py \\
      --checkpoint work_dirs/segformer_fma2d-base_8xb2-160k_ade20k-512x512/iter_160000.pth

For photo.jpg it writes photo_overlay.png, photo_classes.png (one channel, labels as in the data set's annotations);
and for all images together legend.png and areas.csv.
"""

import argparse
import csv
import glob
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DATASETS, MODELS
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm

from fma2d.mmseg import CheckpointError, load_model
from fma2d.tiled import segment, smallest_integer
from tools.config_names import check_inference
from tools.ending import InputError, ending
from tools.mmseg_runs import add_options, annotation_labels, read_config, replace_sync_bn

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs/scenes/segformer_fma2d-nano_1xb4-1200_scenes-128x128.py"
CHECKPOINT = ROOT / "checkpoints/segformer_fma2d-nano_scenes.safetensors"
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class Predictor:
    """A model with its classes: `[H, W, 3]` RGB pictures to `[H, W]` labels.

    Args:
        cfg: a segmentation config.
        checkpoint: weights of its whole model.
        mode: "whole", in tiles of the result so that any size fits, or "slide", mmsegmentation's sliding window.
        full_size: leave out the resizing of the config's test pipeline.
        tile: of the whole mode, see `fma2d.tiled.segment`.
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
        self.mode, self.tile = mode, tile
        dataset = DATASETS.build(dict(cfg.test_dataloader.dataset, pipeline=[], lazy_init=True))
        self.labels = annotation_labels(dataset)
        self.names = [name.strip() for name in dataset.metainfo["classes"]]
        self.palette = np.array(dataset.metainfo["palette"], np.uint8)
        skipped = {"LoadImageFromFile", "LoadAnnotations", *({"Resize"} if full_size else ())}
        steps = [step for step in cfg.test_dataloader.dataset.pipeline if step["type"] not in skipped]
        self.pipeline = Compose([dict(type="LoadImageFromNDArray"), *steps])

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """The class of every pixel, uint8 or int16, counted from 0."""
        data = self.pipeline(dict(img=np.ascontiguousarray(picture[..., ::-1])))
        data = {name: [value] for name, value in data.items()}
        if self.mode == "slide":
            with torch.inference_mode():
                (sample,) = self.model.test_step(data)
            return sample.pred_sem_seg.data[0].to(smallest_integer(len(self.names))).cpu().numpy()
        image = self.model.data_preprocessor(data)["inputs"]
        bar = partial(tqdm, desc="tiles", unit="tile", leave=False, dynamic_ncols=True)
        return segment(self.model, image, picture.shape[:2], self.tile, bar).numpy()

    def overlay(self, picture: np.ndarray, classes: np.ndarray, opacity: float = 0.5) -> Image.Image:
        """The picture with the colours of its classes laid over it."""
        return Image.blend(Image.fromarray(picture), Image.fromarray(self.palette[classes]), opacity)

    def legend(self, classes: list[int], title: str) -> Figure:
        """Colours and names of some classes."""
        columns = 1 + (len(classes) - 1) // 20
        figure = Figure(figsize=(2.4 * columns + 0.4, 0.25 * min(20, len(classes)) + 0.8))
        patches = [Patch(facecolor=self.palette[c] / 255, edgecolor="black", label=self.names[c]) for c in classes]
        figure.legend(handles=patches, loc="center", ncols=columns, frameon=False, title=title)
        return figure


def find_images(inputs: list[str]) -> list[Path]:
    """The images that files, folders and globs name."""
    found = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            paths = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            if not paths:
                raise InputError(f"the folder {path} holds no image ({', '.join(sorted(SUFFIXES))})")
        else:
            paths = [path] if path.is_file() else sorted(map(Path, glob.glob(text, recursive=True)))
            if not paths:
                raise InputError(f"there is no image {text}")
        found += paths
    stems = [path.stem for path in found]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise InputError(f"images of the same name would overwrite each other's results: {', '.join(twice)}")
    return found


def read_picture(path: Path) -> np.ndarray:
    """An image `[H, W, 3]`, RGB, the right way up."""
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from None


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
    add("--opacity", type=float, default=0.5, help="of the colours in the overlay, 0 to 1 (0.5)")
    add("--tile", type=int, default=256, help="pixels a side that head and argmax work on at a time, whole mode (256)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:N (cuda if there)")
    add_options(parser)
    args = parser.parse_args(argv)
    if not 0 <= args.opacity <= 1 or args.tile < 1:
        parser.error("--opacity must be from 0 to 1, --tile at least 1")
    if "model.test_cfg.mode" in (args.cfg_options or {}):
        parser.error("--cfg-options model.test_cfg.mode: --mode says it")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    if args.checkpoint is None:
        if args.config != CONFIG:
            parser.error("--config needs the --checkpoint that belongs to it")
        args.checkpoint = CHECKPOINT
        print("using the model that was trained on generated scenes; on photographs it only shows that things run")
    return args


def predict(args: argparse.Namespace) -> None:
    """Segment each image and write what was found."""
    paths = find_images(args.images)
    cfg = read_config(args.config, args.cfg_options)
    predictor = Predictor(cfg, args.checkpoint, args.mode, args.full_size, args.tile, args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    rows, seen, started = [], set(), time.monotonic()
    for path in tqdm(paths, desc="images", unit="image", dynamic_ncols=True):
        picture = read_picture(path)
        classes = predictor(picture)
        predictor.overlay(picture, classes, args.opacity).save(args.out / f"{path.stem}_overlay.png")
        Image.fromarray(predictor.labels[classes]).save(args.out / f"{path.stem}_classes.png")
        pixels = np.bincount(classes.reshape(-1))
        for i in sorted(np.flatnonzero(pixels), key=lambda i: -pixels[i]):
            share = f"{pixels[i] / classes.size:.6f}"
            rows.append((path, predictor.labels[i], predictor.names[i], pixels[i], share))
            seen.add(int(i))
    with open(args.out / "areas.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "label", "class", "pixels", "share"), *rows])
    predictor.legend(sorted(seen), args.config.stem).savefig(args.out / "legend.png", bbox_inches="tight")
    seconds = time.monotonic() - started
    print(f"{len(paths)} images in {seconds:.1f} s, peak memory {peak_memory(args.device)}; results in {args.out}")


@ending(CheckpointError)
def main(argv: list[str] | None = None) -> None:
    """Predict."""
    predict(parse(argv))


if __name__ == "__main__":
    sys.exit(main())
