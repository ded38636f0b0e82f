"""The study of a converted ViT's task: its rows, and kernels that learn to imitate."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from benchmarks.records import read_rows
from research import saliency


@pytest.fixture
def pets(tmp_path, monkeypatch):
    """Pictures of two breeds, and a model of one block with random weights in the place of the package's."""
    for kind in ("images", "trimaps"):
        (tmp_path / kind).mkdir()
    for name, size in (("Tom_1", (80, 98)), ("Tom_2", (98, 60)), ("Red_cat_1", (98, 98))):
        Image.fromarray(np.random.randint(0, 256, (*size[::-1], 3), np.uint8)).save(tmp_path / "images" / f"{name}.jpg")
        trimap = np.random.randint(1, 4, size[::-1], np.uint8)
        Image.fromarray(trimap).save(tmp_path / "trimaps" / f"{name}.png")
    torch.manual_seed(0)
    model = saliency.Saliency().eval()
    model.backbone.blocks = model.backbone.blocks[:1]
    model.backbone.blocks[0].ls1.gamma.data.fill_(1)
    torch.nn.init.normal_(model.backbone.blocks[0].attn.qkv.weight, std=0.1)
    torch.nn.init.normal_(model.decoder["final_conv"].weight, std=30.0)
    monkeypatch.setattr(saliency, "model_file", lambda given: b"")
    monkeypatch.setattr(saliency, "load", lambda data: model)
    return tmp_path, model


def test_rows_are_made_once_and_learned_kernels_come_nearer(pets, capsys):
    folder, model = pets
    out, kernels = folder / "rows.csv", folder / "kernels.safetensors"
    study = ["study", str(folder), "--out", str(out), "--sizes", "98", "42", "--cells", "2", "8", "--ranks", "1"]
    assert saliency.main([*study, "--breeds", "Tom", "--variants", "linear"]) == 0
    rows = read_rows(out, saliency.COLUMNS)
    # Nothing changes at 42 px, nor with cells of 8.
    assert [(r["pixels"], r["variant"], r["cell_size"]) for r in rows] == [
        ("98", "dense", ""),
        ("98", "linear", "2"),
        ("42", "dense", ""),
    ]
    assert rows[0]["difference"] == "0.0000" and float(rows[1]["difference"]) > 0 and not rows[1]["seconds"]
    before = out.read_text()
    assert saliency.main([*study, "--variants", "linear", "--time"]) == 0
    assert out.read_text().startswith(before)
    added = read_rows(out, saliency.COLUMNS)[3:]
    assert [r["breed"] for r in added] == ["Red_cat"] * 3 and all(float(r["seconds"]) > 0 for r in added)

    options = ["--cell-size", "2", "--rank", "1", "--size", "98", "--lr", "0.05", "--steps", "30", "--minutes", "9"]
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    assert saliency.main(["tune", str(folder), "--breeds", "Tom", "--out", str(kernels), *options]) == 0
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    said = capsys.readouterr().out.split("relative error of the last features ")[1]
    first, last = (float(said.split(" at ")[0]), float(said.split("first, ")[1].split()[0]))
    assert last < 0.98 * first
    assert saliency.main([*study, "--breeds", "Tom", "--kernels", str(kernels)]) == 0
    mean, tuned = read_rows(out, saliency.COLUMNS)[6:8]
    assert (mean["variant"], mean["kernels"]) == ("loglinear", "mean")
    assert tuned["kernels"] == "tuned at 98 px on Tom, 30 steps"
    assert tuned["difference"] != mean["difference"]


def test_border_pixels_do_not_count(pets):
    folder, _ = pets
    path = folder / "images" / "Tom_1.jpg"
    trimap = torch.ones(4, 6, dtype=torch.uint8) * saliency.BACKGROUND
    trimap[:, :2], trimap[:, 2] = saliency.PET, 3
    Image.fromarray(trimap.numpy()).save(folder / "trimaps" / "Tom_1.png")
    found = F.pad(torch.ones(1, 1, 4, 4), (0, 2))  # two columns of the pet, one of border, one wrong
    assert saliency.iou(found, path) == 8 / 12
    assert saliency.iou(0.59 * found, path) == 0


def test_what_it_lacks_is_said_in_one_line(tmp_path, capsys):
    assert saliency.main(["study", str(tmp_path), "--out", str(tmp_path / "rows.csv")]) == 1
    assert "has no BREED_NUMBER.jpg" in capsys.readouterr().err
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "Tom_1.jpg").touch()
    for more, words in (
        (["--model", str(tmp_path / "no.whl")], "--model: no vit_s_focus.onnx"),
        (["--breeds", "Dog"], "Dog"),
    ):
        assert saliency.main(["study", str(tmp_path), "--out", str(tmp_path / "rows.csv"), *more]) == 1
        assert words in capsys.readouterr().err
