"""Generates a data set of street scenes in ADE20K's layout and label ids, to try training on a machine without data.

The scenes are drawn, not photographed: what a model reaches on them says nothing about photographs. They ask for
texture, shape, occlusion, thin and large things, and for context far away, which alone tells these classes apart:

  car or van            the colour of the sign at the other end of the same lane (three lanes, each with its own sign)
  lamp or streetlight   whether the sky is that of night or of day; the posts stand at the bottom edge
  grass or field        whether the skyline is of mountains or of buildings; the meadow lies at the bottom edge

Scene i of a split depends on the seed and on i alone. Textures come from the sample photographs of matplotlib and
scikit-learn. With --check, instead of drawing, a classifier that sees one pixel's colour and position is measured.
"""

import argparse
import colorsys
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.cbook import get_sample_data
from numpy.random import Generator
from PIL import Image
from tqdm import tqdm

from tools.ending import ending
from tools.make_digits import whole_folder

VERSION = 1  # of the generator: the same version, seed and index give the same scene
SIZE = 128  # pixels a side
# ADE20K's ids in annotation files; 0 is "other", which counts nowhere.
LABELS = {
    "other": 0,
    "building": 2,
    "sky": 3,
    "tree": 5,
    "road": 7,
    "grass": 10,
    "sidewalk": 12,
    "person": 13,
    "mountain": 17,
    "car": 21,
    "field": 30,
    "fence": 33,
    "lamp": 37,
    "signboard": 44,
    "streetlight": 88,
    "van": 103,
}
LONG_RANGE = ("car", "van", "lamp", "streetlight", "grass", "field")
SPLITS = {"training": "train", "validation": "val"}  # folder: the word in file names
rows, cols = np.mgrid[:SIZE, :SIZE]


def load_textures() -> list[np.ndarray]:
    """The luminance of the sample photographs, `[H, W]` in -1 to 1, halved in size."""
    from sklearn.datasets import load_sample_image

    photos = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    photos.append(Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)))
    return [np.asarray(photo.convert("L").reduce(2), np.float32) / 127.5 - 1 for photo in photos]


def rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """A colour `[3]` in 0 to 255."""
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32)


def box(left: float, top: float, width: float, height: float) -> np.ndarray:
    """The mask `[SIZE, SIZE]` of a rectangle."""
    return (cols >= left) & (cols < left + width) & (rows >= top) & (rows < top + height)


def ellipse(x: float, y: float, across: float, down: float) -> np.ndarray:
    """The mask of an ellipse around `(x, y)` with these radii."""
    return ((cols - x) / across) ** 2 + ((rows - y) / down) ** 2 <= 1


