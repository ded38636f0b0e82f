"""ViTs with multipole attention beside the originals: cost against resolution, on random weights."""

from collections.abc import Sequence

import timm
import torch
from timm.models import VisionTransformer

import fma2d

from .harness import Task, Work, text_table
from .model_benchmark import CLASSES, work_of
from .records import total_mib

DEFAULT = ["vit_small_patch16_224", "vit_small_patch14_reg4_dinov2"]
VARIANTS = ("loglinear", "linear")


def tasks(
    models: Sequence[str],
    sizes: Sequence[int],
    variants: Sequence[str] = VARIANTS,
    batch: int = 1,
    cell_size: int = 8,
    rank: int = 4,
    **setting,
) -> list[Task]:
    """Inference of each model at each size: the original, then each variant; `setting`: of `Task`."""
    found = []
    for size in sorted(sizes):
        for name in models:
            subject = dict(benchmark="vit", name=name, mode="inference", height=size, width=size, batch=batch)
            converted = [dict(variant=v, cell_size=cell_size, rank=rank) for v in variants]
            for options in ({}, *converted):
                cost = size**2 if options else size**4
                found.append(Task(f"{__name__}:build", subject | options, cost, **setting))
    return found


def create(name: str, size: int, **options) -> VisionTransformer:
    """A ViT with random weights for square images of about `size` pixels a side, converted if there are options."""
    patch = timm.create_model(name, depth=0).patch_embed.patch_size[0]
    model = timm.create_model(name, img_size=max(1, round(size / patch)) * patch, num_classes=CLASSES).eval()
    return fma2d.convert_attention(model, **options) if options else model


def build(*, benchmark, name, mode, height, width, batch, device, dtype, **options) -> Work:
    """The work of a row: logits of a batch, without gradients."""
    torch.manual_seed(0)
    like = dict(device=device, dtype=getattr(torch, dtype))
    model = create(name, height, **options).to(**like)
    images = torch.randn(batch, 3, *model.patch_embed.img_size, **like)
    return work_of(model, images, batch * (model.num_prefix_tokens + model.patch_embed.num_patches))


def table(rows: list[dict]) -> str:
    """The rows of a run beside the original in the same run, and what was left out."""
    settings = ("name", "height", "batch", "device", "dtype")
    dense = {tuple(r[s] for s in settings): r for r in rows if r["status"] == "ok" and not r["variant"]}
    lines, notes = [], []
    for row in rows:
        if row["status"] != "ok":
            notes.append(f"{row['name']} {row['height']} px {row['variant'] or 'dense'}: {row['status']}")
            continue
        peer = dense.get(tuple(row[s] for s in settings))
        line = [row["name"], row["height"], row["variant"] or "dense", row["tokens"], f"{int(row['macs']) / 1e9:.1f}"]
        line += [f"{float(row['median_ms']):.0f}", f"{total_mib(row):.0f}" if row["peak_mib"] else "-"]
        line += [f"{float(row['median_ms']) / float(peer['median_ms']):.2f}" if peer else "-"]
        line += [f"{total_mib(row) / total_mib(peer):.2f}" if peer and row["peak_mib"] else "-"]
        lines.append(line)
    header = ["model", "pixels", "attention", "tokens", "GMACs", "ms", "MiB", "time/dense", "memory/dense"]
    return "\n".join([text_table(header, lines), *notes])
