"""Tests a segmentation model: mIoU on the config's test data, single scale or, with --tta, several scales and flips.

python tools/test.py configs/scenes/segformer_fma2d-nano_1xb8-1k_scenes-128x128.py CHECKPOINT
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from mmengine.config import Config, DictAction

from fma2d.mmseg import load_model
from tools.mmseg_runs import build_runner, check_data, fit_to_machine, read_config, run_tool


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("config", type=Path)
    add("checkpoint", type=Path, help="weights of the whole model, .pth or .safetensors")
    add("--work-dir", type=Path, help="folder of the log (work_dirs/CONFIG)")
    add("--tta", action="store_true", help="average over six scales and flips")
    add("--out", type=Path, help="folder to write predictions to, as annotation files")
    add("--launcher", choices=("none", "pytorch"), default="none", help="pytorch: started by torchrun (none)")
    add("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="settings put into the config")
    return parser.parse_args(argv)


def use_tta(cfg: Config) -> None:
    """Make the test pipeline that of test-time augmentation."""
    loader = cfg.test_dataloader = Config(cfg.test_dataloader.to_dict())  # no longer the validation's
    loader.dataset.pipeline = cfg.tta_pipeline
    loader.batch_size = 1
    cfg.tta_model.module = cfg.model
    cfg.model = cfg.tta_model


def test(args: argparse.Namespace) -> dict[str, float]:
    """Check everything, then test; the metrics."""
    cfg = read_config(args.config, args.cfg_options)
    cfg.work_dir = str(args.work_dir or cfg.get("work_dir") or Path("work_dirs") / args.config.stem)
    fit_to_machine(cfg, args.launcher)
    check_data(cfg, ("test",))
    if args.tta:
        use_tta(cfg)
    if args.out:
        cfg.test_evaluator.output_dir = str(args.out)
    runner = build_runner(cfg, train=False)
    model = getattr(runner.model, "module", runner.model)  # of a parallel or a TTA wrapper
    load_model(getattr(model, "module", model), str(args.checkpoint))
    metrics = runner.test()
    print("  ".join(f"{name} {value:.2f}" for name, value in metrics.items() if np.isscalar(value)))
    return metrics


def main(argv: list[str] | None = None) -> int:
    """Test; 2 if something the user gave is wrong."""
    args = parse(argv)
    return run_tool(lambda: test(args))


if __name__ == "__main__":
    sys.exit(main())
