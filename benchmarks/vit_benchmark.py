"""ViTs with multipole attention beside the originals: cost against resolution, and how far outputs differ.

No pretrained weights are used. Costs do not depend on them. Differences do: they are measured on random weights whose
attention scores have a set spread (the larger, the more a patch attends to few others), and on a small trained model.
"""

import copy
from collections.abc import Sequence

import timm
import torch
from timm.layers import LayerScale
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

import fma2d

from .harness import GateError, Task, Work, text_table
from .model_benchmark import CLASSES, count_macs, load_photo
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

    @torch.inference_mode()
    def step() -> Tensor:
        return model(images)

    def check(logits: Tensor) -> None:
        if logits.shape != (batch, CLASSES) or not logits.isfinite().all():
            raise GateError(f"logits are not {batch} x {CLASSES} finite numbers")

    def warm_up() -> None:
        F.conv2d(images[..., :32, :32], torch.zeros(8, 3, 4, 4, **like)).flatten(2) @ torch.zeros(29 * 29, 8, **like)

    def facts() -> dict:
        tokens = batch * (model.num_prefix_tokens + model.patch_embed.num_patches)
        parameters = sum(p.numel() for p in model.parameters())
        return dict(tokens=tokens, params=parameters, macs=count_macs(model, images))

    return Work(step=step, check=check, warm_up=warm_up, facts=facts)


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


def random_vit(name: str, size: int, spread: float) -> VisionTransformer:
    """A ViT with random weights whose attention scores have about this standard deviation; a trained one's is 1 to 4.

    Queries and keys of a normalised token have independent channels of variance `spread`, so their scaled products have
    that standard deviation. LayerScale, which starts near zero and would hide every difference, is set to one.
    """
    torch.manual_seed(0)
    model = create(name, size)
    for block in model.blocks:
        dim = block.attn.qkv.in_features
        nn.init.normal_(block.attn.qkv.weight[: 2 * dim].data, std=(spread / dim) ** 0.5)
        for module in block.modules():
            if isinstance(module, LayerScale):
                nn.init.ones_(module.gamma)
    return model


def random_differences(
    name: str, size: int, spread: float, photo: str, variants: Sequence[str], **options
) -> list[dict]:
    """Differences between a ViT with random weights and its conversions, on a photo: a row for each variant."""
    model = random_vit(name, size, spread)
    image = load_photo(photo, model.patch_embed.img_size[0])
    found = dict(name=name, pixels=size, spread=spread)
    return [found | row for row, _ in differences(model, image, variants, **options)]


def differences(model: VisionTransformer, images: Tensor, variants: Sequence[str], **options):
    """How far a model's last features are from those of its conversions: yields a row and the logits of each variant.

    The difference of all patches, and of all prefix tokens (nan where there are none), is relative to their norm.
    """
    grid, prefix = model.patch_embed.dynamic_feat_size(images.shape[-2:]), model.num_prefix_tokens
    row = dict(grid="x".join(map(str, grid)), levels=fma2d.num_levels(grid, options["cell_size"])) | options
    with torch.inference_mode():
        dense = model.forward_features(images)
        for variant in variants:
            converted = fma2d.convert_attention(copy.deepcopy(model), variant=variant, **options)
            features = converted.forward_features(images)
            parts = {"patches": slice(prefix, None), "prefix": slice(prefix)}
            shares = {k: (features - dense)[:, part].norm() / dense[:, part].norm() for k, part in parts.items()}
            yield (
                row | dict(variant=variant) | {k: f"{share:.4f}" for k, share in shares.items()},
                converted.forward_head(features),
            )


def trained_differences(sizes: Sequence[int], epochs: int, variants: Sequence[str], **options) -> list[dict]:
    """Differences between a small ViT trained on scikit-learn's digits and its conversions, on the digits held out.

    The training is at 32 px, a grid of 8 x 8 patches; `sizes` are pixels of the test images, all made from 8 x 8.
    """
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    pixels, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels))
    (train, test), count = order.split([1437, 360]), 1437 // 96

    def digits(chosen: Tensor, size: int) -> Tensor:
        images = pixels[chosen].float().view(-1, 1, 8, 8) / 8 - 1
        return F.interpolate(images, size=(size, size), mode="bilinear")

    model = VisionTransformer(32, 4, 1, 10, embed_dim=64, depth=3, num_heads=2, mlp_ratio=2, dynamic_img_size=True)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * count)
    for _ in trange(epochs, desc="training", unit="epoch", dynamic_ncols=True):
        for batch in train[torch.randperm(len(train))].split(96)[:count]:
            shift = torch.randint(-2, 3, (2,)).tolist()
            loss = F.cross_entropy(model(digits(batch, 32).roll(shift, (2, 3))), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()
    rows = []
    for size in sizes:
        images = digits(test, size)
        with torch.inference_mode():
            dense = model(images).argmax(1)
        for row, logits in differences(model, images, variants, **options):
            classes = logits.argmax(1)
            right = {"dense right": dense == labels[test], "right": classes == labels[test], "same": classes == dense}
            rows.append(dict(pixels=size) | row | {k: f"{x.float().mean():.3f}" for k, x in right.items()})
    return rows
