"""Tries variants of causal fast multipole attention on novels: why rank 4 is behind full attention.

    python research/novels.py novels_100.tar.xz                 # first: writes data/novels
    python research/text_variants.py                            # every variant and seed that is not recorded yet
    python research/text_variants.py --only base far_unturned --updates 600 --seeds 0

The layer is computed densely here, so that a variant is a line; without one it equals `fma2d.text.attention.Attention`,
which a test holds. All variants start from the same weights and see the same bytes. Rows go to
research/results/text_variants.csv when they are finished.
"""

import argparse
import copy
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import text_table
from benchmarks.records import ROOT, append_rows, origin, read_rows
from fma2d.text import CausalLM
from fma2d.text.attention import Attention
from tools.ending import GOES_ON, InputError, ending

EVAL_WINDOWS = 64
SUBJECT = ("variant", "seed", "updates", "context", "cell_size", "dim", "depth", "batch_size", "lr")
COLUMNS = (*SUBJECT, "params", "bits", "bits_second_half", "curve", "seconds", "processor_seconds", "machine")
COLUMNS += ("threads", "torch", "fma2d", "commit", "command", "timestamp")


@dataclass(frozen=True)
class Variant:
    """What differs from the layer as it is."""

    kind: str = "fma"  # of `Attention`; only fma and mean are varied
    rank: int = 4
    kernel_lr: float = 1.0  # times that of all other weights
    shared_channels: bool = False  # one kernel for all channels
    far_turned: bool = True  # rotary positions in the far field too
    level_bias: bool = False  # a learned score for each level and head
    count_bias: bool = False


VARIANTS = dict(
    base=Variant(),
    full=Variant("full"),
    local=Variant("local"),
    mean=Variant("mean"),
    rank_1=Variant(rank=1),
    kernel_lr_4=Variant(kernel_lr=4.0),
    kernel_lr_16=Variant(kernel_lr=16.0),
    kernel_lr_quarter=Variant(kernel_lr=0.25),
    shared_channels=Variant(shared_channels=True),
    far_unturned=Variant(far_turned=False),
    mean_far_unturned=Variant("mean", far_turned=False),
    level_bias=Variant(level_bias=True),
    count_bias=Variant(count_bias=True),
)


