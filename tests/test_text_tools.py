"""The trainer of text models: splits, masking, batches, scores, resuming, recipes, bad input."""

import argparse
import csv
import hashlib
from dataclasses import replace
from itertools import chain, pairwise
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F
from training_cases import alone_and_together, assert_same_run, check_killed_process, error_line, resumed_run

from fma2d.text import load_model
from tools import train_text
from tools.text import from_bytes
from tools.text.batches import IGNORED, WindowBatches, Windows, cover, padded, window
from tools.text.corpus import read_corpus, split
from tools.text.engine import TextTraining, evaluate
from tools.text.recipe import TextRecipe, text_model
from tools.training.checkpoints import load_state
from tools.training.engine import Processes
from tools.training.recipe import make_recipe, read_values

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs" / "text").glob("*.yaml"))
CPU = Processes(torch.device("cpu"))
# All that draws random numbers or has a state is on.
TINY = dict(
    task="causal",
    source="bytes",
    context=24,
    dim=16,
    depth=1,
    num_heads=2,
    cell_size=4,
    rank=2,
    dropout=0.1,
    epochs=3,
    updates_per_epoch=3,
    batch_size=4,
    warmup_epochs=1,
    clip_grad=1.0,
    ema_decay=0.9,
)


CLASSIFY = dict(task="classify", source="csv", updates_per_epoch=None)


def make(**keys) -> TextRecipe:
    return make_recipe(TINY | keys, "test", TextRecipe)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(np.random.default_rng(0).choice(list(b"abcde \n"), 2000).astype(np.uint8).tobytes())
    return path


@pytest.fixture
def csv_file(tmp_path):
    path = tmp_path / "texts.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "text"])
        writer.writerows(["good" if i % 2 else "bad", ("yes é " if i % 2 else "no ") * (1 + i % 7)] for i in range(40))
    return path


def command(folder, output, *more, **keys):
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | keys))
    return [str(path), "--output", str(output), "--device", "cpu", "--no-tensorboard", *map(str, more)]


# Texts.


def test_splits_are_90_5_5_percent_in_order(text_file):
    assert [len(part) for part in split(np.zeros(10**8, np.uint8))] == [90 * 10**6, 5 * 10**6, 5 * 10**6]
    found = read_corpus(make(), text_file)
    assert (len(found.train), len(found.val), len(found.test)) == (1800, 100, 100)
    assert b"".join(part.tobytes() for part in (found.train, found.val, found.test)) == text_file.read_bytes()
    assert found.sha256 == hashlib.sha256(text_file.read_bytes()).hexdigest()


def test_embedded_text_is_the_sorted_standard_library():
    """Its own sources and documentation, the same at every call; no tests, no installed packages."""
    text = from_bytes.embedded()
    assert len(text) > 5e6 and text == from_bytes.embedded()
    first = min(Path(argparse.__file__).parent.glob("*.py")).read_bytes()
    assert text.startswith(first) and Path(argparse.__file__).read_bytes() in text
    assert b"class TestCase(unittest.TestCase)" not in text and b"def xfail_strict" not in text


@pytest.mark.parametrize("source, ending", [("bytes", "txt"), ("tokens", "npy"), ("csv", "csv")])
def test_a_folder_has_a_file_for_each_split(tmp_path, source, ending):
    rows = {"train": "text,label\nab,x\nc,y\n", "val": "text,label\nd,y\n", "test": "text,label\ne,x\n"}
    for number, (which, text) in enumerate(rows.items()):
        path = tmp_path / f"{which}.{ending}"
        np.save(path, np.full(40 + number, number, np.int64)) if ending == "npy" else path.write_text(
            text * (1 + 19 * (ending == "txt"))
        )
    recipe = dict(bytes=make(), tokens=make(source="tokens", vocab_size=3), csv=make(**CLASSIFY))[source]
    found = read_corpus(recipe, tmp_path)
    if source == "csv":
        assert found.classes == ["x", "y"] and found.train == [(b"ab", 0), (b"c", 1)]
        assert (found.val, found.test) == ([(b"d", 1)], [(b"e", 0)])
    elif source == "tokens":
        assert [(len(part), part[0]) for part in (found.train, found.val, found.test)] == [(40, 0), (41, 1), (42, 2)]
    else:
        assert bytes(found.val) == 20 * rows["val"].encode()
    digest = found.sha256
    (tmp_path / f"val.{ending}").write_bytes((tmp_path / f"train.{ending}").read_bytes())
    assert read_corpus(recipe, tmp_path).sha256 != digest


