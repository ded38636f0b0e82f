"""What does not fit is refused before any work, by one error that names the argument."""

import pytest
import torch
from operator_cases import BACKENDS, KERNELS, Call, random_call

import fma2d
from fma2d import multipole_attention, ops, why_not

CALL = random_call((9, 7), 2, 2, heads=2, head_dim=3, levels=(2, 2), linear=2, mask=0.8).to(torch.float32)
Q = CALL["q"].detach()


def refused(changes, name, call=CALL):
    for backend in ("auto", *BACKENDS) if "backend" not in changes else ("",):
        with pytest.raises((TypeError, ValueError), match=rf"^{name}\b"):
            multipole_attention(**{**call, "backend": backend, **changes})


@pytest.mark.parametrize(
    "q",
    [
        None,
        Q.numpy(),
        Q[0, 0],
        Q[None, None],
        Q[:, :, :, None, None].expand(-1, -1, -1, 1, 1, -1, -1),
        Q.to(torch.int32),
        Q.bool(),
        Q.to(torch.complex64),
        Q.to(torch.float8_e4m3fn),
        Q[:, :0],
        Q[..., :0],
    ],
    ids=lambda x: f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__,
)
def test_bad_q(q):
    refused({"q": q, "k": q, "v": q}, "q")


@pytest.mark.parametrize("axis", (2, 3))
def test_empty_grid(axis):
    empty = Q.narrow(axis, 0, 0)
    refused({"q": empty, "k": empty, "v": empty, "key_mask": None}, "grid")


MISMATCHES = {
    "no tensor": lambda x: x.tolist(),
    "other dtype": lambda x: x.double(),
    "other device": lambda x: x.to("meta"),
    "no batch": lambda x: x[0],
    "one axis more": lambda x: x[None],
    **{f"longer axis {a}": lambda x, a=a: x.repeat_interleave(2, a) for a in range(5)},
    **{f"shorter axis {a}": lambda x, a=a: x.narrow(a, 0, 1) for a in range(1, 5)},
}


@pytest.mark.parametrize("name", ("k", "v"))
@pytest.mark.parametrize("change", MISMATCHES)
def test_key_or_value_that_does_not_match_the_query(name, change):
    """Cross-attention and grouped queries among them."""
    refused({name: MISMATCHES[change](Q)}, name)


@pytest.mark.parametrize("name", ("cell_size", "rank"))
@pytest.mark.parametrize("value", (0, -1, 2.0, "2", True, None, (2, 2)), ids=repr)
def test_bad_cell_size_or_rank(name, value):
    refused({name: value}, name)


@pytest.mark.parametrize("scale", (float("nan"), float("inf"), -float("inf"), "1", 1j, [1.0], torch.ones(2)), ids=repr)
def test_bad_scale(scale):
    refused({"scale": scale}, "scale")


KERNEL_CHANGES = {
    "no tensor": lambda w: w.tolist(),
    "int64": lambda w: w.long(),
    "complex64": lambda w: w.to(torch.complex64),
    "float8": lambda w: w.to(torch.float8_e4m3fn),
    "other device": lambda w: w.to("meta"),
    "3 dimensions": lambda w: w[0],
    "5 dimensions": lambda w: w[None],
    "rank 1": lambda w: w[:1],
    "rank 4": lambda w: w.repeat(2, 1, 1, 1),
    "3 heads": lambda w: w[:, :1].expand(-1, 3, -1, -1),
    "0 heads": lambda w: w[:, :0],
    "2 channels": lambda w: w[:, :, :1].expand(-1, -1, 2, -1),
    "0 channels": lambda w: w[:, :, :0],
    "3 bins": lambda w: w[..., :1].expand(-1, -1, -1, 3),
    "8 bins": lambda w: w[..., :1].expand(-1, -1, -1, 8),
    "0 bins": lambda w: w[..., :0],
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("change", KERNEL_CHANGES)
@pytest.mark.parametrize("level, axis", [(0, 1), (1, 0)])
def test_kernel_that_does_not_fit(name, change, level, axis):
    """Kind, dtype, device, and every dimension; at a level's second axis and at the second level."""
    kernels = [[w.detach() for w in axes] for axes in CALL[name]]
    kernels[level][axis] = KERNEL_CHANGES[change](kernels[level][axis])
    refused({name: kernels}, name)


LIST_CHANGES = {
    "one tensor": lambda levels: levels[0][0],
    "one level": lambda levels: levels[0],
    "a tensor for a level": lambda levels: [levels[0], levels[1][0]],
    "an axis missing": lambda levels: [levels[0], levels[1][:1]],
    "an axis too many": lambda levels: [levels[0], [*levels[1], levels[1][0]]],
    "None for a level": lambda levels: [levels[0], None],
    "a string": lambda levels: "kernels",
    "a number": lambda levels: 3,
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("change", LIST_CHANGES)
def test_kernels_that_are_no_list_over_levels_of_lists_over_axes(name, change):
    refused({name: LIST_CHANGES[change]([[w.detach() for w in axes] for axes in CALL[name]])}, name)


@pytest.mark.parametrize("name", ("key_kernels", "value_kernels"))
def test_kernels_are_not_optional(name):
    refused({name: None}, name)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(1, 9, 7),
        torch.ones(1, 9, 7, dtype=torch.uint8),
        torch.ones(1, 9, 7, dtype=torch.bool, device="meta"),
        torch.ones(2, 9, 7, dtype=torch.bool),
        torch.ones(1, 9, 8, dtype=torch.bool),
        torch.ones(7, 9, dtype=torch.bool),
        torch.ones(1, 1, 9, 7, dtype=torch.bool),
        torch.ones(9, 0, dtype=torch.bool),
        [[True] * 7] * 9,
        True,
    ],
    ids=lambda x: f"{x.dtype} {tuple(x.shape)} {x.device}" if isinstance(x, torch.Tensor) else type(x).__name__,
)
def test_bad_mask(mask):
    refused({"key_mask": mask}, "key_mask")


