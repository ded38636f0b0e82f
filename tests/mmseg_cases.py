"""What the tests around mmsegmentation share: generated scenes, and the options of a run of seconds on them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools import make_scenes

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs/scenes/segformer_fma2d-nano_1xb4-1200_scenes-128x128.py"


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    make_scenes.write(folder, {"training": 6, "validation": 3}, seed=0)
    return folder


@pytest.fixture
def copy(scenes, tmp_path):
    return Path(shutil.copytree(scenes, tmp_path / "scenes"))


def options(folder, **more):
    """--cfg-options for a run of seconds on the data in a folder."""
    settings = {f"{split}_dataloader.dataset.data_root": folder for split in ("train", "val", "test")}
    settings |= {f"{split}_dataloader.num_workers": 0 for split in ("train", "val", "test")}
    settings |= {f"{split}_dataloader.persistent_workers": False for split in ("train", "val", "test")}
    return ["--cfg-options", *(f"{name}={value}" for name, value in (settings | more).items())]


def break_label(folder, image, annotation):
    labels = np.asarray(Image.open(annotation)).copy()
    labels[3, 5] = 151
    Image.fromarray(labels).save(annotation)
