"""The triton backend, run by Triton's interpreter where there is no GPU (`conftest.py`), against the definition."""

import pytest
import torch
from operator_cases import Call, assert_within_rule, cotangents, random_call
from operator_cases import one_thread as one_thread
from test_operator_backends import LAYOUTS, OP_CASES, assert_fake_has_the_layout, op_arguments

import fma2d
from fma2d import multipole_attention, why_not
from fma2d.ops import library

triton_runs = pytest.mark.skipif(why_not("triton", torch.empty(1, 1, 4, 8)) is not None, reason="needs the interpreter")
pytestmark = triton_runs


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


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What is allocated and not written shows."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def poisoned(*args, allocate=allocate, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() and x.device.type == "cpu" else x

        monkeypatch.setattr(torch, name, poisoned)


def with_nan(call):
    """The call with NaN where no token exists."""
    if call["key_mask"] is None:
        return call
    return call.map(lambda x: torch.where(call.exists[..., None], x, torch.nan), lambda w: w)


# Extents: 1, primes, one off a multiple of the cell, not square. Between them every pair of: dimension and variant; dtype;
# head_dim (8 to 128, powers of two or not); rank; a cell that is one tile, several, or less than a tile; mask; bins.
CASES = {
    "2D linear": dict(grid=(17, 11), cell_size=4, rank=4, head_dim=24, heads=1, linear=2),
    "2D linear, half": dict(grid=(7, 26), cell_size=5, rank=2, head_dim=64, linear=1, dtype=torch.float16, heads=1),
    "2D linear, bfloat16": dict(
        grid=(9, 17), cell_size=4, rank=6, head_dim=8, linear=0, mask=0.7, dtype=torch.bfloat16, scale=-0.3
    ),
    "2D linear, large cells": dict(grid=(3, 37), cell_size=12, rank=4, head_dim=8, linear=1, heads=1, batch=2),
    "2D": dict(grid=(13, 19), cell_size=4, rank=4, head_dim=8, heads=1, count_bias=False),
    "2D, half, masked": dict(grid=(18, 5), cell_size=4, rank=3, head_dim=80, mask=0.6, dtype=torch.float16, heads=1),
    "2D, bfloat16": dict(grid=(1, 33), cell_size=4, rank=2, head_dim=128, heads=1, dtype=torch.bfloat16),
    "2D, no level": dict(grid=(15, 11), cell_size=8, rank=4, head_dim=24, linear=1, mask=0.8),
    "1D": dict(grid=(61,), cell_size=8, rank=3, head_dim=24, batch=2, heads=1),
    "1D, bfloat16, masked": dict(grid=(67,), cell_size=16, rank=4, head_dim=64, mask=0.5, dtype=torch.bfloat16),
    "1D causal": dict(grid=(65,), cell_size=8, rank=2, head_dim=80, causal=True, heads=1, mask=0.8),
    "1D causal, half": dict(grid=(131,), cell_size=32, rank=4, head_dim=8, causal=True, heads=1, dtype=torch.float16),
    "1D causal, no level": dict(grid=(100,), cell_size=64, rank=4, head_dim=8, causal=True, scale=0.0),
    "1D linear": dict(grid=(127,), cell_size=16, rank=1, head_dim=128, linear=1, heads=1, mask=0.6),
    "1D linear, half": dict(grid=(41,), cell_size=8, rank=8, head_dim=24, linear=2, dtype=torch.float16, heads=1),
    "one token": dict(grid=(1, 1), cell_size=8, rank=4, head_dim=8, linear=1),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition(case):
    """Out, lse and every gradient by the error rule; NaN where no token is, and in memory nobody wrote to."""
    settings = dict(CASES[case])
    dtype = settings.pop("dtype", torch.float32)
    call = random_call(**settings).to(dtype, torch.float32)
    d = [x.to(dtype) for x in cotangents(call)]
    truth = call.to(torch.float64).results("reference", d)
    plain = call.results("definition", d)
    assert_within_rule(call.results("triton", d, with_nan), truth, plain, dtype, torch.float32)
