"""The classification trainer: resuming, seeding, recipes, bad inputs."""

import csv
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tools import make_digits, train_classifier, validate
from tools.training import InputError
from tools.training.checkpoints import load_state, read_metadata, save_state
from tools.training.data import EvalBatches, ImageFolder, TrainBatches, list_images, make_loader, train_transform
from tools.training.engine import Processes, Training
from tools.training.log import EpochLog
from tools.training.model import data_config, recipe_model
from tools.training.recipe import Recipe, differences, make_recipe, read_values

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(ROOT.glob("configs/imagenet/*.yaml")) + sorted(ROOT.glob("configs/digits/*.yaml"))

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


def start(words, launcher=()):
    """The trainer in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, *launcher, str(ROOT / "tools" / "train_classifier.py"), *words]
    return subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def assert_same_run(folder, other):
    """Weights, moving averages, momenta and the log agree to the bit."""
    one, two = load_state(folder / "state.pt"), load_state(other / "state.pt")
    assert one["epoch"] == two["epoch"] and one["best"] == two["best"]
    for part in ("model", "ema"):
        assert one[part].keys() == two[part].keys()
        assert all(torch.equal(one[part][key], two[part][key]) for key in one[part])
    for state, twin in zip(one["optimizer"]["state"].values(), two["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(state[key], twin[key]) for key in state)
    assert one["optimizer"]["param_groups"] == two["optimizer"]["param_groups"]
    for name in ("last.safetensors", "best.safetensors"):
        weights, twin = load_file(folder / name), load_file(other / name)
        assert weights.keys() == twin.keys() and all(torch.equal(weights[key], twin[key]) for key in weights)
        assert read_metadata(folder / name) == read_metadata(other / name)
    logs = []
    for path in (folder, other):
        with (path / "log.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        logs.append([{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows])
    assert logs[0] == logs[1] and len(logs[0]) == one["epoch"]


# Resuming.


class Killed(Exception):
    pass


def kill_at(monkeypatch, epoch, update):
    """Have the trainer stop dead after an update."""

    def progress(self, done, *rest):
        if (self.epoch, done) == (epoch, update):
            raise Killed

    monkeypatch.setattr(train_classifier.Progress, "__call__", progress)


def test_resumed_run_is_the_unbroken_one(images, recipe_file, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train_classifier.main(command(recipe_file, images, whole)) == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 2, 2)
        train_classifier.main(command(recipe_file, images, broken))
    assert load_state(broken / "state.pt")["epoch"] == 1
    (broken / ".state.pt.x.unfinished").touch()  # as a kill while writing leaves one
    random.random(), np.random.rand(), torch.rand(1)
    assert train_classifier.main(command(recipe_file, images, broken, "--resume", "--workers", "1")) == 0
    assert_same_run(whole, broken)
    assert sorted(p.name for p in broken.iterdir()) == sorted(p.name for p in whole.iterdir())
    # A run that is done is not changed by going on with it, and another seed makes another run.
    before = (broken / "state.pt").read_bytes()
    assert train_classifier.main(command(recipe_file, images, broken, "--resume")) == 0
    assert (broken / "state.pt").read_bytes() == before
    assert train_classifier.main(command(recipe_file, images, tmp_path / "other", "--seed", "1")) == 0
    with pytest.raises(AssertionError):
        assert_same_run(whole, tmp_path / "other")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")])
def test_killed_process_and_processes(images, recipe_file, tmp_path, launcher):
    """SIGKILL in the middle of epoch 2, alone and under torchrun (gloo); at 64 px learned levels stay unused."""
    more = ["--progress", "0", "--model-kwargs", yaml.safe_dump(TINY["model_kwargs"] | dict(levels=3)).strip()]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = start(command(recipe_file, images, whole, *more), launcher)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert f"{2 if launcher else 1} process(es) on cpu" in output

    process = start(command(recipe_file, images, broken, *more), launcher)
    for line in process.stdout:
        if line.startswith("epoch 2/2  update 1/3"):
            break
    if launcher:  # torchrun starts each in a session of its own
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in children:
            os.kill(int(pid), signal.SIGKILL)
    process.kill()
    process.wait()
    assert load_state(broken / "state.pt")["epoch"] == 1
    process = start(command(recipe_file, images, broken, *more, "--resume"), launcher)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0 and "resuming" in output, output
    assert_same_run(whole, broken)


def flat(lists):
    return [*chain.from_iterable(lists)]


def test_processes_and_accumulation_share_the_images_of_an_update():
    """The update's images are the same however they are dealt out, every epoch has another order, none comes twice."""
    [*alone] = TrainBatches(26, 8, 1, 0, 1, seed=0)
    shares = [[*TrainBatches(26, 8, 2, rank, 2, seed=0)] for rank in range(2)]
    for update, keys in enumerate(alone):
        pieces = [share[2 * update + step] for step in range(2) for share in shares]
        assert [len(piece) for piece in pieces] == [2, 2, 2, 2]
        assert flat(pieces) == keys
    assert len(set(flat(alone))) == 24
    later = TrainBatches(26, 8, 1, 0, 1, seed=0)
    later.epoch = 1
    assert [index for _, index in flat(later)] != [index for _, index in flat(alone)]
    dealt = flat(flat(EvalBatches(7, 2, rank, 3)) for rank in range(3))
    assert sorted(index for _, index in dealt) == list(range(7))


