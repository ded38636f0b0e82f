"""Segmentation in tiles against mmsegmentation's own whole mode, and tools/predict.py."""

import csv
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.dataset import Compose
from mmengine.registry import MODELS, init_default_scope
from mmseg.structures import SegDataSample
from mmseg.utils import register_all_modules
from PIL import Image
from torch.nn import functional as F

import fma2d.mmseg  # noqa: F401  (registers the backbone)
from benchmarks import records
from fma2d.mmseg.tiled import resize_part, segment, source_range
from tools import make_scenes, predict


def small_model(head="SegformerHead", classes=7, out_channels=None, **options):
    """A tiny segmentor whose random weights tell its classes apart, in evaluation mode."""
    register_all_modules(init_default_scope=False)
    init_default_scope("mmseg")
    extra = dict(pool_scales=(1, 2), align_corners=False) if head == "UPerHead" else {}
    cfg = dict(
        type="EncoderDecoder",
        data_preprocessor=dict(type="SegDataPreProcessor", mean=[120] * 3, std=[60] * 3, bgr_to_rgb=True),
        backbone=dict(
            type="FMA2D", arch=dict(dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), head_dim=8), cell_size=4, **options
        ),
        decode_head=dict(
            type=head,
            in_channels=[8, 16, 24, 32],
            in_index=[0, 1, 2, 3],
            channels=16,
            num_classes=classes,
            out_channels=out_channels,
            norm_cfg=dict(type="BN"),
            **extra,
        ),
        test_cfg=dict(mode="whole"),
    )
    model = MODELS.build(ConfigDict(cfg))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # a head that has seen something: not the identity
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    return model.eval()


