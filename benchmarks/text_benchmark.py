"""A text model's forward pass and training step, with fast multipole attention and with others on the same skeleton."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fma2d.text import CausalLM

from .harness import Task, Work, check_results, text_table
from .records import total_mib

MODES = ("forward", "forward+backward")
VOCABULARY = 256
FAR = ("fma", "mean")


def tasks(
    attentions: Sequence[tuple[str, int]],
    lengths: Sequence[int],
    modes: Sequence[str] = MODES,
    *,
    batch: int = 1,
    heads: int = 2,
    head_dim: int = 32,
    depth: int = 3,
    cell_size: int = 8,
    mlp_ratios: Sequence[float] | None = None,
    options: dict | None = None,
    **setting,
) -> list[Task]:
    """Tasks for each length, mode, and pair of attention and rank; `setting`: of `Task`.

    Args:
        mlp_ratios: one for each pair (4 everywhere).
        options: others of the model.
    """
    found = []
    for length in sorted(lengths):
        for mode in modes:
            for (name, rank), ratio in zip(attentions, mlp_ratios or [4.0] * len(attentions), strict=True):
                subject = dict(benchmark="text", name=name, mode=mode, height=1, width=length, batch=batch)
                subject |= dict(heads=heads, head_dim=head_dim)
                if name in FAR:
                    subject |= dict(variant="loglinear", rank=rank)
                if name != "full":
                    subject |= dict(cell_size=cell_size)
                cost = length**2 if name == "full" else length * length.bit_length()
                extra = dict(depth=depth, options=dict(options or {}, mlp_ratio=ratio))
                found.append(Task(f"{__name__}:build", subject, cost, extra=extra, **setting))
    return found


def build(
    *,
    benchmark,
    name,
    mode,
    height,
    width,
    batch,
    heads,
    head_dim,
    device,
    dtype,
    depth,
    options,
    variant="",
    cell_size=8,
    rank=1,
) -> Work:
    """The work of a row: a causal model of bytes, its kernels learned for `width` tokens."""
    torch.manual_seed(0)
    options = dict(attention=name, cell_size=cell_size, rank=rank, context=width) | options
    model = CausalLM(VOCABULARY, heads * head_dim, depth, heads, **options).to(device, getattr(torch, dtype))
    ids = torch.randint(0, VOCABULARY, (batch, width + 1), device=device)

    def work(ids: Tensor) -> list[Tensor]:
        if mode == "forward":
            with torch.inference_mode():
                return [model(ids[:, :-1])]
        model.zero_grad()
        logits = model(ids[:, :-1])
        F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        return [logits.detach(), *(parameter.grad for parameter in model.parameters())]

    def check(results: list[Tensor]) -> None:
        check_results(results, (batch, width, VOCABULARY))

    def facts() -> dict:
        return dict(tokens=batch * width, params=sum(p.numel() for p in model.parameters()))

    # Loads what libraries load once; gradients of the parameters are there from the start, as in a training.
    return Work(step=lambda: work(ids), check=check, warm_up=lambda: work(ids[:, :65]), facts=facts)


def label(row: dict) -> str:
    """The model of a row in words."""
    return f"{row['name']}, rank {row['rank']}" if row["rank"] else row["name"]


def table(rows: list[dict]) -> str:
    """The rows of a run, and what was left out."""
    lines = []
    for row in rows:
        line = [row["width"], row["mode"], label(row), "-", "-", row["status"]]
        if row["status"] == "ok":
            line[3:5] = [f"{float(row['median_ms']):.4g}", f"{total_mib(row):.0f}" if row["peak_mib"] else "-"]
        lines.append(line)
    return text_table(["tokens", "mode", "attention", "ms", "peak MiB", "status"], lines)