def test_augmentation_depends_on_seed_epoch_and_index_alone(images):
    recipe = make_recipe(TINY, "test")
    samples, _ = list_images(images / "train")
    config = data_config(recipe, recipe_model(recipe, 3))

    def image(seed, epoch, index):
        return ImageFolder(samples, 3, train_transform(recipe, config), seed)[epoch, index][0]

    first = image(0, 0, 5)
    image(0, 3, 1), random.random(), np.random.rand(), torch.rand(1)
    assert torch.equal(first, image(0, 0, 5))
    assert not any(torch.equal(first, image(*key)) for key in ((1, 0, 5), (0, 1, 5), (0, 0, 6), (5, 0, 0)))


# Recipes.


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipes_build(path, monkeypatch):
    """Model, optimizer and schedule of every recipe, on the meta device."""
    recipe = make_recipe(read_values(path), str(path))
    if recipe.init_head == "new":
        with pytest.raises(InputError, match="init_head new needs init_from"):
            recipe_model(recipe, recipe.num_classes)
        recipe = replace(recipe, init_head="keep", ema_decay=None)  # timm's has no meta device
    with torch.device("meta"):
        model = recipe_model(recipe, recipe.num_classes)
        training = Training(recipe, model, Processes(torch.device("meta")), 10, 1)
    assert data_config(recipe, model)["input_size"] == (recipe.in_chans, recipe.img_size, recipe.img_size)
    groups = training.optimizer.param_groups
    plain = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    kernels = [p for name, p in model.named_parameters() if name.endswith(".kernels")]
    assert bool(kernels) == (recipe.attention == "fma") and {id(p) for p in kernels} <= plain
    assert len({group.get("lr_scale", 1) for group in groups}) == (1 if recipe.layer_decay is None else 26)
    peak = 0.0
    for update in range(10 * recipe.epochs + 1):
        training.scheduler.step_update(update)
        peak = max(peak, groups[-1]["lr"])
    assert 0.95 * recipe.lr < peak <= recipe.lr and groups[-1]["lr"] == pytest.approx(recipe.min_lr)


