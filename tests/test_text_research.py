"""The study of text models: novels are split by author, rows have equal parameters and go on where they stopped."""

import csv
import tarfile

import pytest
import torch
import yaml

from benchmarks.records import read_rows
from fma2d.text.attention import Attention
from research import novels, text, text_variants
from tools.ending import InputError
from tools.text.corpus import read_corpus
from tools.text.recipe import TextRecipe, text_model
from tools.training.recipe import make_recipe, read_values


@pytest.fixture
def archive(tmp_path):
    """Two novels each by twelve authors, and an anonymous one."""
    corpus = tmp_path / "novels" / "corpus"
    corpus.mkdir(parents=True)
    for i in range(12):
        for year in (1850, 1860):
            words = f"author {i:02} wrote in {year}\r\n" * 800
            (corpus / f"A{i:02}_Novel{year}_{year}.txt").write_bytes(b"\xef\xbb\xbf" + words.encode())
    (corpus / "Anon_Clara_1864.txt").write_text("nobody wrote this\n" * 900)
    path = tmp_path / "novels.tar.xz"
    with tarfile.open(path, "w:xz") as file:
        file.add(corpus.parent, "novels")
    return path


def test_novels_are_split_by_author(archive, tmp_path, capsys):
    assert novels.main([str(archive), "--out", str(tmp_path / "out")]) == 0
    assert "25 novels of 13 authors; validation: A03; test: A07" in capsys.readouterr().out
    for which, number in (("val", 3), ("test", 7)):
        found = (tmp_path / "out" / f"{which}.txt").read_bytes()
        assert found.startswith(f"author {number:02} wrote in 1850\n".encode()) and found.count(b"author") == 1600
        assert f"author {number:02}".encode() not in (tmp_path / "out" / "train.txt").read_bytes()
    assert b"nobody" in (tmp_path / "out" / "train.txt").read_bytes()
    rows = {}
    for which in ("train", "val", "test"):
        with (tmp_path / "out" / "authors" / f"{which}.csv").open(newline="") as file:
            rows[which] = list(csv.DictReader(file))
        assert all(f"author {row['label'][1:]}" in row["text"] and len(row["text"]) == 4096 for row in rows[which])
    assert {"1860" in row["text"] for row in rows["test"]} == {True}
    assert {"1850" in row["text"] for row in rows["train"]} == {True} and len(rows["train"]) == 12 * 4
    assert novels.main([str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1


def test_rows_have_equal_parameters():
    """Within 1 %; the recipe's own model is that of full attention."""
    base = make_recipe(read_values(text.ROOT / "configs/text/novels.yaml", TextRecipe), "test", TextRecipe)
    args = text.parse(["contexts"])
    for study, count in (("contexts", 40), ("cells", 16), ("masked", 6), ("authors", 6)):
        rows = text.STUDIES[study](args, base)
        assert (
            len(rows)
            == len({row.folder for row in rows})
            == len({tuple(row.subject.values()) for row in rows})
            == count
        )
        sizes = [text.count_parameters(row.recipe)[0] for row in rows]
        assert max(sizes) < 1.02 * min(sizes)
        assert {row.recipe.context * row.recipe.batch_size for row in rows} == {text.UPDATE}
    full = text.contexts(args, base)[1]
    assert full.name == "full" and sum(p.numel() for p in text_model(full.recipe).parameters()) == 1_278_400
    with pytest.raises(InputError, match="1% is allowed"):
        text.make_row(args, make_recipe(dict(dim=16, num_heads=1, depth=1), "", TextRecipe), "", ("fma", 4, 32), 512, 0)


def test_a_study_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    """A budget ends it between rows, a second call trains what is missing, a larger --until goes on with all."""
    for which in ("train", "val", "test"):
        (tmp_path / f"{which}.txt").write_bytes(b"some words " * 60)
    recipe = tmp_path / "tiny.yaml"
    small = dict(context=64, dim=48, depth=1, num_heads=1, cell_size=32, epochs=999, updates_per_epoch=1, ema_decay=0.5)
    recipe.write_text(yaml.safe_dump(small))
    monkeypatch.setattr(text, "MAIN", (("fma", 1, 8), ("full", 1, 8)))
    monkeypatch.setattr(text, "UPDATE", 128)
    words = ["contexts", "--recipe", recipe, "--data", tmp_path, "--contexts", 64, "--seeds", 0, "--test-tokens", 128]
    words += ["--output", tmp_path / "out", "--results", tmp_path / "results", "--figures", tmp_path / "figures"]
    words = [*map(str, words)]
    monkeypatch.setattr(text.time, "monotonic", iter([0, 0, 90]).__next__)
    assert text.main([*words, "--until", "1e-9", "--budget", "1"]) == 0
    assert "the same command goes on" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(text, "MAIN", (("fma", 1, 8), ("full", 1, 8)))
    monkeypatch.setattr(text, "UPDATE", 128)

    def rows():
        return read_rows(tmp_path / "results" / "text.csv", text.COLUMNS)

    [first] = rows()
    assert first["name"] == "fma, rank 1, cell 8" and first["updates"] == "1"
    assert text.main([*words, "--until", "1e-9"]) == 0
    assert rows()[0] == first and [row["name"] for row in rows()] == ["fma, rank 1, cell 8", "full"]
    with (tmp_path / "out" / "contexts-64-full-0" / "log.csv").open(newline="") as file:
        seconds = float(next(csv.DictReader(file))["seconds"])
    longer = max(seconds, float(first["seconds"])) / 60 + 2e-3  # recorded seconds are rounded
    assert text.main([*words, "--until", str(longer)]) == 0
    assert all(int(row["updates"]) > 1 for row in rows())
    points = read_rows(tmp_path / "results" / "text_curves.csv", text.CURVE)
    for row in rows():
        own = [point for point in points if point["name"] == row["name"]]
        assert [int(point["updates"]) for point in own] == list(range(1, int(row["updates"]) + 1))
        assert own[-1]["seconds"] == row["seconds"] and float(own[-1]["bits"]) > 0 and row["bits_by_place"]
    assert text.main(["report", *words[1:]]) == 0
    assert "fma, rank 1, cell 8" in capsys.readouterr().out
    assert (tmp_path / "figures" / "text_contexts.png").stat().st_size > 10_000
    assert read_corpus(make_recipe(small, "", TextRecipe), tmp_path).sha256 == first["text"]


def test_the_dense_layer_of_the_variants_is_the_layer(tmp_path, capsys):
    """With kernels that are anything; and every variant trains, once."""
    for kind, count_bias in (("fma", False), ("mean", True)):
        layer = Attention(64, 2, kind, causal=True, cell_size=4, rank=2, context=64, count_bias=count_bias)
        if layer.kernels is not None:
            torch.nn.init.normal_(layer.kernels)
        dense = text_variants.DenseFMA(layer, text_variants.Variant(kind, count_bias=count_bias), 64).double()
        x = torch.randn(2, 64, 64, dtype=torch.float64)
        assert torch.allclose(dense(x), layer.double()(x), rtol=0, atol=1e-12)
    for which in ("train", "val"):
        (tmp_path / f"{which}.txt").write_bytes(bytes(range(32, 122)) * 9)
    words = ["--data", tmp_path, "--out", tmp_path / "rows.csv", "--updates", 2, "--context", 64, "--cell-size", 8]
    words += ["--depth", 1, "--batch-size", 2, "--seeds", 0]
    for _ in range(2):
        assert text_variants.main([*map(str, words)]) == 0
    rows = {row["variant"]: row["bits"] for row in read_rows(tmp_path / "rows.csv", text_variants.COLUMNS)}
    assert list(rows) == list(text_variants.VARIANTS) and all(float(bits) > 4 for bits in rows.values())
    assert len(set(rows.values())) > 4 and capsys.readouterr().out.count("base, seed 0") == 1