def test_labelled_texts(csv_file):
    recipe = make(**CLASSIFY)
    found = read_corpus(recipe, csv_file)
    assert found.classes == ["bad", "good"] and [len(x) for x in (found.train, found.val, found.test)] == [36, 2, 2]
    assert all(text.startswith("yes é".encode() if label else b"no ") for text, label in found.train)
    assert found.train != read_corpus(replace(recipe, seed=1), csv_file).train
    ids, key_mask = padded([b"abc", b"e"])
    assert ids.tolist() == [[97, 98, 99], [101, 0, 0]] and key_mask.tolist() == [[True] * 3, [True, False, False]]


# Batches.


def test_masking():
    """15 % are to be predicted: of those 80 % are shown as the mask, 10 % as any token, 10 % as they are."""
    recipe, data = make(task="masked", context=20_000), np.random.default_rng(0).integers(0, 256, 20_000, np.uint8)
    ids, targets = window(recipe, data, 0, (0, 0))
    true = torch.from_numpy(data.astype(np.int64))
    chosen = targets != IGNORED
    assert (
        chosen.sum() == 3000 and torch.equal(targets[chosen], true[chosen]) and torch.equal(ids[~chosen], true[~chosen])
    )
    masked, kept = ids[chosen] == recipe.ids, ids[chosen] == true[chosen]
    assert 0.78 < masked.float().mean() < 0.82 and 0.08 < kept.float().mean() < 0.12
    again, other = window(recipe, data, 0, (0, 0))[0], window(recipe, data, 0, (0, 1))[0]
    assert torch.equal(again, ids) and not torch.equal(other, ids)
    assert window(replace(recipe, context=2), data, 0, (0, 0))[1].ne(IGNORED).sum() == 1


def test_windows_are_shared_by_processes_and_cover_the_split():
    data, recipe = np.arange(200, dtype=np.uint8), make()

    def batches(accum, rank, world):
        found = WindowBatches(24, 8, accum, rank, world, 0, "windows")
        found.starts = 150
        return found

    alone, shares = batches(1, 0, 1), [[*batches(2, rank, 2)] for rank in range(2)]
    for update, keys in enumerate(alone):
        assert [*chain.from_iterable(share[2 * update + step] for step in range(2) for share in shares)] == keys
    for ids, targets in Windows(recipe, data, alone):
        assert ids.shape == (8, 24) and torch.equal(ids[:, 1:], targets[:, :-1]) and torch.equal(ids + 1, targets)
    first = [*alone]
    alone.epoch = 1
    assert [*alone] != first

    def covered(recipe, world):
        shares = [cover(recipe, 200, 2, Processes(torch.device("cpu"), rank, world)) for rank in range(world)]
        return [pair for share in shares for pair in Windows(recipe, data, share)]

    targets = torch.cat([targets.flatten() for _, targets in covered(recipe, 3)])
    assert sorted(targets.tolist()) == list(range(1, 200))  # the last window has 7
    assert [ids[:, 0].tolist() for ids, _ in covered(replace(recipe, eval_windows=3), 1)] == [[0, 24 * 4], [24 * 7]]


