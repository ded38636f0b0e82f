"""Trains a timm model, fma2d's or another, on images in ROOT/train/CLASS/IMAGE and ROOT/val/CLASS/IMAGE.

    python tools/train_classifier.py configs/digits/fma2d_nano.yaml --data-dir data/digits
    torchrun --nproc_per_node=8 tools/train_classifier.py configs/imagenet/base_1k_224.yaml --data-dir data/imagenet

The output folder gets recipe.yaml, log.csv, tensorboard/, best.safetensors and last.safetensors (weights, for
tools/validate.py and timm) and state.pt (to go on). Killed anywhere, the same command with --resume goes on after the
last whole epoch and ends with the same weights as an unbroken run.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.ending import InputError
from tools.training.data import (
    WORKERS,
    EvalBatches,
    ImageFolder,
    Images,
    TrainBatches,
    broken_images,
    eval_transform,
    make_loader,
    read_images,
    train_transform,
)
from tools.training.engine import Training, evaluate
from tools.training.folder import RunFolder
from tools.training.log import Progress, duration
from tools.training.model import data_config, recipe_model
from tools.training.program import RankError, go_on, guarded, make_parser, parsed, start_processes
from tools.training.recipe import Recipe, recipe_from_arguments
from tools.training.seeding import WEIGHTS, seed_at

ROOT = Path(__file__).resolve().parents[1]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    usage = "%(prog)s RECIPE.yaml --data-dir ROOT [options] [--key value ...]"
    parser = make_parser(usage, __doc__, "out/train/RECIPE", Recipe, "configs/digits/fma2d_nano.yaml")
    add = parser.add_argument
    add("--data-dir", type=Path, required=True, metavar="ROOT", help="the images")
    add("--check-data", action="store_true", help="read every image once, name those that are broken, and stop")
    add("--workers", type=int, default=WORKERS, metavar="N", help=f"image readers for each GPU; 0: none ({WORKERS})")
    add("--grad-checkpointing", action="store_true", help="compute activations twice, to save memory")
    args = parsed(parser, argv)
    if args.workers < 0:
        parser.error("--workers must be at least 0")
    return args


def main(argv: list[str] | None = None) -> int:
    """Train; 1 if something given cannot be used, 130 if interrupted."""
    return guarded(run, parse(argv))


def run(args: argparse.Namespace) -> int:
    """Train as the command line says."""
    recipe = recipe_from_arguments(args)
    images = read_images(args.data_dir, recipe.num_classes, validation=recipe.eval_every > 0)
    if args.check_data:
        return check_data([path for path, _ in images.train + images.val], args.workers)
    folder = RunFolder(args.output or ROOT / "out" / "train" / args.recipe.stem, recipe, images)
    stored = folder.stored_state(args.resume)
    processes, say = start_processes(args.device, args.deterministic)
    seed_at(WEIGHTS, recipe.seed)
    # A run that goes on needs not what it started from.
    start = dataclasses.replace(recipe, init_from=None, init_head="keep") if stored else recipe
    model = recipe_model(start, len(images.classes), say).to(processes.device)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    config = data_config(recipe, model)
    share = (processes.rank, processes.world)
    batches = TrainBatches(len(images.train), recipe.batch_size, args.grad_accum, *share, recipe.seed)
    training = Training(recipe, model, processes, batches.updates, args.grad_accum, args.compile)
    data = ImageFolder(images.train, recipe.in_chans, train_transform(recipe, config), recipe.seed)
    train_loader = make_loader(data, batches, args.workers, processes.device)
    data = ImageFolder(images.val, recipe.in_chans, eval_transform(config), recipe.seed)
    val_loader = make_loader(data, EvalBatches(len(data), batches.piece, *share), args.workers, processes.device)
    go_on(training, stored, folder, args, say)
    describe(say, training, images, folder.path)

    while training.epoch < recipe.epochs:
        epoch = batches.epoch = training.epoch
        progress = Progress(epoch + 1, recipe.epochs, batches.updates, recipe.batch_size, args.progress, folder.log)
        validate = recipe.eval_every and ((epoch + 1) % recipe.eval_every == 0 or epoch + 1 == recipe.epochs)
        try:
            loss = training.train_epoch(train_loader, progress)
            seconds = progress.seconds
            scores = evaluate(training.weights, val_loader, processes, recipe.amp) if validate else {}
        except InputError as error:
            raise RankError(str(error)) from None
        if processes.is_first:
            row = epoch_row(training, loss, seconds, batches.updates * recipe.batch_size, scores)
            say(epoch_line(row, recipe.epochs, progress.seconds * (recipe.epochs - training.epoch)), flush=True)
            folder.record(training, row, config)
    if folder.best["epoch"]:
        say(f"best top-1 {folder.best['top1']:.2f} % after epoch {folder.best['epoch']}")
    say(f"weights in {folder.path}")
    return 0


def check_data(paths: list[str], workers: int) -> int:
    """Read every image; 1 if some are broken."""
    broken = broken_images(paths, workers)
    print(*broken, sep="\n", end="\n" if broken else "")
    print(f"{len(paths)} images, {len(broken)} broken")
    return 1 if broken else 0


def describe(say, training: Training, images: Images, folder: Path) -> None:
    """The head of a run's output."""
    recipe, model = training.recipe, training.model
    count = sum(parameter.numel() for parameter in model.parameters())
    say(f"{recipe.model}, attention {recipe.attention}: {count / 1e6:.2f} M parameters, {model.num_classes} classes")
    if recipe.model.startswith("fma2d_") and recipe.attention == "fma":
        levels = [stage.blocks[0].attn.levels for stage in model.stages]
        say(f"levels with learned kernels in each stage: {', '.join(map(str, levels))}")
    say(f"{len(images.train)} images for training, {len(images.val)} for validation, {recipe.img_size} px")
    if images.val and (unseen := len(images.classes) - len({label for _, label in images.val})):
        say(f"note: {unseen} of {len(images.classes)} classes have no image for validation")
    processes = training.processes
    say(f"{processes.world} process(es) on {processes.device.type}, precision {recipe.amp or 'float32'}, in {folder}")


def epoch_row(training: Training, loss: float, seconds: float, images: int, scores: dict) -> dict:
    """A row of the log."""
    row = dict(
        epoch=training.epoch,
        lr=training.optimizer.param_groups[-1]["lr"],
        train_loss=loss,
        images_per_second=images / seconds,
        seconds=seconds,
    )
    return row | (dict(val_loss=scores["loss"], top1=scores["top1"], top5=scores["top5"]) if scores else {})


def epoch_line(row: dict, epochs: int, left: float) -> str:
    """The same for the eye."""
    text = f"epoch {row['epoch']}/{epochs}  loss {row['train_loss']:.4f}  {row['images_per_second']:.0f} images/s"
    if "top1" in row:
        text += f"  validation: loss {row['val_loss']:.4f}  top-1 {row['top1']:.2f}  top-5 {row['top5']:.2f}"
    return text + f"  left {duration(left)}"


if __name__ == "__main__":
    sys.exit(main())