def test_overrides_and_bases(tmp_path):
    (tmp_path / "base.yaml").write_text("lr: 1e-3\nepochs: 5\n")
    path = tmp_path / "recipe.yaml"
    path.write_text("base: base.yaml\nepochs: 7\n")
    args = train_classifier.parse([str(path), "--data-dir", "x", "--batch_size", "16", "--mixup=1", "--amp", "bf16"])
    recipe = train_classifier.recipe_from_arguments(args)
    assert recipe == Recipe(lr=1e-3, epochs=7, batch_size=16, mixup=1.0, amp="bf16")
    assert differences(replace(recipe, lr=2e-3), vars(recipe)) == ["lr 0.002 (was 0.001)"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1", "unknown key learning_rate; the keys are base, model, "),
        ("lr: fast", "lr must be float, got 'fast'"),
        ("epochs: 1.5", "epochs must be int, got 1.5"),
        ("epochs: true", "epochs must be int, got True"),
        ("epochs: 0", "epochs must be at least 1, got 0"),
        ("amp: fp8", "amp must be one of null, bf16, fp16, got 'fp8'"),
        ("scale: [1, 0.1]", "scale must be two positive numbers"),
        ("mean: [0.5]", "mean needs 3 value(s), one a channel"),
        ("base: recipe.yaml", "is its own base"),
        ("a: b: c", "is not YAML"),
        ("- 1", "must be a mapping"),
    ],
)
def test_bad_recipes(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        make_recipe(read_values(path), str(path))
    assert str(path) in str(error.value) and message in str(error.value)


# Bad inputs: one line on stderr, exit status 1, and what was written before is as it was.


def snapshot(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A run of one epoch, and its recipe."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | dict(epochs=1, warmup_epochs=0, ema_decay=None)))
    assert train_classifier.main(command(path, images, folder / "run")) == 0
    return folder


def error_line(capsys, program, words):
    capsys.readouterr()
    assert program(words) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resume", "--lr", "2e-3"], "other hyper-parameters: lr 0.002 (was 0.001)"),
        (["--resume", "--epochs", "9", "--mixup", "0"], "hyper-parameters: epochs 9 (was 1); mixup 0.0 (was 0.8)"),
        ([], "holds a run; go on with it by --resume, or choose another --output"),
        (["--resume", "--num-classes", "4"], "num_classes is 4, but"),
    ],
)
def test_finished_run_is_not_lost(images, finished, capsys, words, message):
    before = snapshot(finished)
    line = error_line(capsys, train_classifier.main, command(finished / "tiny.yaml", images, finished / "run", *words))
    assert message in line
    assert snapshot(finished) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "fma2d_nan"], "cannot build fma2d_nan"),
        (["--model-kwargs", "{cell_sise: 2}"], "cell_sise"),
        (["--model-kwargs", "{num_classes: 2}"], "model_kwargs num_classes have keys of their own"),
        (["--attention", "dense"], "model_kwargs cell_size, rank play no part with attention dense"),
        (["--opt", "adamx"], "cannot build the optimizer adamx"),
        (["--sched", "plateau"], "cannot build the schedule plateau"),
        (["--warmup-epochs", "3"], "warmup_epochs 3.0 must be less than epochs 2"),
        (["--batch-size", "100"], "batch_size 100 is more than the 26 images for training"),
        (["--grad-accum", "3"], "batch_size 8 cannot be shared by 1 process(es) x 3 accumulation step(s)"),
        (["--grad-accum", "8"], "1 images a process and step must be even"),
        (["--device", "cuda"], "there is no CUDA device here"),
        (["--in-chans", "1"], "in_chans 1 needs mean and std"),
        (["--init-head", "new"], "init_head new needs init_from"),
        (["--init-from", "absent.pt"], "there is no checkpoint absent.pt"),
        (["--lr", "1e20", "--clip-grad", "null"], "the loss of epoch"),
    ],
)
def test_bad_settings(images, recipe_file, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert message in error_line(capsys, train_classifier.main, command(recipe_file, images, tmp_path / "run", *words))


def test_unknown_option_is_named(images, recipe_file, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_classifier.main(command(recipe_file, images, tmp_path, "--learning-rate", "1"))
    assert "unrecognized arguments: --learning-rate 1" in capsys.readouterr().err


def test_bad_folders(images, recipe_file, tmp_path, capsys):
    def line(root, *words):
        return error_line(capsys, train_classifier.main, command(recipe_file, root, tmp_path / "run", *words))

    assert f"there is no folder {tmp_path / 'absent'}" in line(tmp_path / "absent")
    root = tmp_path / "copy"
    shutil.copytree(images, root)
    (root / "train" / "class3").mkdir()
    assert "no image in 1 class folder(s) of" in line(root) and "class3" in line(root)
    (root / "train" / "class3").rmdir()
    shutil.copytree(root / "val" / "class0", root / "val" / "class9")
    assert "1 class folder(s) that training does not know: class9" in line(root)
    (root / "val" / "class9").rename(root / "train" / "class0" / "deeper")
    assert "must lie in a class folder of" in line(root)
    shutil.rmtree(root / "train" / "class0" / "deeper")
    shutil.rmtree(root / "val")
    assert "has no folder val; eval_every: 0 trains without it" in line(root)
    assert not (tmp_path / "run").exists()
    assert train_classifier.main(command(recipe_file, root, tmp_path / "run", "--eval-every", "0")) == 0
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    assert "no image in" in line(root, "--eval-every", "0")


@pytest.mark.parametrize("workers", ["0", "1"])
def test_truncated_image_is_named(images, recipe_file, tmp_path, capsys, workers):
    root = tmp_path / "copy"
    shutil.copytree(images, root)
    bad = root / "train" / "class1" / "3.png"
    bad.write_bytes(bad.read_bytes()[:1000])
    words = command(recipe_file, root, tmp_path / "run", "--workers", workers)
    assert f"cannot read the image {bad}: " in error_line(capsys, train_classifier.main, words)
    assert train_classifier.main([*words, "--check-data"]) == 1
    out = capsys.readouterr().out
    assert str(bad) in out and "33 images, 1 broken" in out


def test_bad_checkpoints(images, finished, tmp_path, capsys):
    good = finished / "run" / "last.safetensors"

    def line(path, *words):
        more = ["--init-from", str(path), *words]
        return error_line(
            capsys, train_classifier.main, command(finished / "tiny.yaml", images, tmp_path / "run", *more)
        )

    weights = load_file(good)
    half = tmp_path / "half.safetensors"
    save_file({key: weights[key] for key in sorted(weights)[::2]}, half)
    assert "does not fit fma2d_nano" in line(half) and "missing, e.g. " in line(half)
    assert f"{good} holds fma2d_nano, not fma2d_tiny" in line(good, "--model", "fma2d_tiny")
    bare = tmp_path / "bare.pt"
    torch.save({"state_dict": weights}, bare)
    assert "does not fit resnet18" in line(bare, "--model", "resnet18", "--model-kwargs", "{}", "--layer-decay", "null")
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"no checkpoint")
    assert f"{broken} is not a checkpoint" in line(broken)
    root = tmp_path / "two"
    shutil.copytree(images, root)
    for split in ("train", "val"):
        shutil.rmtree(root / split / "class2")
    words = command(finished / "tiny.yaml", root, tmp_path / "run", "--init-from", str(bare))
    assert "has 3 classes, not 2; a training starts a new" in error_line(capsys, train_classifier.main, words)
    assert not (tmp_path / "run").exists()
    assert train_classifier.main([*words, "--init-head", "new", "--lr", "0", "--warmup-lr", "0", "--min-lr", "0"]) == 0
    kept = load_file(tmp_path / "run" / "last.safetensors")
    assert all(torch.equal(kept[key], weights[key]) for key in kept if not key.startswith("head.fc"))


def test_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    save_state(path, dict(epoch=1))

    def full(_, name):
        Path(name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"cannot write .*state\.pt, what was there is kept: .*No space left"):
        save_state(path, dict(epoch=2))
    assert load_state(path)["epoch"] == 1 and [p.name for p in tmp_path.iterdir()] == ["state.pt"]


# Validation.


def test_validate(images, finished, tmp_path, capsys):
    run = finished / "run"
    [row] = csv.DictReader((run / "log.csv").open())
    words = [str(run / "last.safetensors"), "--data-dir", str(images), "--workers", "0", "--device", "cpu"]
    assert validate.main(words) == 0
    out = capsys.readouterr().out
    assert (
        f"top-1 {float(row['top1']):.2f} %  top-5 {float(row['top5']):.2f} %  loss {float(row['val_loss']):.4f}" in out
    )
    assert "images/s" in out
    published = tmp_path / "half.safetensors"
    assert validate.main([*words, "--store", "float16", "--publish", str(published)]) == 0
    metadata = read_metadata(published)
    assert metadata["validation"]["stored_as"] == "float16" and metadata["classes"] == ["class0", "class1", "class2"]
    assert yaml.safe_load(metadata["recipe"])["lr"] == 1e-3
    assert {tensor.dtype for tensor in load_file(published).values()} == {torch.float16}
    assert validate.main([str(published), *words[1:]]) == 0
    scores = metadata["validation"]
    assert (
        f"top-1 {scores['top1']:.2f} %  top-5 {scores['top5']:.2f} %  loss {scores['loss']:.4f}"
        in capsys.readouterr().out
    )
    assert json.dumps(metadata)


def test_validate_bad_inputs(images, finished, tmp_path, capsys):
    good, data = str(finished / "run" / "last.safetensors"), ["--data-dir", str(images), "--workers", "0"]
    bare = tmp_path / "bare.pt"
    torch.save(load_file(good), bare)
    for words, message in (
        (["absent.pt"], "there is no checkpoint absent.pt"),
        (["fma2d_nan"], "is neither a file nor a pretrained model"),
        ([str(bare)], "does not say what model it is for: name it with --model"),
        ([str(bare), "--model", "fma2d_tiny"], "does not fit fma2d_tiny"),
        ([good, "--split", "test"], "has no folder test"),
        ([good, "--publish", good], "exists already"),
    ):
        assert message in error_line(capsys, validate.main, [*words, *data])


# What else a run may be asked for.


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_and_accumulation(images, recipe_file, finished, tmp_path, amp):
    words = command(recipe_file, images, tmp_path / "run", "--amp", amp, "--epochs", "1", "--warmup-epochs", "0")
    assert train_classifier.main([*words, "--grad-accum", "2", "--grad-checkpointing"]) == 0
    state = load_state(tmp_path / "run" / "state.pt")
    assert bool(state["scaler"]) == (amp == "fp16")
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in state["model"].values())


