"""Tests a segmentation model: mIoU on the config's test data, single scale or, with --tta, several scales and flips.

python tools/test.py configs/scenes/segformer_fma2d-nano_1xb4-1200_scenes-128x128.py CHECKPOINT
"""

import argparse
import copy
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from PIL import Image
from torch import nn

from fma2d.checkpoint import save_checkpoint
from fma2d.mmseg import CheckpointError, load_model
from tools.ending import InputError, ending, output_folder
from tools.mmseg_runs import (
    add_options,
    annotation_labels,
    build_runner,
    check_data,
    files_of,
    fit_to_machine,
    read_config,
    result_names,
)


class WritePredictions(Hook):
    """Writes what was predicted as annotation files, with the labels of the data set's own (`annotation_labels`).

    `names` says where each image's goes, without suffix (`result_names`).
    """

    def __init__(self, folder: Path, labels: np.ndarray, names: dict[Path, Path]):
        self.folder, self.labels, self.names = folder, labels, names

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=()) -> None:
        for sample in outputs:
            classes = sample.pred_sem_seg.data[0].long().cpu().numpy()  # a head of one channel gives them as floats
            path = self.folder / f"{self.names[Path(sample.img_path)]}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(self.labels[classes]).save(path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("config", type=Path)
    add("checkpoint", type=Path, help="weights of the whole model, .pth or .safetensors")
    add("--work-dir", type=Path, help="folder of the log (work_dirs/CONFIG)")
    add("--tta", action="store_true", help="average over six scales and flips")
    add("--out", type=Path, help="folder to write predictions to, as annotation files")
    add("--publish", type=Path, metavar="FILE", help="write the weights and this result to a .safetensors file")
    add("--launcher", choices=("none", "pytorch"), default="none", help="pytorch: started by torchrun (none)")
    add_options(parser)
    args = parser.parse_args(argv)
    if args.publish and args.publish.suffix != ".safetensors":
        parser.error(f"--publish: the file must end in .safetensors, got {args.publish}")
    return args


def use_tta(cfg: Config) -> None:
    """Make the test pipeline that of test-time augmentation."""
    loader = cfg.test_dataloader = copy.deepcopy(cfg.test_dataloader)  # it may be the validation's too
    loader.dataset.pipeline = cfg.tta_pipeline
    loader.batch_size = 1
    cfg.tta_model.module = cfg.model
    cfg.model = cfg.tta_model


def publish(model: nn.Module, path: Path, cfg: Config, metrics: dict[str, float]) -> None:
    """Write the weights with the config's name and the result as metadata, and the file's sha256 beside it."""
    about = Path(cfg.test_dataloader.dataset.get("data_root") or ".", "generated.json")
    digest = save_checkpoint(
        model,
        path,
        config=Path(cfg.filename).stem,
        data=json.loads(about.read_text()) if about.is_file() else cfg.test_dataloader.dataset.type,
        metrics={name: round(float(value), 2) for name, value in metrics.items() if np.isscalar(value)},
    )
    path.with_name(f"{path.name}.sha256").write_bytes(os.fsencode(f"{digest}  {path.name}\n"))
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, sha256 {digest}")


def test(args: argparse.Namespace) -> None:
    """Check everything, then test."""
    cfg = read_config(args.config, args.cfg_options)
    cfg.work_dir = str(args.work_dir or cfg.get("work_dir") or Path("work_dirs") / args.config.stem)
    for folder in filter(None, (Path(cfg.work_dir), args.out, args.publish and args.publish.parent)):
        output_folder(folder)
    if args.publish and args.publish.is_dir():
        raise InputError(f"--publish: {args.publish} is a folder")
    fit_to_machine(cfg, args.launcher)
    check_data(cfg, ("test",))
    if args.tta:
        use_tta(cfg)
    cfg.load_from, cfg.resume = None, False  # where a training starts: the runner would test that
    runner = build_runner(cfg, train=False)
    if args.out:
        parts = files_of(cfg)
        images = [Path(part.get_data_info(i)["img_path"]) for part in parts for i in range(len(part))]
        runner.register_hook(WritePredictions(args.out, annotation_labels(parts[0]), result_names(images)))
    model = getattr(runner.model, "module", runner.model)  # of a parallel or a TTA wrapper
    model = getattr(model, "module", model)
    load_model(model, str(args.checkpoint))
    metrics = runner.test()
    if not is_main_process():
        return
    print("  ".join(f"{name} {value:.2f}" for name, value in metrics.items() if np.isscalar(value)))
    if args.publish:
        publish(model, args.publish, cfg, metrics)


@ending(CheckpointError)
def main(argv: list[str] | None = None) -> None:
    """Test."""
    test(parse(argv))


if __name__ == "__main__":
    sys.exit(main())
