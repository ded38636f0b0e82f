"""The trainer of text models and the comparison: splits, masking, batches, scores, resuming, bad input, figures."""

import csv
import hashlib
import json
import os
from dataclasses import replace
from itertools import chain, pairwise
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F
from training_cases import alone_and_together, check_killed_process, error_line, resumed_run

from benchmarks import text_benchmark
from benchmarks.records import new_row
from fma2d.text import load_model
from tools import compare_text, train_text
from tools.ending import InputError
from tools.text import comparison, corpus, figures
from tools.text.batches import IGNORED, EvalWindows, TrainWindows, WindowBatches, padded, window
from tools.text.engine import TextTraining, evaluate_language
from tools.text.recipe import TextRecipe, text_model
from tools.training.checkpoints import load_state
from tools.training.engine import Processes
from tools.training.recipe import make_recipe, read_values, to_yaml

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
    assert [len(part) for part in corpus.split(np.zeros(10**8, np.uint8))] == [90 * 10**6, 5 * 10**6, 5 * 10**6]
    found = corpus.read_corpus(make(), text_file)
    assert (len(found.train), len(found.val), len(found.test)) == (1800, 100, 100)
    assert b"".join(part.tobytes() for part in (found.train, found.val, found.test)) == text_file.read_bytes()
    assert found.sha256 == hashlib.sha256(text_file.read_bytes()).hexdigest()


def test_embedded_text_is_the_sorted_standard_library():
    """Its own sources and documentation, the same at every call; no tests, no installed packages, nothing generated."""
    files = corpus.embedded_files()
    assert files == sorted(files) and {"argparse.py", "pydoc_data/topics.py", "typing.py"} <= set(files)
    assert not any({"test", "site-packages"} & set(Path(name).parts) or "_sysconfigdata" in name for name in files)
    text = corpus.embedded_text()
    assert len(text) > 5e6 and text == corpus.embedded_text()
    assert text.startswith((Path(os.__file__).parent / files[0]).read_bytes()) and b"class ArgumentParser" in text


@pytest.mark.parametrize("ending", ["npy", "bin", "folder"])
def test_token_files(tmp_path, ending):
    tokens = np.random.default_rng(0).integers(0, 70_000, 1000).astype(np.uint32)
    recipe, path = make(source="tokens", vocab_size=70_000, token_dtype="uint32"), tmp_path / f"tokens.{ending}"
    if ending == "npy":
        np.save(path, tokens)
    elif ending == "bin":
        tokens.tofile(path)
    else:
        path = tmp_path
        np.save(path / "train.npy", tokens[:900])
        tokens[900:950].tofile(path / "val.bin")
        np.save(path / "test.npy", tokens[950:].astype(np.int64))
    found = corpus.read_corpus(recipe, path)
    assert np.array_equal(np.concatenate([found.train, found.val, found.test]), tokens) and len(found.val) == 50


def test_labelled_texts(csv_file, tmp_path):
    recipe = make(task="classify", source="csv", updates_per_epoch=None)
    found = corpus.read_corpus(recipe, csv_file)
    assert found.classes == ["bad", "good"] and [len(x) for x in (found.train, found.val, found.test)] == [36, 2, 2]
    assert all(text.startswith("yes é".encode() if label else b"no ") for text, label in found.train)
    assert found.train != corpus.read_corpus(replace(recipe, seed=1), csv_file).train
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
    masked, kept = ids[chosen] == recipe.mask_id, ids[chosen] == true[chosen]
    assert 0.78 < masked.float().mean() < 0.82 and 0.08 < kept.float().mean() < 0.12
    again, other = window(recipe, data, 0, (0, 0))[0], window(recipe, data, 0, (0, 1))[0]
    assert torch.equal(again, ids) and not torch.equal(other, ids)
    assert window(replace(recipe, context=2), data, 0, (0, 0))[1].ne(IGNORED).sum() == 1


def test_windows_are_shared_by_processes_and_cover_the_split():
    data = np.arange(200, dtype=np.uint8)
    alone = WindowBatches(150, 3, 8, 1, 0, 1, seed=0)
    shares = [[*WindowBatches(150, 3, 8, 2, rank, 2, seed=0)] for rank in range(2)]
    for update, keys in enumerate(alone):
        assert [*chain.from_iterable(share[2 * update + step] for step in range(2) for share in shares)] == keys
    for ids, targets in TrainWindows(make(), data, alone):
        assert ids.shape == (8, 24) and torch.equal(ids[:, 1:], targets[:, :-1]) and torch.equal(ids + 1, targets)
    first = [*alone]
    alone.epoch = 1
    assert [*alone] != first
    targets = [t.flatten() for rank in range(3) for _, t in EvalWindows(make(), data, 2, rank, 3)]
    assert sorted(torch.cat(targets).tolist()) == list(range(1, 200))  # the last window has 7
    [*few] = EvalWindows(make(), data, 2, most=3)
    assert [ids[:, 0].tolist() for ids, _ in few] == [[0, 24 * 4], [24 * 7]]


