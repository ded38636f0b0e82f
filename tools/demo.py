"""What FMA2D does, on a photograph: cost against resolution beside Swin-B and ViT-B, what a token sees, attention maps.

Weights are random, as there are no trained ones of ImageNet yet: time and memory do not depend on them, and the
pictures show the geometry of the attention, not anything learned. The photo is matplotlib's, 512 x 600 px, enlarged for
larger sizes. At last a small model trained on generated scenes segments one of them, and the photo, which is nothing
like what it was trained on.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from matplotlib.cbook import get_sample_data
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.functional import normalize, to_tensor
from tqdm import tqdm

from fma2d.visualize import draw_attention, draw_cover, model_attention_map
from tools import make_scenes, predict
from tools.ending import InputError, ending

ROOT = Path(__file__).resolve().parents[1]

MODELS = ("fma2d_base", "swin_base_patch4_window7_224", "vit_base_patch16_224")
PICTURE = 512  # pixels a side of the photo in the pictures
POINTS = {"nose": (180, 280), "ribbons": (440, 450), "stars": (40, 40)}  # row and column in the picture
STAGES = ((0, 1), (1, 1), (2, 8))  # stage and block


@ending()
def main(argv: list[str] | None = None) -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[224, 512, 768, 1024], help="pixels a side, multiples of 32"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo", help="folder of the pictures")
    parser.add_argument(
        "--time-budget", type=float, default=180, help="seconds for measuring; what does not fit is skipped"
    )
    args = parser.parse_args(argv)
    photo = get_sample_data("grace_hopper.jpg", asfileobj=False)
    started = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    print(__doc__)
    paths = [cover_picture(photo, args.out), attention_picture(photo, args.out)]
    measure(photo, args.sizes, args.out / "demo.csv", args.time_budget)
    paths += segmentation_pictures(photo, args.out)
    print(f"\n{time.monotonic() - started:.0f} seconds. Pictures (weights untrained):")
    print("\n".join(f"  {path}" for path in paths))


def measure(photo: str, sizes: Sequence[int], file: Path, seconds: float) -> None:
    """Time and memory of the models on the photo, printed, recorded in a file and drawn beside it."""
    models = ["model", "--models", *MODELS, "--sizes", *map(str, sizes), "--photo", str(photo)]
    limits = ["--total-budget", str(seconds), "--time-budget", str(seconds), "--repeat", "1", "--fresh"]
    for words in ([*models, *limits, "--out", str(file)], ["draw", str(file)]):
        if subprocess.run([sys.executable, "-m", "benchmarks", *words], cwd=ROOT).returncode:
            raise InputError("the measurement failed; the reason stands above")


def cover_picture(photo: str, folder: Path) -> Path:
    """What one token attends to at two resolutions, drawn on the photo."""
    figure = Figure(figsize=(13, 8.6), layout="constrained")
    for axes, size in zip(figure.subplots(1, 2), (512, 1024), strict=True):
        grid = (size // 4, size // 4)
        token = tuple(p * n // PICTURE for p, n in zip(POINTS["nose"], grid, strict=True))
        draw_cover(grid, 8, token, square(photo, size), ax=axes)
        axes.set_title(f"What one of {grid[0]}x{grid[1]} tokens attends to ({size} px, first stage)")
    return save(figure, folder / "cover.png")


def attention_picture(photo: str, folder: Path) -> Path:
    """Attention maps at a few points (rows) and stages (columns)."""
    model = timm.create_model("fma2d_base", img_size=PICTURE).eval()
    pixels = square(photo, PICTURE)
    image = normalize(to_tensor(pixels), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)[None]
    figure = Figure(figsize=(4.3 * len(STAGES), 4 * len(POINTS) + 0.6), layout="constrained")
    axes = figure.subplots(len(POINTS), len(STAGES), squeeze=False)
    places = [(i, j) for i in range(len(POINTS)) for j in range(len(STAGES))]
    for i, j in tqdm(places, desc="attention maps", unit="map", dynamic_ncols=True):
        (name, point), (stage, block) = list(POINTS.items())[i], STAGES[j]
        attention = model_attention_map(model, image, stage, block, point)[0]
        draw_attention(attention, pixels, point, axes[i, j])
        grid = "x".join(map(str, attention.shape[1:]))
        axes[i, j].set_title(f"{name}: stage {stage + 1}, block {block + 1}, {grid} tokens", fontsize=10)
    figure.suptitle("Attention, mean of heads, 1 = even over all tokens. UNTRAINED weights: geometry, nothing learned")
    return save(figure, folder / "attention.png")


def segmentation_pictures(photo: str, folder: Path) -> list[Path]:
    """Overlays of the small model's classes on a generated scene it has not seen, and on the photo."""
    scene = folder / "scene.png"
    Image.fromarray(make_scenes.scene(0, "validation", 3, make_scenes.load_textures())[0]).save(scene)
    if predict.main([str(scene), str(photo), "--out", str(folder / "segmentation")]):
        raise RuntimeError("the segmentation failed; the reason stands above")
    return sorted((folder / "segmentation").glob("*.png"))


def square(photo: str, size: int) -> np.ndarray:
    """The photo's central square: `[size, size, 3]`."""
    return np.asarray(ImageOps.fit(Image.open(photo).convert("RGB"), (size, size), Image.Resampling.BICUBIC))


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG."""
    figure.savefig(path, dpi=110, bbox_inches="tight")
    return path


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
