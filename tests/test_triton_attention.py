"""The triton backend, on a GPU or in Triton's interpreter (`triton_cases.py`), against the definition."""

import os
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import pytest
import timm
import torch
from operator_cases import assert_within_rule, cotangents, nearly_weightless, random_call
from operator_cases import one_thread as one_thread
from test_operator_backends import LAYOUTS
from test_operator_library import assert_fake_has_the_layout, op_arguments
from triton_cases import DEVICE, INTERPRETED, on_a_device, to_device
from triton_cases import poison as poison

import fma2d
from fma2d import multipole_attention, ops, why_not
from fma2d.ops import tiles

pytestmark = on_a_device


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch):
    """The interpreter keeps bfloat16 as bit patterns and multiplies those: cast the factors up."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    create_dot = interpreter.InterpreterBuilder.create_dot

    def dot(self, a, b, d, *rest):
        if a.dtype == interpreter.tl.bfloat16:
            a, b = (self.cast_impl(x, interpreter.tl.float32) for x in (a, b))
        return create_dot(self, a, b, d, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def with_nan(call):
    """The call with NaN where no token exists."""
    if call["key_mask"] is None:
        return call
    return call.map(lambda x: torch.where(call.exists[..., None], x, torch.nan), lambda w: w)


def assert_equals_the_definition(dtype=torch.float32, **settings):
    call = random_call(**settings).to(dtype, torch.float32)
    d = [x.to(dtype) for x in cotangents(call)]
    truth = call.to(torch.float64).results("reference", d)
    plain = call.results("definition", d)
    found = to_device(call).results("triton", [x.to(DEVICE) for x in d], with_nan)
    assert_within_rule({name: x.cpu() for name, x in found.items()}, truth, plain, dtype, torch.float32)


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


# Extents by the side of a cell, of a 2D and of a 1D grid: all but "primes" for every side, and all with coarse levels.
EXTENTS = {
    "one": (lambda c: (1, 4 * c + 1), lambda c: (2 * c + 1,)),
    "primes": (lambda c: (17, 7), lambda c: (97,)),
    "tile - 1": (lambda c: (3 * c - 1, c - 1), lambda c: (4 * c - 1,)),
    "tile + 1": (lambda c: (c + 1, 2 * c + 1), lambda c: (3 * c + 1,)),
    "not square": (lambda c: (3 * c, c), lambda c: (5 * c,)),
}
FACTORS = {
    "kind": ("2D linear", "2D", "1D causal", "1D", "1D linear"),
    "extents": tuple(EXTENTS),
    "rank": (4, 1, 2, 3, 8),
    "head_dim": (8, 24, 64, 80, 128),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "cell": (4, 8, 5),  # in 1D four times as many
    "copies": ((1, 1), (2, 1), (1, 2)),  # batch, heads
    "learned": (1, 0, 2),  # levels with key (and query) kernels; the value kernels have the rest to 2
    "mask": (None, 0.7),
    "count_bias": (True, False),
    "scale": (None, -0.3),
}
TABLE = pairwise(FACTORS)
SHORT = 8  # every so many rows are in the short run of the tests


def name(row):
    return "-".join(str(value).removeprefix("torch.").replace(" ", "") for value in row.values())


def test_the_table_covers_every_pair():
    for (a, b), found in {
        names: {tuple(row[name] for name in names) for row in TABLE} for names in combinations(FACTORS, 2)
    }.items():
        assert found == set(product(FACTORS[a], FACTORS[b])), (a, b)
    assert len(TABLE) < 45


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=name(row), marks=[pytest.mark.slow] * (i % SHORT > 0)) for i, row in enumerate(TABLE)]
)
def test_equals_the_definition(row):
    """Out, lse and every gradient by the error rule; NaN where no token is, and in memory that nobody wrote to."""
    is_2d, cell_size = row["kind"].startswith("2D"), row["cell"]
    if not is_2d:
        cell_size *= 4
    grid = EXTENTS[row["extents"]][0 if is_2d else 1](cell_size)
    learned = row["learned"]
    assert fma2d.num_levels(grid, cell_size) > 0
    assert_equals_the_definition(
        row["dtype"],
        grid=grid,
        cell_size=cell_size,
        batch=row["copies"][0],
        heads=row["copies"][1],
        levels=(learned, 2 - learned),
        linear=learned if "linear" in row["kind"] else None,
        causal="causal" in row["kind"],
        **{name: row[name] for name in ("rank", "head_dim", "mask", "count_bias", "scale")},
    )


SPECIAL = {
    "one token": dict(grid=(1, 1), cell_size=8, rank=4, head_dim=8, linear=1),
    "no level": dict(grid=(15, 11), cell_size=8, rank=4, head_dim=24, linear=1, mask=0.8),
    "causal, no level": dict(grid=(100,), cell_size=64, rank=4, head_dim=8, causal=True, scale=0.0),
    "cells of several tiles": dict(grid=(3, 37), cell_size=12, rank=4, head_dim=8, heads=1),
    "cells of several tiles, linear": dict(grid=(3, 37), cell_size=12, rank=4, head_dim=8, linear=1, heads=1),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * ("tiles" in c)) for c in SPECIAL])
def test_equals_the_definition_at_the_limits(case):
    assert_equals_the_definition(**SPECIAL[case])


SMALL = {
    "linear": random_call((9, 3), 4, 4, head_dim=8, heads=1, linear=1, mask=0.8).to(torch.float32),
    "log-linear": random_call((3, 9), 4, 2, head_dim=8, heads=1).to(torch.float32),
}


@pytest.mark.parametrize("case", SMALL)
def test_repeats_every_bit(case):
    call = to_device(SMALL[case])
    d = [x.to(DEVICE) for x in cotangents(call)]
    first, second = (call.results("triton", d) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.xfail(strict=True, raises=AssertionError)
def test_another_order_of_sums_is_seen(monkeypatch):
    """The twin of the test above: the same sums in pieces of another size differ in the last bits."""
    call = to_device(random_call((17, 3), 8, 2, head_dim=8, heads=1).to(torch.float32))
    first = call.results("triton")
    monkeypatch.setattr(tiles, "choose", lambda kernel, *key: tiles.Tile(32, 4, 1, step=16))
    second = call.results("triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_gradients_of_summary_keys_in_fewer_pieces(monkeypatch):
    from fma2d.ops import triton_backend

    monkeypatch.setattr(triton_backend, "MOST_PIECES", 3)
    assert_equals_the_definition(grid=(3, 37), cell_size=4, rank=2, head_dim=8, heads=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_tokens(layout):
    """Any strides give the same, in the interpreter the same bits: a compiler may sum by where things lie."""
    call = to_device(SMALL["linear"])
    expected = call.map(lambda x: LAYOUTS[layout](x).contiguous(), lambda w: w)
    arranged = call.map(LAYOUTS[layout], lambda w: w)
    for x, y in zip(arranged.run("triton"), expected.run("triton"), strict=True):
        torch.testing.assert_close(x, y, **dict(rtol=0, atol=0) if INTERPRETED else {})


def test_tokens_are_read_where_they_are():
    """Views into a fused projection go to the kernels as they are; only channels that lie apart are copied."""
    from fma2d.ops.triton_backend import _channels_last

    q = torch.zeros(2, 9, 7, 3, 4, 8)[:, :, :, 1].movedim(-2, 1)
    assert _channels_last(q).data_ptr() == q.data_ptr()
    assert _channels_last(q.mT.contiguous().mT).stride(-1) == 1


@pytest.mark.parametrize("masked", (False, True))
def test_cells_left_with_next_to_no_weight(masked):
    """As of the other backends."""
    call = nearly_weightless(masked)
    truth = call.to(torch.float64).results("reference")
    results = to_device(call).results("triton", [x.to(DEVICE) for x in cotangents(call)])
    assert all(x.isfinite().all() for x in results.values())
    assert torch.allclose(results["out"].double().cpu(), truth["out"], atol=1e-5)


@pytest.mark.parametrize("cell_size", (1, 5), ids=("levels", "no level"))
def test_empty_batch(cell_size):
    call = random_call((9, 7), cell_size, 2, linear=1).map(lambda x: x[:0], lambda w: w)
    call = to_device(call.to(torch.float32))
    out, lse = call.run("triton")
    assert out.shape == call["q"].shape and lse.shape == out.shape[:-1]
    grads = torch.autograd.grad((out, lse), call.leaves(), (out.detach(), lse.detach()))
    assert all((g == 0).all() and g.shape == x.shape for g, x in zip(grads, call.leaves(), strict=True))


@pytest.mark.parametrize("variant", ("linear", pytest.param("loglinear", marks=pytest.mark.slow)))
def test_trains_as_the_reference_does(variant):
    """Three steps of a layer: the losses agree to 1e-5."""

    def losses(backend):
        torch.manual_seed(0)
        model = fma2d.FMA2d(8, 1, 4, 4, levels=1, variant=variant, backend=backend).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        x, target = torch.randn(2, 1, 9, 3, 8).to(DEVICE)
        found = []
        for _ in range(3):
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


@pytest.mark.parametrize("case", SMALL)
def test_op_is_registered_as_it_should(case):
    op, arguments = torch.ops.fma2d.multipole_attention.default, op_arguments(to_device(SMALL[case]), "triton")
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    assert_fake_has_the_layout(op, arguments)
    out, lse = (x.detach() for x in op(*arguments))
    arguments = (*arguments[:6], out, lse, torch.ones_like(out), torch.ones_like(lse), *arguments[6:])
    assert_fake_has_the_layout(torch.ops.fma2d.multipole_attention_backward.default, arguments)


def test_what_it_cannot_do(monkeypatch):
    q = torch.zeros(1, 1, 5, 4, 3, 8, device=DEVICE)
    assert "one and two grid axes" in why_not("triton", q)
    assert "float64" in why_not("triton", q[0].double())
    with pytest.raises(RuntimeError, match="one and two grid axes"):
        multipole_attention(q, q, q, [], [], cell_size=2, rank=1, backend="triton")
    assert why_not("triton", q[0]) is None
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "CUDA" in why_not("triton", q[0].cpu())


def test_auto_never_runs_the_interpreter(monkeypatch):
    monkeypatch.setattr(ops.library, "BACKENDS", {"torch": ".blocked"})
    q = torch.zeros(1, 1, 5, 4)
    assert multipole_attention(q, q, q, [], [], cell_size=2, rank=1).shape == q.shape


SPECIALIZATIONS = """
import random, torch
from unittest.mock import patch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit
from fma2d.ops import triton_backend, triton_aggregation
from fma2d.ops.options import Call, Options