@pytest.mark.parametrize("query_kernels", (None, []), ids=("log-linear", "linear"))
def test_causal_needs_one_axis(query_kernels):
    refused({"causal": True, "query_kernels": query_kernels}, "causal")


@pytest.mark.parametrize("linear", (0, 2))
def test_causal_and_linear(linear):
    """A summary query would hold later tokens; also on a grid without coarse levels."""
    refused({}, "causal", random_call((37,), 2, 2, causal=True, linear=linear))
    refused({}, "causal", random_call((3,), 2, 2, causal=True, linear=linear))


def test_required_and_unknown_arguments():
    for name in ("cell_size", "rank", "key_kernels", "value_kernels"):
        with pytest.raises(TypeError, match=name):
            multipole_attention(**{n: x for n, x in CALL.items() if n != name})
    with pytest.raises(TypeError, match="colour"):
        multipole_attention(**CALL, colour="blue")


@pytest.mark.parametrize("backend", ("cuda", "Torch", "", None, 3), ids=repr)
def test_unknown_backend(backend):
    refused({"backend": backend}, "backend")
    with pytest.raises(ValueError, match=r"^backend\b"):
        why_not(backend, Q)


def test_why_not_of_auto_is_never_a_reason():
    assert why_not("auto", Q) is None


def test_why_not_refuses_unknown_options():
    """The options are those of `multipole_attention`; a misspelt one is not swallowed."""
    with pytest.raises(TypeError, match="colour"):
        why_not("torch", Q, colour="blue")


@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_backends_can_always(backend):
    options = {name: x for name, x in CALL.items() if name not in ("q", "k", "v")}
    assert why_not(backend, Q, **options) is None
    assert why_not(backend, Q) is None


def test_forcing_a_backend_that_cannot_says_why():
    reason = why_not("triton", CALL["q"].double())
    if reason is None:
        CALL.to(torch.float64).run("triton")
    else:
        with pytest.raises(RuntimeError) as error:
            CALL.to(torch.float64).run("triton")
        assert reason in str(error.value)


@pytest.mark.parametrize("backend", (*BACKENDS, "triton"))
def test_every_backend_obeys_why_not(backend, monkeypatch):
    monkeypatch.setattr(ops, "why_not", lambda name, q, **options: f"{name} has a day off")
    with pytest.raises(RuntimeError, match=f"{backend} has a day off"):
        CALL.run(backend)


def test_a_refused_call_comes_first():
    """A bad argument is told before a backend that cannot."""
    refused({"backend": "triton", "rank": 0}, "rank")


def test_good_call():
    """The twin of everything above: the call that the tests spoil runs."""
    for backend in ("auto", *BACKENDS):
        assert multipole_attention(**CALL, backend=backend).shape == Q.shape
    for kernels in ((), tuple(tuple(level) for level in CALL["key_kernels"])):
        out = multipole_attention(**Call(CALL | {"key_kernels": kernels}))
        assert torch.equal(out, multipole_attention(**Call(CALL | {"key_kernels": [list(level) for level in kernels]})))
    assert fma2d.multipole_attention is multipole_attention
