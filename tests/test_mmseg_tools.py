"""The tools around mmsegmentation: generated scenes, training, testing, and what they refuse."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmseg.datasets import ADE20KDataset
from mmseg_cases import CONFIG, ROOT, break_label, options
from mmseg_cases import copy as copy
from mmseg_cases import scenes as scenes
from PIL import Image
from safetensors import safe_open

from tools import make_scenes, mmseg_runs, test, train

SMALL_RUN = {
    "train_dataloader.batch_size": 2,
    "train_cfg.max_iters": 4,
    "train_cfg.val_interval": 4,
    "default_hooks.checkpoint.interval": 2,
    "default_hooks.logger.interval": 1,
}


def test_scenes_are_frozen():
    """The same generator version, seed and index give the same labels, whatever else is generated."""
    textures = make_scenes.load_textures()
    labels = [make_scenes.scene(0, split, i, textures)[1] for split in make_scenes.SPLITS for i in (0, 3)]
    digest = hashlib.sha256(b"".join(array.tobytes() for array in labels)).hexdigest()
    assert (make_scenes.VERSION, digest[:16]) == (1, "b21fa4a519697812")


def test_scenes_have_the_layout_and_the_labels_of_ade20k(scenes):
    names = ADE20KDataset.METAINFO["classes"]
    assert all(names[label - 1].strip() == name for name, label in make_scenes.LABELS.items() if label)
    assert (scenes / "images/training/ADE_train_00000001.jpg").is_file()
    assert (scenes / "annotations/validation/ADE_val_00000003.png").is_file()
    assert "generated" in json.loads((scenes / "generated.json").read_text())["what"]
    for path in (scenes / "annotations").rglob("*.png"):
        labels = {int(i) for i in np.unique(np.asarray(Image.open(path)))}
        assert labels <= set(make_scenes.LABELS.values())
        # One sky and one skyline a scene: never both of a pair, and the meadow follows the skyline.
        assert len(labels & {37, 88}) == 1 and len(labels & {10, 30}) == 1 and (2 in labels) == (10 in labels)


def test_scenes_are_written_once_and_whole(tmp_path, monkeypatch, capsys):
    """Other numbers mixed two data sets in one folder, and what an interrupted run left had to be removed by hand."""
    out = tmp_path / "new" / "scenes"
    words = ["--out", str(out), "--train", "2", "--val", "1"]

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(make_scenes, "description", stop)
        make_scenes.write(out, {"training": 1, "validation": 1}, 0)
    assert not list(out.parent.iterdir())
    assert make_scenes.main(words) == 0
    assert len(list(out.rglob("*.jpg"))) == len(list(out.rglob("*.png"))) == 3
    before = out.stat().st_mtime_ns
    assert make_scenes.main(words) == 0 and "stays as it is" in capsys.readouterr().out
    for other in ([*words, "--seed", "1"], [*words, "--train", "1"]):
        with pytest.raises(SystemExit):
            make_scenes.main(other)
        assert "holds something else already; remove it" in capsys.readouterr().err
    assert out.stat().st_mtime_ns == before and [path.name for path in out.parent.iterdir()] == ["scenes"]


@pytest.mark.slow
def test_colour_and_position_do_not_tell_the_classes():
    assert np.mean(list(make_scenes.pixel_baseline(seed=0).values())) < 0.40


def refuse(tool, arguments, capsys):
    """The one line of a refusal, which comes before any training."""
    assert tool.main([str(argument) for argument in arguments]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and sum(line.startswith("error: ") for line in lines) == 1
    return lines[-1]


def test_training_refuses_in_one_line(scenes, copy, tmp_path, capsys):
    def refused(*arguments, folder=scenes, config=CONFIG, **more):
        work_dir = tmp_path / "work"
        return refuse(train, [config, "--work-dir", work_dir, *arguments, *options(folder, **more)], capsys)

    assert "there is no config nowhere.py" in refused(config="nowhere.py")
    assert "--amp needs a CUDA device" in refused("--amp")
    assert "--launcher pytorch is for torchrun" in refused("--launcher", "pytorch")
    (tmp_path / "work").mkdir(exist_ok=True)
    torch.save(dict(state_dict={}, meta=Path.touch), tmp_path / "work" / "iter_1.pth")  # could run code
    (tmp_path / "work" / "last_checkpoint").write_text(str(tmp_path / "work" / "iter_1.pth"))
    assert "could run code" in refused("--resume")
    shutil.rmtree(tmp_path / "work")
    (tmp_path / "work").touch()
    assert f"cannot write to the folder {tmp_path / 'work'}: it is a file" in refused()
    (tmp_path / "work").unlink()
    assert "there is no folder" in refused("--resume", folder=tmp_path / "nowhere")  # starts from the beginning
    assert "num_classes is 7, the train data has 15 classes" in refused(**{"model.decode_head.num_classes": 7})
    assert "has no model.bacbone" in refused(**{"model.bacbone.arch": "tiny"})
    assert "optim_wrapper is meant?" in refused(**{"optim_wraper.type": "x"})
    assert "cel_size" in refused(**{"model.backbone.cel_size": 4})
    assert "ADE20K" in refused(**{"train_dataloader.dataset.type": "ADE20KDatset"})
    assert "optim_wrapper cannot be built" in refused(**{"optim_wrapper.optimizer.type": "AdamWW"})
    assert "param_scheduler cannot be built" in refused(**{"param_scheduler.0.type": "LinearLRR"})
    assert "val_evaluator cannot be built: KeyError: metrics" in refused(**{"val_evaluator.iou_metrics": ["mIoX"]})
    best = {"default_hooks.checkpoint.save_best": "mDice"}
    assert "save_best is mDice, which is not measured; that is aAcc, mIoU, mAcc" in refused(**best)
    misspelt = tmp_path / "misspelt.py"
    misspelt.write_text(f"_base_ = [{str(CONFIG)!r}]\ntrain_dataloder = dict(batch_size=2)\n")
    assert "sets train_dataloder" in refused(config=misspelt)
    break_label(copy, None, copy / "annotations/validation/ADE_val_00000001.png")
    assert "label beyond 150" in refused(folder=copy)
    torch.save(mmseg_runs.fma2d.mmseg.FMA2D("nano").state_dict(), tmp_path / "nano.pth")
    pretrained = f"dict(type='Pretrained', checkpoint={str(tmp_path / 'nano.pth')!r})"
    config = tmp_path / "base.py"
    config.write_text(f"_base_ = [{str(CONFIG)!r}]\nmodel = dict(backbone=dict(arch='base', init_cfg={pretrained}),")
    with open(config, "a") as file:
        file.write(" decode_head=dict(in_channels=[128, 256, 512, 1024]))\n")
    assert "the file is of arch 'nano'" in (error := refused(config=config)) and "arch 'base'" in error
    assert "there is no file nowhere.pth" in refused(load_from="nowhere.pth")
    assert "136 missing: backbone.stages" in refused(load_from=tmp_path / "nano.pth")
    assert not list((tmp_path / "work").glob("*.pth"))


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_bad_picture_that_the_sample_missed_is_named(workers, copy, tmp_path, monkeypatch, capsys):
    """It was a traceback of the decoder, without the file's name."""
    monkeypatch.setattr(mmseg_runs, "SAMPLE", 1)
    pictures = sorted((copy / "images/training").iterdir())
    for path in pictures[:3] + pictures[4:]:  # the sample draws the one left
        path.write_bytes(path.read_bytes()[:40])
    more = {"train_dataloader.num_workers": workers}
    line = refuse(train, [CONFIG, "--work-dir", tmp_path / "work", *options(copy, **SMALL_RUN | more)], capsys)
    assert "images/training/ADE_train_0000000" in line and "image that cannot be read" in line


