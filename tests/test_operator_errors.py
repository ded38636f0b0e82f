"""What does not fit is refused before any work, by one error that names the argument."""

import pytest
import torch
from operator_cases import BACKENDS, Call, random_call

import fma2d
from fma2d import multipole_attention, ops, why_not

CALL = random_call((9, 7), 2, 2, heads=2, head_dim=3, variant="linear", mask=0.8).to(torch.float32)
Q = CALL["q"].detach()


def refused(changes, name, call=CALL, end=r"\b"):
    for backend in ("auto", *BACKENDS) if "backend" not in changes else ("",):
        with pytest.raises((TypeError, ValueError), match=rf"^{name}{end}"):
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


@pytest.mark.parametrize("value", (2**31, 2**63, 10**30), ids=("2**31", "2**63", "10**30"))
def test_sizes_beyond_all_measure(value):
    """Finding the tiling of a rank of 2**63 took for ever; a cell of 10**30 tokens did not fit the op's integers."""
    for name in ("cell_size", "rank"):
        refused({name: value, "kernels": None}, name)
        with pytest.raises(ValueError, match=rf"^{name}\b"):
            fma2d.start_kernels(
                **{"level": 1, "cell_size": 4, "rank": 2, "ndim": 2, "heads": 1, "head_dim": 1, name: value}
            )
    refused({"scale": value**40}, "scale")


def test_a_cell_larger_than_the_grid():
    """Up to 2**31 - 1 tokens a side: no coarse level, and no work of that size."""
    call = Call(CALL | {"kernels": None, "cell_size": 2**31 - 1})
    for backend in BACKENDS:
        torch.testing.assert_close(call.run(backend), Call(call | {"cell_size": 9}).run(backend))


@pytest.mark.parametrize("scale", (float("nan"), float("inf"), -float("inf"), "1", 1j, [1.0], torch.ones(2)), ids=repr)
def test_bad_scale(scale):
    refused({"scale": scale}, "scale")


# Of one level, [kinds, axes, rank, heads, head_dim, bins].
KERNEL_CHANGES = {
    "no tensor": lambda w: w.tolist(),
    "None": lambda w: None,
    "bool": lambda w: w.bool(),
    "int64": lambda w: w.long(),
    "complex64": lambda w: w.to(torch.complex64),
    "float8": lambda w: w.to(torch.float8_e4m3fn),
    "sparse": lambda w: w.to_sparse(),
    "nested": lambda w: torch.nested.nested_tensor([w[0], w[1]]),
    "other device": lambda w: w.to("meta"),
    "5 dimensions": lambda w: w[0],
    "7 dimensions": lambda w: w[None],
    "2 kinds": lambda w: w[:2],
    "4 kinds": lambda w: w[[0, 1, 2, 2]],
    "1 axis": lambda w: w[:, :1],
    "3 axes": lambda w: w[:, [0, 1, 1]],
    "rank 1": lambda w: w[:, :, :1],
    "rank 4": lambda w: w.repeat(1, 1, 2, 1, 1, 1),
    "3 heads": lambda w: w[:, :, :, :1].expand(-1, -1, -1, 3, -1, -1),
    "0 heads": lambda w: w[:, :, :, :0],
    "2 channels": lambda w: w[..., :1, :].expand(-1, -1, -1, -1, 2, -1),
    "0 channels": lambda w: w[..., :0, :],
    "3 bins": lambda w: w[..., :1].expand(-1, -1, -1, -1, -1, 3),
    "8 bins": lambda w: w[..., :1].expand(-1, -1, -1, -1, -1, 8),
    "0 bins": lambda w: w[..., :0],
}


@pytest.mark.parametrize("change", KERNEL_CHANGES)
def test_kernels_that_do_not_fit(change):
    """Kind, dtype, layout, device and every dimension; the level is named."""
    levels = [w.detach() for w in CALL["kernels"]]
    for level, name in ((0, r"kernels\[0\]"), (1, r"kernels\[1\]")):
        spoiled = levels.copy()
        spoiled[level] = KERNEL_CHANGES[change](levels[level])
        refused({"kernels": spoiled}, name, end="")


@pytest.mark.parametrize("change", [name for name in KERNEL_CHANGES if name not in ("no tensor", "None", "nested")])
def test_one_tensor_that_does_not_fit(change):
    """The same with a levels axis in front; bins must divide the side of the first level, too."""
    levels = KERNEL_CHANGES[change](CALL["kernels"][0].detach().repeat_interleave(2, -1)[..., :2])
    refused({"kernels": torch.stack([levels, levels]) if levels.layout == torch.strided else levels}, "kernels")


@pytest.mark.parametrize(
    "kernels", ("kernels", 3, True, {}, iter(()), CALL["kernels"][0].detach()), ids=lambda x: type(x).__name__
)
def test_kernels_that_are_no_sequence_of_tensors(kernels):
    """One level's tensor without a sequence around it, too."""
    refused({"kernels": kernels}, "kernels")


@pytest.mark.parametrize("variant", ("loglinear", "linear"))
def test_kernels_of_the_other_variant(variant):
    own = random_call((9, 7), 2, 2, variant=variant)
    other = random_call((9, 7), 2, 2, variant="linear" if variant == "loglinear" else "loglinear")
    refused({"kernels": other["kernels"]}, "kernels", own, r"\[0\].*kinds.*variant")


@pytest.mark.parametrize("variant", ("log-linear", "LINEAR", "", None, True, 2, ["linear"]), ids=repr)
def test_bad_variant(variant):
    refused({"variant": variant}, "variant")


@pytest.mark.parametrize("name", ("causal", "count_bias", "return_lse"))
@pytest.mark.parametrize("value", (None, 0, 1, "yes", torch.tensor(True)), ids=repr)
def test_switches_are_bool(name, value):
    refused({name: value}, name)


@pytest.mark.parametrize("layout", ("sparse", "nested"))
@pytest.mark.parametrize("name", ("q", "k", "v", "key_mask"))
def test_tensors_are_dense(name, layout):
    x = CALL[name].detach()
    spoiled = x.to_sparse() if layout == "sparse" else torch.nested.nested_tensor([x[0]])
    refused({name: spoiled}, name)


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


@pytest.mark.parametrize("variant", ("linear", "loglinear"))
def test_causal_needs_one_axis(variant):
    refused({"causal": True, "variant": variant, "kernels": None}, "causal")


@pytest.mark.parametrize("levels", (None, 2))
@pytest.mark.parametrize("extent", (37, 3))
def test_causal_and_linear(levels, extent):
    """A summary query would hold later tokens; also on a grid without coarse levels."""
    refused({}, "causal", random_call((extent,), 2, 2, causal=True, levels=levels, variant="linear"))


def test_required_and_unknown_arguments():
    for name in ("cell_size", "rank"):
        with pytest.raises(TypeError, match=name):
            multipole_attention(**{n: x for n, x in CALL.items() if n != name})
    with pytest.raises(TypeError, match="colour"):
        multipole_attention(**CALL, colour="blue")


@pytest.mark.parametrize("backend", ("cuda", "Torch", "", None, 3, ["torch"], torch.device("cpu")), ids=repr)
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
    assert fma2d.multipole_attention is multipole_attention