@pytest.mark.parametrize("size, source", [(37, 10), (10, 37), (64, 16), (19, 19), (5, 1), (255, 64)])
def test_a_part_of_a_resized_map_is_that_part_of_the_whole(size, source):
    x = torch.randn(2, source, source + 3)
    sizes, sources = (size, 2 * size), x.shape[-2:]
    whole = F.interpolate(x[None], sizes, mode="bilinear", align_corners=False)[0]
    for parts in [
        ((0, size), (0, 2 * size)),
        ((size // 2, size), (size - 1, size + 3)),
        ((0, 1), (2 * size - 1, 2 * size)),
    ]:
        rows, cols = (slice(*source_range(p, n, s)) for p, n, s in zip(parts, sizes, sources, strict=True))
        part = resize_part(x[:, rows, cols], parts, sizes, sources)
        expected = whole[:, slice(*parts[0]), slice(*parts[1])]
        # A place is known to some float32 steps of the extent; values differ by at most 8 from one place to the next.
        torch.testing.assert_close(part, expected, atol=1e-6 + 8 * 2**-23 * max(sources), rtol=0)


@pytest.mark.parametrize(
    "head, classes, channels", [("SegformerHead", 7, None), ("UPerHead", 7, None), ("SegformerHead", 2, 1)]
)
@pytest.mark.parametrize("shape, original, tile", [((61, 83), (61, 83), 17), ((64, 96), (131, 190), 50)])
def test_tiles_give_the_classes_of_the_whole_mode(head, classes, channels, shape, original, tile):
    """Odd sizes, an image that was resized before the network, tiles that divide nothing; a head of one channel too."""
    model = small_model(head, classes, channels)
    image = torch.randn(1, 3, *shape)
    meta = dict(img_shape=shape, ori_shape=original, pad_shape=shape, padding_size=(0, 0, 0, 0))
    with torch.inference_mode():
        (sample,) = model.predict(image, [SegDataSample(metainfo=meta)])
    found = segment(model, image, original, tile)
    expected = sample.pred_sem_seg.data[0].to(found.dtype)
    assert len(expected.unique()) > min(3, classes - 1), (
        "the random model must tell classes apart, else nothing is tested"
    )
    assert (found != expected).sum() <= 2e-4 * found.numel()  # ties but for rounding


def test_head_never_sees_the_whole_map():
    """What sets the peak of memory: the fused map exists for one tile at a time."""
    model = small_model()
    largest = []
    model.decode_head.fusion_conv.register_forward_hook(
        lambda module, args, out: largest.append(out.shape[-2:].numel())
    )
    segment(model, torch.randn(1, 3, 128, 128), tile=32)
    assert len(largest) == 16 and max(largest) <= 10 * 10


def test_predict_writes_what_it_promises(tmp_path, capsys, monkeypatch):
    cfg = predict.read_config(predict.CONFIG)
    predict.replace_sync_bn(cfg.model)
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), tmp_path / "weights.pth")
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for name, shape in {"a.jpg": (70, 101, 3), "b.png": (64, 64, 3)}.items():
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(photos / name)
    out = tmp_path / "out"
    arguments = [str(photos), "--config", str(predict.CONFIG), "--checkpoint", str(tmp_path / "weights.pth")]
    assert predict.main([*arguments, "--out", str(out), "--device", "cpu", "--full-size"]) == 0
    assert "peak memory" in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {
        *("a_overlay.png", "a_classes.png", "b_overlay.png", "b_classes.png", "legend.png", "areas.csv")
    }
    with open(out / "areas.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    classes = np.asarray(Image.open(out / "a_classes.png"))
    assert classes.shape == (70, 101)
    of_a = {int(row["label"]): int(row["pixels"]) for row in rows if row["image"].endswith("a.jpg")}
    assert of_a == {int(i): int((classes == i).sum()) for i in np.unique(classes)}
    window = ["--cfg-options", "model.test_cfg.crop_size=64,64", "model.test_cfg.stride=48,48"]
    assert predict.main([*arguments, "--out", str(tmp_path / "slide"), "--mode", "slide", *window]) == 0
    # The model has 15 classes; labels are ADE20K's all the same.
    assert all(make_scenes.LABELS[row["class"]] == int(row["label"]) for row in rows)


@pytest.fixture(scope="session")
def predictor():
    """The model that comes along."""
    return predict.Predictor(predict.read_config(predict.CONFIG), predict.CHECKPOINT)


def write_pictures(folder):
    """One scene in many kinds of file, all of the same 8 bits but for rounding; the labels are not asked for."""
    picture, _ = make_scenes.scene(0, "validation", 0, make_scenes.load_textures())
    picture = np.asarray(picture)[:, :100]
    image, exif = Image.fromarray(picture), Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "plain.png")
    image.convert("CMYK").save(folder / "cmyk.tif")
    image.convert("L").save(folder / "grey.png")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(folder / "sixteen.png")
    image.convert("RGBA").save(folder / "alpha.png")
    image.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    return picture


def test_pictures_are_read_and_segmented_as_in_testing(tmp_path, predictor):
    """16 bits were cut at 255; a swap of red and blue, in reading or before the network, went unseen."""
    picture = write_pictures(tmp_path)
    grey = np.asarray(Image.open(tmp_path / "grey.png"))[..., None].repeat(3, 2)
    testing = Compose(predict.read_config(predict.CONFIG).test_dataloader.dataset.pipeline)
    for path in tmp_path.iterdir():
        found = predict.read_picture(path)
        assert np.abs(found.astype(int) - (grey if path.stem in ("grey", "sixteen") else picture)).max() <= 1, path
        info = dict(img_path=str(path), seg_map_path=str(tmp_path / "grey.png"), reduce_zero_label=True, seg_fields=[])
        data = {name: [value] for name, value in testing(info).items()}
        with torch.inference_mode():
            (sample,) = predictor.model.test_step(data)
        expected, classes = sample.pred_sem_seg.data[0].numpy(), predictor(predictor.read(path))
        assert (classes != expected).mean() < 1e-3, path
    swapped = predictor(picture[..., ::-1])
    assert (swapped != predictor(picture)).mean() > 0.05, "the model must see colour, else nothing is tested"


