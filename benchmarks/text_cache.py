"""What a token costs when text is generated: the multilevel cache against one of all keys and values.

    python benchmarks/text_cache.py           # measure, and draw
    python benchmarks/text_cache.py --draw    # draw what was measured

For each kind of attention and each position it fills the cache of an untrained model up to there with generated keys
and values (time and memory depend on their number alone), and decodes some tokens, one a call, batch 1. Before that,
decoding must equal the whole sequence, or nothing is measured. Every row is appended to results/text_cache.csv at once;
the figure is drawn from that file. It shows the CPU time of a token, which other programs on the machine disturb less
than its wall time; with one thread on a quiet machine the two are equal. Both are medians.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from matplotlib.figure import Figure

from benchmarks import records
from benchmarks.harness import text_table
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
    add = parser.add_argument
    add("--positions", type=int, nargs="+", default=[100, 1000, 10_000, 60_000], help="(100 1000 10000 60000)")
    for name, value in dict(dim=256, depth=4, heads=8, cell_size=32, rank=4).items():
        add(f"--{name.replace('_', '-')}", type=int, default=value, help=f"of the model ({value})")
    add("--tokens", type=int, default=50, help="decoded and timed at each position, the last ones before it (50)")
    add("--threads", type=int, default=1, help="of torch (1)")
    add("--out", type=Path, default=records.ROOT / "benchmarks/results/text_cache.csv", help="CSV (benchmarks/results)")
    add("--figure", type=Path, default=records.ROOT / "docs/figures/text_cache.png", help="PNG (docs/figures)")
    add("--draw", action="store_true", help="only draw the figure, from the CSV as it is")
    args = parser.parse_args(argv)
    if args.tokens < 1 or min(args.positions) <= args.tokens + WARM_UP:
        parser.error(f"--tokens must be at least 1, and every position above --tokens + {WARM_UP}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model_of = {name: getattr(args, name) for name in SUBJECT[2:]}
    lines = []
    for attention in () if args.draw else ATTENTIONS:
        options = dict(attention=attention, cell_size=args.cell_size, rank=args.rank)
        model = CausalLM(256, args.dim, args.depth, args.heads, **options).eval()
        if (error := decoding_error(model)) > 1e-4:
            print(f"{attention}: decoding differs from the whole sequence by {error:.1e}", file=sys.stderr)
            return 1
        for position in sorted(args.positions):
            row = dict(attention=attention, position=position, **model_of) | measure(model, position, args.tokens)
            kept = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
            lines.append(
                [*(kept[key] for key in ("attention", "position", "entries", "cache_mib", "cpu_ms", "wall_ms"))]
            )
            lines[-1].append(f"{1000 / row['wall_ms']:.0f}")
            kept |= records.origin(threads=args.threads) | dict(device="cpu", dtype="float32")
            records.append_rows(args.out, COLUMNS, [kept])
    print(text_table(["attention", "position", "entries", "MiB", "CPU ms", "wall ms", "tokens/s"], lines))
    draw(read(args.out), args.figure)
    print(f"{args.out}\n{args.figure}")
    return 0


@torch.no_grad()
def decoding_error(model: CausalLM, tokens: int = 200, prompt: int = 100) -> float:
    """The largest difference of a logit between decoding and the whole sequence."""
    ids, cache = torch.randint(256, (1, tokens)), model.new_cache()
    outs = [model(ids[:, :prompt], cache=cache), model(ids[:, prompt:], cache=cache)]
    return (torch.cat(outs, 1) - model(ids)).abs().max().item()


@torch.no_grad()
def measure(model: CausalLM, position: int, tokens: int) -> dict:
    """Size of the cache at `position`, and the times of the last `tokens` tokens up to there."""
    cache, attention, before = model.new_cache(), model.blocks[0].attention, position - tokens - WARM_UP
    for _ in cache.steps(torch.zeros(1, before, dtype=torch.int64), None):
        for layer in cache.layers:
            layer.fill(*torch.randn(2, 1, attention.num_heads, before, attention.head_dim), torch.tensor([before]))
    wall, cpu, token = [], [], torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(WARM_UP + tokens):
        start = time.perf_counter(), time.process_time()
        model(token, cache=cache)
        wall.append(1000 * (time.perf_counter() - start[0]))
        cpu.append(1000 * (time.process_time() - start[1]))
    q10, median, q90 = torch.tensor(cpu[WARM_UP:]).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    return dict(
        entries=cache.entries(),
        cache_mib=len(cache.layers) * cache.entries() * 2 * attention.dim * torch.float32.itemsize / 2**20,
        wall_ms=torch.tensor(wall[WARM_UP:]).median().item(),
        cpu_ms=median,
        cpu_q10_ms=q10,
        cpu_q90_ms=q90,
        tokens=tokens,
    )


def read(path: Path) -> list[dict]:
    """The rows of a file; of two of the same thing the later."""
    return records.latest(records.read_rows(path, COLUMNS), SUBJECT)


def draw(rows: list[dict], path: Path) -> None:
    """Entries a layer and time a token against the position, on logarithmic axes; of the last model measured."""
    rows = [row for row in rows if all(row[name] == rows[-1][name] for name in SUBJECT[2:])]
    rows.sort(key=lambda row: int(row["position"]))
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    panels = dict(entries="what a layer keeps: a key and a value an entry", cpu_ms="CPU time of a token, ms: median")
    for axes, (key, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for i, (attention, label) in enumerate(ATTENTIONS.items()):
            line = [(int(row["position"]), float(row[key])) for row in rows if row["attention"] == attention]
            axes.loglog(*zip(*line, strict=True), marker="os"[i], color=f"C{i}", label=label)
        axes.set_xlabel("position in the text")
        axes.set_title(title, fontsize=11)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    first = rows[0]
    model = f"{first['depth']} layers of {first['dim']}, {first['heads']} heads, cell {first['cell_size']}, "
    model += f"rank {first['rank']}, {first['dtype']}, batch 1"
    where = f"{first['machine']}, {first['threads']} thread; torch {first['torch']}, fma2d {first['fma2d']} "
    figure.supxlabel(f"{model}; {where}{first['commit']}", fontsize=8, color="0.35")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