@pytest.mark.parametrize("option, value", [("test_dataloader.batchsize", 4), ("test_dataloader.batch_size", -1)])
def test_testing_refuses_in_one_line(option, value, scenes, tmp_path, capsys):
    """The test's data loader was built in the test itself: a traceback."""
    arguments = [CONFIG, tmp_path / "x.pth", "--work-dir", tmp_path, *options(scenes, **{option: value})]
    assert "test_dataloader" in refuse(test, arguments, capsys)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("default_hooks.checkpoint.intervall", 3, "CheckpointHook does not take; interval is meant?"),
        ("default_hooks.checkpoint.x", 3, "CheckpointHook does not take$"),
        ("default_hooks.timer.intervall", 3, "IterTimerHook does not take$"),
        ("train_cfg.max_iter", 3, "IterBasedTrainLoop does not take; max_iters is meant?"),
        ("train_dataloader.batchsize", 3, "DataLoader does not take; batch_size is meant?"),
        ("train_dataloader.sampler.shufle", True, "InfiniteSampler does not take; shuffle is meant?"),
        ("train_dataloader.dataset.data_prefix.img_pth", "x", "nothing reads; img_path is meant?"),
        ("train_dataloader.dataset.pipeline.2.probb", 1, "RandomFlip does not take; prob is meant?"),
        ("val_evaluator.iou_metric", ["mIoU"], "IoUMetric does not take; iou_metrics is meant?"),
        ("param_scheduler.0.begn", 3, "LinearLR does not take; begin is meant?"),
        ("optim_wrapper.clip_grads", 3, "OptimWrapper does not take; clip_grad is meant?"),
        ("optim_wrapper.optimizer.weight_decy", 0.1, "AdamW does not take; weight_decay is meant?"),
        ("optim_wrapper.paramwise_cfg.custom_keys.norm.decay_mul", 0.1, "nothing reads; decay_mult is meant?"),
        ("env_cfg.cudnn_benchmarks", True, "nothing reads; cudnn_benchmark is meant?"),
        ("model.test_cfg.crop_siz", 64, "nothing reads; crop_size is meant?"),
        ("default_hooks.checkpoint.interval.x", 3, "the --cfg-options do not fit .*interval"),
        ("model.test_cfg", 3, "must be dicts"),
        ("model.test_cfg.mode", "slid", "mode must be whole or slide, got slid"),
        ("model.test_cfg.mode", "slide", "the mode slide needs the window and its stride, .* model.test_cfg.stride="),
    ],
)
def test_names_that_nothing_reads_are_refused(key, value, message):
    """A misspelt setting of the checkpoints was found when the first was written: what had been trained was lost."""
    with pytest.raises(mmseg_runs.InputError, match=message.replace("?", r"\?")):
        mmseg_runs.read_config(CONFIG, {key: value})