class Scene:
    """One scene, painted back to front: `image` `[SIZE, SIZE, 3]` float32, 0 to 255; `labels` `[SIZE, SIZE]` uint8."""

    def __init__(self, rng: Generator, textures: list[np.ndarray]):
        self.rng, self.textures = rng, textures
        self.image = np.zeros((SIZE, SIZE, 3), np.float32)
        self.labels = np.zeros((SIZE, SIZE), np.uint8)
        self.day = rng.random() < 0.5
        self.city = rng.random() < 0.5
        self.horizon = int(rng.integers(30, 49))
        self.sky()
        self.skyline()
        self.trees()
        bottom = self.lanes()
        self.foreground(bottom)
        gain = rng.uniform(0.85, 1.15) * rng.uniform(0.95, 1.05, 3)
        self.image = np.clip(self.image * gain + rng.normal(0, 4, self.image.shape), 0, 255)

    def uniform(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def integer(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return int(self.rng.integers(low, high + 1))

    def texture(self, photo: int | None = None) -> np.ndarray:
        """A random piece of a photograph's luminance, mirrored at random: `[SIZE, SIZE]`."""
        source = self.textures[self.integer(0, 2) if photo is None else photo]
        top, left = (self.integer(0, n - SIZE) for n in source.shape)
        piece = source[top : top + SIZE, left : left + SIZE]
        return piece[:, ::-1] if self.rng.random() < 0.5 else piece

    def paint(self, mask: np.ndarray, colour: np.ndarray, name: str, texture=None, strength: float = 30) -> None:
        """Fill a mask with a colour, `[3]` or `[SIZE, SIZE, 3]`, and its label."""
        colour = np.broadcast_to(colour, self.image.shape)
        if texture is not None:
            colour = colour + strength * texture[..., None]
        self.image[mask] = colour[mask]
        self.labels[mask] = LABELS[name]

    def muted(self) -> np.ndarray:
        """A colour that houses, hills and paving share, so that colour does not tell them apart."""
        return rgb(self.uniform(0, 1), self.uniform(0.1, 0.45), self.uniform(0.3, 0.8))

    def sky(self) -> None:
        if self.day:
            top = rgb(self.uniform(0.5, 0.62), self.uniform(0.1, 0.5), self.uniform(0.6, 0.95))
            low = rgb(self.uniform(0, 0.15), 0.15, 0.95)
        else:
            top, low = rgb(self.uniform(0.6, 0.75), 0.6, 0.12), rgb(self.uniform(0.6, 0.9), 0.4, 0.3)
        share = (rows / self.horizon)[..., None].clip(0, 1)
        cloud = Image.fromarray(np.ascontiguousarray(self.texture())).reduce(8).resize((SIZE, SIZE))
        self.paint(box(0, 0, SIZE, SIZE), (1 - share) * top + share * low, "sky", np.asarray(cloud), 25)
        if self.rng.random() < 0.3:
            x, y = self.uniform(15, SIZE - 15), self.uniform(8, 20)
            balloon = ellipse(x, y, self.uniform(5, 9), self.uniform(5, 9))
            self.paint(balloon, rgb(self.uniform(0, 1), 0.5, 0.7), "other", self.texture(), 50)

    def skyline(self) -> None:
        ground = box(0, 0, SIZE, self.horizon)
        if self.city:
            left = self.uniform(-10, 0)
            while left < SIZE:
                width, top = self.uniform(14, 30), self.uniform(5, self.horizon - 12)
                house = box(left, top, width, SIZE) & ground
                self.paint(house, self.muted(), "building", self.texture(0))
                panes = house & ((cols - int(left)) % 5 >= 3) & ((rows - int(top)) % 6 >= 3) & (rows > top + 2)
                self.paint(panes, rgb(0.13, 0.5, self.uniform(0.15, 0.9)), "building")
                left += width + (self.uniform(0, 6) if self.rng.random() < 0.4 else 0)
        else:
            for _ in range(self.integer(3, 5)):
                peak, top, slope = self.uniform(0, SIZE), self.uniform(5, self.horizon - 14), self.uniform(0.4, 1.0)
                rough = 3 * np.sin(cols / self.uniform(2, 5) + self.uniform(0, 6))
                hill = (top + slope * abs(cols - peak) + rough <= rows) & ground
                self.paint(hill, self.muted(), "mountain", self.texture(), 40)
            foot = box(0, self.horizon - self.uniform(4, 8), SIZE, SIZE) & ground
            self.paint(foot, self.muted(), "mountain", self.texture(), 40)

    def trees(self) -> None:
        for _ in range(self.integer(2, 4)):
            x, radius = self.uniform(5, SIZE - 5), self.uniform(6, 11)
            y = self.horizon - self.uniform(6, 10)
            self.paint(box(x - 1.5, y, 3, self.horizon - y), rgb(0.08, 0.5, 0.3), "tree")
            crown = ellipse(x, y, radius, radius * self.uniform(0.7, 1.1))
            crown |= ellipse(x + self.uniform(-5, 5), y - 4, radius * 0.7, radius * 0.7)
            leaves = rgb(self.uniform(0, 0.5), self.uniform(0.2, 0.6), self.uniform(0.3, 0.7))
            self.paint(crown & (self.horizon > rows), leaves, "tree", self.texture(1), 60)

    def lanes(self) -> int:
        """Three lanes with a strip of paving behind each; where the last one ends."""
        top = self.horizon
        hues = (self.uniform(0, 1) + np.arange(3) / 3)[self.rng.permutation(3)]
        things = []
        for hue in hues:
            strip, height = self.integer(4, 9), self.integer(12, 15)
            self.paint(box(0, top, SIZE, strip), self.muted(), "sidewalk", self.texture(2))
            joints = box(0, top, SIZE, strip) & ((cols + self.integer(0, 7)) % 8 == 0)
            self.image[joints] *= 0.7
            if self.rng.random() < 0.4:
                self.fence(top + strip - 7)
            top += strip
            # The tint says which sign belongs to which vehicle, beside the row.
            asphalt = rgb(hue, 0.35, self.uniform(0.35, 0.7))
            self.paint(box(0, top, SIZE, height), asphalt, "road", self.texture(), 15)
            things.append((top, height))
            top += height
        for lane_top, height in things:
            self.traffic(lane_top, height)
        return top

    def fence(self, top: int) -> None:
        left, width = self.integer(0, SIZE - 40), self.integer(30, 60)
        self.paint(box(left, top, width, 6), self.muted(), "fence")
        gaps = box(left, top, width, 6) & (cols % 4 >= 2) & (rows - top != 1) & (rows - top != 4)
        self.image[gaps] *= 0.45

    def traffic(self, top: int, height: int) -> None:
        """A sign at one end of a lane, one or two vehicles at the other, people between and before them."""
        van = self.rng.random() < 0.5
        sign_left = self.rng.random() < 0.5
        vehicles = self.integer(1, 2)
        for i in range(vehicles):
            width, tall = self.integer(16, 19), self.integer(9, 11)
            near_edge = self.integer(1, 3) + i * self.integer(21, 23)
            left = SIZE - near_edge - width if sign_left else near_edge
            self.vehicle(left, top + height - 2 - tall, width, tall, "van" if van else "car")
        for _ in range(self.integer(0, 2)):
            self.person(self.uniform(30, SIZE - 30), top + height - self.integer(0, 3))
        x = self.integer(1, 10) if sign_left else SIZE - 10 - self.integer(1, 10)
        self.paint(box(x + 3.5, top + 3, 2, height - 4), rgb(0, 0, 0.4), "signboard")
        self.paint(box(x, top - 1, 9, 9), rgb(0, 0, self.uniform(0.8, 1)), "signboard")
        hue = self.uniform(0.56, 0.66) if van else self.uniform(-0.04, 0.04)
        self.paint(box(x + 1, top, 7, 7), rgb(hue, 0.85, self.uniform(0.6, 0.9)), "signboard")

    def vehicle(self, left: int, top: int, width: int, height: int, name: str) -> None:
        body = rgb(self.uniform(0, 1), self.uniform(0.2, 0.9), self.uniform(0.4, 0.9))
        cabin = self.integer(2, 5)
        self.paint(box(left, top + height * 0.4, width, height * 0.45), body, name)
        self.paint(box(left + cabin, top, width - cabin - 2, height * 0.5), body, name)
        self.paint(box(left + cabin + 2, top + 1.5, width - cabin - 6, height * 0.3), rgb(0.55, 0.3, 0.25), name)
        for x in (left + 3.5, left + width - 4.5):
            self.paint(ellipse(x, top + height - 2, 2.3, 2.3), rgb(0, 0, 0.08), name)

    def person(self, x: float, foot: float) -> None:
        tall = self.uniform(11, 14)
        self.paint(box(x - 1.5, foot - tall * 0.45, 3.4, tall * 0.45), rgb(self.uniform(0, 1), 0.4, 0.3), "person")
        shirt = rgb(self.uniform(0, 1), self.uniform(0.3, 0.9), self.uniform(0.4, 0.9))
        self.paint(box(x - 2.5, foot - tall * 0.8, 5, tall * 0.4), shirt, "person")
        skin = rgb(0.07, self.uniform(0.3, 0.6), self.uniform(0.35, 0.9))
        self.paint(ellipse(x, foot - tall * 0.88, 2.2, 2.4), skin, "person")

    def foreground(self, top: int) -> None:
        meadow = rgb(self.uniform(0.08, 0.4), self.uniform(0.2, 0.5), self.uniform(0.35, 0.7))
        self.paint(box(0, top, SIZE, SIZE), meadow, "grass" if self.city else "field", self.texture(1), 40)
        places = self.rng.permutation([18, 46, 74, 102])[: self.integer(1, 3)]
        for place in places:
            x, foot = place + self.integer(-8, 8), SIZE - self.integer(3, 8)
            tall = self.integer(22, 28)
            name = "streetlight" if self.day else "lamp"
            metal = rgb(self.uniform(0, 1), 0.2, self.uniform(0.15, 0.35))
            self.paint(box(x - 1, foot - tall, 3, tall), metal, name)
            self.paint(box(x - 4, foot - tall - 3, 9, 7), metal, name)
            self.paint(box(x - 3, foot - tall - 1, 7, 4), rgb(0.14, self.uniform(0.2, 0.5), 0.95), name)


def scene(seed: int, split: str, index: int, textures: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Scene `index` of a split: the image `[SIZE, SIZE, 3]` and its annotation `[SIZE, SIZE]`, both uint8."""
    drawn = Scene(np.random.default_rng((VERSION, seed, list(SPLITS).index(split), index)), textures)
    return drawn.image.round().astype(np.uint8), drawn.labels


def description(counts: dict[str, int], seed: int) -> str:
    """What `generated.json` says of a data set."""
    about = dict(what="generated scenes, no photographs", generator=VERSION, seed=seed, size=SIZE, scenes=counts)
    return json.dumps(about | dict(labels=LABELS, long_range=LONG_RANGE), indent=2)


def write(out: Path, counts: dict[str, int], seed: int) -> None:
    """Write a data set, whole or not at all: ADE20K's folders and file names, and `generated.json`, its description."""
    textures = load_textures()
    with whole_folder(out) as folder:
        for split, count in counts.items():
            images, annotations = folder / "images" / split, folder / "annotations" / split
            for path in (images, annotations):
                path.mkdir(parents=True)
            for i in tqdm(range(count), desc=split, unit="scene", dynamic_ncols=True):
                image, labels = scene(seed, split, i, textures)
                name = f"ADE_{SPLITS[split]}_{i + 1:08d}"
                Image.fromarray(image).save(images / f"{name}.jpg", quality=95)
                Image.fromarray(labels).save(annotations / f"{name}.png")
        (folder / "generated.json").write_text(description(counts, seed))


def pixel_baseline(seed: int, scenes: int = 200, per_scene: int = 300, test_scenes: int = 50) -> dict[str, float]:
    """The IoU of each class that a classifier reaches from one pixel's colour and position."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    textures = load_textures()

    def pixels(split: str, count: int, per_scene: int) -> tuple[np.ndarray, np.ndarray]:
        rng, inputs, labels = np.random.default_rng(seed), [], []
        for i in range(count):
            image, annotation = scene(seed, split, i, textures)
            known = np.flatnonzero(annotation)
            chosen = rng.choice(known, min(per_scene, len(known)), replace=False)
            position = np.stack((rows, cols), -1)
            inputs.append(np.concatenate((image, position), -1).reshape(-1, 5)[chosen])
            labels.append(annotation.reshape(-1)[chosen])
        return np.concatenate(inputs), np.concatenate(labels)

    model = HistGradientBoostingClassifier(random_state=0).fit(*pixels("training", scenes, per_scene))
    inputs, truth = pixels("validation", test_scenes, 4000)
    found = model.predict(inputs)
    ious = {}
    for name, label in LABELS.items():
        if label:
            ious[name] = float(
                ((found == label) & (truth == label)).sum() / ((found == label) | (truth == label)).sum()
            )
    return ious


@ending()
def main(argv: list[str] | None = None) -> int:
    """Generate, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/scenes"), help="folder of the data set (data/scenes)")
    parser.add_argument("--train", type=int, default=4000, help="training scenes (4000)")
    parser.add_argument("--val", type=int, default=400, help="validation scenes (400)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another data set (0)")
    parser.add_argument("--check", action="store_true", help="measure what colour and position alone tell")
    args = parser.parse_args(argv)
    if args.seed < 0 or args.train < 1 or args.val < 1:
        parser.error("--train and --val must be at least 1, --seed at least 0")
    if args.check:
        ious = pixel_baseline(args.seed)
        print("\n".join(f"{name:<12} {iou:.3f}" for name, iou in ious.items()))
        print(f"{'mIoU':<12} {np.mean(list(ious.values())):.3f}  (one pixel's colour and position, generated scenes)")
        return 0
    counts, written = {"training": args.train, "validation": args.val}, args.out / "generated.json"
    if written.is_file() and written.read_text() == description(counts, args.seed):
        print(f"{args.out} holds these {args.train} + {args.val} generated scenes already: it stays as it is")
        return 0
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"{args.out} holds something else already; remove it, or name another folder with --out")
    write(args.out, counts, args.seed)
    print(f"{args.train} + {args.val} generated scenes in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
