"""How far a ViT's outputs are from the original's after fma2d.convert_attention (costs: `python -m benchmarks vit`).

    python -m research.vit difference    # relative difference of the last features, on a photo
    python -m research.vit trained       # the same of a tiny ViT, trained first: minutes

No pretrained weights are used. The first measures random weights whose attention scores have a set spread: the larger,
the more a patch attends to few others. The photo is matplotlib's, 512 x 600 px, enlarged for larger sizes. The second
trains on scikit-learn's digits, which are 8 x 8 px whatever size they are brought to, so it says what averaging does to
trained attention, nothing about real images. Results go to research/results/vit_*.csv, written anew.
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from timm import create_model, is_model
from timm.layers import LayerScale
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm, trange

import fma2d
from benchmarks.harness import text_table
from benchmarks.model_benchmark import load_photo
from benchmarks.records import origin, write_rows
from benchmarks.vit_benchmark import DEFAULT, VARIANTS, create
from tools.arguments import positive
from tools.ending import ending
from tools.training.model import no_model

from . import RESULTS

ORIGIN = ("torch", "timm", "fma2d", "commit", "command")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="(both)")
    add("--rank", type=positive, default=4, help="summary tokens per coarse cell (4)")
    add("--threads", type=positive, help="on the CPU (torch's choice)")
    add("--out", type=Path, help="results file (research/results/vit_REPORT.csv)")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_subparsers(dest="report", metavar="REPORT", required=True)
    add = which.add_parser("difference", help="of the last features", parents=[common]).add_argument
    add("--models", nargs="+", default=DEFAULT, help=f"timm ViTs ({' '.join(DEFAULT)})")
    add("--sizes", nargs="+", type=positive, default=[224, 512, 1024], help="pixels, to the next patch (224 512 1024)")
    add("--cell-size", type=positive, default=8, help="patches per side of a base cell (8)")
    add("--spreads", nargs="+", type=float, default=[1, 3], help="standard deviations of attention scores (1 3)")
    add = which.add_parser("trained", help="difference of a tiny trained ViT", parents=[common]).add_argument
    add("--sizes", nargs="+", type=positive, default=[32, 64], help="pixels a side of the test images (32 64)")
    add("--cell-size", type=positive, default=2, help="patches per side of a base cell (2)")
    add("--epochs", type=positive, default=40, help="of the training (40)")
    args = parser.parse_args(argv)
    for name in getattr(args, "models", []):
        if not is_model(name):
            parser.error(no_model(name))
        with torch.device("meta"):
            if not isinstance(create_model(name), VisionTransformer):
                parser.error(f"{name} is no VisionTransformer of timm, which this is about")
    return args


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


@ending()
def main(argv: list[str] | None = None) -> None:
    """Compute, print and write."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    options = dict(variants=args.variants, cell_size=args.cell_size, rank=args.rank)
    if args.report == "trained":
        rows = trained_differences(args.sizes, args.epochs, **options)
    else:
        from matplotlib.cbook import get_sample_data

        photo = str(get_sample_data("grace_hopper.jpg", asfileobj=False))
        cases = list(product(args.models, args.sizes, args.spreads))
        bar = tqdm(cases, unit="model", dynamic_ncols=True)
        rows = [row for case in bar for row in random_differences(*case, photo, **options)]
    path = args.out or RESULTS / f"vit_{args.report}.csv"
    source = origin(threads=args.threads)
    write_rows(path, [*rows[0], *ORIGIN], [row | source for row in rows])
    print(f"\n{text_table(list(rows[0]), [list(row.values()) for row in rows])}\n\nrows in {path}")


if __name__ == "__main__":
    sys.exit(main())
