"""The data checker, which lists and loads as training does."""

import shutil

import numpy as np
import pytest
from mmcv.transforms import LoadImageFromFile
from mmseg.datasets import ADE20KDataset, BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations
from mmseg_cases import CONFIG, break_label
from mmseg_cases import copy as copy
from mmseg_cases import scenes as scenes
from PIL import Image

from tools import check_dataset, make_scenes, mmseg_runs


def test_checker_counts_and_finds_nothing_wrong(scenes, capsys):
    assert check_dataset.main([str(CONFIG), "--data-root", str(scenes)]) == 0
    out = capsys.readouterr().out
    assert "train: 6 images, 6 of them read with their annotations" in out and "all well" in out
    counts = np.zeros(256, int)
    for path in (scenes / "annotations/training").iterdir():
        counts += np.bincount(np.asarray(Image.open(path)).reshape(-1), minlength=256)
    shares = {name: counts[label] / counts[1:].sum() for name, label in make_scenes.LABELS.items() if label}
    [line] = [line for line in out.splitlines() if "classes occur" in line][:1]
    assert line.startswith(f"  {sum(map(bool, shares.values()))} of 15 classes occur: ")
    assert all(f"{name} {share:.2%}" in line for name, share in shares.items() if share)


def break_size(folder, image, annotation):
    Image.open(annotation).resize((64, 64), 0).save(annotation)


def break_channels(folder, image, annotation):
    Image.open(annotation).convert("RGB").save(annotation)


def paint_all(folder, image, annotation, paint):
    """Every annotation anew, from its labels."""
    for path in annotation.parent.iterdir():
        labels = np.asarray(Image.open(path))
        Image.fromarray(np.broadcast_to(paint(labels), labels.shape).astype(np.uint8)).save(path)


def turn(folder, image, annotation, orientation):
    """A camera's tag that the picture is to be turned before it is seen."""
    exif = Image.Exif()
    exif[check_dataset.ORIENTATION] = orientation
    Image.open(image).save(image, exif=exif)


def crop(folder, image, annotation):
    for path in (image, annotation):
        Image.open(path).crop((0, 0, 128, 96)).save(path)


