"""The operator as PyTorch sees it: registration, compilation, memory."""

from functools import partial
from itertools import accumulate

import pytest
import torch
from operator_cases import Call, cotangents, forced, random_call
from operator_cases import one_thread as one_thread
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fma2d import multipole_attention, num_levels, ops, start_kernels
from fma2d.ops import reference, torch_backend


def op_arguments(call, backend="torch"):
    """Positional arguments of the registered op."""
    *tensors, options = call.op_call()
    return *tensors, *options, backend


OP_CASES = {
    "linear, masked": random_call((7, 5), 1, 2, batch=2, variant="linear", mask=0.7).to(torch.float32),
    "causal, channels last": random_call((13,), 1, 3, causal=True)
    .map(lambda x: x.movedim(1, -2).contiguous().movedim(-2, 1), lambda w: w)
    .to(torch.float64),
    "half, no kernels": random_call((9, 7), 2, 1, levels=None).to(torch.float16),
}


def assert_fake_has_the_layout(op, arguments):
    """opcheck does not compare strides; a compiler that gets others than it was told is stopped, or goes wrong."""
    real = op(*arguments)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = op(*arguments)
    assert [(x.shape, x.dtype, x.stride()) for x in real] == [(x.shape, x.dtype, x.stride()) for x in fake]


@pytest.mark.parametrize("case", OP_CASES)
def test_ops_are_registered_as_they_should(case):
    """Schema, fake and autograd, of the op and of its backward."""
    forward, backward = (
        torch.ops.fma2d.multipole_attention.default,
        torch.ops.fma2d.multipole_attention_backward.default,
    )
    inputs = op_arguments(OP_CASES[case])
    out, lse = (x.detach() for x in forward(*inputs))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    if case == "linear, masked":
        checks += ("test_aot_dispatch_dynamic",)
    for op, arguments, tests in (
        (forward, inputs, checks),
        (backward, (*inputs[:5], out, lse, torch.ones_like(out), torch.ones_like(lse), *inputs[5:]), checks[:3]),
        (backward, (*inputs[:5], out, lse, torch.ones_like(out), None, *inputs[5:]), checks[:3]),
    ):
        torch.library.opcheck(op, arguments, test_utils=tests)
        assert_fake_has_the_layout(op, arguments)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("variant", ("linear", "loglinear"))
@pytest.mark.parametrize("grid, cell_size", (((37,), 2), ((9, 20), 1), ((5, 3), 3)), ids=("1D", "2D", "no level"))
def test_transforms_see_through_the_operator(grid, cell_size, variant):
    """They need rules that a `torch.library` op lacks: in forward mode its derivative was zero, without a word."""
    call = random_call(grid, cell_size, 2, variant=variant, mask=0.7)
    leaves = [x.detach() for x in call.leaves()]
    tangents = [torch.randn_like(x) for x in leaves]

    def attend(*leaves, backend="torch"):
        return multipole_attention(**call.with_leaves(leaves), backend=backend)

    def loss(leaves, backend="torch"):
        return attend(*leaves, backend=backend).sin().sum()

    def reference(*leaves):
        return attend(*leaves, backend="reference")

    def same(found, expected):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)

    expected = torch.func.jvp(reference, tuple(leaves), tuple(tangents))
    same(torch.func.jvp(attend, tuple(leaves), tuple(tangents)), expected)
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, leaves, tangents)
        same(forward_ad.unpack_dual(attend(*duals, backend="auto")).tangent, expected[1])
    same(torch.func.grad(loss)(leaves), torch.func.grad(partial(loss, backend="reference"))(leaves))
    images = torch.randn(3, *leaves[0].shape, dtype=torch.float64)
    same(torch.vmap(lambda x: attend(x, *leaves[1:]))(images), torch.stack([attend(x, *leaves[1:]) for x in images]))


