"""Calls of the operator drawn at random, and the rule for numerical errors."""

import sys
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch
from hypothesis import strategies as st
from operator_definition import definition

from fma2d import multipole_attention, num_levels, start_kernels
from fma2d.ops import torch_backend
from fma2d.ops.call import Call as OpCall
from fma2d.ops.call import Options

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BACKENDS = ("reference", "torch")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For the module that imports it: on a busy machine, threads over tensors so small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Call(dict):
    """Keyword arguments of one call, printed by shape; `kernels` are None, one tensor, or a list over levels."""

    def __repr__(self):
        def text(x):
            if isinstance(x, torch.Tensor):
                return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
            return f"[{', '.join(map(text, x))}]" if isinstance(x, list) else repr(x)

        return f"Call({', '.join(f'{name}={text(x)}' for name, x in self.items())})"

    @property
    def grid(self):
        return tuple(self["q"].shape[2:-1])

    @property
    def exists(self):
        """`[B, 1, *grid]`, bool."""
        shape = (self["q"].shape[0], *self.grid)
        mask = self["key_mask"]
        return torch.ones(shape, dtype=torch.bool)[:, None] if mask is None else mask.expand(shape)[:, None]

    def map(self, token, kernel=None):
        """The call with `token` applied to q, k and v and then `kernel` (default: the same) to the kernels."""
        kernel, kernels = kernel or token, self["kernels"]
        changes = {name: token(self[name]) for name in "qkv"}
        if isinstance(kernels, torch.Tensor):
            changes["kernels"] = kernel(kernels)
        elif kernels is not None:
            changes["kernels"] = [kernel(w) for w in kernels]
        return Call(self | changes)

    def to(self, dtype, kernel_dtype=None):
        """The call in another dtype, its tensors new leaves that need a gradient."""

        def leaf(x, dtype):
            return x.detach().to(dtype, copy=True).requires_grad_()

        return self.map(lambda x: leaf(x, dtype), lambda w: leaf(w, kernel_dtype or dtype))

    def leaves(self):
        """The tensors that take gradients: q, k, v, then the kernels."""
        kernels = self["kernels"]
        kernels = [kernels] if isinstance(kernels, torch.Tensor) else kernels or []
        return [self["q"], self["k"], self["v"], *kernels]

    def with_leaves(self, leaves):
        """The call with other tensors in the place of `leaves()`."""
        rest = iter(leaves)
        return self.map(lambda _: next(rest))

    def op_call(self):
        """What a backend gets of it."""
        kernels = self["kernels"]
        stacks = [kernels] if isinstance(kernels, torch.Tensor) else [w[None] for w in kernels or []]
        mask = None if self["key_mask"] is None else self.exists[:, 0]
        scale = self["q"].shape[-1] ** -0.5 if self["scale"] is None else float(self["scale"])
        options = [self[name] for name in ("cell_size", "rank", "variant", "causal", "count_bias")]
        return OpCall(self["q"], self["k"], self["v"], stacks, mask, Options(*options, scale))

    def run(self, backend, **changes):
        """`(out, lse)` of a backend; of `definition` for "definition", of the torch backend's own code for "followed".

        The latter is what `torch.func` and the second derivative go through.
        """
        if backend == "definition":
            return definition(**{**self, **changes})
        if backend == "followed":
            return torch_backend.forward(Call(self | changes).op_call())
        return multipole_attention(**{**self, **changes}, return_lse=True, backend=backend)

    def run_plain(self, backend):
        """Out alone, as most callers ask for it."""
        if backend in ("definition", "followed"):
            return self.run(backend)[0]
        return multipole_attention(**self, backend=backend)

    def results(self, backend, cotangents=None, arrange=lambda call: call):
        """Out and lse where tokens exist, and the gradients, one vector for each argument: `{name: vector}`.

        Those of the kernels are told apart by kind.

        Args:
            cotangents: of out and lse; None for no gradients, None for the lse's to leave the lse out altogether.
            arrange: a differentiable function from this call to the one that the backend gets.
        """
        call = arrange(self)
        alone = cotangents is not None and cotangents[1] is None
        with torch.set_grad_enabled(cotangents is not None):
            outputs = (call.run_plain(backend),) if alone else call.run(backend)
        exists = call.exists.expand(outputs[0].shape[:-1])
        assert (outputs[0][~exists] == 0).all()
        results = {"out": outputs[0][exists].flatten().detach()}
        if not alone:
            assert (outputs[1][~exists] == -torch.inf).all()
            results["lse"] = outputs[1][exists].detach()
        if cotangents is not None:
            cotangents = [c.to(x.dtype) for c, x in zip(cotangents, outputs, strict=False)]
            unused = {} if backend == "torch" else {"allow_unused": True, "materialize_grads": True}
            q, k, v, *kernels = torch.autograd.grad(outputs, self.leaves(), cotangents, **unused)
            results |= {f"gradient of {name}": x.flatten() for name, x in zip("qkv", (q, k, v), strict=True)}
            if kernels:
                kinds = zip(*(w.unbind(-6) for w in kernels), strict=True)
                for name, grads in zip(("key", "value", "query"), kinds, strict=False):
                    results[f"gradient of {name} kernels"] = torch.cat([x.flatten() for x in grads])
        return results