def test_one_bad_picture_of_many_is_told_at_the_end(tmp_path, predictor, monkeypatch, capsys):
    """It ended the work, and what had been measured was lost; so did a name that the locale cannot write."""
    monkeypatch.setattr(predict, "Predictor", lambda *args: predictor)
    for name in ("a/x.png", "b/x.png", "b/\u4e2d.png", "b/cut.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((40, 50, 3), 99, np.uint8)).save(tmp_path / name)
    cut = tmp_path / "b/cut.png"
    cut.write_bytes(cut.read_bytes()[:60])
    (tmp_path / "b/._x.png").write_bytes(b"of macOS")
    out = tmp_path / "out"
    ascii_locale = dict(encoding="ascii", errors="strict")
    monkeypatch.setattr(predict, "open", lambda *args, **more: open(*args, **ascii_locale | more), raising=False)  # noqa: SIM115
    assert predict.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert f"error: 1 of 4 images left out: {cut} cannot be read as an image" in captured.err
    assert captured.out.splitlines()[-1].startswith("3 images in ")
    with open(out / "areas.csv", newline="", encoding="utf-8") as file:
        names = {row["image"] for row in csv.DictReader(file)}
    assert names == {str(tmp_path / name) for name in ("a/x.png", "b/x.png", "b/\u4e2d.png")}
    found = {path.relative_to(out).as_posix() for path in out.rglob("*_classes.png")}
    assert found == {"a/x_classes.png", "b/x_classes.png", "b/\u4e2d_classes.png"} and (out / "legend.png").is_file()


def test_results_are_named_apart():
    """One of two images of the same name in different folders lost its prediction."""
    for images, names in (
        (["d/a.jpg", "d/b.jpg"], ["a", "b"]),
        (["d/x/a.jpg", "e/b.jpg"], ["a", "b"]),
        (["d/x/a.jpg", "d/y/a.jpg", "d/b.jpg"], ["x/a", "y/a", "b"]),
        (["d/a.jpg", "d/a.png"], ["a.jpg", "a.png"]),
        (["d/a.jpg", "d/a.jpg"], ["a"]),
    ):
        found = predict.result_names([Path(image) for image in images])
        assert [str(name) for name in found.values()] == names


def test_a_picture_is_not_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict, "Predictor", None)  # before the model is built
    for name in ("x.png", "x_overlay.png"):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / name)
    assert predict.main([str(tmp_path), "--out", str(tmp_path)]) == 1
    assert "a result would overwrite the image" in capsys.readouterr().err
    assert predict.main([str(tmp_path), "--out", str(tmp_path / "x.png")]) == 1
    assert f"cannot write to the folder {tmp_path / 'x.png'}: it is a file" in capsys.readouterr().err


def test_peak_memory_is_that_of_the_device(monkeypatch):
    used = {"cuda:0": 0, "cuda:1": 3 << 30}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device="cuda:0": used[device])
    assert predict.peak_memory("cuda:1").startswith("3.00 GiB")
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows, where the tools did not start
    assert predict.peak_memory("cpu") == "not known"
    for module in (predict, records):
        importlib.reload(module)


@pytest.mark.parametrize(
    "option, message", [("a.jpg", "takes KEY=VALUE, got a.jpg"), ("model.test_cfg.mode=slide", "--mode says it")]
)
def test_predict_does_not_take_every_option(option, message, capsys):
    with pytest.raises(SystemExit):
        predict.parse(["photo.jpg", "--cfg-options", option])
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere.jpg"], "there is no image nowhere.jpg"),
        (["{empty}"], "holds no image"),
        (["{text}"], "text.jpg cannot be read as an image"),
        (["{text}", "--config", "nowhere.py", "--checkpoint", "x.pth"], "there is no config nowhere.py"),
        (["{text}", "--config", str(predict.CONFIG), "--checkpoint", "x.pth"], "there is no file x.pth"),
        (["{text}", "--mode", "slide"], "--cfg-options model.test_cfg.crop_size=128,128 model.test_cfg.stride=96,96"),
    ],
)
def test_predict_says_what_is_wrong_in_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("no image")
    if "cannot be read" in message:
        monkeypatch.setattr(predict, "Predictor", lambda *args: SimpleNamespace(read=predict.read_picture))
    places = dict(empty=tmp_path / "empty", text=tmp_path / "text.jpg")
    assert predict.main([a.format(**places) for a in arguments] + ["--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and error.splitlines()[-1].startswith("error: ")