def test_the_kernels_on_a_gpu_are_not_for_transforms(monkeypatch):
    monkeypatch.setattr(ops, "why_not", lambda backend, q: None)
    x = torch.zeros(1, 1, 5, 4)
    with pytest.raises(RuntimeError, match=r"torch\.func and forward mode need backend 'torch'"):
        torch.vmap(lambda x: multipole_attention(x, x, x, cell_size=1, rank=1, backend="triton"))(x[None])


def test_compiles_to_one_graph_for_all_sizes():
    """Levels, cells and cut edges are no business of the compiler: no size is a reason to compile again.

    The first call has no two sizes alike: a compiler may take equal ones for one size.
    """
    counter = CompileCounterWithBackend("aot_eager")
    kernels = random_call((9, 7), 1, 2, variant="linear", stacked=True).to(torch.float32)

    def run(q, k, v):
        out, lse = Call(kernels | {"q": q, "k": k, "v": v}).run("auto")
        return out * 2, lse

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    for seed, (batch, *grid) in enumerate(((5, 9, 7), (2, 5, 21), (3, 8, 8), (4, 2, 2), (2, 33, 3))):
        call = random_call(grid, 1, 2, batch=batch, seed=seed).to(torch.float32)
        tokens, d = [call[name] for name in "qkv"], [x.float() for x in cotangents(call, seed)]
        leaves = [*tokens, *kernels.leaves()[3:]]
        results = [
            (*outputs, *torch.autograd.grad(outputs, leaves, d)) for outputs in (compiled(*tokens), run(*tokens))
        ]
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y)
    assert counter.frame_count == 1


class Largest(TorchDispatchMode):
    """Records the elements of the largest memory block that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("way", ("as it is", "windows"))
@pytest.mark.parametrize("variant", ("linear", "loglinear"))
@pytest.mark.parametrize("grid", ((4096,), (64, 64)), ids=str)
def test_torch_backend_holds_nothing_quadratic(grid, variant, way):
    """4096 tokens would give 2**24 scores; some cells' scores are held at a time."""
    call = random_call(grid, 4, 2, heads=1, head_dim=2, variant=variant).map(torch.Tensor.float).op_call()
    with forced(way), torch.no_grad(), Largest() as largest:
        out, lse = torch_backend.forward(call)
        torch_backend.backward(call, out, lse, out, lse)
    assert largest.elements < 2**20


def test_the_largest_block_is_seen():
    """The twin of the test above: the dense reference is found out."""
    call = random_call((1200,), 4, 2, heads=1, head_dim=2, levels=None).map(torch.Tensor.float).op_call()
    with torch.no_grad(), Largest() as largest:
        reference.attention(call)
    assert largest.elements >= 1200**2 > 2**20


def peak_allocated(step):
    """The most bytes that torch's tensors hold at once, beyond those held before, in `step()`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = step()
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())]
    del result
    return max(accumulate(changes))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
@pytest.mark.parametrize("learn", (False, True), ids=("forward", "forward and backward"))
def test_memory_per_token_is_constant(learn):
    """Within 15 % from 128x128 to 512x512 tokens, at the settings of the operator's benchmark."""
    per_token = []
    for side in (128, 512):
        q, k, v = torch.randn(side, side, 3, 2, 64).movedim((-3, -2), (0, 1))[:, None]
        levels = num_levels((side, side), 8)
        kernels = torch.stack(
            [start_kernels(level, 8, 4, 2, 2, 64, variant="linear") for level in range(1, levels + 1)]
        )
        leaves = [x.detach().requires_grad_(learn) for x in (q, k, v, kernels)]

        def step(leaves=leaves):
            out = multipole_attention(*leaves, cell_size=8, rank=4, variant="linear")
            return torch.autograd.grad(out, leaves, torch.ones_like(out)) if learn else out

        per_token.append(peak_allocated(step) / side**2)
    print(f"bytes a token: {per_token[0]:.0f} at 128x128, {per_token[1]:.0f} at 512x512")
    assert max(per_token) <= min(per_token) / 0.85