def cotangents(call, seed=1):
    """Gradients of out and lse, float64."""
    shape, generator = call["q"].shape, torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, shape[:-1])]


def assert_within_rule(results, truth, plain, dtype, kernel_dtype=None):
    """The error rule: `max|x - truth| <= 2 max|plain - truth| + 4 (eps + sqrt(n) eps') max|truth|` for every result.

    `eps` is that of the dtype under test and `eps'` that of the sums, which are in float32 or wider; `n` is the number
    of results, which no sum has more terms than. Any order of a sum of `n` terms of random sign, one after another or
    in pairs, in whatever registers, errs by a random walk of `n` roundings: at most about `sqrt(n) eps'` of its size.
    Four such sums follow each other (score, softmax, product, aggregation). So the bound holds where `plain` happens
    to err by nothing, which is a matter of the processor. In float32 it is about 3e-5 for the largest calls here; a
    token miscounted, a cell left out, one weight's sign change results by more than 1e-3.
    """
    assert results.keys() == truth.keys()
    n = max(t.numel() for t in truth.values())
    sums = n**0.5 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for name, x in results.items():
        t, p = truth[name].double(), plain[name].double()
        eps = torch.finfo(dtype).eps
        if kernel_dtype is not None and name.endswith("kernels"):
            eps = max(eps, torch.finfo(kernel_dtype).eps)
        assert x.isfinite().all(), name
        if x.numel():
            error = (x.double() - t).abs().max()
            allowed = 2 * (p - t).abs().max() + 4 * (eps + sums) * t.abs().max()
            assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_same(results, expected, tolerance=1e-11):
    """Float64 results equal to rounding, relative to the largest of each."""
    assert results.keys() == expected.keys()
    for name, x in results.items():
        if x.numel():
            error, most = (x - expected[name]).abs().max(), expected[name].abs().max().clamp(min=1)
            assert error <= tolerance * most, f"{name}: error {error:.3g} of {most:.3g}"


# The torch backend's ways through a call, which it chooses by size, and the constants that force each on a small one.
WAYS = {
    "as it is": {},
    "windows": {"FEW_CELLS": 0, "LENGTH": 1, "LEAST_CELLS": 3},
    "windows in many tiles": {"FEW_CELLS": 0, "LENGTH": 1, "LEAST_CELLS": 1, "PAIRS": 100, "PIECE": 50},
    "rows": {"FEW_CELLS": 1 << 40},
    "rows in many tiles": {"FEW_CELLS": 1 << 40, "LEAST_QUERIES": 1, "PAIRS": 100, "PIECE": 50},
}


@contextmanager
def forced(way):
    """Set the constants of a way wherever the library holds them."""
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "fma2d"]
    with ExitStack() as stack:
        for name, value in WAYS[way].items():
            holders = [module for module in modules if hasattr(module, name)]
            assert holders, f"no module has {name}"
            for module in holders:
                stack.enter_context(patch.object(module, name, value))
        yield


def _density(shape, generator):
    """Random signs, sizes about that of the start value, and some weights that are 0, but never all of a kernel."""
    size = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    keep = torch.rand(shape, generator=generator) > 0.1
    keep[..., torch.randint(shape[-1], (), generator=generator)] = True
    return size * sign * keep


def random_kernels(levels, ndim, cell_size, rank, heads, head_dim, generator, variant="loglinear", stacked=False):
    """Kernels of `levels` levels, which share heads or channels, and have bins, as it happens, each level on its own.

    Args:
        stacked: one tensor, with a levels axis in front.
    """

    def shape(level):
        side = cell_size * 2 ** (level - 1)
        bins = [b for b in range(1, side + 1) if side % b == 0]
        h, d, b = (x[torch.randint(len(x), (), generator=generator)] for x in ((1, heads), (1, head_dim), bins))
        return (3 if variant == "linear" else 2, ndim, rank, h, d, b)

    if stacked:
        return _density((levels, *shape(1)), generator)
    return [_density(shape(level), generator) for level in range(1, levels + 1)]


