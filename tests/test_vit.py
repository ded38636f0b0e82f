"""Converted ViTs: what they cost and how far they are from the originals."""

import csv

import pytest

from benchmarks import vit_benchmark
from benchmarks.__main__ import main as measure
from research import vit


def test_costs_of_the_original_and_the_variants():
    tasks = vit_benchmark.tasks(["vit_tiny_patch16_224"], [384], cell_size=3, rank=1)
    assert [task.subject.get("variant") for task in tasks] == [None, "loglinear", "linear"]
    rows = []
    for task, ms, mib in zip(tasks, ("20.0", "30.0", "5.0"), ("39.0", "19.0", "59.0"), strict=True):
        work = vit_benchmark.build(**task.subject, device="cpu", dtype="float32")
        work.warm_up()
        work.check(work.step())
        measured = dict(median_ms=ms, base_mib="1.0", peak_mib=mib, status="ok")
        rows.append({"variant": "", **task.subject, "device": "cpu", "dtype": "float32"} | measured | work.facts())
    assert [row["tokens"] for row in rows] == [577] * 3
    dense, *converted = [row["macs"] for row in rows]
    # A third of this ViT is attention.
    assert all(0.65 * dense < macs < 0.8 * dense for macs in converted)
    lines = [line.split() for line in vit_benchmark.table(rows).splitlines()[2:]]
    assert [line[2:4] + line[5:] for line in lines] == [
        ["dense", "577", "20", "40", "1.00", "1.00"],
        ["loglinear", "577", "30", "20", "1.50", "0.50"],
        ["linear", "577", "5", "60", "0.25", "1.50"],
    ]


def test_differences_grow_with_the_spread_of_scores_and_vanish_without_levels(tmp_path, capsys):
    out = tmp_path / "difference.csv"
    options = ["--models", "vit_tiny_patch16_224", "--out", str(out), "--spreads", "0.1", "3"]
    assert vit.main(["difference", *options, "--sizes", "64", "160", "--cell-size", "2"]) == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["pixels"], row["levels"]) for row in rows] == [("64", "0")] * 4 + [("160", "2")] * 4
    found = [float(row["patches"]) for row in rows]
    assert max(found[:4]) < 1e-4 < min(found[4:]) and max(found[4:6]) < min(found[6:])
    assert "prefix" in capsys.readouterr().out


def test_what_cannot_be_measured_is_said(capsys):
    assert measure(["vit", "--models", "vit_smal_patch16_224"]) == 1
    assert "timm has no model vit_smal_patch16_224; near it are vit_" in capsys.readouterr().err
    assert measure(["vit", "--models", "resnet18"]) == 1
    assert "resnet18 is no VisionTransformer of timm" in capsys.readouterr().err
    for program, words in ((measure, ["vit", "--sizes", "0"]), (vit.main, ["difference", "--models", "resnet18"])):
        with pytest.raises(SystemExit):
            program(words)
    assert "resnet18 is no VisionTransformer" in capsys.readouterr().err


@pytest.mark.slow
def test_a_trained_model_is_compared_too(tmp_path):
    out = tmp_path / "trained.csv"
    assert vit.main(["trained", "--out", str(out), "--epochs", "1", "--sizes", "32", "64", "--cell-size", "2"]) == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["pixels"], row["grid"], row["levels"], row["variant"]) for row in rows] == [
        ("32", "8x8", "1", "loglinear"),
        ("32", "8x8", "1", "linear"),
        ("64", "16x16", "2", "loglinear"),
        ("64", "16x16", "2", "linear"),
    ]
    # With four summary tokens a level-1 cell of 2 x 2 patches is nothing but its patches.
    assert all(float(row["patches"]) < 1e-4 and float(row["same"]) > 0.99 for row in rows[:2])
    assert all(float(row["patches"]) > 1e-4 for row in rows[2:])
