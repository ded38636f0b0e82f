"""What the tests of the trainers share: ways to run and to break them; of images a tiny recipe and generated data."""

import csv
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch.utils._pytree import tree_flatten

from tools import train_classifier
from tools.training.checkpoints import load_state, read_metadata
from tools.training.log import Progress

ROOT = Path(__file__).resolve().parents[1]
TIMES = ("seconds", "processor_seconds", "per_second", "images_per_second")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
alone_and_together = pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["alone", "torchrun"])

# All that draws random numbers is on: crops, flips, policies, erasing, mixup and cutmix, drop path, dropout; and all
# that has a state: momenta, schedule with warm-up, moving average.
TINY = dict(
    model="fma2d_nano",
    model_kwargs=dict(dims=[8, 8, 16, 16], depths=[1, 1, 1, 1], head_dim=8, cell_size=2, rank=1),
    img_size=32,
    epochs=2,
    batch_size=8,
    lr=1e-3,
    warmup_epochs=1,
    clip_grad=1.0,
    layer_decay=0.8,
    ema_decay=0.9,
    drop_rate=0.1,
    drop_path_rate=0.2,
    mixup=0.8,
    cutmix=1.0,
    auto_augment="rand-m5-mstd0.5-inc1",
    reprob=0.5,
)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Generated images in three classes: 26 for training, 7 for validation."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, counts in (("train", (10, 9, 7)), ("val", (3, 2, 2))):
        for label, count in enumerate(counts):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (40, 36, 3), dtype=np.uint8) // 2 + 60 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def command(recipe_file, images, output, *more):
    places = ["--data-dir", str(images), "--output", str(output)]
    return [str(recipe_file), *places, "--workers", "0", "--device", "cpu", "--no-tensorboard", *more]


@pytest.fixture(scope="session")
def finished(images, tmp_path_factory):
    """A run of one epoch, and its recipe."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | dict(epochs=1, warmup_epochs=0, ema_decay=None)))
    assert train_classifier.main(command(path, images, folder / "run")) == 0
    return folder


def error_line(capsys, main, words):
    """What a program that is given something unusable prints: one line."""
    capsys.readouterr()
    assert main(words) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


def assert_same_run(folder, other):
    """The state, the weights' files and the log agree to the bit, times excepted, and no other file is there."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in other.iterdir())
    one, two = load_state(folder / "state.pt"), load_state(other / "state.pt")
    (values, shape), (twins, twin_shape) = tree_flatten(one), tree_flatten(two)
    assert shape == twin_shape
    assert all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(values, twins, strict=True))
    for name in ("last.safetensors", "best.safetensors"):
        weights, twin = load_file(folder / name), load_file(other / name)
        assert weights.keys() == twin.keys() and all(torch.equal(weights[key], twin[key]) for key in weights)
        assert read_metadata(folder / name) == read_metadata(other / name)
    for path in folder.glob("*.json"):
        assert path.read_text() == (other / path.name).read_text()
    logs = []
    for path in (folder, other):
        with (path / "log.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        logs.append([{key: x for key, x in row.items() if key not in TIMES} for row in rows])
    assert logs[0] == logs[1] and len(logs[0]) == one["epoch"]


class Killed(Exception):
    pass


def resumed_run(program, words, tmp_path, monkeypatch, *more):
    """Run whole, and in another folder stop dead in epoch 2 and go on: the same. The two folders.

    `words(output, ...)` are the program's arguments, `more` those of going on.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert program.main(words(whole)) == 0

    def progress(self, done, *rest):
        if (self.epoch, done) == (2, 2):
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Progress, "__call__", progress)
        program.main(words(broken))
    assert load_state(broken / "state.pt")["epoch"] == 1
    (broken / ".state.pt.x.unfinished").touch()  # as a kill while writing leaves one
    random.random(), np.random.rand(), torch.rand(1)
    assert program.main(words(broken, "--resume", *more)) == 0
    assert_same_run(whole, broken)
    return whole, broken


def check_killed_process(program, words, tmp_path, update, launcher):
    """The same with a process, or those of a launcher, killed after a line of progress."""

    def start(*arguments):
        command = [sys.executable, *launcher, program.__file__, *words(*arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = start(whole)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0 and f"{2 if launcher else 1} process(es) on cpu" in output, output
    process = start(broken)
    for line in process.stdout:
        if line.startswith(update):
            break
    if launcher:  # torchrun starts each in a session of its own
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
    process.kill()
    process.wait()
    assert load_state(broken / "state.pt")["epoch"] == 1
    process = start(broken, "--resume")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0 and "resuming" in output, output
    assert_same_run(whole, broken)
