"""Bad inputs of the classification trainer and of validation.

Each gives one line on stderr and exit status 1, and what was written before is as it was.
"""

import io
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from training_cases import command, error_line
from training_cases import finished as finished
from training_cases import images as images
from training_cases import recipe_file as recipe_file

from tools import train_classifier, validate
from tools.ending import InputError, ending
from tools.training.checkpoints import load_state, load_weights, save_state
from tools.training.recipe import make_recipe, read_values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1", "unknown key learning_rate; the keys are base, seed, "),
        ("lr: fast", "lr must be float, got 'fast'"),
        ("epochs: 1.5", "epochs must be int, got 1.5"),
        ("epochs: true", "epochs must be int, got True"),
        ("epochs: 0", "epochs must be at least 1, got 0"),
        ("lr: .nan", "lr must be finite, got nan"),
        ("lr: -1", "lr must be at least 0, got -1.0"),
        ("drop_path_rate: 2", "drop_path_rate must be from 0 to 1, got 2.0"),
        ("mixup_prob: -0.1", "mixup_prob must be from 0 to 1, got -0.1"),
        ("ema_decay: 99", "ema_decay must be from 0 to 1, got 99.0"),
        ("crop_pct: 0", "crop_pct must be above 0, got 0"),
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


def snapshot(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


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
        (["--model", "fma2d_nan"], "timm has no model fma2d_nan; near it are fma2d_nano"),
        (["--model-kwargs", "{cell_sise: 2}"], "cell_sise"),
        (["--model-kwargs", "{num_classes: 2}"], "model_kwargs num_classes have keys of their own"),
        (["--attention", "dense"], "cell_size, rank cannot be given with attn_layer"),
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
        (["--lr", "1e20", "--clip-grad", "null"], "the weights are no longer finite in epoch 1"),
    ],
)
def test_bad_settings(images, recipe_file, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert message in error_line(capsys, train_classifier.main, command(recipe_file, images, tmp_path / "run", *words))


def test_unknown_option_is_named(images, recipe_file, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_classifier.main(command(recipe_file, images, tmp_path, "--learning-rate", "1"))
    assert "unrecognized arguments: --learning-rate 1" in capsys.readouterr().err
    line = error_line(capsys, train_classifier.main, command(tmp_path / "absent.yaml", images, tmp_path))
    assert f"cannot read the recipe {tmp_path / 'absent.yaml'}: No such file" in line


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
    assert "does not fit fma2d_nano" in line(half) and "missing: " in line(half)
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
    torch.save({key: weights[key] for key in weights if not key.startswith("head.")}, bare)
    assert f"{bare} has no classifier; a training starts a new one" in error_line(capsys, train_classifier.main, words)
    words += ["--init-head", "new", "--lr", "0", "--warmup-lr", "0", "--min-lr", "0"]
    assert train_classifier.main(words) == 0
    assert f"weights of {bare}: a new classifier\n" in capsys.readouterr().out
    kept = load_file(tmp_path / "run" / "last.safetensors")
    assert all(torch.equal(kept[key], weights[key]) for key in kept if not key.startswith("head.fc"))
    bare.unlink()  # a run that goes on does not need it
    assert train_classifier.main([*words, "--resume"]) == 0


def test_a_load_is_reported_once(tmp_path, caplog):
    """By fma2d's models themselves; it was said twice."""
    for name, said, reports in (("fma2d_nano", [], 1), ("test_resnet", ["matched"], 0)):
        model = timm.create_model(name, num_classes=3)
        torch.save(model.state_dict(), tmp_path / "x.pt")
        lines = []
        caplog.clear()
        load_weights(model, tmp_path / "x.pt", name, say=lines.append)
        assert [line.split()[-1] for line in lines] == said and len(caplog.records) == reports


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


def test_validate_bad_inputs(images, finished, tmp_path, capsys):
    good, data = str(finished / "run" / "last.safetensors"), ["--data-dir", str(images), "--workers", "0"]
    bare = tmp_path / "bare.pt"
    torch.save(load_file(good), bare)
    junk = tmp_path / "junk.pth"
    junk.write_text("junk")
    for words, message in (
        (["absent.pt"], "there is no checkpoint absent.pt"),
        (["fma2d_nan"], "is neither a file nor a pretrained model"),
        ([str(bare)], "does not say what classifier it is of: name it with --model"),
        ([str(junk)], "is not a checkpoint of tensors and plain values"),
        ([str(bare), "--model", "fma2d_tiny"], "does not fit fma2d_tiny"),
        ([good, "--split", "test"], "has no folder test\n"),
        ([good, "--publish", good], "exists already"),
    ):
        assert message in error_line(capsys, validate.main, [*words, *data])


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--batch-size", "0", "at least 1"),
        ("--workers", "-1", "--workers must be at least 0"),
        ("--img-size", "-8", "at least 1"),
        ("--crop-pct", "1.5", "from 0 to 1"),
        ("--device", "gpu", "'gpu' cannot be used"),
        ("--device", "meta", "'meta' cannot be used"),
        ("--publish", "weights.pt", "must end in .safetensors"),
    ],
)
def test_validation_refuses_values_at_once(option, value, message, capsys):
    """A file of another ending was refused when all images had been seen."""
    with pytest.raises(SystemExit):
        validate.parse(["x", "--data-dir", "y", option, value])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_what_cannot_be_written_is_one_line(images, recipe_file, tmp_path, capsys, monkeypatch):
    """A file in the way, a pipe that is closed, a disk that is full: tracebacks, some when all work was done."""
    (tmp_path / "file").touch()
    for place in ("file", "file/below"):
        line = error_line(capsys, train_classifier.main, command(recipe_file, images, tmp_path / place))
        assert f"cannot write to the folder {tmp_path / place}: " in line

    for error, message in (
        (BrokenPipeError(32, "Broken pipe"), "what reads the output was closed before the end"),
        (OSError(28, "No space left on device"), "cannot write: No space left on device"),
        (OSError(28, "No space left on device", "x.pth"), "x.pth: No space left on device"),
    ):

        def fail(*_, error=error):
            raise error

        assert error_line(capsys, ending()(fail), []) == f"error: {message}\n"
        monkeypatch.setattr(train_classifier, "run", fail)
        assert (
            error_line(capsys, train_classifier.main, command(recipe_file, images, tmp_path)) == f"error: {message}\n"
        )

    @ending()
    def lost(argv):
        raise FileNotFoundError(2, "No such file", "ours")

    with pytest.raises(FileNotFoundError):  # a bug of ours keeps its traceback
        lost([])


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_console_without_the_characters_gets_them_escaped(encoding, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", console)
    assert ending()(lambda argv: print("\u4e2d \ufffd \udcff"))([]) == 0
    assert console.buffer.getvalue() == b"\\u4e2d \\ufffd \\udcff\n"
