"""The configs of CamVid, on data in the layout of its public repository."""

import numpy as np
import pytest
import torch
from mmengine.registry import METRICS, MODELS
from mmseg_cases import ROOT, options
from PIL import Image

from tools import test as tester
from tools import train
from tools.mmseg_runs import read_config

CONFIGS = ROOT / "configs" / "camvid"
FULL = CONFIGS / "segformer_fma2d-nano_1xb8-12k_camvid-256x256.py"
OTHER = CONFIGS / "segformer_nano-mit_1xb8-12k_camvid-256x256.py"
FIRST = CONFIGS / "segformer_fma2d-nano_1xb8-600_camvid-128x128.py"
SECOND = CONFIGS / "segformer_fma2d-nano_1xb4-160_camvid-256x256.py"
VOID = 11


@pytest.fixture(scope="module")
def camvid(tmp_path_factory):
    """Three pictures a split, every label in them, void too."""
    folder, draw = tmp_path_factory.mktemp("camvid"), np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for name, shape in ((split, (36, 48, 3)), (f"{split}annot", (36, 48))):
            (folder / name).mkdir()
            for i in range(3):
                pixels = draw.integers(0, VOID + 1 if len(shape) == 2 else 256, shape, np.uint8)
                Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_void_counts_nowhere():
    """Neither in the loss, nor in the score, nor where a crop is filled up."""
    cfg = read_config(FULL)
    model = MODELS.build(cfg.model)
    logits = torch.randn(1, VOID, 8, 8)
    labels = torch.arange(64).reshape(1, 8, 8) % (VOID + 1)

    def loss(labels):
        return model.decode_head.loss_decode(logits, labels, ignore_index=model.decode_head.ignore_index)

    assert not loss(torch.full_like(labels, VOID)).any()
    assert loss(labels) > 0
    assert model.data_preprocessor.seg_pad_val == VOID
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        metric = METRICS.build(evaluator)
        areas = metric.intersect_and_union(labels, labels, VOID, metric.ignore_index)
        assert areas[0].sum() == (labels != VOID).sum()
    crop = next(step for step in cfg.train_dataloader.dataset.pipeline if step["type"] == "RandomCrop")
    assert crop["ignore_index"] == VOID


@pytest.mark.slow
def test_both_parts_of_the_short_schedule_run_on_the_public_layout(camvid, tmp_path, capsys):
    data = options(camvid, **{"train_dataloader.batch_size": 2, "train_cfg.max_iters": 1, "train_cfg.val_interval": 2})
    first, second = tmp_path / "first", tmp_path / "second"
    assert train.main([str(FIRST), "--work-dir", str(first), *data]) == 0
    assert train.main([str(SECOND), "--work-dir", str(second), *data, f"load_from={first / 'iter_1.pth'}"]) == 0
    assert (
        tester.main([str(FULL), str(second / "iter_1.pth"), "--work-dir", str(tmp_path / "t"), *options(camvid)]) == 0
    )
    out = capsys.readouterr().out
    assert "11 of 11 classes occur" in out and "mIoU" in out.splitlines()[-1]


@pytest.mark.parametrize("attention", ["mit", "near", "windows"])
def test_other_attention_has_the_skeleton_of_fma(attention):
    model = MODELS.build(read_config(OTHER, {"model.backbone.attention": attention}).model)
    fma = MODELS.build(read_config(FULL).model).backbone
    names = {name for name, _ in fma.named_parameters() if ".attn." not in name}
    assert names == {name for name, _ in model.backbone.named_parameters() if ".attn." not in name}
    image = torch.randn(1, 3, 70, 50)
    with torch.inference_mode():
        assert [f.shape for f in model.backbone(image)] == [f.shape for f in fma(image)]
