"""What a token costs when text is generated: the multilevel cache against one of all keys and values.

    python benchmarks/text_cache.py           # measure, and draw
    python benchmarks/text_cache.py --draw    # draw what was measured

For each kind of attention and each position it fills the caches of an untrained model up to there with generated keys
and values (time and memory depend on their number alone), and decodes some tokens, one a call, batch 1. Before that,
decoding must equal the whole sequence, or nothing is measured. Every row is appended to results/text_cache.csv at once;
the figure is drawn from that file. It shows the CPU time of a token, which other programs on the machine disturb less
than its wall time; with one thread on a quiet machine the two are equal. Both are medians.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks import records
from fma2d.text import CausalLM

SUBJECT = ("attention", "position", "dim", "depth", "heads", "cell_size", "rank")
RESULT = ("entries", "cache_mib", "wall_ms", "cpu_ms", "cpu_q10_ms", "cpu_q90_ms", "tokens")
ORIGIN = ("device", "dtype", "machine", "threads", "torch", "python", "fma2d", "commit", "command", "timestamp")
COLUMNS = (*SUBJECT, *RESULT, *ORIGIN)
ATTENTIONS = {"fma": "multilevel cache (fma)", "full": "all keys and values (full attention)"}
WARM_UP = 4


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table, draw; 1 if decoding is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, results = parser.add_argument, records.ROOT / "benchmarks/results/text_cache.csv"
    add("--positions", type=int, nargs="+", default=[2**i for i in range(7, 17)], help="(powers of two, 128 to 65536)")
    add("--dim", type=int, default=256, help="(256)")
    add("--depth", type=int, default=4, help="layers (4)")
    add("--heads", type=int, default=8, help="(8)")
    add("--cell-size", type=int, default=32, help="(32)")
    add("--rank", type=int, default=4, help="(4)")
    add("--tokens", type=int, default=50, help="decoded and timed at each position, the last ones before it (50)")
    add("--threads", type=int, default=1, help="of torch (1)")
    add("--out", type=Path, default=results, help="CSV (benchmarks/results/text_cache.csv)")
    add(
        "--figure",
        type=Path,
        default=records.ROOT / "docs/figures/text_cache.png",
        help="(docs/figures/text_cache.png)",
    )
    add("--draw", action="store_true", help="only draw the figure, from the CSV as it is")
    args = parser.parse_args(argv)
    if args.draw:
        draw(read(args.out), args.figure)
        return 0
    if args.tokens < 1 or min(args.positions) <= args.tokens + WARM_UP:
        parser.error(f"--tokens must be at least 1, and every position above --tokens + {WARM_UP}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    shared = {name: getattr(args, name) for name in ("dim", "depth", "heads", "cell_size", "rank")}
    print(f"{'attention':10}{'position':>9}{'entries':>9}{'MiB':>9}{'CPU ms':>9}{'wall ms':>9}")
    for attention in ATTENTIONS:
        model = CausalLM(
            256, args.dim, args.depth, args.heads, attention=attention, cell_size=args.cell_size, rank=args.rank
        ).eval()
        if (error := decoding_error(model)) > 1e-4:
            print(f"{attention}: decoding differs from the whole sequence by {error:.1e}", file=sys.stderr)
            return 1
        for position in sorted(args.positions):
            row = dict(attention=attention, position=position, **shared) | measure(model, position, args.tokens)
            kept = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
            kept |= records.origin(threads=args.threads) | dict(device="cpu", dtype="float32")
            records.append_rows(args.out, COLUMNS, [kept])
            numbers = f"{row['entries']:9}{row['cache_mib']:9.2f}{row['cpu_ms']:9.2f}{row['wall_ms']:9.2f}"
            print(f"{attention:10}{position:9}{numbers}", flush=True)
    draw(read(args.out), args.figure)
    print(f"{args.out}\n{args.figure}")
    return 0


@torch.no_grad()
def decoding_error(model: CausalLM, tokens: int = 200, prompt: int = 100) -> float:
    """The largest difference of a logit between decoding and the whole sequence."""
    ids, cache = torch.randint(256, (1, tokens)), model.new_cache()
    outs = [model(ids[:, :prompt], cache=cache)]
    outs += [model(ids[:, i : i + 1], cache=cache) for i in range(prompt, tokens)]
    return (torch.cat(outs, 1) - model(ids)).abs().max().item()


@torch.no_grad()
def measure(model: CausalLM, position: int, tokens: int) -> dict:
    """Size of the cache at `position`, and the times of the last `tokens` tokens up to there."""
    caches, attention = model.new_cache(), model.blocks[0].attention
    shape = (1, attention.num_heads, position - tokens - WARM_UP, model.dim // attention.num_heads)
    for cache in caches:
        q, k, v = torch.randn(3, *shape)
        cache.extend(q, k, v, None, lambda q, k, v, key_mask: q)
    wall, cpu, token = [], [], torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(WARM_UP + tokens):
        start = time.perf_counter(), time.process_time()
        model(token, cache=caches)
        wall.append(1000 * (time.perf_counter() - start[0]))
        cpu.append(1000 * (time.process_time() - start[1]))
    q10, median, q90 = torch.tensor(cpu[WARM_UP:]).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    entries, width = caches[0].entries(), 2 * model.dim * torch.float32.itemsize
    return dict(
        entries=entries,
        cache_mib=len(caches) * entries * width / 2**20,
        wall_ms=torch.tensor(wall[WARM_UP:]).median().item(),
        cpu_ms=median,
        cpu_q10_ms=q10,
        cpu_q90_ms=q90,
        tokens=tokens,
    )


def read(path: Path) -> list[dict]:
    """The rows of a file; of two of the same thing the later."""
    return records.latest(records.read_rows(path, COLUMNS), SUBJECT)


def draw(rows: Sequence[dict], path: Path) -> None:
    """Entries a layer and time a token against the position, on logarithmic axes; of the last model measured."""
    setting = {name: rows[-1][name] for name in SUBJECT[2:]}
    rows = [row for row in rows if all(row[name] == value for name, value in setting.items())]
    rows.sort(key=lambda row: int(row["position"]))
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    entries, time_ = figure.subplots(1, 2)
    for i, (attention, label) in enumerate(ATTENTIONS.items()):
        line = [row for row in rows if row["attention"] == attention]
        at = [int(row["position"]) for row in line]
        style = dict(marker="os"[i], color=f"C{i}", label=label)
        entries.plot(at, [int(row["entries"]) for row in line], **style)
        time_.plot(at, [float(row["cpu_ms"]) for row in line], **style)
        time_.fill_between(
            at,
            *([float(row[name]) for row in line] for name in ("cpu_q10_ms", "cpu_q90_ms")),
            color=f"C{i}",
            alpha=0.15,
        )
    for axes, title, name in [
        (entries, "what a layer keeps: a key and a value an entry", "entries"),
        (time_, "CPU time a token: median, 10 to 90 %", "ms"),
    ]:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({int(row["position"]) for row in rows})[::-2])
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("position in the text")
        axes.set_ylabel(name)
        axes.set_title(title, fontsize=11)
        axes.grid(alpha=0.3)
    figure.legend(*entries.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    first = rows[0]
    model = f"{first['depth']} layers of {first['dim']}, {first['heads']} heads, cell {first['cell_size']}, "
    model += f"rank {first['rank']}, {first['dtype']}, batch 1"
    where = f"{first['machine']}, {first['threads']} thread; torch {first['torch']}, fma2d {first['fma2d']} "
    figure.supxlabel(f"{model}; {where}{first['commit']}", fontsize=8, color="0.35")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
