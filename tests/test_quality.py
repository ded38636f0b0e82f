"""The comparison of attention layers: its tasks, its rules, its runs and its reports."""

import copy
import csv
import dataclasses

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.datasets import load_digits
from torch.nn import functional as F

import fma2d
from fma2d.baselines import DenseAttention
from research import approximation, compare_attention
from research.attention_layers import NearFieldAttention
from research.quality import model, paths, report, runs, tasks
from tools.ending import InputError

LOOK_AFAR = tasks.TASKS["look_afar"]


@pytest.fixture
def small(monkeypatch):
    """ "Look afar" with few images."""
    task = dataclasses.replace(
        LOOK_AFAR, batch_size=4, test=lambda: tasks.look_afar(tasks.test_generator(), 20, "test"), dims=(8,), head_dim=4
    )
    monkeypatch.setitem(tasks.TASKS, "look_afar", task)
    return task


def words(folder, *more):
    """A command line whose files lie in a folder."""
    return ["--tasks", "look_afar", "--output", str(folder / "out"), "--results", str(folder / "csv"), *more]


def test_look_afar_names_the_other_digit():
    images, labels = LOOK_AFAR.draw(np.random.default_rng(3), 40)
    again = LOOK_AFAR.draw(np.random.default_rng(3), 40)
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    assert not torch.equal(images, LOOK_AFAR.draw(np.random.default_rng(4), 40)[0])
    data = load_digits()
    scans = zip((data.images / 16).astype(np.float32), data.target, strict=True)
    known = {scan.tobytes(): int(label) for scan, label in scans}
    for image, label in zip(images[:, 0].numpy(), labels.numpy(), strict=True):
        places = np.argwhere(label != tasks.IGNORE)
        assert len(places) == 4
        # At opposite edges: one axis tells the two apart.
        axis = next(a for a in (0, 1) if set(places[:, a]) == {0, 11})
        boxes = [places[places[:, axis] < 6], places[places[:, axis] > 6]]
        found = []
        for box in boxes:
            row, col = 4 * box.min(0).clip(max=10)
            found.append(known[image[row : row + 8, col : col + 8].tobytes()])
            image[row : row + 8, col : col + 8] = 0
        assert not image.any()
        assert [set(label[tuple(box.T)]) for box in boxes] == [{found[1]}, {found[0]}]


@pytest.mark.parametrize("variant", model.VARIANTS)
def test_only_a_far_field_sees_the_other_digit(variant):
    """Else the near field or the convolutions could solve the task, and it would say nothing about far fields."""
    net = model.build(LOOK_AFAR, variant, LOOK_AFAR.cell_sizes, LOOK_AFAR.rank)
    images, labels = LOOK_AFAR.draw(np.random.default_rng(0), 6)
    images.requires_grad_()
    logits = net(images)
    for i in range(len(images)):
        places = (labels[i] != tasks.IGNORE).nonzero()
        one, other = places[0], places[-1]
        [grad] = torch.autograd.grad(logits[i, :, one[0], one[1]].square().sum(), images, retain_graph=True)
        row, col = (4 * (other - 1).clamp(min=0)).tolist()
        seen = grad[i, 0, row : row + 8, col : col + 8].abs().max()
        assert (seen == 0) == (variant in ("near", "window"))