def test_names_that_a_class_hands_on_are_kept():
    hooks = [dict(type="EMAHook", momentum=1e-3, update_buffers=True, priority=49), dict(type="of another library")]
    resize = dict(type="RandomChoiceResize", scales=[64], keep_ratio=True)  # the last is Resize's
    given = {"custom_hooks": hooks, "train_dataloader.dataset.pipeline": [resize], "model.test_cfg.more": 1}
    cfg = mmseg_runs.read_config(CONFIG, given | {"default_hooks.checkpoint.meta": dict(run=1)})
    assert cfg.custom_hooks == hooks and cfg.default_hooks.checkpoint.meta.run == 1


@pytest.mark.parametrize("processes", ["two", "0", ""])
def test_a_number_of_processes_is_asked_for(processes):
    """torchrun's traceback was the answer."""
    found = subprocess.run([ROOT / "tools/dist_train.sh", CONFIG, processes], capture_output=True, text=True)
    assert (found.returncode, len(found.stderr.splitlines())) == (2, 1) and "PROCESSES must be" in found.stderr


def test_checkpoints_are_plain_and_resume_to_the_same_end(scenes, tmp_path, capsys):
    """They held mmengine's log history and numbers of numpy, which `weights_only=True` refuses, and no settings."""

    # Resuming, mmengine skips batches without drawing the flips of their images, so later flips would differ.
    settings = options(scenes, **SMALL_RUN, **{"train_dataloader.dataset.pipeline.2.prob": 0.0})

    def run(folder, *arguments):
        assert train.main([str(CONFIG), "--work-dir", str(folder), *arguments, *settings]) == 0
        return torch.load(folder / "iter_4.pth", weights_only=True)

    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    expected = run(unbroken)
    assert expected["meta"]["fma2d"]["format_version"] == 1 and expected["meta"]["fma2d"]["cell_size"] == 4
    # A copy of a run of two iterations, which names the original's folder; that one has gone on since.
    shutil.copytree(unbroken, broken)
    (broken / "iter_4.pth").unlink()
    (broken / "last_checkpoint").write_text(str(unbroken / "iter_2.pth"))
    found = run(broken, "--resume")
    assert all(torch.equal(weight, expected["state_dict"][name]) for name, weight in found["state_dict"].items())
    logs = [run["message_hub"]["log_scalars"]["train/loss"] for run in (found, expected)]
    assert torch.equal(logs[0]["log"], logs[1]["log"]) and logs[0]["log"].shape == logs[0]["count"].shape == (4,)
    capsys.readouterr()
    run(broken, "--resume")  # nothing is left to train, and what it reaches may never have been told
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"{broken} is finished; tools/test.py {CONFIG} {broken / 'iter_4.pth'} scores it" in last