def test_scores_are_those_of_a_plain_loop():
    """Bits per token of all, of the second half, and by place, with a shorter last window."""
    torch.manual_seed(0)
    recipe, data = make(context=32, dropout=0.0), np.random.default_rng(0).integers(0, 256, 100, np.uint8)
    model = text_model(recipe).eval()
    found = evaluate_language(model, EvalWindows(recipe, data, 2), 32, CPU)
    bits, places = [], []
    for start in range(0, 99, 32):
        ids = torch.from_numpy(data[start : start + 33].astype(np.int64))
        bits += (F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none") / log(2)).tolist()
        places += range(len(ids) - 1)
    bits, places = np.array(bits), np.array(places)
    assert found["tokens"] == 99 and found["bits"] == pytest.approx(bits.mean(), rel=1e-5)
    assert found["perplexity"] == pytest.approx(2 ** bits.mean(), rel=1e-5)
    assert found["bits_second_half"] == pytest.approx(bits[places >= 16].mean(), rel=1e-5)
    ends = (0, 2, 4, 8, 16, 32)
    parts = [bits[(places >= low) & (places < high)].mean() for low, high in pairwise(ends)]
    assert found["bits_by_place"] == pytest.approx(parts, rel=1e-5)


# Training.


@pytest.mark.parametrize("task", ["causal", "masked", "classify"])
def test_resumed_run_is_the_unbroken_one(text_file, csv_file, tmp_path, monkeypatch, task):
    keys = dict(task=task) | (dict(source="csv", updates_per_epoch=None) if task == "classify" else {})

    def words(output, *more):
        return command(tmp_path, output, "--data", csv_file if task == "classify" else text_file, *more, **keys)

    whole, _ = resumed_run(train_text, words, tmp_path, monkeypatch)
    model = load_model(whole / "last.safetensors")
    assert model.note["task"] == task and model.note["metrics"]["epoch"] == 3
    rows = list(csv.DictReader((whole / "log.csv").open()))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3] and all(float(row["val_loss"]) > 0 for row in rows)
    assert ("classes" in model.note) == (task == "classify") == bool(rows[0]["accuracy"])


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
def test_recipes_build(path):
    """Model, optimizer and schedule of every recipe, on the meta device; kernels have no weight decay."""
    recipe = make_recipe(read_values(path, TextRecipe), str(path), TextRecipe)
    meta = torch.device("meta")
    with meta:
        model = text_model(recipe, num_classes=2)
        training = TextTraining(replace(recipe, ema_decay=None), model, Processes(meta), 10, 1)  # timm's has no meta
    groups = training.optimizer.param_groups
    plain = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    kernels = [p for name, p in model.named_parameters() if name.endswith(".kernels")]
    assert len(kernels) == recipe.depth and {id(p) for p in kernels} <= plain


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
        (dict(position="learned"), b"", "cannot build the model: position must be one of ('sinusoidal', 'rotary')"),
        (dict(num_heads=0), b"", "cannot build the model: num_heads must be at least 1, got 0"),
        (dict(context=0), b"", "cannot build the model: context must be at least 1, got 0"),
        (dict(rank=3), b"", "cannot build the model: rank 3"),
        (dict(vocab_size=0), b"", "vocab_size must be at least 1, got 0"),
        (dict(source="csv"), b"text,label\n", "task classify and source csv go together"),
        (
            dict(source="csv", task="classify"),
            b"text,label\n",
            "task classify takes whole passes, without updates_per_epoch",
        ),
        (dict(vocab_size=9), b"x" * 999, "vocab_size is needed for source tokens, and for nothing else"),
        (dict(source="embedded"), b"x" * 999, "source embedded takes no --data"),
        (dict(source="tokens", vocab_size=9), b"x" * 999, "text.txt must be a .npy file, or a .bin file of uint16"),
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
    path = tmp_path / "tokens.bin"
    path.write_bytes(b"odd")
    words = command(tmp_path, tmp_path / "run", "--data", path, **keys)
    assert "does not hold whole numbers of uint16; see the key token_dtype" in error(words)


