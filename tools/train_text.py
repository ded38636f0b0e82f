"""Trains a text model of fma2d on bytes, on the tokens of a tokenizer, or on labelled texts.

    python tools/train_text.py configs/text/embedded.yaml    # at once: text found inside the Python installation
    python tools/train_text.py configs/text/enwik8.yaml --data enwik8
    torchrun --nproc_per_node=8 tools/train_text.py configs/text/wikitext103.yaml --data wikitext103
    python tools/train_text.py configs/text/classify.yaml --data reviews.csv

The output folder gets recipe.yaml, log.csv, tensorboard/, best.safetensors and last.safetensors (for
`fma2d.text.load_model`), result.json (the scores on the test split) and state.pt (to go on). Killed anywhere, the same
command with --resume goes on after the last whole epoch and ends with the same weights as an unbroken run.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.text.batches import EvalWindows, Texts, TrainWindows, WindowBatches
from tools.text.corpus import Corpus, Labelled, read_corpus
from tools.text.engine import TextTraining, evaluate_classes, evaluate_language
from tools.text.folder import RESULT, TextFolder
from tools.text.recipe import TextRecipe, text_model
from tools.training.data import EvalBatches, TrainBatches
from tools.training.engine import Processes
from tools.training.log import Progress, duration
from tools.training.program import go_on, guarded, make_parser, parsed, start_processes
from tools.training.recipe import recipe_from_arguments
from tools.training.seeding import WEIGHTS, seed_at

ROOT = Path(__file__).resolve().parents[1]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    usage = "%(prog)s RECIPE.yaml [--data PATH] [options] [--key value ...]"
    parser = make_parser(usage, __doc__, "out/text/RECIPE", TextRecipe, "configs/text/embedded.yaml")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="for source bytes: a file; tokens: a file or a folder with train, val and test, each .npy or .bin; csv: a "
        "file or a folder with train.csv, val.csv and test.csv; a single file is split 90/5/5 percent",
    )
    return parsed(parser, argv)


def main(argv: list[str] | None = None) -> int:
    """Train; 1 if something given cannot be used, 130 if interrupted."""
    return guarded(run, parse(argv))


def run(args: argparse.Namespace) -> int:
    """Train as the command line says."""
    recipe = recipe_from_arguments(args, TextRecipe)
    corpus = read_corpus(recipe, args.data)
    folder = TextFolder(args.output or ROOT / "out" / "text" / args.recipe.stem, recipe, corpus)
    stored = folder.stored_state(args.resume)
    processes, say = start_processes(args.device, args.deterministic)
    seed_at(WEIGHTS, recipe.seed)
    model = text_model(recipe, len(corpus.classes) if recipe.task == "classify" else 0).to(processes.device)
    train, validation, test = make_batches(recipe, corpus, processes, args.grad_accum)
    updates = train.batches.updates
    training = TextTraining(recipe, model, processes, updates, args.grad_accum, args.compile)
    go_on(training, stored, folder, args, say)
    count = sum(parameter.numel() for parameter in model.parameters())
    say(f"{type(model).__name__}, attention {recipe.attention}: {count / 1e6:.2f} M parameters")
    say(corpus)
    where = f"{processes.world} process(es) on {processes.device.type}"
    say(f"{where}, precision {recipe.amp or 'float32'}, in {folder.path}")

    size = recipe.batch_size * (recipe.context if recipe.task != "classify" else 1)
    unit = "tokens" if recipe.task != "classify" else "texts"
    while training.epoch < recipe.epochs:
        epoch = train.batches.epoch = training.epoch
        progress = Progress(epoch + 1, recipe.epochs, updates, size, args.progress, folder.log, unit)
        start = time.process_time()
        loss = training.train_epoch(train, progress)
        row = dict(
            epoch=training.epoch,
            updates=training.epoch * updates,
            lr=training.optimizer.param_groups[-1]["lr"],
            train_loss=loss,
            per_second=updates * size / progress.seconds,
            seconds=progress.seconds,
            processor_seconds=time.process_time() - start,
        )
        if recipe.eval_every and (training.epoch % recipe.eval_every == 0 or training.epoch == recipe.epochs):
            scores = evaluate(training, recipe, validation)
            row |= dict(val_loss=scores["loss"]) | {key: scores[key] for key in folder.columns if key in scores}
        if processes.is_first:
            left = progress.seconds * (recipe.epochs - training.epoch)
            say(f"{epoch_line(row, recipe.epochs, unit)}  left {duration(left)}", flush=True)
            folder.record(training, row)
    # Whether it is there must be one answer for all processes: they share the work.
    if not any(processes.sum([processes.is_first and (folder.path / RESULT).exists()])):
        say("scoring the test split", flush=True)
        result = evaluate(training, recipe, test)
        result |= dict(params=count, updates=training.epoch * updates, text=corpus.sha256)
        if processes.is_first:
            folder.write_result(result)
            say(f"test: {scores_line(result)}")
    say(f"weights in {folder.path}")
    return 0


def make_batches(recipe: TextRecipe, corpus: Corpus | Labelled, processes: Processes, accum: int) -> tuple:
    """Batches of this process for training, validation and the test."""
    share = (processes.rank, processes.world)
    if recipe.task == "classify":
        batches = TrainBatches(len(corpus.train), recipe.batch_size, accum, *share, recipe.seed, "texts")
        held_out = ((texts, EvalBatches(len(texts), batches.piece, *share)) for texts in (corpus.val, corpus.test))
        return Texts(recipe, corpus.train, batches), *(Texts(recipe, *pair) for pair in held_out)
    tokens = len(corpus.train)
    starts = tokens - recipe.context + (recipe.task != "causal")
    updates = recipe.updates_per_epoch or max(1, tokens // (recipe.context * recipe.batch_size))
    batches = WindowBatches(starts, updates, recipe.batch_size, accum, *share, recipe.seed)
    validation = EvalWindows(recipe, corpus.val, batches.piece, *share, recipe.eval_windows)
    return (
        TrainWindows(recipe, corpus.train, batches),
        validation,
        EvalWindows(recipe, corpus.test, batches.piece, *share),
    )


def evaluate(training: TextTraining, recipe: TextRecipe, batches) -> dict:
    """Scores of the weights that count."""
    if recipe.task == "classify":
        return evaluate_classes(training.weights, batches, training.processes, recipe.amp)
    return evaluate_language(training.weights, batches, recipe.context, training.processes, recipe.amp)


def epoch_line(row: dict, epochs: int, unit: str) -> str:
    """A row of the log for the eye."""
    text = f"epoch {row['epoch']}/{epochs}  loss {row['train_loss']:.4f}  {row['per_second']:.0f} {unit}/s"
    return text + (f"  validation: {scores_line(row)}" if "val_loss" in row else "")


def scores_line(scores: dict) -> str:
    """Scores for the eye."""
    if "accuracy" in scores:
        return f"accuracy {scores['accuracy']:.2f} %"
    second = scores["bits_second_half"]
    text = f"{scores['bits']:.4f} bits a token, perplexity {scores['perplexity']:.2f}"
    return text if second is None else f"{text}, second half of the context {second:.4f} bits"


if __name__ == "__main__":
    sys.exit(main())