def test_the_last_checkpoint_is_that_of_the_folder(tmp_path, capsys):
    """A copied folder went on from the original's files; an empty or a cut `last_checkpoint` was a traceback."""
    assert mmseg_runs.last_checkpoint(tmp_path) is None
    for i in (8, 16, 100):
        torch.save(dict(iter=i), tmp_path / f"iter_{i}.pth")
    note, whole = tmp_path / "last_checkpoint", tmp_path / "iter_100.pth"
    for text, number in (
        ("/elsewhere/run/iter_16.pth", 16),
        (r"C:\runs\a\iter_8.pth", 8),
        ("", 100),
        ("/elsewhere/run/iter_1", 100),
        ("/elsewhere/run/iter_200.pth", 100),
    ):
        note.write_text(text)
        assert mmseg_runs.last_checkpoint(tmp_path) == tmp_path / f"iter_{number}.pth", text
    note.unlink()
    whole.write_bytes(whole.read_bytes()[:-30])  # as a kill or a full disk leaves it
    assert mmseg_runs.last_checkpoint(tmp_path) == tmp_path / "iter_16.pth"
    assert f"{whole} is not whole and is passed over" in capsys.readouterr().out


def test_a_copied_run_leaves_the_best_checkpoint_of_the_original(scenes, tmp_path):
    """mmengine removes the best one by its whole path when there is a better."""
    best = {"default_hooks.checkpoint.save_best": "mIoU", "default_hooks.checkpoint.rule": "less"}
    settings = options(scenes, **SMALL_RUN | {"train_cfg.val_interval": 1, "train_cfg.max_iters": 1} | best)
    first, copied = tmp_path / "first", tmp_path / "copied"
    assert train.main([str(CONFIG), "--work-dir", str(first), *settings]) == 0
    files = {path.name: path.read_bytes() for path in first.glob("*.pth")}
    assert any(name.startswith("best") for name in files)
    shutil.copytree(first, copied)
    runner = SimpleNamespace(work_dir=str(copied), hooks=[])
    hub = torch.load(first / "iter_1.pth", weights_only=True)["message_hub"]
    mmseg_runs.OwnFolder().after_load_checkpoint(runner, dict(message_hub=hub))
    named = [Path(value) for name, value in hub["runtime_info"].items() if name.startswith("best_ckpt")]
    assert named and all(path.is_file() and path.parent == copied for path in named)


@pytest.mark.parametrize("processes", [1, 2])
def test_what_becomes_of_sync_bn_is_said(processes, monkeypatch, capsys):
    """Where it was kept, nothing was said."""
    cfg = mmseg_runs.read_config(CONFIG.parents[1] / "ade20k/segformer_fma2d-nano_8xb2-160k_ade20k-512x512.py")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    mmseg_runs.fit_to_machine(cfg, "pytorch")
    kind, words = ("BN", "replaced by BN") if processes == 1 else ("SyncBN", "kept")
    assert cfg.model.decode_head.norm_cfg.type == kind
    assert f"SyncBN: {words} in " in capsys.readouterr().out


def test_one_process_tells_and_publishes_the_result(scenes, tmp_path, monkeypatch, capsys):
    """Under torchrun every process did, all of them into one file."""
    published = tmp_path / "model.safetensors"
    weights = ROOT / "checkpoints/segformer_fma2d-nano_scenes.safetensors"
    arguments = [str(CONFIG), str(weights), "--work-dir", str(tmp_path), "--publish", str(published)]
    arguments += ["--out", str(tmp_path / "out")]
    for is_first in (False, True):
        monkeypatch.setattr(test, "is_main_process", lambda is_first=is_first: is_first)
        # Where the config's training starts was loaded over the checkpoint.
        assert test.main([*arguments, *options(scenes), f"load_from={tmp_path / 'gone.pth'}"]) == 0
        told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("aAcc ")]
        assert len(told) == published.exists() == is_first
    # The files hold what was measured, in the labels of the annotations.
    pairs = [
        (np.asarray(Image.open(tmp_path / "out" / path.name)), np.asarray(Image.open(path)))
        for path in sorted((scenes / "annotations/validation").iterdir())
    ]
    found, labels = (np.concatenate([pair[i].reshape(-1) for pair in pairs]) for i in (0, 1))
    assert told[0].startswith(f"aAcc {100 * (found == labels)[labels > 0].mean():.2f} ")
    assert 50 < float(told[0].split()[1]) < 100
    with safe_open(published, "pt") as file:
        assert f'"aAcc": {told[0].split()[1].rstrip("0")}' in file.metadata()["metrics"]


