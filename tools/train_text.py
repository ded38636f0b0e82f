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
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.text.batches import make_batches
from tools.text.corpus import read_corpus
from tools.text.engine import TextTraining, evaluate
from tools.text.folder import RESULT, TextFolder
from tools.text.recipe import TextRecipe, text_model
from tools.training.checkpoints import write_text
from tools.training.log import Progress, duration
from tools.training.program import go_on, guarded, make_parser, parsed, start_processes
from tools.training.recipe import recipe_from_arguments
from tools.training.seeding import WEIGHTS, seed_at

ROOT = Path(__file__).resolve().parents[1]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    usage = "%(prog)s RECIPE.yaml [--data PATH] [options] [--key value ...]"
    parser = make_parser(usage, __doc__, "out/text/RECIPE", TextRecipe, "configs/text/embedded.yaml")
    text = "a folder with train, val and test, each .txt (source bytes), .npy (tokens) or .csv; or one file of this "
    text += "kind, which is split 90/5/5 percent"
    parser.add_argument("--data", type=Path, metavar="PATH", help=text)
    text = "end after the epoch that reaches this much training in all; --resume goes on"
    parser.add_argument("--stop-after", type=float, metavar="MINUTES", help=text)
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
    model = text_model(recipe, len(corpus.classes)).to(processes.device)
    train, validation, test = make_batches(recipe, corpus, processes, args.grad_accum)
    updates = train.batches.updates
    training = TextTraining(recipe, model, processes, updates, args.grad_accum, args.compile)
    go_on(training, stored, folder, args, say)
    count = sum(parameter.numel() for parameter in model.parameters())
    say(f"{type(model).__name__}, attention {recipe.attention}: {count / 1e6:.2f} M parameters\n{corpus}")
    where, precision = f"{processes.world} process(es) on {processes.device.type}", recipe.amp or "float32"
    say(f"{where}, precision {precision}, in {folder.path}")

    unit = "texts" if recipe.task == "classify" else "tokens"
    size = recipe.batch_size * (1 if recipe.task == "classify" else recipe.context)
    trained = sum(float(row["seconds"]) for row in folder.log.rows) if processes.is_first else 0.0
    while training.epoch < recipe.epochs:
        # All processes must hear the same: they share the work.
        if args.stop_after is not None and processes.sum([trained])[0] >= 60 * args.stop_after:
            say(f"stopped after {args.stop_after:g} minutes of training; --resume goes on")
            return 0
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
            scores = evaluate(training.weights, validation, recipe, processes)
            row |= dict(val_loss=scores["loss"]) | {key: scores[key] for key in folder.columns if key in scores}
        if processes.is_first:
            trained += row["seconds"]
            line = f"epoch {row['epoch']}/{recipe.epochs}  loss {loss:.4f}  {row['per_second']:.0f} {unit}/s"
            line += f"  validation: {scores_line(row)}" if "val_loss" in row else ""
            say(f"{line}  left {duration(progress.seconds * (recipe.epochs - training.epoch))}", flush=True)
            folder.record(training, row)
    if not any(processes.sum([processes.is_first and (folder.path / RESULT).exists()])):
        say("scoring the test split", flush=True)
        result = evaluate(training.weights, test, recipe, processes)
        result |= dict(params=count, updates=training.epoch * updates, text=corpus.sha256)
        if processes.is_first:
            write_text(folder.path / RESULT, json.dumps(result, indent=1) + "\n")
            say(f"test: {scores_line(result)}")
    say(f"weights in {folder.path}")
    return 0


def scores_line(scores: dict) -> str:
    """Scores for the eye."""
    if "accuracy" in scores:
        return f"accuracy {scores['accuracy']:.2f} %"
    return f"{scores['bits']:.4f} bits a token, perplexity {scores['perplexity']:.2f}"


if __name__ == "__main__":
    sys.exit(main())
