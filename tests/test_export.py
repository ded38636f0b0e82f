"""The portable form against the operator, and what exporters make of it."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.export import Dim

import fma2d
from fma2d.backbone import FMA2DBackbone
from tools import export


def pair(variant, cell_size, rank, learned, levels):
    """A layer by the definition, with random kernels, and its portable form; float64."""
    torch.manual_seed(0)
    settings = dict(levels=learned, variant=variant, aggregation="learned" if learned else "mean", dtype=torch.float64)
    layer = fma2d.FMA2d(12, 2, cell_size, rank, backend="reference", **settings)
    portable = fma2d.FMA2d(12, 2, cell_size, rank, export_levels=levels, **settings)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    portable.load_state_dict(layer.state_dict())
    return layer, portable


@pytest.mark.parametrize("variant", ["linear", "loglinear"])
@pytest.mark.parametrize(
    "grid, cell_size, rank, learned",
    [
        ((1, 1), 4, 4, 1),
        ((32, 16), 4, 4, 3),
        ((5, 37), 4, 2, 1),
        ((33, 20), 4, 4, 2),
        ((13, 29), 3, 1, 3),
        ((19, 26), 6, 6, 1),
        ((21, 11), 5, 4, 0),
    ],
)
def test_computes_the_operator(variant, grid, cell_size, rank, learned):
    layer, portable = pair(variant, cell_size, rank, learned, levels=0)
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(portable(x), layer(x), rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("variant, rank, learned", [("linear", 4, 2), ("loglinear", 2, 1), ("linear", 3, 0)])
def test_open_sizes_follow_what_is_fed(variant, rank, learned):
    """Levels that a grid lacks contribute nothing, sizes are those of the call, not those of the tracing."""
    layer, portable = pair(variant, 4, rank, learned, levels=3)
    with torch.no_grad():
        traced = torch.jit.trace(portable, torch.randn(1, 24, 32, 12, dtype=torch.float64), check_trace=False)
        for grid in ((1, 1), (8, 3), (5, 37), (33, 20), (64, 57)):
            x = torch.randn(1, *grid, 12, dtype=torch.float64)
            assert torch.allclose(traced(x), layer(x), rtol=0, atol=1e-10)


def test_what_cannot_be_exported_is_refused():
    layer = fma2d.FMA2d(8, 2, 4, 4, levels=1, export_levels=1)
    with pytest.raises(ValueError, match="key_mask"):
        layer(torch.randn(1, 4, 4, 8), key_mask=torch.ones(4, 4, dtype=torch.bool))
    sizes = ({1: Dim("height", min=8, max=16)},)
    with pytest.raises(Exception, match=r"fix the size, or trace.*dynamo=False"):
        torch.export.export(layer, (torch.randn(1, 12, 16, 8),), dynamic_shapes=sizes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_of_a_plain_model_names_the_flag(dynamo, tmp_path):
    pytest.importorskip("onnxscript")
    with pytest.raises(Exception, match="exportable=True"):
        torch.onnx.export(small(), (torch.zeros(1, 3, 16, 16),), tmp_path / "model.onnx", dynamo=dynamo, verbose=False)


def test_exportable_model_is_the_model():
    model = timm.create_model("fma2d_nano", num_classes=3, img_size=160, cell_size=4, exportable=True).eval()
    assert [stage.blocks[0].attn.export_levels for stage in model.stages] == [3, 2, 1, 0]
    plain = timm.create_model("fma2d_nano", num_classes=3, img_size=160, cell_size=4).eval()
    plain.load_state_dict(model.state_dict())
    model.to(torch.bfloat16).float()
    for size in ((160, 97), (64, 33)):
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            assert torch.allclose(model(x), plain(x), atol=1e-2)
    model.set_input_size(320)
    assert [stage.blocks[0].attn.export_levels for stage in model.stages] == [4, 3, 2, 1]
    # Explicit levels say what is learned, not for which grids the export is.
    model = timm.create_model("fma2d_nano", img_size=160, levels=1, exportable=True).eval()
    model.set_input_size(cell_size=4)
    assert [stage.blocks[0].attn.export_levels for stage in model.stages] == [3, 2, 1, 0]


def small(**options):
    """One stage of one block: quick to export. 4 pixels a token, 2 tokens a cell."""
    torch.manual_seed(0)
    settings = dict(dims=(8,), depths=(1,), head_dim=8, cell_size=2, num_classes=3, img_size=64)
    return FMA2DBackbone(**settings, **options).eval()


def portable_small(**options):
    with timm.layers.set_exportable(True):
        return small(**options)


def test_torch_export_with_open_sizes():
    """Without the flag, where the operator is one node."""
    plain = small()
    program = export.export_open(plain, 64, batch=2, min_size=8)
    assert any("fma2d.multipole_attention" in str(node.target) for node in program.graph.nodes)
    for size in ((64, 64), (37, 21), (8, 9)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            assert torch.allclose(program.module()(x), plain(x), atol=1e-6)


def test_fixed_sizes_are_constants(tmp_path):
    """Standard operations, few of them: no sizes are computed, no tables, and nothing of kernels alone."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    size = (50, 37)
    program = export.export_fixed(portable_small(), size, batch=2)
    assert not [n for n in program.graph.nodes if n.op == "call_function" and "fma2d" in str(n.target)]
    nodes = export.write_onnx(program, tmp_path / "model.onnx")
    operations = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert nodes < 85 and not operations & {"Shape", "Range", "Expand", "Where", "Abs", "Cast", "GatherND"}
    pytest.importorskip("onnxruntime")
    found = list(export.compare(small(), {"onnx": export.onnx_runner(tmp_path / "model.onnx")}, 2, [size]))
    assert found[0][-1] < 1e-5


