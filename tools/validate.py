"""Top-1 and top-5 accuracy and speed of a classifier on images in ROOT/SPLIT/CLASS/IMAGE.

    python tools/validate.py out/train/fma2d_nano/best.safetensors --data-dir data/digits
    python tools/validate.py fma2d_nano.digits --data-dir data/digits
    python tools/validate.py weights.pth --model fma2d_base --data-dir data/imagenet

Weights are a file of tools/train_classifier.py, which says what model it is for; another checkpoint, with --model; or
the timm name of a pretrained model. --publish writes the weights, in the precision that was measured, as one
safetensors file with the metrics in its metadata.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timm
import torch
from timm.data import resolve_data_config
from torch import nn

from tools.arguments import device, mapping, positive, share
from tools.ending import InputError, ending, output_folder
from tools.training.checkpoints import load_weights, read_metadata, read_tensors, save_weights, sha256
from tools.training.data import WORKERS, EvalBatches, ImageFolder, eval_transform, find_split, list_images, make_loader
from tools.training.engine import Processes, evaluate
from tools.training.model import build_model

DTYPES = ("float32", "bfloat16", "float16")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("weights", help="checkpoint file, or timm name of a pretrained model")
    add("--data-dir", type=Path, required=True, metavar="ROOT", help="the images")
    add("--split", default="val", help="folder below ROOT (val)")
    add("--model", metavar="NAME", help="timm name, for a checkpoint that does not say its own")
    add("--model-kwargs", type=mapping, default={}, metavar="X", help="its arguments as YAML, e.g. '{cell_size: 2}'")
    add("--img-size", type=positive, metavar="N", help="pixels a side (what the weights were made for)")
    add("--crop-pct", type=share, metavar="X", help="share of the image that is seen (the same)")
    add("--batch-size", type=positive, default=64, metavar="N", help="(64)")
    add("--workers", type=int, default=WORKERS, metavar="N", help=f"processes that read images; 0: none ({WORKERS})")
    add("--device", type=device, help="cpu, cuda or cuda:N (a GPU if there is one)")
    add("--amp", choices=("bf16", "fp16"), help="mixed precision (float32)")
    add("--store", choices=DTYPES, default="float32", help="round the weights to this before measuring (float32)")
    add("--publish", type=Path, metavar="FILE.safetensors", help="write the weights and what was measured")
    args = parser.parse_args(argv)
    if args.workers < 0:
        parser.error("--workers must be at least 0")
    if args.publish and args.publish.suffix != ".safetensors":
        parser.error(f"--publish: the file must end in .safetensors, got {args.publish}")
    return args


@ending()
def main(argv: list[str] | None = None) -> None:
    """Validate."""
    run(parse(argv))


def run(args: argparse.Namespace) -> None:
    """Validate as the command line says."""
    place = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.publish and args.publish.exists():
        raise InputError(f"{args.publish} exists already")
    if args.publish and not args.publish.parent.is_dir():
        raise InputError(f"there is no folder {args.publish.parent} to publish to")
    if args.publish:
        output_folder(args.publish.parent)
    metadata = read_metadata(Path(args.weights)) if Path(args.weights).is_file() else {}
    if args.publish and "recipe" not in metadata:
        raise InputError(f"--publish needs a file of tools/train_classifier.py; {args.weights} has no recipe")
    root = find_split(args.data_dir, args.split)
    samples, classes = list_images(root, metadata.get("classes"))
    model = load_model(args, metadata, len(classes))
    config = data_config(args, model, metadata)
    if len(classes) != model.num_classes:
        raise InputError(f"the weights are for {model.num_classes} classes, {root} has {len(classes)} class folders")
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(getattr(torch, args.store)).float()

    data = ImageFolder(samples, config["input_size"][0], eval_transform(config), seed=0)
    loader = make_loader(data, EvalBatches(len(samples), args.batch_size), args.workers, place)
    scores = evaluate(model.to(place), loader, Processes(place), args.amp)
    print(
        f"top-1 {scores['top1']:.2f} %  top-5 {scores['top5']:.2f} %  loss {scores['loss']:.4f}  "
        f"({len(samples)} images of {root}, {config['input_size'][-1]} px)"
    )
    print(f"{len(samples) / scores['seconds']:.1f} images/s in the model, on {place}, {args.amp or 'float32'}")
    if args.publish:
        publish(args, model, scores, metadata)


def load_model(args: argparse.Namespace, metadata: dict, num_classes: int) -> nn.Module:
    """The model with its weights."""
    path = Path(args.weights)
    if not path.is_file():
        if path.suffix in (".safetensors", ".pt", ".pth", ".bin") or len(path.parts) > 1:
            raise InputError(f"there is no checkpoint {path}")
        try:
            return timm.create_model(args.weights, pretrained=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"{args.weights} is neither a file nor a pretrained model: {error}") from None
    name = args.model or metadata.get("architecture")
    if name is None:
        read_tensors(path)  # says so if it is no checkpoint
        raise InputError(f"{path} does not say what classifier it is of: name it with --model")
    config = metadata.get("data_config", {})
    input_size = config.get("input_size", (3, 224, 224))
    model = build_model(
        name,
        metadata.get("model_kwargs", {}) | args.model_kwargs,
        num_classes=num_classes,
        in_chans=input_size[0],
        img_size=args.img_size or input_size[-1],
        attention=metadata.get("attention", "fma"),
    )
    load_weights(model, path, name)
    return model


def data_config(args: argparse.Namespace, model: nn.Module, metadata: dict) -> dict:
    """Size, mean, std, crop and interpolation: the command line's, else the weights', else the model's."""
    config = dict(metadata.get("data_config") or resolve_data_config({}, model=model))
    if args.img_size:
        config["input_size"] = (config["input_size"][0], args.img_size, args.img_size)
    if args.crop_pct:
        config["crop_pct"] = args.crop_pct
    return config


def publish(args: argparse.Namespace, model: nn.Module, scores: dict, metadata: dict) -> None:
    """Write the weights as measured, with the metrics, and print the file's hash."""
    measured = {key: scores[key] for key in ("loss", "top1", "top5", "count")}
    metadata = metadata | dict(validation=measured | dict(split=args.split, stored_as=args.store))
    save_weights(model.to(getattr(torch, args.store)), args.publish, metadata)
    print(f"{args.publish}: {args.publish.stat().st_size / 1e6:.2f} MB, sha256 {sha256(args.publish)}")


if __name__ == "__main__":
    sys.exit(main())