backend, found = make_backend(GPUTarget("cuda", 90, 32)), {}

def record(kernel, *args, grid, warmup, **kwargs):
    bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    found.setdefault(kernel.fn.__name__, set()).add(str(bind(*args, **kwargs)[1:]))

random.seed(0)
with patch.object(jit.JITFunction, "run", record):
    for linear in (True, False):
        for _ in range(25):
            batch, height, width = random.randint(1, 5), random.randint(17, 90), random.randint(17, 90)
            tokens = torch.zeros(batch, height, width, 3, 2, 32, dtype=torch.bfloat16)
            tokens, options = (x.movedim(-2, 1) for x in tokens.unbind(-3)), Options(8, 4, False, True, 0.2)
            call = Call(*tokens, [], [], [] if linear else None, None, options)
            out, lse = triton_backend.forward(call)
            triton_backend.backward(call, out, lse, out, lse)
for name, keys in sorted(found.items()):
    print(name, len(keys))
"""


def test_sizes_are_no_reason_to_compile_again():
    """50 sizes: one compilation of an attention kernel a variant. Nothing is run, launches are recorded on the CPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-c", SPECIALIZATIONS],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    counts = {name: int(count) for name, count in map(str.split, run.stdout.splitlines())}
    both = {"near_forward", "near_dq", "near_dkdv", "prepare"}
    linear = {"coarse_forward", "merge_levels", "collect", "coarse_dq", "coarse_dkdv"}
    assert both | linear | {"column_dkdv", "column_sum"} <= counts.keys()
    assert all(counts[name] <= 2 for name in both), counts
    assert all(counts[name] == 1 for name in (linear | {"column_dkdv", "column_sum"})), counts
