"""The weights in the package: found by their tag only, whole, and as good as their metadata say."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch

import fma2d
from fma2d.checkpoint import SETTINGS
from tools import make_digits, validate
from tools.training.checkpoints import read_metadata, sha256

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "fma2d" / "weights" / "fma2d_nano_digits.safetensors"


def test_tagged_model_has_its_own_settings():
    model = timm.create_model("fma2d_nano.digits", pretrained=True)
    assert (model.num_classes, model.in_chans) == (10, 1)
    assert [stage.blocks[0].attn.cell_size for stage in model.stages] == [2, 2, 2, 2]
    assert [stage.blocks[0].attn.levels for stage in model.stages] == [1, 0, 0, 0]
    config = timm.data.resolve_model_data_config(model)
    stored = read_metadata(WEIGHTS)["data_config"]
    for key in ("input_size", "mean", "std", "crop_pct", "interpolation"):
        assert config[key] == (tuple(stored[key]) if isinstance(stored[key], list) else stored[key])


def test_untagged_model_does_not_take_them():
    with pytest.raises(RuntimeError, match="no weights are published for fma2d_nano"):
        timm.create_model("fma2d_nano", pretrained=True)
    assert timm.create_model("fma2d_nano").num_classes == 1000


def test_accuracy_is_the_one_in_the_metadata(tmp_path, capsys):
    assert make_digits.main(["--out", str(tmp_path / "digits")]) == 0
    words = ["--data-dir", str(tmp_path / "digits"), "--workers", "0", "--device", "cpu"]
    assert validate.main(["fma2d_nano.digits", *words]) == 0
    scores = read_metadata(WEIGHTS)["validation"]
    assert scores["top1"] >= 96 and scores["count"] == 360
    assert f"top-1 {scores['top1']:.2f} %" in capsys.readouterr().out
    # With the kernels of the coarse level as they start, the logits are others: they were trained, and are read.
    model = timm.create_model("fma2d_nano.digits", pretrained=True).eval()
    image = torch.randn(1, 1, 32, 32)
    logits = model(image)
    attn = model.stages[0].blocks[0].attn
    attn.kernels.data = attn.start_kernels()
    assert not torch.allclose(model(image), logits)


def test_file_is_the_published_one_and_in_the_wheel():
    assert sha256(WEIGHTS) in (ROOT / "docs" / "training.md").read_text()
    assert read_metadata(WEIGHTS).keys() >= {"format_version", "architecture", *SETTINGS}
    listed = re.search(
        r"^\[tool\.setuptools\.package-data\]\nfma2d = (.*)$", (ROOT / "pyproject.toml").read_text(), re.M
    )
    patterns = json.loads(listed[1])
    package = Path(fma2d.__file__).parent
    assert WEIGHTS in {path for pattern in patterns for path in package.glob(pattern)}