def test_bad_labelled_texts(tmp_path, error):
    path, keys = tmp_path / "texts.csv", dict(task="classify", source="csv", updates_per_epoch=None)
    for text, message in (
        ("", "needs the columns text and label, has none"),
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


# Comparison.


def test_parameters_of_a_comparison_are_equal(tmp_path):
    """The baselines get wider MLPs for the kernels that they lack; without that the rule is broken, and says so."""
    base = make(dim=64, num_heads=2, depth=2, context=512, cell_size=8)
    rows = comparison.table_rows(base, tmp_path)
    counts = [comparison.count_parameters(row.recipe) for row in rows]
    assert max(counts) <= 1.03 * min(counts) and rows[0].recipe.mlp_ratio < rows[1].recipe.mlp_ratio
    assert counts == [sum(p.numel() for p in text_model(row.recipe).parameters()) for row in rows]
    with pytest.raises(InputError, match="a comparison allows 3% in between"):
        comparison.check_parameters([replace(row.recipe, mlp_ratio=4.0) for row in rows])
    wide = comparison.width_rows(base, tmp_path)
    assert [row.name for row in wide] == [row.name for row in rows] and wide[1].recipe == rows[1].recipe
    assert {row.recipe.mlp_ratio for row in wide} == {max(row.recipe.mlp_ratio for row in rows)}
    names = [row.name for row in comparison.sweep_rows(base, tmp_path)]
    assert len(names) == 15 and "cell 4, rank 8" not in names and names[-1] == "cell 32, rank 8"


@pytest.mark.parametrize(("which", "names"), [("table", 5), ("width", 5), ("sweep", 3)])
def test_rows_are_trained_once(text_file, tmp_path, monkeypatch, capsys, which, names):
    """A second call trains nothing, and writes the same table and figure again."""
    recipe = tmp_path / "compare.yaml"
    recipe.write_text(yaml.safe_dump(TINY | dict(dropout=0.0, batch_size=2)))
    trained = []

    def in_this_process(row, data, device, threads):
        trained.append(row.name)
        words = [str(recipe), "--output", str(row.folder), "--data", str(data), "--device", device, "--no-tensorboard"]
        recipe.write_text(to_yaml(row.recipe))
        return train_text.main(words)

    sweep_rows = comparison.sweep_rows
    monkeypatch.setattr(comparison, "sweep_rows", lambda base, folder: sweep_rows(base, folder, (2, 4), (2, 4)))
    monkeypatch.setattr(comparison, "_train", in_this_process)
    monkeypatch.setattr(compare_text, "VALIDATIONS", dict(table=3, width=3, sweep=3))
    monkeypatch.setattr(compare_text, "step_costs", lambda args, folder, rows: [("1.5", "20")] * len(rows))
    words = [which, "--recipe", tmp_path / "base.yaml", "--data", text_file, "--updates", 6]
    words += ["--output", tmp_path / "out", "--results", tmp_path / "results", "--figures", tmp_path / "figures"]
    (tmp_path / "base.yaml").write_text(recipe.read_text())
    for _ in range(2):
        assert compare_text.main([*map(str, words)]) == 0
    assert len(trained) == names and f"finished before: {names} of {names} rows" in capsys.readouterr().out
    with (tmp_path / "results" / f"text_{which}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == trained and {row["updates"] for row in rows} == {"6"}
    result = json.loads(next((tmp_path / "out").glob("*/*-rank4/result.json")).read_text())
    assert f"{result['bits']:.4f}" in {row["bits"] for row in rows} and rows[0]["bits_by_place"].count(":") == 5
    assert (tmp_path / "figures" / f"text_{which}.png").stat().st_size > 20_000

    assert compare_text.main([*map(str, words), "--seed", "1"]) == 0
    with (tmp_path / "results" / f"text_{which}_curves.csv").open(newline="") as file:
        points = list(csv.DictReader(file))
    with (tmp_path / "results" / f"text_{which}.csv").open(newline="") as file:
        both = list(csv.DictReader(file))
    assert both[:names] == rows and [row["seed"] for row in both] == ["0"] * names + ["1"] * names
    assert {(point["name"], point["seed"]) for point in points} == {(row["name"], row["seed"]) for row in both}
    assert compare_text.main([*map(str, words), "--updates", "9"]) == 0
    assert f"{names} recorded rows of other trainings (another updates, " in capsys.readouterr().out
    with (tmp_path / "results" / f"text_{which}.csv").open(newline="") as file:
        assert {(row["seed"], row["updates"]) for row in csv.DictReader(file)} == {("0", "9")}


def test_runtime_rows_and_figure():
    """Each row's work gives finite logits and gradients; a row that was left out is not drawn."""
    found = []
    attentions, small = [("fma", 2), ("full", 0), ("local", 0)], dict(heads=2, head_dim=8, depth=1, cell_size=4)
    for i, task in enumerate(text_benchmark.tasks(attentions, [24, 65], **small, threads=1)):
        work = text_benchmark.build(**task.subject, device="cpu", dtype="float32", **task.extra)
        work.check(work.step())
        results = dict(status="ok", median_ms=1 + i, base_mib=1, peak_mib=2) if i else dict(status="out of memory")
        found.append(new_row(task.subject, "cpu", "float32", 1) | {name: str(x) for name, x in results.items()})
    assert {(row["name"], row["rank"], row["cell_size"]) for row in found} == {
        ("fma", "2", "4"),
        ("full", "", ""),
        ("local", "", "4"),
    }
    axes = figures.runtime_figure(found).axes
    assert len(axes) == 4 and [len(line.get_xdata()) for line in axes[0].lines] == [2, 2, 1]
