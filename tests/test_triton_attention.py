"""The triton backend, on a GPU or in Triton's interpreter (`triton_cases.py`), against the definition."""

import json
import os
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import pytest
import timm
import torch
from triton_cases import (
    DEVICE,
    INTERPRETED,
    a_call,
    assert_equals_the_definition,
    cotangents,
    moved,
    of_backend,
    on_a_device,
)
from triton_cases import bfloat16_products as bfloat16_products
from triton_cases import poison as poison

import fma2d
from fma2d import multipole_attention, ops, why_not

backend = pytest.importorskip("fma2d.ops.triton_backend")
tiles = backend.tiles
pytestmark = on_a_device


def pairwise(factors):
    """Rows, one value of every factor each, in which any two values of two factors meet; chosen greedily."""
    pairs = combinations(factors, 2)
    missing = dict.fromkeys(((a, x), (b, y)) for a, b in pairs for x, y in product(factors[a], factors[b]))
    order, rows = list(factors), []

    def gains(row, name, value):
        others = [((n, row[n]), (name, value)) for n in row if order.index(n) < order.index(name)]
        others += [((name, value), (n, row[n])) for n in row if order.index(n) > order.index(name)]
        return [pair for pair in others if pair in missing]

    while missing:
        row = dict(next(iter(missing)))
        for name in order:
            if name not in row:
                row[name] = max(factors[name], key=lambda value, name=name: len(gains(row, name, value)))
        for pair in [pair for name, value in row.items() for pair in gains(row, name, value)]:
            missing.pop(pair, None)
        rows.append({name: row[name] for name in order})
    return rows


# Extents by the side of a cell, of a 2D and of a 1D grid, all with coarse levels.
EXTENTS = {
    "one": (lambda c: (1, 4 * c + 1), lambda c: (2 * c + 1,)),
    "primes": (lambda c: (17, 7), lambda c: (97,)),
    "tile - 1": (lambda c: (3 * c - 1, c - 1), lambda c: (4 * c - 1,)),
    "tile + 1": (lambda c: (c + 1, 2 * c + 1), lambda c: (3 * c + 1,)),
    "whole": (lambda c: (4 * c, c), lambda c: (4 * c,)),
}
FACTORS = {
    "kind": ("2D linear", "2D", "1D causal", "1D", "1D linear"),
    "extents": tuple(EXTENTS),
    "rank": (4, 1, 2, 3, 9),
    "head_dim": (8, 24, 64, 80, 128),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "cell": (4, 8, 5),  # in 1D four times as many
    "copies": ((1, 1), (2, 1), (1, 2)),  # batch, heads
    "learned": (1, 0, 3),  # levels
    "mask": (None, 0.7),
    "count_bias": (True, False),
    "scale": (None, -0.3),
}
TABLE = pairwise(FACTORS)
SHORT = 8  # every so many rows are in the short run of the tests


def name(row):
    return "-".join(str(value).removeprefix("torch.").replace(" ", "") for value in row.values())


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=name(row), marks=[pytest.mark.slow] * (i % SHORT > 0)) for i, row in enumerate(TABLE)]
)
def test_equals_the_definition(row):
    """Out, lse and every gradient by the error rule; NaN where no token is, and in memory that nobody wrote to."""
    is_2d, cell_size = row["kind"].startswith("2D"), row["cell"]
    if not is_2d:
        cell_size *= 4
    grid = EXTENTS[row["extents"]][0 if is_2d else 1](cell_size)
    assert fma2d.num_levels(grid, cell_size) > 0
    settings = {name: row[name] for name in ("rank", "head_dim", "dtype", "mask", "count_bias", "scale")}
    assert_equals_the_definition(
        backend, grid=grid, cell_size=cell_size, variant="linear" if "linear" in row["kind"] else "loglinear",
        causal="causal" in row["kind"], batch=row["copies"][0], heads=row["copies"][1], learned=(row["learned"],),
        **settings,
    )  # fmt: skip


# What the table lacks; by which of the two aggregations.
SPECIAL = {
    "whole cells": (True, dict(grid=(16, 8), cell_size=4, rank=4)),
    "whole cells, log-linear, lse not asked for": (
        True,
        dict(grid=(16, 8), cell_size=4, rank=4, variant="loglinear", asks_lse=False),
    ),
    "levels beyond the learned one, shared heads": (
        True,
        dict(grid=(3, 17), cell_size=4, rank=2, heads=2, share_heads=True),
    ),
    "several stacks": (False, dict(grid=(3, 37), cell_size=4, rank=2, learned=(1, 1), variant="loglinear")),
    "other bins": (False, dict(grid=(3, 19), cell_size=4, rank=2, bins=2)),
    "one bin": (False, dict(grid=(3, 19), cell_size=4, rank=2, bins=1)),
    "cells of several tiles": (True, dict(grid=(3, 25), cell_size=12, rank=2, variant="loglinear")),
    "scale zero": (True, dict(grid=(33,), cell_size=8, rank=2, scale=0.0)),
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (i > 1 and i % 2)) for i, c in enumerate(SPECIAL)]
)
def test_equals_the_definition_in_special_cases(case):
    fused, settings = SPECIAL[case]
    call = a_call(**{name: value for name, value in settings.items() if name != "asks_lse"})
    assert backend._plan(backend._signature(moved(call))).aggregation.is_fused == fused
    assert_equals_the_definition(backend, **settings)


