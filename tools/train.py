"""Trains a segmentation config of configs/ (or of your own) with mmsegmentation. Runs on a CPU, a GPU, or many.

python tools/train.py configs/scenes/segformer_fma2d-nano_1xb4-1200_scenes-128x128.py
tools/dist_train.sh configs/ade20k/segformer_fma2d-base_8xb2-160k_ade20k-512x512.py 8
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fma2d.mmseg import CheckpointError, load_tensors, read_weights
from tools.ending import ending, output_folder
from tools.mmseg_runs import add_options, build_runner, check_data, fit_to_machine, last_checkpoint, read_config


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("config", type=Path)
    add("--work-dir", type=Path, help="folder of checkpoints and logs (work_dirs/CONFIG)")
    add("--resume", action="store_true", help="go on from the last checkpoint in the work dir, if there is one")
    add("--amp", action="store_true", help="mixed precision; needs a CUDA device")
    add("--launcher", choices=("none", "pytorch"), default="none", help="pytorch: started by torchrun (none)")
    add_options(parser)
    return parser.parse_args(argv)


def train(args: argparse.Namespace) -> None:
    """Check everything, then train."""
    cfg = read_config(args.config, args.cfg_options)
    cfg.work_dir = str(args.work_dir or cfg.get("work_dir") or Path("work_dirs") / args.config.stem)
    output_folder(Path(cfg.work_dir))
    if args.resume or (cfg.get("resume") and not cfg.get("load_from")):
        found = last_checkpoint(Path(cfg.work_dir))
        cfg.resume = found is not None
        if found:
            cfg.load_from = str(found)
        else:
            print(f"there is no checkpoint in {cfg.work_dir}: starting from the beginning")
    fit_to_machine(cfg, args.launcher, args.amp)
    check_data(cfg, ("train", "val"))
    if start := cfg.get("load_from"):
        read_weights(start)  # what is no checkpoint is refused now, before mmengine runs the code it may hold
    runner = build_runner(cfg, train=True)
    meta = load_tensors(start, "cpu").get("meta", {}) if start and cfg.get("resume") else {}
    if meta.get("iter", 0) >= runner.max_iters:
        # The checkpoint is written before the last validation, which a stopped run may lack.
        print(f"the training in {cfg.work_dir} is finished; tools/test.py {args.config} {start} scores it")
        return
    runner.train()


@ending(CheckpointError, interrupted="interrupted; --resume goes on from the last checkpoint")
def main(argv: list[str] | None = None) -> None:
    """Train."""
    train(parse(argv))


if __name__ == "__main__":
    sys.exit(main())