def test_scores_are_those_of_a_plain_loop():
    """Bits per token of all, and by place, with a shorter last window."""
    recipe, data = make(context=160, dropout=0.0), np.random.default_rng(0).integers(0, 256, 500, np.uint8)
    model = text_model(recipe).eval()
    found = evaluate(model, Windows(recipe, data, cover(recipe, 500, 2, CPU)), recipe, CPU)
    bits, places = [], []
    for start in range(0, 499, 160):
        ids = torch.from_numpy(data[start : start + 161].astype(np.int64))
        bits += (F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none") / log(2)).tolist()
        places += range(len(ids) - 1)
    bits, places = np.array(bits), np.array(places)
    assert found["count"] == 499 and found["bits"] == pytest.approx(bits.mean(), rel=1e-5)
    assert found["perplexity"] == pytest.approx(2 ** bits.mean(), rel=1e-5)
    ends = (0, 64, 128, 160)
    parts = [bits[(places >= low) & (places < high)].mean() for low, high in pairwise(ends)]
    assert [*found["bits_by_place"]] == ["0-63", "64-127", "128-159"]
    assert [*found["bits_by_place"].values()] == pytest.approx(parts, rel=1e-5)


# Training.


@pytest.mark.parametrize("task", ["causal", "masked", "classify"])
def test_resumed_run_is_the_unbroken_one(text_file, csv_file, tmp_path, monkeypatch, task):
    keys = CLASSIFY if task == "classify" else dict(task=task)

    def words(output, *more):
        return command(tmp_path, output, "--data", csv_file if task == "classify" else text_file, *more, **keys)

    whole, _ = resumed_run(train_text, words, tmp_path, monkeypatch)
    model = load_model(whole / "last.safetensors")
    assert model.note["task"] == task and model.note["metrics"]["epoch"] == 3
    rows = list(csv.DictReader((whole / "log.csv").open()))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3] and all(float(row["val_loss"]) > 0 for row in rows)
    assert bool(model.note["classes"]) == (task == "classify") == bool(rows[0]["accuracy"])


def test_a_training_in_parts_is_the_unbroken_one(text_file, tmp_path, capsys):
    """`--stop-after` ends after an epoch, without scores of the test; what goes on ends as if it had not stopped."""

    def words(output, *more):
        return command(tmp_path, tmp_path / output, "--data", text_file, *more)

    assert train_text.main(words("whole")) == 0
    for _ in range(2):
        assert train_text.main(words("parts", "--resume", "--stop-after", "1e-9")) == 0
        assert load_state(tmp_path / "parts" / "state.pt")["epoch"] == 1
    assert "--resume goes on" in capsys.readouterr().out and not (tmp_path / "parts" / "result.json").exists()
    assert train_text.main(words("parts", "--resume")) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@alone_and_together
