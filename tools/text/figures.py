"""Figures of the text comparisons, from their CSV files and from nothing else."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib.figure import Figure

from benchmarks.figures import MARKERS, log_axes
from benchmarks.records import total_mib
from benchmarks.text_benchmark import label

from .comparison import Recorded

BASE = "local"  # curves lie so close together that they are drawn as differences from this one


def save(figure: Figure, path: Path) -> None:
    """Write a figure, in a new folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def table_figure(recorded: Recorded) -> Figure:
    """Bits per character during the training, less those of `BASE`, and on the test text by the place in the context; a
    line for each name, the mean over its seeds."""
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows, curves = recorded.rows, recorded.points
    names = list(dict.fromkeys(row["name"] for row in rows))
    trainings = {
        name: dict(zip(*_means((int(c["updates"]), c["bits"]) for c in curves if c["name"] == name), strict=True))
        for name in names
    }
    base = trainings.get(BASE, {})
    for i, name in enumerate(names):
        style = dict(marker=MARKERS[i % len(MARKERS)], color=f"C{i}", label=name, markersize=5)
        left.plot(*zip(*((n, bits - base.get(n, 0)) for n, bits in trainings[name].items()), strict=True), **style)
        parts = (part.split(":") for row in rows if row["name"] == name for part in row["bits_by_place"].split())
        places, bits = _means(parts)
        right.plot(range(len(places)), bits, **style)
    seeds = len({row["seed"] for row in rows})
    meant = f", mean of {seeds} seeds" if seeds > 1 else ""
    beside = f", less those of {BASE}" if base else ""
    left.set(xlabel="updates", ylabel=f"bits per character{beside}", title=f"validation{meant}")
    right.set(xlabel="place in the context", ylabel="bits per character", title=f"test, after the training{meant}")
    right.set_xticks(range(len(places)), places)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return _with_footer(figure, rows[0])


def sweep_figure(recorded: Recorded) -> Figure:
    """Heat maps over cell size and rank, the brighter the better: bits per character of all and of the second half,
    memory, time; means over seeds."""
    figure = Figure(figsize=(10, 7.6), layout="constrained")
    rows = recorded.rows
    cells, ranks = (sorted({int(row[key]) for row in rows}) for key in ("cell_size", "rank"))
    panels = (
        ("bits", "bits per character", "{:.3f}"),
        ("bits_second_half", "the same, second half of the context", "{:.3f}"),
        ("peak_mib", "peak memory of a training step, MiB", "{:.0f}"),
        ("processor_ms", "processor time of an update, ms", "{:.0f}"),
    )
    for axes, (key, title, form) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        values = np.full((len(cells), len(ranks)), np.nan)
        of_cells = _means(((row["cell_size"], row["rank"]), row[key]) for row in rows)
        for (cell, rank), value in zip(*of_cells, strict=True):
            values[cells.index(int(cell)), ranks.index(int(rank))] = value
        image = axes.imshow(values, cmap="viridis_r", aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            dark = np.isfinite(value) and image.norm(value) > 0.5
            text = form.format(value) if np.isfinite(value) else "-"
            axes.text(j, i, text, ha="center", va="center", color="white" if dark else "black")
        axes.set_xticks(range(len(ranks)), ranks)
        axes.set_yticks(range(len(cells)), cells)
        axes.set(xlabel="rank", ylabel="cell size", title=title)
    return _with_footer(figure, rows[0])


def runtime_figure(rows: Sequence[dict]) -> Figure:
    """Time and peak memory against the length, for each mode; `rows` of `benchmarks.text_benchmark`."""
    rows = [row for row in rows if row["status"] == "ok"]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure = Figure(figsize=(10, 3.7 * len(modes) + 0.7), layout="constrained")
    names = list(dict.fromkeys(map(label, rows)))
    for pair, mode in zip(figure.subplots(len(modes), 2, squeeze=False), modes, strict=True):
        for i, name in enumerate(names):
            own = [row for row in rows if (label(row), row["mode"]) == (name, mode)]
            own.sort(key=lambda row: int(row["width"]))
            lengths = [int(row["width"]) for row in own]
            style = dict(marker=MARKERS[i % len(MARKERS)], color=f"C{i}", label=name, markersize=5)
            pair[0].plot(lengths, [float(row["median_ms"]) / 1000 for row in own], **style)
            known = [row for row in own if row["peak_mib"]]
            pair[1].plot([int(row["width"]) for row in known], [total_mib(row) for row in known], **style)
        pair[0].set(ylabel="s")
        pair[0].set_title(f"{mode}: time", fontsize=11)
        pair[1].set(ylabel="MiB")
        pair[1].set_title(f"{mode}: peak memory, weights included", fontsize=11)
        for axes in pair:
            log_axes(axes, sorted({int(row["width"]) for row in rows}), "tokens")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return _with_footer(figure, rows[0])


def _means(pairs: Iterable[tuple]) -> tuple[list, list[float]]:
    """The keys of (key, value) pairs, and the mean of each one's values; what has no value is left out."""
    groups = {}
    for key, value in pairs:
        if value:
            groups.setdefault(key, []).append(float(value))
    return list(groups), [mean(group) for group in groups.values()]


def _with_footer(figure: Figure, row: dict) -> Figure:
    text = f"{row['machine']}, {row['threads']} thread(s); torch {row['torch']}, fma2d {row['fma2d']} {row['commit']}"
    figure.supxlabel(text, fontsize=8, color="0.35")
    return figure
