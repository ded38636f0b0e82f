"""Where the tests of the Triton kernels run: on a GPU, or in Triton's interpreter (`conftest.py`) on the CPU."""

import pytest
import torch
from operator_cases import Call

from fma2d import why_not

triton = pytest.importorskip("triton")

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

on_a_device = [
    pytest.mark.skipif(
        why_not("triton", torch.empty(1, 1, 4, 8, device=DEVICE)) is not None,
        reason="needs a GPU or Triton's interpreter",
    ),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]


def to_device(call):
    """A call of the operator on `DEVICE`, its leaves new ones."""
    mask = call["key_mask"]
    moved = call.map(lambda x: x.detach().to(DEVICE).requires_grad_(x.requires_grad))
    return Call(moved | {"key_mask": None if mask is None else mask.to(DEVICE)})


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """For the module that imports it: what is allocated and not written holds NaN."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def poisoned(*args, allocate=allocate, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        monkeypatch.setattr(torch, name, poisoned)