def test_killed_process_and_processes(text_file, tmp_path, launcher):
    """SIGKILL in epoch 2, alone and under torchrun (gloo)."""

    def words(output, *more):
        return command(tmp_path, output, "--data", text_file, "--progress", 0, *more, updates_per_epoch=20)

    check_killed_process(train_text, words, tmp_path, "epoch 2/3  update 3/20", launcher)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_and_accumulation(text_file, tmp_path, amp):
    words = command(tmp_path, tmp_path / "run", "--data", text_file, "--grad-accum", 2, amp=amp)
    assert train_text.main(words) == 0
    assert bool(load_state(tmp_path / "run" / "state.pt")["scaler"]) == (amp == "fp16")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipes_run(path, tmp_path, csv_file):
    """Every recipe on a small file of its own kind, with a small model; kernels have no weight decay."""
    recipe = make_recipe(read_values(path, TextRecipe), str(path), TextRecipe)
    small = dict(dim=16, num_heads=2, context=256) | (dict(vocab_size=300) if recipe.vocab_size else {})
    recipe = replace(recipe, **small)
    training = TextTraining(recipe, text_model(recipe, 2), CPU, 10, 1)
    groups = training.optimizer.param_groups
    plain = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    kernels = [p for name, p in training.model.named_parameters() if name.endswith(".kernels")]
    assert len(kernels) == recipe.depth and {id(p) for p in kernels} <= plain

    data, tokens = [], 60 * recipe.context
    if recipe.source == "bytes":
        data = ["--data", tmp_path / "text"]
        data[1].write_bytes(b"word " * (tokens // 5))
    elif recipe.source == "tokens":
        data = ["--data", tmp_path]
        for which in ("train", "val", "test"):
            np.save(tmp_path / f"{which}.npy", np.arange(tokens // 20, dtype=np.uint16) % recipe.vocab_size)
    elif recipe.source == "csv":
        data = ["--data", csv_file]
    small |= dict(depth=1, batch_size=2, epochs=1, warmup_epochs=0, amp="null")
    small |= {} if recipe.task == "classify" else dict(updates_per_epoch=1, eval_windows=1)
    words = [word for key, value in small.items() for word in (f"--{key}", value)]
    words = [path, *data, "--output", tmp_path / "run", "--device", "cpu", "--no-tensorboard", *words]
    assert train_text.main([*map(str, words)]) == 0
    assert load_model(tmp_path / "run" / "best.safetensors").options["attention"] == recipe.attention


# Bad input: one line each, and what was there is kept.


@pytest.fixture
def error(capsys):
    """The line that the trainer prints when it is given unusable arguments."""
    return lambda words: error_line(capsys, train_text.main, words)


@pytest.mark.parametrize(
    ("keys", "content", "message"),
    [
        ({}, b"", "text.txt is empty"),
        ({}, b"x" * 400, "text.txt has 20 tokens for val, context 24 needs 25: give more text or a smaller --context"),
        (dict(contxt=8), b"x" * 999, "unknown key contxt; the keys are "),
        (dict(attention="dense"), b"", "cannot build the model: attention must be one of ('fma', 'fma-linear', "),
        (dict(attention="fma-linear"), b"", "cannot build the model: attention 'fma-linear' is bidirectional"),
        (dict(num_heads=0), b"", "cannot build the model: num_heads must be at least 1, got 0"),
        (dict(context=0), b"", "cannot build the model: context must be at least 1, got 0"),
        (dict(rank=3), b"", "cannot build the model: rank 3"),
        (dict(vocab_size=0), b"", "vocab_size must be at least 1, got 0"),
        (dict(source="csv"), b"text,label\n", "task classify and source csv go together"),
        (
            CLASSIFY | dict(updates_per_epoch=3),
            b"text,label\n",
            "task classify takes whole passes, without updates_per_epoch",
        ),
        (dict(vocab_size=9), b"x" * 999, "vocab_size is needed for source tokens, and for nothing else"),
        (dict(source="embedded"), b"x" * 999, "source embedded takes no --data"),
        (dict(source="tokens", vocab_size=9), b"x" * 999, "cannot read "),
    ],
)
def test_bad_texts_and_recipes(text_file, tmp_path, error, keys, content, message):
    text_file.write_bytes(content)
    assert message in error(command(tmp_path, tmp_path / "run", "--data", text_file, **keys))
    assert not (tmp_path / "run").exists()


def test_bad_token_files(tmp_path, error):
    path, keys = tmp_path / "tokens.npy", dict(source="tokens", vocab_size=50)
    for tokens, message in (
        (np.arange(2000) % 60, "holds ids 0 to 59; with vocab_size 50 they must be below it"),
        (np.arange(2000) % 60 - 1, "holds ids -1 to 58"),
        (np.ones(2000), "must hold a row of integers, got float64"),
        (np.ones((2, 9), int), "must hold a row of integers, got int64 of shape (2, 9)"),
        (np.ones(0, int), "is empty"),
    ):
        np.save(path, tokens)
        assert message in error(command(tmp_path, tmp_path / "run", "--data", path, **keys))
    path.write_bytes(b"none")
    assert f"cannot read {path}" in error(command(tmp_path, tmp_path / "run", "--data", path, **keys))


def test_bad_labelled_texts(tmp_path, error):
    path, keys = tmp_path / "texts.csv", CLASSIFY
    for text, message in (
        ("", "texts.csv is empty"),
        ("\n", "needs the columns text and label, has none"),
        ("review,label\nx,1\n", "needs the columns text and label, has review, label"),
        ("text,label\nx,1\n,0\n", "text or label of row 2 is empty"),
        ("text,label\n" + "x,1\n" * 60, "all training texts have the label '1'"),
        ("text,label\nx,1\n", "has no text for train"),
    ):
        path.write_text(text)
        assert message in error(command(tmp_path, tmp_path / "run", "--data", path, **keys))
    path.write_bytes(b"text,label\n\xff,1\n")
    assert f"cannot read {path}" in error(command(tmp_path, tmp_path / "run", "--data", path, **keys))


def test_run_is_not_lost(text_file, tmp_path, error):
    def words(*more, **keys):
        return command(tmp_path, tmp_path / "run", "--data", text_file, *more, **keys)

    assert train_text.main(words()) == 0
    before = (tmp_path / "run" / "state.pt").read_bytes()
    assert "holds a run; go on with it by --resume, or choose another --output" in error(words())
    assert "other hyper-parameters: lr 0.5 (was 0.001)" in error(words("--resume", "--lr", "0.5"))
    text_file.write_bytes(b"y" * 2000)
    assert "was trained on other data: sha256 " in error(words("--resume"))
    assert (tmp_path / "run" / "state.pt").read_bytes() == before