class DenseFMA(Attention):
    """Causal `Attention` of kind "fma" or "mean" as one dense softmax, for a context of whole cells, with a variant."""

    def __init__(self, layer: Attention, variant: Variant, context: int):
        kind = dict(causal=True, cell_size=layer.cell_size, rank=layer.rank, context=context)
        super().__init__(layer.dim, layer.num_heads, layer.kind, **kind, count_bias=variant.count_bias)
        self.load_state_dict(layer.state_dict())
        self.variant, self.dense_levels = variant, int(math.log2(context // layer.cell_size)) - 1
        if variant.shared_channels:
            self.kernels = nn.Parameter(self.kernels.detach()[..., :1, :].clone())
        if variant.level_bias:
            self.level_bias = nn.Parameter(torch.zeros(self.dense_levels, layer.num_heads))

    def forward(self, x: Tensor, key_mask: Tensor | None = None, cache: None = None) -> Tensor:
        turned = self.project(x)
        plain = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        (near_q, near_k, v), (q, k) = turned, (turned if self.variant.far_turned else plain)[:2]
        size, rank, tokens = self.cell_size, self.rank, torch.arange(x.shape[1])
        near = (tokens <= tokens[:, None]) & (tokens // size >= tokens[:, None] // size - 1)
        scores, values = [(near_q @ near_k.mT * self.head_dim**-0.5).masked_fill(~near, -torch.inf)], [v]
        start = torch.eye(rank, dtype=x.dtype).mul(rank).repeat_interleave(size // rank, 1)[:, None]
        for level in range(self.dense_levels):
            side = size << level
            kernels = (start, start) if self.kernels is None else self.kernels[level, :, 0, :, 0]
            weights = [w.expand(-1, self.head_dim, -1).repeat_interleave(side // size, 2) / side for w in kernels]
            keys, value = (
                torch.einsum("bhcsd,pds->bhcpd", t.unflatten(2, (-1, side)), w).flatten(2, 3)
                for t, w in zip((k, v), weights, strict=True)
            )
            cell, cells = tokens[:, None] // side, torch.arange(len(tokens) // side)
            first = cell // 2 * 2 - 2
            seen = ((first >= 0) & (cells >= first) & (cells <= cell - 2)).repeat_interleave(rank, 1)
            score = q @ keys.mT * self.head_dim**-0.5 + (math.log(side / rank) if self.count_bias else 0.0)
            if self.variant.level_bias:
                score = score + self.level_bias[level, :, None, None]
            scores.append(score.masked_fill(~seen, -torch.inf))
            values.append(value)
        return self.merge(torch.cat(scores, -1).softmax(-1) @ torch.cat(values, 2))


def make_model(variant: Variant, args: argparse.Namespace, seed: int) -> CausalLM:
    """Weights that differ between variants in what they do not share only."""
    torch.manual_seed(seed)
    options = dict(attention=variant.kind, cell_size=args.cell_size, rank=variant.rank, context=args.context)
    model = CausalLM(256, args.dim, args.depth, args.dim // 32, **options, count_bias=variant.count_bias)
    if variant.kind in ("fma", "mean") and variant != Variant(variant.kind, variant.rank):
        for block in model.blocks:
            block.attention = DenseFMA(block.attention, variant, args.context)
    return model


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--data", type=Path, default=ROOT / "data" / "novels", metavar="DIR", help="of research/novels.py (data/novels)"
    )
    add("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS))
    add("--seeds", type=int, nargs="+", default=[0, 1], metavar="N", help="(0 1)")
    defaults = dict(updates=2000, context=512, cell_size=16, dim=64, depth=2, batch_size=4)
    for name, value in defaults.items():
        add(f"--{name.replace('_', '-')}", type=int, default=value, metavar="N", help=f"({value})")
    add("--lr", type=float, default=6e-3, help="after a warm-up of 50 updates, constant (0.006)")
    add("--out", type=Path, default=ROOT / "research" / "results" / "text_variants.csv", metavar="FILE", help="CSV")
    args = parser.parse_args(argv)
    cells = args.context / args.cell_size
    if cells < 4 or math.log2(cells) % 1 or args.dim % 32:
        parser.error("--context must be --cell-size times 4, 8, 16 and so on, --dim a multiple of 32")
    return args


@ending(interrupted=GOES_ON)
def main(argv: list[str] | None = None) -> None:
    """Train what is not recorded; print what is."""
    args = parse(argv)
    torch.set_num_threads(1)
    if not all((args.data / f"{which}.txt").is_file() for which in ("train", "val")):
        raise InputError(f"{args.data} has no train.txt and val.txt; research/novels.py writes them")
    texts = [np.memmap(args.data / f"{which}.txt", np.uint8, "r") for which in ("train", "val")]
    for seed in args.seeds:
        for name in args.only:
            subject = {key: str(vars(args).get(key, "")) for key in SUBJECT} | dict(variant=name, seed=str(seed))
            if not any(subject.items() <= row.items() for row in read_rows(args.out, COLUMNS)):
                found = train(make_model(VARIANTS[name], args, seed), VARIANTS[name], args, seed, *texts)
                append_rows(args.out, COLUMNS, [origin(threads=1) | subject | found])
                print(f"{name}, seed {seed}: {found['bits']}", flush=True)
    keys = ("variant", "seed", "updates", "params", "bits", "bits_second_half", "curve", "processor_seconds")
    print(text_table(list(keys), [[row[key] for key in keys] for row in read_rows(args.out, COLUMNS)]))


def train(model: CausalLM, variant: Variant, args, seed: int, text: np.ndarray, held_out: np.ndarray) -> dict:
    """Train a model; bits of the moving average of its weights on windows of the validation text."""
    kernels = [p for name, p in model.named_parameters() if name.endswith("kernels")]
    vectors = [p for name, p in model.named_parameters() if p.dim() == 1 or name.endswith("level_bias")]
    left_out = {id(p) for p in kernels + vectors}
    groups = [dict(params=[p for p in model.parameters() if id(p) not in left_out], weight_decay=0.1)]
    groups += [dict(params=vectors), dict(params=kernels, factor=variant.kernel_lr)]
    optimizer = torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    average, random, curve = copy.deepcopy(model), np.random.default_rng(seed), []
    start = time.perf_counter(), time.process_time()
    for update in range(1, args.updates + 1):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, update / 50) * group.get("factor", 1.0)
        loss = losses(model, text, random.integers(0, len(text) - args.context, args.batch_size), args.context).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for mean, p in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(p, 1 - min(0.99, update / (update + 10)))
            if update % max(1, args.updates // 8) == 0 or update == args.updates:
                starts = np.linspace(0, len(held_out) - args.context - 1, EVAL_WINDOWS).astype(int)
                bits = torch.cat([losses(average, held_out, part, args.context) for part in np.split(starts, 8)])
                bits = bits.mean(0) / math.log(2)
                curve.append(f"{update}:{bits.mean():.4f}")
    return dict(
        params=sum(p.numel() for p in model.parameters()),
        bits=f"{bits.mean():.4f}",
        bits_second_half=f"{bits[args.context // 2 :].mean():.4f}",
        curve=" ".join(curve),
        seconds=f"{time.perf_counter() - start[0]:.0f}",
        processor_seconds=f"{time.process_time() - start[1]:.0f}",
    )


def losses(model: CausalLM, text: np.ndarray, starts: np.ndarray, context: int) -> Tensor:
    """Nats of each byte `[B, context]` of windows that begin there."""
    ids = torch.from_numpy(np.stack([text[start : start + context + 1] for start in starts]).astype(np.int64))
    return F.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:], reduction="none")


if __name__ == "__main__":
    sys.exit(main())