def test_dashed_paths_join_the_marked_point_where_the_labels_say_so():
    """By connected components of the same drawing without gaps."""
    for seed in range(8):
        images, labels = paths.draw(np.random.default_rng(seed), 1, 64, tasks.STRIDE, tasks.IGNORE)
        pair = paths.two_paths(np.random.default_rng(seed), 64)
        solid = paths.drawing(np.random.default_rng(0), pair, 64, gaps=False)
        regions, count = ndimage.label(solid, np.ones((3, 3)))
        [marked] = set(regions[ndimage.binary_opening(solid > 0, np.ones((4, 4)))])
        assert count == 2
        for row, col in np.argwhere(labels[0].numpy() != tasks.IGNORE):
            passing = set(regions[4 * row :, 4 * col :][:4, :4].ravel()) - {0}
            assert (marked if labels[0, row, col] else 3 - marked) in passing
        # The gaps are there: what is drawn falls into many pieces.
        assert ndimage.label(images[0, 0] > 0, np.ones((3, 3)))[1] > 4

        again, ends = paths.draw(np.random.default_rng(seed), 1, 64, tasks.STRIDE, tasks.IGNORE, ends=True)
        asked = ends != tasks.IGNORE
        assert torch.equal(images, again) and torch.equal(ends[asked], labels[asked])
        assert sorted(ends[asked].tolist()) == [0, 1]
    images, labels = tasks.TASKS["dashed_64"].draw(np.random.default_rng(0), 3)
    assert images.shape == (3, 1, 64, 64) and labels.shape == (3, 16, 16)


def test_labels_of_scenes_are_those_of_their_pixels_mirrored_too(monkeypatch):
    monkeypatch.setattr(tasks, "SCENES", dict(train=2, val=1))
    tasks.scenes.cache_clear()
    images, labels = tasks.scenes("train")
    assert images.shape == (2, 3, 64, 64) and labels.shape == (2, 16, 16)
    # A label painted into the image, at the pixel that it is of, must still be there in the mirror.
    painted = torch.zeros(2, 1, 64, 64)
    painted[:, 0, 2::4, 2::4] = labels.float()
    turned = tasks.mirrored(painted)
    assert torch.equal(turned[:, 0, 2::4, 2::4], tasks.mirrored_labels(labels).float())
    tasks.scenes.cache_clear()


def test_the_error_is_that_of_the_heads_outputs_before_the_projection():
    """Whatever the last projection does; and exact where the near field holds all tokens."""
    full = DenseAttention(8, 2)
    x = torch.randn(2, 6, 6, 8)
    layer = approximation.stand_in(full, (6, 6), 1, 1, "linear")
    wrong, whole = approximation.squares(layer, full, x)
    q, k, v = full.qkv(x).flatten(1, 2).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(whole, F.scaled_dot_product_attention(q, k, v).square().sum())
    full.proj.weight.data.zero_()
    torch.testing.assert_close(approximation.squares(layer, full, x), (wrong, whole))
    assert 0.01 < wrong / whole < 1
    near = approximation.stand_in(full, (6, 6), 3, 1, "linear")
    assert approximation.squares(near, full, x)[0] < 1e-8 * whole
    # One number of both layers: the second has no level and does not count.
    model = torch.nn.ModuleList([full, copy.deepcopy(full)])
    assert approximation.error([layer, near], model, [x, x]) == pytest.approx((wrong / whole).sqrt().item())
    kinds = [type(layer) for layer in approximation.swapped(model, [layer, near])]
    assert kinds == [fma2d.FMA2d] * 2 and {type(layer) for layer in model} == {DenseAttention}


def test_near_field_is_that_of_the_cover():
    grid, cell_size = (7, 9), 2
    mask = NearFieldAttention(4, 1, cell_size=cell_size).mask(*grid, torch.device("cpu"))
    for token in ((0, 0), (3, 4), (6, 8)):
        near, _ = fma2d.cover(grid, cell_size, token)
        row = mask[token[0] * grid[1] + token[1]].view(grid)
        assert sorted(map(tuple, row.nonzero().tolist())) == near