def test_onnx_with_open_sizes(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export.write_open_onnx(portable_small(), 64, tmp_path / "model.onnx", batch=2)
    runner = export.onnx_runner(tmp_path / "model.onnx")
    found = list(export.compare(small(), {"onnx": runner}, 2, [(64, 48), (21, 29), (8, 16)]))
    assert [levels for *_, levels, _ in found] == [[2], [1], [0]]
    assert max(difference for *_, difference in found) < 1e-5


@pytest.mark.slow
def test_the_tool_exports_and_checks_a_model(tmp_path, capsys):
    arguments = ["fma2d_nano", "--num-classes", "5", "--out", str(tmp_path)]
    arguments += ["--model-kwargs", "{cell_size: 4, depths: [1, 1, 1, 1]}"]
    assert export.main([*arguments, "--max-size", "192"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "levels" in line]
    assert len(lines) == 6 and "[3, 2, 1, 0]" in lines[0] and "95 x 64" in lines[2] and "[1, 0, 0, 0]" in lines[4]
    assert export.main([*arguments, "--size", "96x160"]) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if "levels" in line]) == 2
    names = {f"fma2d_nano_{size}.{kind}" for size in ("192", "96x160") for kind in ("pt2", "onnx")}
    assert {path.name for path in tmp_path.iterdir()} >= names


def test_the_tool_says_what_is_wrong(tmp_path, capsys):
    dense = tmp_path / "dense.safetensors"
    save_file({"weight": torch.ones(1)}, dense, {"attention": "dense"})
    for arguments, words in [
        (["fma2d_nano", "--checkpoint", str(dense)], "was trained with dense attention, which this does not export"),
        (["fma2d_nano", "--max-size", "32"], "--max-size must be above 64"),
        (["fma2d_nano", "--size", "480:640"], "must be pixels, such as 512 or 480x640, got '480:640'"),
        (["fma2d_nano", "--size", "64", "--max-size", "128"], "not allowed with"),
        (["fma2d_tini"], "timm has no model fma2d_tini; near it are fma2d_tiny"),
        (["fma2d_nano", "--model-kwargs", "{window: 7}"], "window"),
        (["fma2d_nano", "--model-kwargs", "window=7"], "must be a mapping, e.g. '{cell_size: 2}', got 'window=7'"),
    ]:
        with pytest.raises(SystemExit):
            export.main([*arguments, "--out", str(tmp_path)])
        assert words in capsys.readouterr().err