BROKEN = {
    "there is no folder": lambda folder, image, annotation: shutil.rmtree(folder / "annotations/training"),
    "holds no image whose name ends with .jpg": lambda folder, image, annotation: [
        path.rename(path.with_suffix(".jpeg")) for path in image.parent.iterdir()
    ],
    "1 x image without annotation: ADE_train_00000002": lambda folder, image, annotation: annotation.unlink(),
    "of 150 classes only wall (label 1) occurs in the 6 annotations read; 50% of all": lambda *given: paint_all(
        *given, lambda labels: np.where(np.arange(128) < 64, 1, 255)
    ),
    "every pixel of the 6 annotations read is 0 or 255, which is ignored": lambda *given: paint_all(
        *given, lambda labels: 255 * (labels % 2)
    ),
    "1 x image that its EXIF tag turns in training": lambda *given: turn(*given, 3),
    "1 x annotation of another size than its image (the image's EXIF tag turns it": lambda *given: (
        crop(*given),
        turn(*given, 6),
    ),
    "1 x annotation with a label beyond 150, such as 151": break_label,
    "1 x annotation of another size than its image": break_size,
    "1 x annotation that is not one channel of 8 bits": break_channels,
    "1 x image that cannot be read": lambda folder, image, annotation: image.write_bytes(image.read_bytes()[:400]),
    "1 x annotation that cannot be read": lambda folder, image, annotation: annotation.write_bytes(b"png"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_checker_finds(message, copy):
    image = copy / "images/training/ADE_train_00000002.jpg"
    BROKEN[message](copy, image, copy / "annotations/training/ADE_train_00000002.png")
    cfg = dict(type=ADE20KDataset, data_root=str(copy))  # not by name: the scope of mmseg may not be set here
    cfg["data_prefix"] = dict(img_path="images/training", seg_map_path="annotations/training")
    cfg["pipeline"] = [dict(type=LoadImageFromFile), dict(type=LoadAnnotations)]
    report = check_dataset.check_split(cfg, "train", sample=64)
    assert message in check_dataset.describe(report)
    assert len(report.problems) == 1


def test_checker_sees_what_training_sees(scenes, copy, tmp_path, capsys):
    """It listed and read files by itself: hidden and left over ones stopped it, and what wrappers hold it left out."""
    (copy / "images/training/._ADE_train_00000002.jpg").write_bytes(b"of macOS")
    (copy / "annotations/training/left_over.png").write_bytes(b"of nobody")
    turn(copy, copy / "images/training/ADE_train_00000001.jpg", None, 1)
    (copy / "more").symlink_to(scenes / "images/training")
    (copy / "images/training/linked").symlink_to(copy / "more")
    (copy / "annotations/training/linked").symlink_to(scenes / "annotations/training")
    (copy / "list.txt").write_text("ADE_train_00000003\nADE_train_00000004\n")
    config = tmp_path / "config.py"
    config.write_text(
        f"_base_ = [{str(CONFIG)!r}]\n"
        "one = _base_.train_dataloader.dataset\n"
        f"one.data_root = {str(copy)!r}\n"
        f"train_dataloader = dict(dataset=dict(_delete_=True, type='ConcatDataset', datasets=[\n"
        "    dict(type='RepeatDataset', times=3, dataset=one), dict(one, ann_file='list.txt')]))\n"
        f"val_dataloader = dict(dataset=dict(data_root={str(scenes)!r}))\n"
    )
    assert check_dataset.main([str(config)]) == 0
    out = capsys.readouterr().out
    assert "train.datasets.0.dataset: 12 images, 12 of them read" in out and "train.datasets.1: 2 images" in out
    assert "note: 1 x annotation without image, which nothing reads: left_over" in out
    break_label(copy, None, copy / "annotations/training/ADE_train_00000004.png")
    cfg = mmseg_runs.read_config(config)
    with pytest.raises(mmseg_runs.InputError, match=r"the train.datasets.0.dataset data .* label beyond 150"):
        mmseg_runs.check_data(cfg, ("train", "val"))
    (copy / "images/training/ADE_train_00000005.jpg").unlink()
    (copy / "list.txt").write_text("ADE_train_00000005\n")
    assert check_dataset.main([str(config)]) == 1
    assert (
        "train.datasets.1: 1 images" in (out := capsys.readouterr().out) and "image that is listed and not there" in out
    )


def two_classes(folder, paint, ignore=255, **options):
    """A report on four annotations of two classes."""
    for kind in ("images", "annotations"):
        (folder / kind).mkdir(parents=True)
    for i in range(4):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / f"images/{i}.png")
        Image.fromarray(paint(i)).save(folder / f"annotations/{i}.png")
    pipeline = [dict(type=LoadImageFromFile), dict(type=LoadAnnotations)]
    cfg = dict(type=BaseSegDataset, data_root=str(folder), img_suffix=".png", pipeline=pipeline, **options)
    cfg |= dict(data_prefix=dict(img_path="images", seg_map_path="annotations"))
    cfg |= dict(metainfo=dict(classes=("road", "car"), palette=[[0] * 3, [9] * 3]))
    return check_dataset.check_split(cfg, "train", sample=2, ignored=ignore)


def test_labels_count_as_the_loss_counts_them(tmp_path):
    half = np.arange(64).reshape(8, 8) < 32
    white = two_classes(tmp_path / "white", lambda i: (255 * half).astype(np.uint8))
    assert "of 2 classes only road (label 0) occurs in the 4 annotations read; 50% of all" in white.problems[0]
    other = two_classes(tmp_path / "other", lambda i: (255 * half).astype(np.uint8), ignore=7)
    assert "label beyond 1, such as 255; for two classes write 0 and 1" in other.problems[0]
    assert not two_classes(tmp_path / "seven", lambda i: np.where(half, 7, i % 2).astype(np.uint8), ignore=7).problems
    rare = two_classes(tmp_path / "rare", lambda i: np.full((8, 8), i == 3, np.uint8))
    assert not rare.problems and rare.read >= 2, "a class that the first few lack is looked for in the rest"
    wide = two_classes(tmp_path / "wide", lambda i: np.where(half, 256, 1).astype(np.uint16))
    assert "annotation that is not one channel of 8 bits" in wide.problems[0], "training would read 256 as 0"
