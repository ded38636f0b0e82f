"""What the tests of the classification trainer share: a tiny recipe, generated images, ways to run it."""

import numpy as np
import pytest
import yaml
from PIL import Image

from tools import train_classifier

# All that draws random numbers is on: crops, flips, policies, erasing, mixup and cutmix, drop path, dropout; and all
# that has a state: momenta, schedule with warm-up, moving average.
TINY = dict(
    model="fma2d_nano",
    model_kwargs=dict(dims=[8, 8, 16, 16], depths=[1, 1, 1, 1], head_dim=8, cell_size=2, rank=1),
    img_size=32,
    epochs=2,
    batch_size=8,
    lr=1e-3,
    warmup_epochs=1,
    clip_grad=1.0,
    layer_decay=0.8,
    ema_decay=0.9,
    drop_rate=0.1,
    drop_path_rate=0.2,
    mixup=0.8,
    cutmix=1.0,
    auto_augment="rand-m5-mstd0.5-inc1",
    reprob=0.5,
)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Generated images in three classes: 26 for training, 7 for validation."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, counts in (("train", (10, 9, 7)), ("val", (3, 2, 2))):
        for label, count in enumerate(counts):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (40, 36, 3), dtype=np.uint8) // 2 + 60 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def command(recipe_file, images, output, *more):
    places = ["--data-dir", str(images), "--output", str(output)]
    return [str(recipe_file), *places, "--workers", "0", "--device", "cpu", "--no-tensorboard", *more]


@pytest.fixture(scope="session")
def finished(images, tmp_path_factory):
    """A run of one epoch, and its recipe."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | dict(epochs=1, warmup_epochs=0, ema_decay=None)))
    assert train_classifier.main(command(path, images, folder / "run")) == 0
    return folder
