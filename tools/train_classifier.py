"""Trains a timm model, fma2d's or another, on images in ROOT/train/CLASS/IMAGE and ROOT/val/CLASS/IMAGE.

    python tools/train_classifier.py configs/digits/fma2d_nano.yaml --data-dir data/digits
    torchrun --nproc_per_node=8 tools/train_classifier.py configs/imagenet/base_1k_224.yaml --data-dir data/imagenet

The output folder gets recipe.yaml, log.csv, tensorboard/, best.safetensors and last.safetensors (weights, for
tools/validate.py and timm) and state.pt (to go on). Killed anywhere, the same command with --resume goes on after the
last whole epoch and ends with the same weights as an unbroken run.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from timm.utils import init_distributed_device

from fma2d import __version__
from tools.training import InputError
from tools.training.checkpoints import load_state, remove_unfinished, save_state, save_weights, write_whole
from tools.training.data import (
    EvalBatches,
    ImageFolder,
    TrainBatches,
    broken_images,
    eval_transform,
    find_split,
    list_images,
    make_loader,
    train_transform,
)
from tools.training.engine import Processes, Training, evaluate
from tools.training.log import EpochLog, Progress, duration
from tools.training.model import data_config, recipe_model
from tools.training.recipe import Recipe, add_recipe_arguments, differences, recipe_from_arguments, to_yaml
from tools.training.seeding import WEIGHTS, seed_at

ROOT = Path(__file__).resolve().parents[1]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s RECIPE.yaml --data-dir ROOT [options] [--key value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data-dir", type=Path, required=True, metavar="ROOT", help="the images")
    add("--output", type=Path, metavar="DIR", help="folder of the run (out/train/RECIPE)")
    add("--resume", action="store_true", help="go on where the run in the output folder stopped, if there is one")
    add("--check-data", action="store_true", help="read every image once, name those that are broken, and stop")
    add("--device", help="cpu, cuda or cuda:N (a GPU if there is one)")
    add("--workers", type=int, default=4, metavar="N", help="processes that read images, for each GPU; 0: none (4)")
    add("--grad-accum", type=int, default=1, metavar="N", help="steps to an update, to save memory (1)")
    add("--grad-checkpointing", action="store_true", help="compute activations twice, to save memory")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--deterministic", action="store_true", help="on a GPU too: the same weights from the same command, slower")
    add("--no-tensorboard", action="store_true", help="write log.csv only")
    add("--progress", type=float, default=10, metavar="SECONDS", help="between lines of progress (10)")
    add_recipe_arguments(parser)
    args = parser.parse_args([dashes(word) for word in (sys.argv[1:] if argv is None else argv)])
    if args.workers < 0 or args.grad_accum < 1:
        parser.error("--workers must be at least 0 and --grad-accum at least 1")
    return args


def dashes(word: str) -> str:
    """An option as the parser knows it: keys may be written as in the recipe, with underscores."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def main(argv: list[str] | None = None) -> int:
    """Train; 1 if something given cannot be used, 130 if interrupted."""
    args = parse(argv)
    first = int(os.environ.get("RANK", 0)) == 0
    try:
        return run(args)
    except InputError as error:
        if first or isinstance(error, RankError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        if first:
            print("\ninterrupted; --resume goes on after the last whole epoch", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class RankError(InputError):
    """One that only this process may have met."""


def run(args: argparse.Namespace) -> int:
    """Train as the command line says."""
    recipe = recipe_from_arguments(args)
    folder = args.output or ROOT / "out" / "train" / args.recipe.stem
    train_root = find_split(args.data_dir, "train")
    samples, classes = list_images(train_root)
    val_samples = []
    if recipe.eval_every:
        val_samples, _ = list_images(find_split(args.data_dir, "val"), classes)
    if args.check_data:
        return check_data([path for path, _ in samples + val_samples], args.workers)
    if recipe.num_classes not in (None, len(classes)):
        raise InputError(f"num_classes is {recipe.num_classes}, but {train_root} has {len(classes)} class folders")
    stored = stored_state(folder, args.resume, recipe, classes, len(samples))
    processes = start_processes(args.device)
    say = print if processes.is_first else lambda *_, **__: None
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)

    seed_at(WEIGHTS, recipe.seed)
    # A run that goes on needs not what it started from.
    start = dataclasses.replace(recipe, init_from=None, init_head="keep") if stored else recipe
    model = recipe_model(start, len(classes))
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    config = data_config(recipe, model)
    rank, world = processes.rank, processes.world
    batches = TrainBatches(len(samples), recipe.batch_size, args.grad_accum, rank, world, recipe.seed)
    wrap = torch.compile if args.compile else None
    training = Training(recipe, model.to(processes.device), processes, batches.updates, args.grad_accum, wrap)
    train_data = ImageFolder(samples, recipe.in_chans, train_transform(recipe, config), recipe.seed)
    train_loader = make_loader(train_data, batches, args.workers, processes.device)
    val_loader = None
    if val_samples:
        val_data = ImageFolder(val_samples, recipe.in_chans, eval_transform(config), recipe.seed)
        val_batches = EvalBatches(len(val_samples), batches.piece, rank, world)
        val_loader = make_loader(val_data, val_batches, args.workers, processes.device)

    facts = dict(classes=classes, images=len(samples), spread=dict(processes=world, grad_accum=args.grad_accum))
    best = dict(epoch=0, top1=-1.0)
    if stored:
        training.load_state_dict(stored)
        best = stored["best"]
        say(f"resuming {folder} after epoch {training.epoch}")
        if stored["spread"] != facts["spread"]:
            say(f"note: the work is shared by {facts['spread']}, was {stored['spread']}: the weights will be others")
    elif args.resume:
        say(f"no training state in {folder}: starting from the beginning")
    log = None
    if processes.is_first:
        open_folder(folder, recipe)
        log = EpochLog(folder, training.epoch, not args.no_tensorboard)
    describe(say, recipe, model, samples, val_samples, processes, folder)

    while training.epoch < recipe.epochs:
        batches.epoch = training.epoch
        progress = Progress(
            training.epoch + 1, recipe.epochs, batches.updates, recipe.batch_size, args.progress, not log
        )
        scores = {}
        try:
            loss = training.train_epoch(train_loader, progress)
            seconds = progress.seconds
            if val_loader and (training.epoch % recipe.eval_every == 0 or training.epoch == recipe.epochs):
                scores = evaluate(training.weights, val_loader, processes, recipe.amp)
        except InputError as error:
            raise RankError(str(error)) from None
        if not log:
            continue
        row = epoch_row(training, loss, seconds, batches.updates * recipe.batch_size, scores)
        log.append(row)
        say(epoch_line(row, recipe.epochs, progress.seconds * (recipe.epochs - training.epoch)), flush=True)
        metadata = weights_metadata(recipe, config, classes, row)
        save_weights(training.weights, folder / "last.safetensors", metadata)
        if scores and scores["top1"] > best["top1"]:
            best = dict(epoch=training.epoch, top1=scores["top1"])
            save_weights(training.weights, folder / "best.safetensors", metadata)
        # Last, so that whatever is killed before is done again by the run that goes on.
        state = training.state_dict() | facts | dict(recipe=dataclasses.asdict(recipe), best=best)
        save_state(folder / "state.pt", state)
    if best["epoch"]:
        say(f"best top-1 {best['top1']:.2f} % after epoch {best['epoch']}")
    say(f"weights in {folder}")
    return 0


def check_data(paths: list[str], workers: int) -> int:
    """Read every image; 1 if some are broken."""
    broken = broken_images(paths, workers)
    print(*broken, sep="\n", end="\n" if broken else "")
    print(f"{len(paths)} images, {len(broken)} broken")
    return 1 if broken else 0


def stored_state(folder: Path, resume: bool, recipe: Recipe, classes: list[str], images: int) -> dict | None:
    """The state to go on from, if any; refuses to mix it with another recipe or other data, or to overwrite it."""
    path = folder / "state.pt"
    if not path.exists():
        if not resume and folder.is_dir() and any(folder.glob("*.safetensors")):
            raise InputError(f"{folder} holds weights; choose another --output")
        return None
    if not resume:
        raise InputError(f"{folder} holds a run; go on with it by --resume, or choose another --output")
    state = load_state(path)
    if changed := differences(recipe, state["recipe"]):
        raise InputError(f"{folder} was trained with other hyper-parameters: {'; '.join(changed)}")
    if (state["classes"], state["images"]) != (classes, images):
        raise InputError(
            f"{folder} was trained on other data: {state['images']} images of {len(state['classes'])} classes, "
            f"now {images} of {len(classes)}" + (", other names" if state["classes"] != classes else "")
        )
    return state


def start_processes(device: str | None) -> Processes:
    """Join the other processes of torchrun, if there are any."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {device}: there is no CUDA device here")
    found = SimpleNamespace(device=device)
    try:
        device = init_distributed_device(found)
    except RuntimeError as error:
        raise InputError(f"--device {device}: {error}") from None
    return Processes(device, found.rank, found.world_size, found.local_rank)


def open_folder(folder: Path, recipe: Recipe) -> None:
    """Make the folder of the run, without what a killed one has left unfinished, and put the recipe there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the output folder {folder}: {error.strerror}") from None
    remove_unfinished(folder)
    write_whole(folder / "recipe.yaml", lambda temporary: Path(temporary).write_text(to_yaml(recipe)))


def describe(say, recipe: Recipe, model, samples, val_samples, processes: Processes, folder: Path) -> None:
    """The head of a run's output."""
    count = sum(parameter.numel() for parameter in model.parameters())
    say(f"{recipe.model}, attention {recipe.attention}: {count / 1e6:.2f} M parameters, {model.num_classes} classes")
    if recipe.model.startswith("fma2d_") and recipe.attention == "fma":
        levels = [stage.blocks[0].attn.levels for stage in model.stages]
        say(f"levels with learned kernels in each stage: {', '.join(map(str, levels))}")
    say(f"{len(samples)} images for training, {len(val_samples)} for validation, {recipe.img_size} px")
    if val_samples and (unseen := model.num_classes - len({label for _, label in val_samples})):
        say(f"note: {unseen} of {model.num_classes} classes have no image for validation")
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


def weights_metadata(recipe: Recipe, config: dict, classes: list[str], row: dict) -> dict:
    """What is to be known to use the weights: the model, its input, its classes, and how it was made."""
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    return dict(
        architecture=recipe.model,
        attention=recipe.attention,
        model_kwargs=recipe.model_kwargs,
        data_config={key: config[key] for key in keys},
        classes=classes,
        recipe=to_yaml(recipe),
        metrics={key: row[key] for key in ("epoch", "train_loss", "val_loss", "top1", "top5") if key in row},
        fma2d=__version__,
    )


if __name__ == "__main__":
    sys.exit(main())
