"""The report on converted ViTs."""

import csv

import pytest

from benchmarks import vit_benchmark
from tools import vit_report


def test_costs_of_the_original_and_the_variants(capsys):
    tasks = vit_benchmark.tasks(["vit_tiny_patch16_224"], [384], cell_size=3, rank=1)
    assert [task.subject.get("variant") for task in tasks] == [None, "loglinear", "linear"]
    rows = []
    for task in tasks:
        work = vit_benchmark.build(**task.subject, device="cpu", dtype="float32")
        work.warm_up()
        work.check(work.step())
        measured = dict(median_ms="2.0", base_mib="1.0", peak_mib="1.0", status="ok")
        rows.append({"variant": "", **task.subject, "device": "cpu", "dtype": "float32"} | measured | work.facts())
    assert [row["tokens"] for row in rows] == [577] * 3
    dense, *converted = [row["macs"] for row in rows]
    # A third of this ViT is attention.
    assert all(0.65 * dense < macs < 0.8 * dense for macs in converted)
    assert vit_benchmark.table(rows).count("1.00") >= 6


def test_differences_grow_with_the_spread_of_scores_and_vanish_without_levels(tmp_path, capsys):
    out = tmp_path / "difference.csv"
    options = ["--models", "vit_tiny_patch16_224", "--out", str(out), "--spreads", "0.1", "3"]
    assert vit_report.main(["difference", *options, "--sizes", "64", "160", "--cell-size", "2"]) == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["pixels"], row["levels"]) for row in rows] == [("64", "0")] * 4 + [("160", "2")] * 4
    found = [float(row["patches"]) for row in rows]
    assert max(found[:4]) < 1e-4 < min(found[4:]) and max(found[4:6]) < min(found[6:])
    assert "prefix" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["cost", "--models", "vit_smal_patch16_224"],
            "timm has no model vit_smal_patch16_224; near it are vit_",
        ),
        (["difference", "--models", "resnet18"], "resnet18 is no VisionTransformer of timm"),
        (["cost", "--sizes", "0"], "must be a number of at least 1, got '0'"),
    ],
)
def test_what_cannot_be_reported_is_said(capsys, words, message):
    with pytest.raises(SystemExit):
        vit_report.main(words)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_trained_model_is_compared_too(tmp_path):
    out = tmp_path / "trained.csv"
    assert (
        vit_report.main(["trained", "--out", str(out), "--epochs", "1", "--sizes", "32", "64", "--cell-size", "2"]) == 0
    )
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
