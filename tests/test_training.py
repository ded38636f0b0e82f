"""The classification trainer: resuming, seeding, recipes, validation."""

import csv
import hashlib
import random
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_cases import TINY, alone_and_together, check_killed_process, command, resumed_run
from training_cases import finished as finished
from training_cases import images as images
from training_cases import recipe_file as recipe_file

from tools import make_digits, train_classifier, validate
from tools.ending import InputError, ending
from tools.training.checkpoints import load_state, read_metadata
from tools.training.data import EvalBatches, ImageFolder, TrainBatches, list_images, make_loader, train_transform
from tools.training.engine import Processes, Training
from tools.training.log import EpochLog
from tools.training.model import data_config, recipe_model
from tools.training.recipe import Recipe, differences, make_recipe, read_values

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = [
    path for name in ("imagenet", "digits", "tiny_imagenet") for path in sorted(ROOT.glob(f"configs/{name}/*.yaml"))
]


# Resuming.


def test_resumed_run_is_the_unbroken_one(images, recipe_file, tmp_path, monkeypatch):
    def words(*more):
        return command(recipe_file, images, *more)

    whole, broken = resumed_run(train_classifier, words, tmp_path, monkeypatch, "--workers", "1")
    # A run that is done is not changed by going on with it, and another seed makes another run.
    before = (broken / "state.pt").read_bytes()
    assert train_classifier.main(words(broken, "--resume")) == 0
    assert (broken / "state.pt").read_bytes() == before
    assert train_classifier.main(words(tmp_path / "other", "--seed", "1")) == 0
    one, other = (load_file(folder / "last.safetensors") for folder in (whole, tmp_path / "other"))
    assert one.keys() == other.keys() and not all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
@alone_and_together
def test_killed_process_and_processes(images, recipe_file, tmp_path, launcher):
    """SIGKILL in the middle of epoch 2, alone and under torchrun (gloo); at 64 px learned levels stay unused."""
    more = ["--progress", "0", "--model-kwargs", yaml.safe_dump(TINY["model_kwargs"] | dict(levels=3)).strip()]

    def words(output, *rest):
        return command(recipe_file, images, output, *more, *rest)

    check_killed_process(train_classifier, words, tmp_path, "epoch 2/2  update 1/3", launcher)


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


# What else a run may be asked for.


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_and_accumulation(images, recipe_file, tmp_path, monkeypatch, amp):
    words = command(recipe_file, images, tmp_path / "run", "--amp", amp, "--epochs", "1", "--warmup-epochs", "0")
    seen = []

    def watched(*args):
        model = recipe_model(*args)
        layer = next(m for m in model.stages[0].blocks.modules() if isinstance(m, torch.nn.Linear))
        layer.register_forward_hook(lambda module, x, out: seen.append((module.training, len(out), out.dtype)))
        return model

    monkeypatch.setattr(train_classifier, "recipe_model", watched)
    assert train_classifier.main([*words, "--grad-accum", "2", "--grad-checkpointing"]) == 0
    half = torch.bfloat16 if amp == "bf16" else torch.float16
    assert {dtype for _, _, dtype in seen} == {half}
    # Three updates of two steps of four images, each computed twice; the average's model validates, not this one.
    assert [size for is_training, size, _ in seen if is_training] == [4] * 12
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
        training.train_epoch(make_loader(data, batches, 0, cpu), lambda *_: False)
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
def test_compiled_training(images, recipe_file, tmp_path, monkeypatch):
    """To the weights of a training that is not compiled, but for rounding; what draws random numbers is off."""
    still = ["--drop-rate", "0", "--drop-path-rate", "0", "--opt", "sgd"]
    compiled, ends = [], []
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or compile_(model))
    for words in ([], ["--compile"]):
        output = tmp_path / f"run{len(words)}"
        assert train_classifier.main(command(recipe_file, images, output, *still, *words)) == 0
        ends.append(load_file(output / "last.safetensors"))
    assert len(compiled) == 1
    for key in ends[0]:
        torch.testing.assert_close(ends[1][key], ends[0][key], rtol=1e-3, atol=1e-5)


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


def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert make_digits.main(["--out", str(tmp_path / "digits")]) == 1
    assert capsys.readouterr().err == "error: scikit-learn is not installed: pip install scikit-learn\n"
    monkeypatch.setitem(sys.modules, "tools.training.data", None)

    @ending()
    def broken(argv):
        import tools.training.data  # noqa: F401

    @ending()
    def nameless(argv):
        raise ModuleNotFoundError("of nothing")

    for tool in (broken, nameless):
        with pytest.raises(ModuleNotFoundError):  # a bug of ours keeps its traceback
            tool()