SMALL = {
    "linear": dict(grid=(9, 3), cell_size=4, rank=4),
    "log-linear": dict(grid=(3, 9), cell_size=4, rank=2, variant="loglinear"),
}


@pytest.mark.parametrize("case", SMALL)
def test_repeats_every_bit(case):
    call = moved(a_call(**SMALL[case]))
    d = [x.to(DEVICE) for x in cotangents(call)]
    first, second = (of_backend(backend, call, *d) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.xfail(strict=True, raises=AssertionError)
def test_another_order_of_sums_is_seen(monkeypatch):
    """The twin of the test above: the same sums in pieces of another size differ in the last bits."""
    call = moved(a_call((17, 3), 8, 2))
    first = backend.forward(call)
    monkeypatch.setattr(tiles, "choose", lambda kernel, *key: tiles.Tile(32, 4, 1, step=16))
    backend._plan.cache_clear()
    second = backend.forward(call)
    backend._plan.cache_clear()
    assert all(map(torch.equal, first, second))


@pytest.mark.slow
def test_gradients_of_summary_keys_in_fewer_pieces(monkeypatch):
    monkeypatch.setattr(backend, "MOST_PIECES", 3)
    backend._plan.cache_clear()
    assert_equals_the_definition(backend, grid=(3, 37), cell_size=4, rank=2, variant="loglinear")
    backend._plan.cache_clear()


LAYOUTS = {
    "heads first": lambda x: x.contiguous(),
    "channels apart": lambda x: x.mT.contiguous().mT,
    "one of them transposed": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_tokens(layout):
    """Any strides give the same, in the interpreter the same bits: a compiler may sum by where things lie."""
    call = moved(a_call(**SMALL["linear"]))
    arranged = call._replace(q=LAYOUTS[layout](call.q), k=LAYOUTS[layout](call.k))
    for x, y in zip(backend.forward(arranged), backend.forward(call), strict=True):
        torch.testing.assert_close(x, y, **dict(rtol=0, atol=0) if INTERPRETED else {})


def test_tokens_are_read_where_they_are():
    """Views into a fused projection go to the kernels as they are; only channels that lie apart are copied."""
    call = a_call((9, 7), 4, 2)
    assert backend._readable(call) is call
    apart = call._replace(k=call.k.mT.contiguous().mT)
    readable = backend._readable(apart)
    assert readable.k.stride(-1) == 1 and readable.q.data_ptr() == call.q.data_ptr()


def test_a_plan_is_made_once_and_their_number_is_bounded():
    backend._plan.cache_clear()
    for _ in range(2):
        backend.forward(moved(a_call(**SMALL["linear"])))
    info = backend._plan.cache_info()
    assert (info.hits, info.misses) == (1, 1) and info.maxsize == backend.MOST_PLANS


@torch.no_grad()
def test_empty_batch():
    call = moved(a_call((9, 7), 4, 2))
    call = call._replace(q=call.q[:0], k=call.k[:0], v=call.v[:0])
    out, lse = backend.forward(call)
    assert out.shape == call.q.shape and lse.shape == out.shape[:-1]
    d_tokens, d_kernels = backend.backward(call, out, lse, out, None)
    assert all((d == 0).all() and d.shape == x.shape for d, x in zip(d_kernels, call.kernels, strict=True))
    assert [d.shape for d in d_tokens] == [call.q.shape] * 3


@pytest.mark.parametrize("variant", ("linear", pytest.param("loglinear", marks=pytest.mark.slow)))
def test_trains_as_the_reference_does(variant):
    """Two steps of a layer: the losses agree to 1e-5."""

    def losses(backend):
        torch.manual_seed(0)
        model = fma2d.FMA2d(8, 1, 4, 4, levels=1, variant=variant, backend=backend).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        x, target = torch.randn(2, 1, 9, 3, 8).to(DEVICE)
        found = []
        for _ in range(2):
            optimizer.zero_grad()
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    expected = losses("reference")
    assert expected[-1] < expected[0]
    assert losses("triton") == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_fma2d_nano_trains_as_with_the_reference(monkeypatch):
    """30 steps on an image of 9 x 2 tokens, three cells, so that the first stage has a coarse level: losses to 1e-5.

    Convolutions in TF32, which is PyTorch's default, would round the backends' last bits apart from step to step.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    size = (36, 8)
    assert fma2d.num_levels((9, 2), 4) == 1
    if INTERPRETED:  # where a few large tiles take half the time
        monkeypatch.setattr(tiles, "choose", lambda kernel, *key: tiles.Tile(64, 4, 1))
        backend._plan.cache_clear()

    def losses(backend):
        torch.manual_seed(0)
        model = timm.create_model("fma2d_nano", img_size=size, cell_size=4, num_classes=4, backend=backend).to(DEVICE)
        optimizer = torch.optim.SGD(model.parameters(), 3e-3, momentum=0.9)
        images, labels = torch.randn(1, 3, *size).to(DEVICE), torch.tensor((3,), device=DEVICE)
        found = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    expected = losses("reference")
    assert expected[-1] < 0.5 * expected[0]
    assert losses("triton") == pytest.approx(expected, rel=1e-5, abs=1e-6)
    backend._plan.cache_clear()


@pytest.mark.parametrize("case", SMALL)
def test_op_is_registered_as_it_should(case):
    call = moved(a_call(**SMALL[case]))
    leaves = [x.requires_grad_() for x in (*call[:3], *call.kernels)]
    op, arguments = (
        torch.ops.fma2d.multipole_attention.default,
        (*leaves[:3], leaves[3:], None, *call.options, "triton"),
    )
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    out, lse = (x.detach() for x in op(*arguments))
    arguments = (*arguments[:5], out, lse, torch.ones_like(out), None, *arguments[5:])
    found = torch.ops.fma2d.multipole_attention_backward.default(*arguments)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.ops.fma2d.multipole_attention_backward.default(*arguments)
    assert [(x.shape, x.stride(), x.dtype) for x in found] == [(x.shape, x.stride(), x.dtype) for x in fake]


def test_what_it_cannot_do(monkeypatch):
    q = torch.zeros(1, 1, 5, 4, 3, 8, device=DEVICE)
    assert "one and two grid axes" in why_not("triton", q)
    assert "float64" in why_not("triton", q[0].double())
    with pytest.raises(RuntimeError, match="one and two grid axes"):
        multipole_attention(q, q, q, cell_size=2, rank=1, backend="triton")
    assert why_not("triton", q[0]) is None
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "CUDA" in why_not("triton", q[0].cpu())


def test_auto_never_runs_the_interpreter(monkeypatch):
    monkeypatch.setattr(ops.library, "BACKENDS", {"torch": ".torch_backend"})
    q = torch.zeros(1, 1, 9, 4)
    assert multipole_attention(q, q, q, cell_size=2, rank=1).shape == q.shape


def of_a_gpu(script):
    """What a script prints as JSON that runs without the interpreter and with `benchmarks.gpu.launches`' driver."""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


COUNTS = """
import json, torch
from benchmarks.gpu.launches import a_call, count, no_gpu, steps
found = []
with no_gpu() as launched, torch.no_grad():
    for side, variant in ((56, "linear"), (256, "linear"), (256, "loglinear")):
        for step in steps(a_call(side, variant)):
            counter = count(step, launched)
            found.append([len(counter.kernels), counter.operations])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_few_launches():
    """At most 6 forward and 16 backward, of Triton and torch together; none of torch where there is no mask."""
    found = of_a_gpu(COUNTS)
    assert all(operations == [] for _, operations in found), found
    assert [count for count, _ in found[::2]] == [6, 6, 4] and all(count <= 16 for count, _ in found[1::2]), found


SPECIALIZATIONS = """
import json, random, torch
from unittest.mock import patch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit
from fma2d.ops import triton_backend
from fma2d.ops.call import Call, Options

backend, found = make_backend(GPUTarget("cuda", 90, 32)), {}

def record(kernel, *args, grid, warmup, **kwargs):
    bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    found.setdefault(kernel.fn.__name__, set()).add(str(bind(*args, **kwargs)[1:]))

random.seed(0)
with patch.object(jit.JITFunction, "run", record), patch.object(triton_backend.tiles, "INTERPRETER", {}):
    for variant in ("linear", "loglinear"):
        for _ in range(25):
            batch, height, width = random.randint(1, 5), random.randint(33, 90), random.randint(33, 90)
            tokens = torch.zeros(batch, height, width, 3, 2, 32, dtype=torch.bfloat16)
            tokens = (x.movedim(-2, 1) for x in tokens.unbind(-3))
            kernels = torch.zeros(1, 3 if variant == "linear" else 2, 2, 4, 2, 32, 8)
            call = Call(*tokens, [kernels], None, Options(8, 4, variant, False, True, 0.2))
            out, lse = triton_backend.forward(call)
            triton_backend.backward(call, out, lse, out, None)
print(json.dumps({name: len(keys) for name, keys in found.items()}))
"""


def test_sizes_are_no_reason_to_compile_again():
    """50 sizes: a kernel is compiled once for each reason of another kind. Launches are recorded, nothing is run.

    Such reasons are the variant, for the near field whole cells, and for the aggregation whole cells of the top level
    and how many block sums there are.
    """
    counts = of_a_gpu(SPECIALIZATIONS)
    linear = {"coarse_forward", "merge_levels", "collect", "coarse_dq", "coarse_dkdv"}
    assert all(counts[name] == 1 for name in (linear | {"column_sum"})), counts
    assert all(counts[name] <= 4 for name in ("near_forward", "near_dq", "near_dkdv", "column_dkdv", "prepare")), counts
    assert all(count <= 16 for count in counts.values()), counts
