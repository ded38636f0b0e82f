"""Tables and figures of the results files, and of nothing else."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import text_table
from tools.ending import InputError

from .model import FAR_FIELD, VARIANTS
from .tasks import TASKS

Table = tuple[list[str], list[list[str]]]  # header, lines


def comparison(rows: Sequence[dict], task: str) -> Table:
    """A line for each attention layer and number of steps on a task: the score of each seed and the mean."""
    own = compared(rows, task)
    measures = [("score", f"{TASKS[task].measure}, %")]
    if any(row["long_range"] for row in own):
        measures.append(("long_range", f"{TASKS[task].measure} of long-range classes, %"))
    header = ["attention", "steps", "cell sizes", "rank", "`L` per stage", "parameters", "MLP ratio"]
    for _, shown in measures:
        header += [f"{shown}: seeds", "mean"]
    lines = []
    for variant, steps, *cells in cases(own):
        runs = [row for row in own if case_of(row) == (variant, steps, *cells)]
        runs.sort(key=lambda row: int(row["seed"]))
        line = [VARIANTS[variant], steps, *(cells if variant in FAR_FIELD else ("-", "-"))]
        line.append(runs[0]["levels"] if variant in FAR_FIELD else "-")
        line += [runs[0]["params"], f"{float(runs[0]['mlp_ratio']):.2f}"]
        for column, _ in measures:
            scores = [float(row[column]) for row in runs]
            line += [" ".join(f"{score:.1f}" for score in scores), f"**{mean(scores):.1f}**"]
        lines.append([*line, f"{mean(float(row['cpu_seconds']) for row in runs):.0f}"])
    return [*header, "CPU s a run"], lines


def compared(rows: Sequence[dict], task: str) -> list[dict]:
    """The rows of a task with its own cell sizes and rank; others are of a sweep."""
    own = (task, " ".join(map(str, TASKS[task].cell_sizes)), str(TASKS[task].rank))
    return [row for row in rows if (row["task"], row["cell_sizes"], row["rank"]) == own]


def case_of(row: dict) -> tuple[str, str, str, str]:
    """What the runs of one line have in common: all but the seed."""
    return row["variant"], row["steps"], row["cell_sizes"], row["rank"]


def cases(rows: Sequence[dict]) -> list[tuple[str, str, str, str]]:
    """The lines of rows, by steps, then in the order of `VARIANTS`."""
    found = {case_of(row) for row in rows}
    return sorted(found, key=lambda case: (int(case[1]), list(VARIANTS).index(case[0]), case[2:]))


def origin(rows: Sequence[dict]) -> str:
    """Where rows come from, in a line: machine and versions; the files tell commits and commands."""

    def values(name: str) -> str:
        return ", ".join(dict.fromkeys(row[name] for row in rows))

    return f"{values('machine')}, threads: {values('threads')}, torch {values('torch')}, timm {values('timm')}"


def training_of(rows: Sequence[dict]) -> str:
    """How the runs of rows were trained, in a line."""
    [images], [rate] = ({row[name] for row in rows} for name in ("batch_size", "lr"))
    return f"{images} images a step, AdamW, learning rate {rate}"


def curves_figure(points: Sequence[dict], task: str) -> Figure:
    """Learning curves of a task: a panel a layer, a line for each seed of its longest runs, full attention in grey."""
    longest: dict[str, list[dict]] = {}
    for variant in VARIANTS:
        own = [point for point in compared(points, task) if point["variant"] == variant]
        longest[variant] = [p for p in own if int(p["steps"]) == max(int(q["steps"]) for q in own)]
    lines = [("score", "-", "the layer")]
    if any(point["long_range"] for own in longest.values() for point in own):
        lines = [("score", "-", "the layer, all classes"), ("long_range", "--", "the layer, long-range classes")]
    figure = Figure(figsize=(10.5, 5.4), layout="constrained")
    *panels, corner = figure.subplots(2, 4, sharex=True, sharey=True).flat
    for axes, (variant, own) in zip(panels, longest.items(), strict=True):
        for column, style, _ in lines:
            draw_seeds(axes, longest["full"], column, color="0.65", linestyle=style, linewidth=1)
            draw_seeds(axes, own, column, color="C0", linestyle=style, linewidth=1.6)
        axes.set_title(VARIANTS[variant] + ("" if own else ": not run"), fontsize=9.5)
        axes.grid(alpha=0.3)
    panels[3].tick_params(labelbottom=True)  # what is below it has no axes
    corner.set_axis_off()
    for _, style, name in lines:
        corner.plot([], [], color="C0", linestyle=style, label=name)
    corner.plot([], [], color="0.65", linewidth=1, label="full attention")
    corner.legend(loc="center", fontsize=9)
    figure.supxlabel("steps", fontsize=10)
    figure.supylabel(f"{TASKS[task].measure}, %", fontsize=10)
    figure.suptitle(f"{TASKS[task].what}\na line for each seed", fontsize=10)
    return figure


def draw_seeds(axes: Axes, points: Sequence[dict], column: str, **style) -> None:
    """A line of a column over the steps for each seed."""
    for seed in dict.fromkeys(point["seed"] for point in points):
        own = [point for point in points if point["seed"] == seed]
        axes.plot([int(point["step"]) for point in own], [float(point[column]) for point in own], **style)


def markdown(table: Table) -> str:
    """A table of a page."""
    header, lines = table
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


def plain(table: Table) -> str:
    """A table for the terminal."""
    header, *lines = [[cell.replace("*", "").replace("`", "") for cell in line] for line in (table[0], *table[1])]
    return text_table(header, lines)


def fill_page(page: str, pieces: dict[str, Callable[[], str]]) -> str:
    """A page with what stands between `<!-- NAME -->` and `<!-- end -->` made anew.

    Raises:
        InputError: if the page asks for a piece that there is not.
    """

    def piece(match: re.Match) -> str:
        if match[1] not in pieces:
            raise InputError(f"the page asks for {match[1]}; there are {', '.join(pieces)}")
        return f"<!-- {match[1]} -->\n{pieces[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", piece, page, flags=re.DOTALL)


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