def test_scores_are_those_counted_by_hand():
    """Of four tokens of class 0, two of 1 and one of 2: hits 3, 1 and 1; one more is not to be counted."""
    labels = torch.tensor([[[0, 0, 0, 0], [1, 1, 2, tasks.IGNORE]]])
    guesses = torch.tensor([[[0, 0, 0, 1], [1, 0, 2, 2]]])
    logits = 20.0 * F.one_hot(guesses, 3).movedim(-1, 1)
    few = dict(classes=3, test=lambda: (torch.zeros(1, 1, 8, 16), labels), long_range=(1, 2))
    net = torch.nn.Module()
    net.forward = lambda images: logits
    scores = [runs.evaluate(net, dataclasses.replace(LOOK_AFAR, measure=m, **few)) for m in ("accuracy", "mIoU")]
    ious = (3 / 5, 1 / 3, 1.0)
    assert scores[0]["score"] == pytest.approx(100 * 5 / 7) and scores[0]["long_range"] is None
    assert scores[1]["score"] == pytest.approx(100 * sum(ious) / 3)
    assert scores[1]["long_range"] == pytest.approx(100 * (ious[1] + ious[2]) / 2)
    assert scores[0]["val_loss"] == pytest.approx(20 * 2 / 7, rel=1e-4)


def test_runs_differ_by_their_seed_and_learn(small):
    batches = [next(iter(runs.Batches(small, seed, first, 1)))[0] for seed, first in ((0, 0), (1, 0), (0, 1), (0, 0))]
    assert torch.equal(batches[0], batches[3])
    assert not torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], batches[2])
    (one, training), (other, _) = (runs.make_training(runs.make_run(small, "near", seed, 10), 4.0) for seed in (0, 1))
    before = one.classifier.weight.clone()
    assert not torch.equal(before, other.classifier.weight)
    for _ in range(2):  # the first is the warm-up
        training.train_epoch(runs.Batches(small, 0, training.epoch, 1), lambda *_: False)
    moved = (one.classifier.weight - before).abs().max()
    assert 0.1 * small.lr < moved < 2.1 * small.lr  # a step of Adam is about the rate


@pytest.mark.parametrize("task", tasks.TASKS.values(), ids=str)
def test_parameters_agree_within_three_percent(task):
    counts = {}
    for variant in model.VARIANTS:
        ratio = model.matched_ratio(task, variant, task.cell_sizes, task.rank)
        counts[variant] = model.count(model.build(task, variant, task.cell_sizes, task.rank, ratio))
    assert max(abs(count / counts["linear"] - 1) for count in counts.values()) <= 0.03
    assert any(model.levels(task, task.cell_sizes))


def test_parameters_that_cannot_agree_are_refused():
    task = dataclasses.replace(LOOK_AFAR, reductions=(6,))
    with pytest.raises(InputError, match="look_afar, reduction: parameters cannot be matched"):
        model.matched_ratio(task, "reduction", task.cell_sizes, 1)


def test_a_comparison_without_coarse_levels_is_refused(tmp_path, capsys):
    assert compare_attention.main(words(tmp_path, "--cell-size", "6")) == 1
    assert "look_afar: no stage has a coarse level (12 x 12 tokens in cells of 6)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert compare_attention.main(words(tmp_path, "--steps", "15")) == 1
    assert "steps must be a multiple of 10, got 15" in capsys.readouterr().err


