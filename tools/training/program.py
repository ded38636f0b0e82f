"""What the training programs have in common around their work: options, the processes of torchrun, ends."""

import argparse
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from timm.utils import init_distributed_device

from ..ending import InputError, say_anything, told
from .engine import Processes, Training
from .folder import RunFolder
from .recipe import CommonRecipe, add_recipe_arguments


class RankError(InputError):
    """One that only this process may have met."""


def dashes(word: str) -> str:
    """An option as the parser knows it: keys may be written as in the recipe, with underscores."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def make_parser(
    usage: str, description: str, output: str, kind: type[CommonRecipe], example: str
) -> argparse.ArgumentParser:
    """A parser of the options that every training has, the keys of its recipe among them.

    Args:
        output: the folder that --output is by default, in words.
        kind, example: of the recipe.
    """
    parser = argparse.ArgumentParser(
        usage=usage, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--output", type=Path, metavar="DIR", help=f"folder of the run ({output})")
    add("--resume", action="store_true", help="go on where the run in the output folder stopped, if there is one")
    add("--device", help="cpu, cuda or cuda:N (a GPU if there is one)")
    add("--grad-accum", type=int, default=1, metavar="N", help="steps to an update, to save memory (1)")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--deterministic", action="store_true", help="on a GPU too: the same weights from the same command, slower")
    add("--no-tensorboard", action="store_true", help="write log.csv only")
    add("--progress", type=float, default=10, metavar="SECONDS", help="between lines of progress (10)")
    add_recipe_arguments(parser, kind, example)
    return parser


def parsed(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The command line; keys may be written with dashes or underscores."""
    args = parser.parse_args([dashes(word) for word in (sys.argv[1:] if argv is None else argv)])
    if args.grad_accum < 1:
        parser.error("--grad-accum must be at least 1")
    if not args.progress >= 0:
        parser.error("--progress must be at least 0")
    return args


def guarded(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """The exit status of `run(args)`; 1 if something given cannot be used, said in one line, 130 if interrupted."""
    first = int(os.environ.get("RANK", 0)) == 0
    say_anything()
    try:
        status = run(args)
        sys.stdout.flush()  # here, where an error can still be told
        return status
    except Exception as error:
        if (line := told(error)) is None:
            raise
        if first or isinstance(error, RankError | OSError):
            print(f"error: {line}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        if first:
            print("\ninterrupted; --resume goes on after the last whole epoch", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            # A model in a reference cycle holds the group, whose threads would outlive Python and may abort it.
            gc.collect()
            dist.destroy_process_group()


def start_processes(device: str | None, deterministic: bool) -> tuple[Processes, Callable[..., None]]:
    """Join the other processes of torchrun, if there are any; and a `print` that is silent in all but the first."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {device}: there is no CUDA device here")
    found = SimpleNamespace(device=device)
    try:
        device = init_distributed_device(found)
    except RuntimeError as error:
        raise InputError(f"--device {device}: {error}") from None
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    processes = Processes(device, found.rank, found.world_size, found.local_rank)
    return processes, print if processes.is_first else lambda *_, **__: None


def go_on(training: Training, stored: dict | None, folder: RunFolder, args: argparse.Namespace, say: Callable) -> None:
    """Bring a training to where its run stopped, if there is a stored state, and open the folder."""
    if stored:
        training.load_state_dict(stored)
        say(f"resuming {folder.path} after epoch {training.epoch}")
        if training.spread != stored["spread"]:
            say(f"note: the work is shared by {training.spread}, was {stored['spread']}: the weights will be others")
    elif args.resume:
        say(f"no training state in {folder.path}: starting from the beginning")
    if training.processes.is_first:
        folder.open(training.epoch, not args.no_tensorboard)