def test_testing_writes_each_image_and_of_one_channel_too(tmp_path):
    """Images of one name in two folders wrote one file; a head of one channel, whose classes are floats, none."""
    names = {Path("a/im.jpg"): Path("a/im"), Path("b/im.jpg"): Path("b/im")}
    hook = test.WritePredictions(tmp_path, np.array([4, 9], np.uint8), names)
    for i, path in enumerate(names):
        classes = torch.full((1, 3, 5), float(i))
        sample = SimpleNamespace(img_path=str(path), pred_sem_seg=SimpleNamespace(data=classes))
        hook.after_test_iter(None, 0, None, [sample])
    for folder, label in ("a", 4), ("b", 9):
        assert (np.asarray(Image.open(tmp_path / folder / "im.png")) == np.full((3, 5), label)).all()


def test_the_learning_rate_is_scaled_once(scenes, tmp_path):
    """The schedules are built before the training, where mmengine would scale again, or refuse to."""
    small = {name: 1 for name in ("train_cfg.max_iters", "train_cfg.val_interval", "train_dataloader.batch_size")}
    words = (word.split("=") for word in options(scenes)[1:])
    given = {name: 0 if value in ("0", "False") else value for name, value in words} | small
    cfg = mmseg_runs.read_config(CONFIG, given | {"auto_scale_lr": dict(enable=True, base_batch_size=4)})
    cfg.work_dir = str(tmp_path)
    mmseg_runs.fit_to_machine(cfg, "none")
    runner = mmseg_runs.build_runner(cfg, train=True)
    runner.train()
    assert any(isinstance(hook, mmseg_runs.OwnFolder) for hook in runner.hooks)
    assert {group["initial_lr"] for group in runner.optim_wrapper.optimizer.param_groups} == {2e-3 / 4}


def command(*arguments):
    return [sys.executable, *map(str, arguments)]


def environment():
    return dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")


@pytest.mark.slow
def test_train_kill_resume_test(scenes, tmp_path, capsys):
    """Training by the command line: killed, resumed to its end, and tested at one scale and at several."""
    run = dict(SMALL_RUN) | {"train_cfg.max_iters": 8, "train_cfg.val_interval": 8}
    arguments = [ROOT / "tools/train.py", CONFIG, *options(scenes, **run)]
    process = subprocess.Popen(
        command(*arguments, "--work-dir", tmp_path / "killed"),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed/last_checkpoint").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = subprocess.run(
        command(arguments[0], CONFIG, "--work-dir", tmp_path / "killed", "--resume", *arguments[2:]),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "SyncBN: replaced by BN" in resumed.stdout and "resumed" in (resumed.stdout + resumed.stderr).lower()
    checkpoint = tmp_path / "killed/iter_8.pth"
    results = []
    published = tmp_path / "model.safetensors"
    for extra in (["--publish", str(published)], ["--tta", "--out", str(tmp_path / "predictions")]):
        assert (
            test.main([str(CONFIG), str(checkpoint), "--work-dir", str(tmp_path / "t"), *extra, *options(scenes)]) == 0
        )
        results.append(capsys.readouterr().out.splitlines()[-1])
    assert "sha256" in results[0] and "mIoU" in results[1]
    predictions = list((tmp_path / "predictions").glob("ADE_val_*.png"))
    assert len(predictions) == 3
    for path in predictions:
        assert set(np.unique(np.asarray(Image.open(path)))) <= set(make_scenes.LABELS.values())
    digest, _, name = Path(f"{published}.sha256").read_text().strip().partition("  ")
    assert (hashlib.sha256(published.read_bytes()).hexdigest(), published.name) == (digest, name)
    with safe_open(published, "pt") as file:
        assert "mIoU" in json.loads(file.metadata()["metrics"]) and file.metadata()["cell_size"] == "4"


@pytest.mark.slow
def test_two_processes_on_the_cpu(scenes, tmp_path):
    """The same config file under torchrun, by gloo."""
    found = subprocess.run(
        [
            str(ROOT / "tools/dist_train.sh"),
            str(CONFIG),
            "2",
            "--work-dir",
            str(tmp_path),
            *options(scenes, **SMALL_RUN),
        ],
        env=environment() | dict(PYTHON=sys.executable),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert found.returncode == 0, found.stderr
    assert "process 1 of 2 on the CPU, by gloo" in found.stdout
    assert (tmp_path / "iter_4.pth").is_file()