def test_accumulated_gradients_are_those_of_the_whole_update(images):
    """Without what draws random numbers a batch, two steps of four images end where one of eight does."""
    still = dict(drop_rate=0.0, drop_path_rate=0.0, mixup=0.0, cutmix=0.0, opt="sgd", ema_decay=None)
    recipe = make_recipe(TINY | still, "test")
    ends = []
    for accum in (1, 2):
        torch.manual_seed(0)
        model = recipe_model(recipe, 3)
        samples, _ = list_images(images / "train")
        batches = TrainBatches(len(samples), 8, accum, 0, 1, 0)
        data = ImageFolder(samples, 3, train_transform(recipe, data_config(recipe, model)), 0)
        cpu = torch.device("cpu")
        training = Training(recipe, model, Processes(cpu), batches.updates, accum)
        training.train_epoch(make_loader(data, batches, 0, cpu), lambda *_: None)
        ends.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.allclose(*ends, rtol=1e-4, atol=1e-6)


def test_log_of_a_resumed_run_has_each_epoch_once(tmp_path):
    log = EpochLog(tmp_path, 0, tensorboard=True)
    for epoch in (1, 2, 3):
        log.append(dict(epoch=epoch, lr=0.1, train_loss=1.0))
    log.writer.close()
    log = EpochLog(tmp_path, 2, tensorboard=True)
    log.append(dict(epoch=3, lr=0.2, train_loss=0.5, top1=50.0))
    log.writer.close()
    with (tmp_path / "log.csv").open() as file:
        assert [(row["epoch"], row["lr"]) for row in csv.DictReader(file)] == [("1", "0.1"), ("2", "0.1"), ("3", "0.2")]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train_loss")] == [(1, 1.0), (2, 1.0), (3, 0.5)]


@pytest.mark.slow
def test_compiled_training(images, recipe_file, tmp_path):
    assert train_classifier.main(command(recipe_file, images, tmp_path / "run", "--compile")) == 0
    assert read_metadata(tmp_path / "run" / "last.safetensors")["metrics"]["epoch"] == 2


def test_digits_are_a_folder_of_images(tmp_path):
    assert make_digits.main(["--out", str(tmp_path / "digits")]) == 0
    train, classes = list_images(tmp_path / "digits" / "train")
    val, _ = list_images(tmp_path / "digits" / "val", classes)
    assert classes == [str(digit) for digit in range(10)] and (len(train), len(val)) == (1437, 360)
    shares = [sum(label == digit for _, label in val) for digit in range(10)]
    assert all(34 <= share <= 37 for share in shares)
    assert not {Path(path).name for path, _ in train} & {Path(path).name for path, _ in val}
    assert hashlib.sha256(b"".join(Path(path).name.encode() for path, _ in val)).hexdigest()[:12] == "addd0ed675a2"
    with Image.open(val[0][0]) as image:
        assert (image.size, image.mode) == ((32, 32), "L")
    assert make_digits.main(["--out", str(tmp_path / "digits")]) == 1
