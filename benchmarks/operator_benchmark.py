"""The operator against dense attention on the same tokens."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from fma2d import multipole_attention, num_levels, start_kernels
from fma2d.geometry import count_pairs

from . import peers as others
from .harness import GateError, Task, Work, check_results, text_table

# And "backward", which says nothing new where both are measured one by one.
MODES = ("forward", "forward+backward")
VARIANTS = ("linear", "loglinear")
DENSE = "sdpa"
# Tokens a side and batch: what a model's stages have at 224 and 512 px, and beyond.
TABLE = (*((n, 4) for n in (8, 12, 14, 16, 20, 24, 28, 32, 48, 56, 64)), (128, 1), (256, 1))


def tasks(
    grids: Sequence[tuple[int, int]],
    modes: Sequence[str] = MODES,
    variants: Sequence[str] = ("linear",),
    backend: str = "torch",
    batch: int = 1,
    heads: int = 2,
    head_dim: int = 64,
    cell_size: int = 8,
    rank: int = 4,
    peers: Sequence[str] = (DENSE,),
    **setting,
) -> list[Task]:
    """Tasks for each grid: `fma2d-<backend>` in each variant, then its peers; `setting`: of `Task`."""
    found = []
    for height, width in sorted(grids, key=prod):
        for mode in modes:
            subject = dict(benchmark="operator", mode=mode, height=height, width=width)
            subject |= dict(batch=batch, heads=heads, head_dim=head_dim)
            for variant in variants:
                own = dict(name=f"fma2d-{backend}", variant=variant, cell_size=cell_size, rank=rank)
                cost = sum(count_pairs((height, width), cell_size, rank, linear=variant == "linear"))
                found.append(Task(f"{__name__}:build", subject | own, cost, **setting))
            for name in peers:
                cost = others.pairs(name, height, width, count_pairs((height, width), cell_size, rank, linear=True)[0])
                extra = {} if name == DENSE else {"near_cell": cell_size}
                found.append(Task(f"{__name__}:build", subject | {"name": name}, cost, extra=extra, **setting))
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
    variant="",
    cell_size=8,
    rank=4,
    near_cell=8,
) -> Work:
    """The work of a row. In memory q, k and v lie as a fused projection leaves them, channels last.

    `near_cell`: cell size of the near field whose cover a peer is to have.
    """
    like = dict(device=device, dtype=getattr(torch, dtype))
    learn, is_peer = mode != "forward", name in others.PEERS

    def inputs(grid) -> list[Tensor]:
        """q, k, v `[B, heads, *grid, head_dim]`, then the kernels of all levels in one tensor, if there are any."""
        tokens = torch.randn(batch, *grid, 3, heads, head_dim, **like).movedim(-3, 0).movedim(-2, 2)
        shape = (cell_size, rank, 2, heads, head_dim)
        levels = range(1, 1 if is_peer else num_levels(grid, cell_size) + 1)
        stack = [start_kernels(n, *shape, variant=variant, bins=cell_size, device=device) for n in levels]
        return [x.detach().requires_grad_(learn) for x in (*tokens, *([torch.stack(stack)] if stack else []))]

    def attend(q, k, v, *kernels) -> Tensor:
        if is_peer:
            return attend_as[tuple(q.shape[2:4])](q, k, v)
        options = dict(cell_size=cell_size, rank=rank, variant=variant, backend=name.split("-")[1])
        return multipole_attention(q, k, v, *kernels, **options)

    def work(grid):
        if is_peer:
            attend_as[grid] = others.peer(name, height=grid[0], width=grid[1], cell_size=near_cell, device=device)
        leaves = inputs(grid)
        if not learn:
            return lambda: [attend(*leaves)]
        d_out = torch.randn(batch, *grid, heads, head_dim, **like).movedim(-2, 1)
        if mode == "backward":
            out = attend(*leaves)
            return lambda: [out, *torch.autograd.grad(out, leaves, d_out, retain_graph=True)]

        def step() -> list[Tensor]:
            out = attend(*leaves)
            return [out, *torch.autograd.grad(out, leaves, d_out)]

        return step

    def check(results: list[Tensor]) -> None:
        check_results(results, (batch, heads, height, width, head_dim))

    def facts() -> dict:
        grid = (height, width)
        linear = is_peer or variant == "linear"
        count = count_pairs(grid, near_cell if is_peer else cell_size, rank, linear=linear)
        count = others.pairs(name, *grid, count[0]) if is_peer else sum(count)
        # Products of a pair: its score and its value; backward, the score again and four gradients.
        products = {"forward": 2, "backward": 5, "forward+backward": 7}[mode]
        return dict(tokens=batch * height * width, macs=count * batch * heads * head_dim * products)

    attend_as = {}
    tiny = work((8 * cell_size, 8 * cell_size))  # loads what libraries load once
    return Work(step=work((height, width)), check=check, warm_up=tiny, facts=facts)


def gate(device: str, dtype: str, backend: str, variants: Sequence[str] = VARIANTS) -> None:
    """Hold a backend to the reference on a small ragged grid with random kernels, gradients included.

    The rule: `max|x - truth| <= 2 max|plain - truth| + 4 eps max|truth|`, where truth is the reference in float64 and
    plain the reference in `dtype`.

    Raises:
        GateError: with the result that breaks it.
    """
    grid, cell_size, rank, heads, head_dim = (37, 22), 4, 4, 2, 8
    low = getattr(torch, dtype)
    random = dict(generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = torch.randn(3, 1, heads, *grid, head_dim, **random)
    # Of both signs and none near 0: at cut edges a kernel is divided by what is left of it.
    kernels = torch.rand(2, 3, 2, rank, heads, head_dim, cell_size, **random) * 2 - 1  # two levels
    kernels = (kernels + kernels.sign()) / 2
    d_out = torch.randn(1, heads, *grid, head_dim, **random).to(device, low)
    leaves = [x.to(device, low) for x in tokens]

    def results(backend, dtype, variant):
        kinds = ("key", "value", "query")[: 3 if variant == "linear" else 2]
        own = [x.to(dtype).requires_grad_() for x in (*leaves, kernels[:, : len(kinds)].to(device, low))]
        out = multipole_attention(*own, cell_size=cell_size, rank=rank, variant=variant, backend=backend)
        *grads, d_kernels = torch.autograd.grad(out, own, d_out.to(dtype))
        found = {"out": out.detach()} | {f"gradient of {name}": x for name, x in zip("qkv", grads, strict=True)}
        found |= {f"gradient of the {kind} kernels": d_kernels[:, i] for i, kind in enumerate(kinds)}
        return {name: x.double() for name, x in found.items()}

    for variant in variants:
        checked, plain = (results(which, low, variant) for which in (backend, "reference"))
        for what, truth in results("reference", torch.float64, variant).items():
            error = (checked[what] - truth).abs().max()
            allowed = 2 * (plain[what] - truth).abs().max() + 4 * torch.finfo(low).eps * truth.abs().max()
            if not error <= allowed:
                where = f"{backend} backend, {variant}, {dtype}, {device}"
                raise GateError(f"{where}: {what} is {error:.3g} away from the reference, allowed are {allowed:.3g}")


def flop_bound(row: dict) -> float:
    """How many times faster than dense attention `row` could be: entries of a query's softmax, dense over its own.

    In the linear variant the far field is one entry, which few coarse queries have computed.
    """
    grid = (int(row["height"]), int(row["width"]))
    linear = row["variant"] == "linear"
    near, far = count_pairs(grid, int(row["cell_size"]), int(row["rank"]), linear=linear)
    tokens = prod(grid)
    return tokens / (near / tokens + (min(far, 1) if linear else far / tokens))


def table(rows: list[dict]) -> str:
    """The rows of a run beside dense attention in the same run, and what was left out."""
    dense = {_place(row): row for row in rows if row["name"] == DENSE}
    lines, notes = [], []
    for row in rows:
        if row["status"] != "ok":
            notes.append(f"{row['name']} {row['height']}x{row['width']} {row['mode']}: {row['status']}")
        elif row["name"] != DENSE:
            peer, bound = dense.get(_place(row)), flop_bound(row) if row["variant"] else None
            line = [f"{row['height']}x{row['width']}", row["mode"], row["name"], row["variant"], _ms(row)]
            if peer and peer["status"] == "ok":
                ratio = float(peer["median_ms"]) / float(row["median_ms"])
                line += [_ms(peer), f"{ratio:.1f}"]
            else:
                ratio = None
                line += ["-", "-"]
            line += [f"{bound:.1f}" if bound else "-", f"{ratio / bound:.2f}" if bound and ratio else "-"]
            lines.append([*line, _bytes_per_token(row), _bytes_per_token(peer)])
    header = ["tokens", "mode", "name", "variant", "ms", f"{DENSE} ms", "faster", "bound", "of it", "B/token"]
    return "\n".join([text_table([*header, f"{DENSE} B/token"], lines), *notes])


def ratios(rows: list[dict]) -> str:
    """Time of dense attention over that of fma2d in the same run: a line for each grid and variant."""
    times = {(*_place(row), row["name"], row["variant"]): row for row in rows if row["status"] == "ok"}
    lines: dict[tuple, dict] = {}
    for row in rows:
        peer = times.get((*_place(row), DENSE, ""))
        if row["name"] != DENSE and row["status"] == "ok" and peer:
            line = lines.setdefault((f"{row['height']}x{row['width']}", row["batch"], row["name"], row["variant"]), {})
            line[row["mode"]] = f"{float(peer['median_ms']) / float(row['median_ms']):.2f}"
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    table = [[*line, *(found.get(mode, "-") for mode in modes)] for line, found in lines.items()]
    return text_table(["tokens", "batch", "name", "variant", *modes], table)


def _place(row: dict) -> tuple:
    return tuple(row[name] for name in ("height", "width", "mode", "batch", "heads", "head_dim", "device", "dtype"))


def _ms(row: dict) -> str:
    return f"{float(row['median_ms']):.4g}"


def _bytes_per_token(row: dict | None) -> str:
    if not row or not row["peak_mib"]:
        return "-"
    return f"{float(row['peak_mib']) * 2**20 / int(row['tokens']):.0f}"