def test_a_killed_run_goes_on_and_a_finished_one_is_not_made_again(tmp_path, small, monkeypatch, capsys):
    some = ["--variants", "linear", "full", "--seeds", "0", "--steps", "10"]
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert compare_attention.main(words(unbroken, *some)) == 0
    evaluate, calls = runs.evaluate, []

    def dies(net, task):
        calls.append(task)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return evaluate(net, task)

    monkeypatch.setattr(runs, "evaluate", dies)
    assert compare_attention.main(words(broken, *some)) == 130
    assert capsys.readouterr().err.endswith("\ninterrupted; the same command goes on where it stopped\n")
    assert not (broken / "csv").exists()
    assert compare_attention.main(words(broken, *some)) == 0
    assert len(calls) == 5 + 6 + 10  # four points were saved
    assert compare_attention.main(words(broken, *some)) == 0
    assert len(calls) == 21 and "2 runs, 2 of them in" in capsys.readouterr().out

    files = [[rows_of(folder / "csv" / f"{stem}.csv") for stem in ("quality", "quality_curves")]
             for folder in (unbroken, broken)]  # fmt: skip
    for one, other in zip(*files, strict=True):
        volatile = dict.fromkeys(("cpu_seconds", "timestamp", "command"))
        assert [row | volatile for row in one] == [row | volatile for row in other]
    row = files[0][0][0]
    assert (row["levels"], row["variant"], row["seed"], row["long_range"]) == ("2", "linear", "0", "")
    assert row["machine"] and row["torch"] == torch.__version__.split("+")[0] and row["command"]
    assert (broken / "csv" / "quality_look_afar.png").stat().st_size > 10_000

    state = next((broken / "out").glob("*full*")) / "state.pt"
    held = runs.load_state(state)
    runs.save_state(state, held | dict(run=held["run"] | dict(seed=1)))
    (broken / "csv" / "quality.csv").unlink()
    assert compare_attention.main(words(broken, *some)) == 1
    assert "is of another run" in capsys.readouterr().err


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_more_summary_tokens_and_tuning_lessen_the_error(tmp_path, small, capsys):
    some = ["--variants", "full", "near", "--seeds", "0", "--steps", "10"]
    assert compare_attention.main(words(tmp_path, *some)) == 0
    full, near = (next((tmp_path / "out").glob(f"*{name}*")) / "state.pt" for name in ("full", "near"))
    places = ["--out", str(tmp_path / "a.csv"), "--figure", str(tmp_path / "a.png"), "--steps", "5"]
    assert approximation.main(["--state", str(full), "--rank", "1", "4", *places]) == 0
    rows = rows_of(tmp_path / "a.csv")
    errors = {(r["variant"], r["rank"], r["kernels"], r["level"]): float(r["error"]) for r in rows}
    assert len(errors) == len(rows) == 2 * 2 * 2
    assert errors["linear", "4", "start", "all"] < errors["linear", "1", "start", "all"]
    for variant in ("linear", "loglinear"):
        assert errors[variant, "1", "tuned", "all"] < errors[variant, "1", "start", "all"]
    capsys.readouterr()
    assert approximation.main(["--state", str(near), *places]) == 1
    assert "not with full attention" in capsys.readouterr().err


def test_tables_tell_seeds_and_means():
    base = dict.fromkeys(runs.COLUMNS, "1") | dict(
        task="look_afar", levels="2", cell_sizes="2", rank="1", long_range=""
    )
    scores = (("full", 0, 20, 70.25), ("linear", 1, 20, 80.0), ("linear", 0, 20, 90.5), ("near", 0, 10, 9.0))
    rows = [base | dict(variant=v, seed=str(s), steps=str(n), score=str(x)) for v, s, n, x in scores]
    header, lines = report.comparison(rows, "look_afar")
    columns = [header.index(name) for name in ("attention", "`L` per stage", "accuracy, %: seeds", "mean")]
    assert [[line[i] for i in columns] for line in lines] == [
        ["near field only", "-", "9.0", "**9.0**"],
        ["linear FMA", "2", "90.5 80.0", "**85.2**"],
        ["full attention", "-", "70.2", "**70.2**"],
    ]
    rows.append(rows[2] | dict(rank="4", score="95.0"))
    assert report.comparison(rows, "look_afar") == (header, lines)
    page = report.fill_page("a\n<!-- look_afar -->\nold\n<!-- end -->\nb", {"look_afar": lambda: "new"})
    assert page == "a\n<!-- look_afar -->\nnew\n<!-- end -->\nb"
    with pytest.raises(InputError, match="the page asks for other"):
        report.fill_page("<!-- other -->\n<!-- end -->", {"look_afar": str})


def test_page_has_the_recorded_figures():
    page = compare_attention.PAGE.read_text()
    assert page == compare_attention.Recorded(compare_attention.RESULTS).fill(page)
