"""The exportable formulation against the definition, and what exporters make of it."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.export import Dim

import fma2d
from fma2d.backbone import FMA2DBackbone
from fma2d.ops import exportable
from tools import export


@pytest.mark.parametrize("variant", ["linear", "loglinear"])
@pytest.mark.parametrize(
    "grid, cell_size, rank, learned",
    [
        ((1, 1), 4, 4, 1),
        ((5, 37), 4, 2, 1),
        ((33, 20), 4, 4, 2),
        ((13, 29), 3, 1, 3),
        ((19, 26), 6, 6, 1),
        ((21, 11), 5, 4, 0),
    ],
)
@pytest.mark.parametrize("spare", [0, 2])
def test_computes_the_operator(variant, grid, cell_size, rank, learned, spare):
    """Also when made for more levels than a grid has: those contribute nothing."""
    q, k, v = torch.randn(3, 2, 2, *grid, 6, dtype=torch.float64)
    levels = fma2d.num_levels(grid, cell_size)

    def kernels():
        start = [fma2d.start_kernels(i, cell_size, rank, 2, 2, 6, bins=cell_size) for i in range(1, learned + 1)]
        return [[torch.randn_like(w).double() for w in axes] for axes in start]

    groups = kernels(), kernels(), kernels() if variant == "linear" else None
    cells = dict(cell_size=cell_size, rank=rank)
    expected = fma2d.multipole_attention(q, k, v, *groups[:2], query_kernels=groups[2], backend="reference", **cells)
    out = exportable.attention(q, k, v, *groups, levels=levels + spare, **cells)
    assert torch.allclose(out, expected, rtol=0, atol=1e-10)


def test_a_larger_grid_and_a_mask_are_refused():
    module = fma2d.FMA2d(8, 2, 4, 4, levels=1, export_levels=1)
    module(torch.randn(1, 16, 16, 8))
    with pytest.raises(ValueError, match=r"17 x 3 tokens; the levels this was made for \(1\) reach 16"):
        module(torch.randn(1, 17, 3, 8))
    with pytest.raises(ValueError, match="key_mask"):
        module(torch.randn(1, 4, 4, 8), key_mask=torch.ones(4, 4, dtype=torch.bool))


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


@pytest.fixture(scope="module")
def standard():
    """`small()` in standard operations, exported."""
    with timm.layers.set_exportable(True):
        return export.export(small(), 64, batch=2, min_size=8)


def test_torch_export_with_open_sizes(standard):
    """Both formulations: the operator as one opaque node, and in standard operations."""
    plain = small()
    image = torch.randn(2, 3, 40, 50)
    height, width = Dim("height", min=8, max=64), Dim("width", min=8, max=64)
    program = torch.export.export(plain, (image,), dynamic_shapes=({2: height, 3: width},))
    assert any("fma2d.multipole_attention" in str(node.target) for node in program.graph.nodes)
    assert not [n for n in standard.graph.nodes if n.op == "call_function" and "fma2d" in str(n.target)]
    for size in ((64, 64), (37, 21), (8, 9)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            assert torch.allclose(program.module()(x), plain(x), atol=1e-6)
            assert torch.allclose(standard.module()(x), plain(x), atol=1e-5)


def test_onnx_with_open_sizes(standard, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export.write_onnx(standard, tmp_path / "model.onnx")
    runner = export.onnx_runner(tmp_path / "model.onnx")
    found = list(export.compare(small(), {"onnx": runner}, 2, [(64, 48), (21, 29), (8, 16)]))
    assert [levels for *_, levels, _ in found] == [[2], [1], [0]]
    assert max(difference for *_, difference in found) < 1e-5


@pytest.mark.slow
def test_the_tool_exports_and_checks_a_model(tmp_path, capsys):
    arguments = ["fma2d_nano", "--max-size", "192", "--num-classes", "5", "--out", str(tmp_path)]
    assert export.main([*arguments, "--model-kwargs", "{cell_size: 4, depths: [1, 1, 1, 1]}"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "levels" in line]
    assert len(lines) == 6 and "[3, 2, 1, 0]" in lines[0] and "95 x 64" in lines[2] and "[1, 0, 0, 0]" in lines[4]
    assert {path.name for path in tmp_path.iterdir()} >= {"fma2d_nano_192.pt2", "fma2d_nano_192.onnx"}


def test_the_tool_says_what_is_wrong(tmp_path, capsys):
    dense = tmp_path / "dense.safetensors"
    save_file({"weight": torch.ones(1)}, dense, {"attention": "dense"})
    for arguments, words in [
        (["fma2d_nano", "--checkpoint", str(dense)], "was trained with dense attention, which this does not export"),
        (["fma2d_nano", "--max-size", "32"], "--max-size must be above 64"),
        (["fma2d_tini"], "timm has no model fma2d_tini; near it are fma2d_tiny"),
        (["fma2d_nano", "--model-kwargs", "{window: 7}"], "window"),
        (["fma2d_nano", "--model-kwargs", "window=7"], "must be a mapping, e.g. '{cell_size: 2}', got 'window=7'"),
    ]:
        with pytest.raises(SystemExit):
            export.main([*arguments, "--out", str(tmp_path)])
        assert words in capsys.readouterr().err
