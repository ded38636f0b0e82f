"""Whole-image segmentation, from image to 150 classes: FMA2D and mmsegmentation's MiT under SegFormer's head.

mmsegmentation is imported where a row is measured, so that the other benchmarks run without it.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .harness import GateError, Task, Work, text_table
from .records import ROOT, total_mib

# mmsegmentation's own whole mode, and fma2d.mmseg.tiled with head and argmax in tiles.
MODES = ("whole", "whole, in tiles")
MODELS = {
    "fma2d_nano": "configs/ade20k/segformer_fma2d-nano_8xb2-160k_ade20k-512x512.py",
    "fma2d_tiny": "configs/ade20k/segformer_fma2d-tiny_8xb2-160k_ade20k-512x512.py",
    "mit_b0": "mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py",
    "mit_b2": "mmseg::segformer/segformer_mit-b2_8xb2-160k_ade20k-512x512.py",
}


def tasks(
    models: Sequence[str], sizes: Sequence[int], modes: Sequence[str] = MODES, batch: int = 1, **setting
) -> list[Task]:
    """Tasks for each size, mode and model; `setting`: of `Task`."""
    subjects = [
        dict(benchmark="segmentation", name=name, mode=mode, height=size, width=size, batch=batch)
        for size in sorted(sizes)
        for mode in modes
        for name in models
    ]
    return [Task(f"{__name__}:build", subject, subject["height"] ** 2, **setting) for subject in subjects]


def build(*, benchmark, name, mode, height, width, batch, device, dtype) -> Work:
    """The work of a row: the class of every pixel of one image, weights random."""
    from mmengine import registry
    from mmengine.config import Config
    from mmengine.hub import get_config
    from mmseg.structures import SegDataSample
    from mmseg.utils import register_all_modules

    import fma2d.mmseg  # noqa: F401  (registers the backbone, finds mmseg's configs)
    from fma2d.mmseg.tiled import segment

    torch.manual_seed(0)
    register_all_modules(init_default_scope=False)
    registry.init_default_scope("mmseg")
    place = MODELS[name]
    cfg = get_config(place) if "::" in place else Config.fromfile(str(Path(ROOT, place)))
    cfg.model.decode_head.norm_cfg.type = "BN"
    cfg.model.backbone.pop("init_cfg", None)
    like = dict(device=device, dtype=getattr(torch, dtype))
    model = registry.MODELS.build(cfg.model).to(**like).eval()
    image = torch.randn(batch, 3, height, width, **like)
    shape = (height, width)
    meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, padding_size=(0, 0, 0, 0))

    def step() -> Tensor:
        if mode == MODES[1]:
            return segment(model, image)
        with torch.inference_mode():
            (sample,) = model.predict(image, [SegDataSample(metainfo=meta)])
        return sample.pred_sem_seg.data[0]

    def check(classes: Tensor) -> None:
        if classes.shape != shape or not 0 <= classes.min() <= classes.max() < model.num_classes:
            raise GateError(f"classes are not {height} x {width} numbers below {model.num_classes}")

    def warm_up() -> None:
        torch.nn.functional.conv2d(image[..., :32, :32], torch.zeros(8, 3, 4, 4, **like))

    def facts() -> dict:
        return dict(tokens=(height // 4) * (width // 4), params=sum(p.numel() for p in model.parameters()))

    return Work(step=step, check=check, warm_up=warm_up, facts=facts)


def table(rows: list[dict]) -> str:
    """The rows of a run, and what was left out."""
    lines = []
    for row in rows:
        line = [row["height"], row["name"], row["mode"], "-", "-", "-", row["status"]]
        if row["status"] == "ok":
            peak = f"{total_mib(row):.0f}" if row["peak_mib"] else "-"
            line[3:6] = [f"{int(row['params']) / 1e6:.1f}", f"{float(row['median_ms']) / 1000:.1f}", peak]
        lines.append(line)
    return text_table(["pixels", "model", "mode", "M params", "seconds", "peak MiB", "status"], lines)