def random_call(
    grid,
    cell_size,
    rank,
    *,
    batch=1,
    heads=2,
    head_dim=3,
    levels=2,
    stacked=False,
    variant="loglinear",
    causal=False,
    mask=None,
    count_bias=True,
    scale=None,
    seed=0,
):
    """A call with random tokens and kernels, float64.

    Args:
        levels: number of levels with kernels; None for no kernels.
        stacked: whether they are one tensor.
        mask: the share of tokens that exist, or a mask, or None.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, heads, *grid, head_dim, generator=generator, dtype=torch.float64)
    kernels = None
    if levels is not None:
        kernels = random_kernels(levels, len(grid), cell_size, rank, heads, head_dim, generator, variant, stacked)
    if isinstance(mask, float):
        mask = torch.rand(batch, *grid, generator=generator) < mask
    return Call(
        q=q,
        k=k,
        v=v,
        kernels=kernels,
        cell_size=cell_size,
        rank=rank,
        variant=variant,
        causal=causal,
        key_mask=mask,
        count_bias=count_bias,
        scale=scale,
    )


def nearly_weightless(masked):
    """Kernels whose zeros a first step of training made 1e-20, in float32: cut cells divide by 1e-40."""
    call = random_call((9, 9), 2, 4, heads=2, head_dim=8, levels=2, variant="linear")
    start = [start_kernels(level, 2, 4, 2, 2, 8, variant="linear") for level in (1, 2)]
    call["kernels"] = [torch.where(w == 0, 1e-20, w) for w in start]
    if masked:
        call["key_mask"] = torch.rand(len(call["q"]), 9, 9, generator=torch.Generator().manual_seed(0)) > 0.4
    return call.to(torch.float32)


# By number of axes: extents (1, primes, one off a multiple) and cell sizes that give up to 6 levels.
EXTENTS = {1: (1, 2, 9, 16, 31, 37, 64, 67), 2: (1, 3, 7, 8, 9, 11), 3: (1, 2, 3, 4, 5)}
CELL_SIZES = {1: (1, 2, 3, 4, 6), 2: (1, 2, 3), 3: (1, 1, 2)}


KINDS = ("1D", "1D causal", "1D linear", "2D", "2D linear", "3D", "3D linear")


@st.composite
def grids(draw, ndims=(1, 2, 3)):
    """`(grid, cell_size)`."""
    ndim = draw(st.sampled_from(ndims))
    extents = st.sampled_from(EXTENTS[ndim])
    return tuple(draw(extents) for _ in range(ndim)), draw(st.sampled_from(CELL_SIZES[ndim]))


@st.composite
def calls(draw, kinds=KINDS, masks=True):
    """A call in float64 of one of some kinds, with and without kernels, mask, count bias and scale."""
    kind = draw(st.sampled_from(kinds))
    grid, cell_size = draw(grids((int(kind[0]),)))
    rank = draw(st.sampled_from((1, 2, 3, 4, 6, 8)))
    batch = draw(st.sampled_from((1, 2)))
    most = num_levels(grid, cell_size) + 1
    levels = draw(st.sampled_from((None, *range(1, most + 1))))
    mask = draw(st.sampled_from((None, *masks * ("batch", "shared", "last axis", "one empty"))))
    if mask is not None:
        shape = {"shared": (1, *grid), "last axis": grid[-1:]}.get(mask, (batch, *grid))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
        exists = torch.rand(shape, generator=generator) < draw(st.sampled_from((0.3, 0.8)))
        if mask == "one empty":
            exists[0] = False
        mask = exists
    return random_call(
        grid,
        cell_size,
        rank,
        batch=batch,
        heads=draw(st.sampled_from((1, 2))),
        head_dim=draw(st.integers(1, 5)),
        levels=levels,
        stacked=draw(st.booleans()),
        variant="linear" if "linear" in kind else "loglinear",
        causal="causal" in kind,
        mask=mask,
        count_bias=draw(st.booleans()),
        scale=draw(st.sampled_from((None, None, 0.7, -1, 0))),
        seed=draw(st.integers(0, 2**20)),
    )
