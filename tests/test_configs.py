"""The shipped segmentation configs under mmsegmentation's own programs, none of ours on the way."""

import os
import subprocess
import sys
from pathlib import Path

import mmseg
import numpy as np
import pytest
from PIL import Image

from tools import make_scenes

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*/*.py") if path.parent.name != "_base_")
PROGRAMS = Path(mmseg.__file__).parent / ".mim" / "tools"
SCENES = "scenes/{}_1xb4-1200_scenes-128x128.py"


def run(folder, *words):
    """The output of Python on these words, started in a folder where nothing of this project lies."""
    env = os.environ | dict(PYTHONPATH=str(ROOT), MPLBACKEND="Agg")
    found = subprocess.run([sys.executable, *map(str, words)], cwd=folder, env=env, capture_output=True, text=True)
    assert not found.returncode, found.stderr[-2000:]
    return found.stdout + found.stderr


def test_every_config_is_read_from_any_folder(tmp_path):
    """Bases named `mmseg::...` were found only after `import fma2d.mmseg`, which no program but ours did."""
    code = "import sys; from mmengine.config import Config; assert 'fma2d' not in sys.modules\n"
    code += "print(*(Config.fromfile(path).model.type for path in sys.argv[1:]))"
    assert len(CONFIGS) > 10
    assert run(tmp_path, "-c", code, *CONFIGS).split() == ["EncoderDecoder"] * len(CONFIGS)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["segformer_fma2d-nano", "segformer_mit-b0"])
def test_programs_of_mmsegmentation_run_on_them(tmp_path, model):
    config = ROOT / "configs" / SCENES.format(model)
    make_scenes.write(tmp_path / "data" / "scenes", {"training": 4, "validation": 2}, seed=0)
    here = ("num_workers=0", "persistent_workers=False")
    quick = [f"{split}_dataloader.{option}" for split in ("train", "val", "test") for option in here]
    steps = ["train_cfg.max_iters=1", "train_cfg.val_interval=1", "default_hooks.checkpoint.interval=1"]
    common = [config, "--work-dir", "work", "--cfg-options", *quick]
    assert "mIoU" in run(tmp_path, PROGRAMS / "train.py", *common, *steps)
    assert "mIoU" in run(tmp_path, PROGRAMS / "test.py", config, "work/iter_1.pth", *common[1:])
    flops = run(tmp_path, PROGRAMS / "analysis_tools/get_flops.py", config, "--shape", 128, 128)
    count = float(flops.split("Flops: ")[1].split("G")[0])
    assert 0.1 < count < 1, flops


@pytest.mark.slow
def test_confusion_matrix_of_mmsegmentation(tmp_path):
    """On Cityscapes: it draws each class 600 pixels wide, so ADE20K's 150 make a picture of 26 GB."""
    config = next(path for path in CONFIGS if path.parent.name == "cityscapes")
    labels = np.arange(64 * 32, dtype=np.uint8).reshape(32, 64) % 19
    for name, pixels in (
        ("leftImg8bit/val/a/a_leftImg8bit.png", np.zeros((32, 64, 3), np.uint8)),
        ("gtFine/val/a/a_gtFine_labelTrainIds.png", labels),
        ("found/a.png", labels),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / name)
    options = ["--cfg-options", f"test_dataloader.dataset.data_root={tmp_path}"]
    resize = "test_dataloader.dataset.pipeline.1.scale=(64, 32)"
    run(tmp_path, PROGRAMS / "analysis_tools/confusion_matrix.py", config, "found", "matrix", *options, resize)
    assert (tmp_path / "matrix" / "confusion_matrix.png").is_file()
