"""Write a model as a torch.export program and as ONNX, and check both.

With `--size` the files are for images of that size alone: standard operations only, and what depends on the size is a
constant. With `--max-size` height and width stay open. The ONNX file then has the levels of that size, of which those
that a smaller grid lacks contribute nothing, and the operator is one node of the torch.export program, which needs
`import fma2d` to run. The files run beside the model in PyTorch, with open sizes at three of them, which differ in
their levels. ONNX needs the extra `export`.
"""

import argparse
import io
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timm
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

import fma2d
from tools.arguments import mapping, positive
from tools.ending import ending
from tools.training.checkpoints import load_weights, read_metadata
from tools.training.model import no_model

MIN_SIZE = 64
FOLDED = 1 << 26  # elements
TOLERANCE = 1e-4  # of the largest output, in float32


@ending()
def main(argv: list[str] | None = None) -> int:
    """Export and check; 1 if a result differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("model", help="a registered name, such as fma2d_tiny")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--size", type=image_size, metavar="HxW", help="fix height and width, pixels: 512 or 480x640")
    sizes.add_argument("--max-size", type=positive, default=512, help="leave them open, up to this many pixels a side")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", type=Path, help="weights (safetensors or PyTorch)")
    weights.add_argument("--pretrained", action="store_true", help="weights that the name stands for; else random ones")
    add("--num-classes", type=int, help="classes of the head, 0 for pooled features (the checkpoint's or the model's)")
    add("--model-kwargs", type=mapping, default={}, metavar="X", help="more options as YAML, e.g. '{cell_size: 4}'")
    add("--formats", nargs="+", choices=("pt2", "onnx"), default=["pt2", "onnx"], help="what to write")
    add("--batch", type=positive, default=1, help="images at a time; fixed, unlike their height and width")
    add("--out", type=Path, default=Path("out/export"), help="folder of the files")
    args = parser.parse_args(argv)
    if args.size is None and args.max_size <= MIN_SIZE:
        parser.error(f"--max-size must be above {MIN_SIZE}, got {args.max_size}")
    if not timm.is_model(args.model):
        parser.error(no_model(args.model))
    needed = ("onnx", "onnxscript", "onnxruntime") if "onnx" in args.formats else ()
    if missing := [name for name in needed if not find_spec(name)]:
        parser.error(f"ONNX needs {', '.join(missing)}: pip install 'fma2d[export]', or --formats pt2")
    metadata = read_metadata(args.checkpoint) if args.checkpoint and args.checkpoint.is_file() else {}
    if (attention := metadata.get("attention", "fma")) != "fma":
        parser.error(f"{args.checkpoint} was trained with {attention} attention, which this does not export")
    options = made_with(metadata) | args.model_kwargs
    options |= dict(img_size=args.size or args.max_size, pretrained=args.pretrained)
    if args.num_classes is not None:
        options["num_classes"] = args.num_classes
    try:
        eager = timm.create_model(args.model, **options).eval()
        model = timm.create_model(args.model, exportable=True, **options).eval()
    except (RuntimeError, ValueError, TypeError) as error:
        parser.error(f"{args.model} cannot be made: {error}")
    if args.checkpoint:
        load_weights(eager, args.checkpoint, args.model)
    model.load_state_dict(eager.state_dict())
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"{args.model}_{'x'.join(map(str, args.size)) if args.size else args.max_size}"
    files = {kind: args.out / f"{name}.{kind}" for kind in args.formats}

    sizes = [args.size] if args.size else check_sizes(args.max_size)
    if args.size:
        program = timed("torch.export", export_fixed, model, args.size, args.batch)
    elif "pt2" in files:
        program = timed("torch.export", export_open, eager, args.max_size, args.batch)
    runners = {}
    if "pt2" in files:
        torch.export.save(program, files["pt2"])
        runners["torch.export"] = torch.export.load(files["pt2"]).module()
    if "onnx" in files:
        if args.size:
            nodes = timed("ONNX", write_onnx, program, files["onnx"])
        else:
            nodes = timed("ONNX", write_open_onnx, model, args.max_size, files["onnx"], args.batch)
        print(f"{nodes} nodes, {files['onnx'].stat().st_size / 2**20:.0f} MiB")
        runners["onnxruntime"] = onnx_runner(files["onnx"])
    print("\nlargest difference from the model in PyTorch, over the largest output\n")
    worst = 0.0
    for name, height, width, levels, difference in compare(eager, runners, args.batch, sizes):
        print(f"{name:14}{height:5} x {width:<5}levels {levels}   {difference:.1e}", flush=True)
        worst = max(worst, difference)
    written = ", ".join(map(str, files.values()))
    print(f"\n{written}: {'fine' if worst <= TOLERANCE else 'WRONG'} (at most {TOLERANCE:.0e} is rounding)")
    return int(worst > TOLERANCE)


def image_size(text: str) -> tuple[int, int]:
    """Height and width of `512` or `480x640`, for argparse."""
    parts = text.split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"must be pixels, such as 512 or 480x640, got {text!r}")
    return int(parts[0]), int(parts[-1])


def made_with(metadata: dict) -> dict:
    """Arguments of the model that a checkpoint of tools/train_classifier.py is of."""
    made = metadata.get("model_kwargs", {})
    if "classes" in metadata:
        made = made | dict(num_classes=len(metadata["classes"]))
    if "data_config" in metadata:
        made = made | dict(in_chans=metadata["data_config"]["input_size"][0])
    return made


def export_fixed(model: nn.Module, size: tuple[int, int], batch: int = 1) -> ExportedProgram:
    """Export an exportable model for `batch` images `[B, C, *size]`."""
    with torch.no_grad():
        return torch.export.export(model, (torch.zeros(batch, model.in_chans, *size),))


def export_open(model: nn.Module, max_size: int, batch: int = 1, min_size: int = MIN_SIZE) -> ExportedProgram:
    """Export any model for `batch` images `[B, C, H, W]` of `min_size` to `max_size` pixels a side."""
    from torch.fx.experimental import _config

    image = torch.zeros(batch, model.in_chans, max_size - 1, max_size)
    height, width = (Dim(name, min=min_size, max=max_size) for name in ("height", "width"))
    shapes = ({2: height, 3: width},)
    # Without this, export takes a coarse grid of more than one cell to be so at every size.
    with torch.no_grad(), _config.patch(backed_size_oblivious=True):
        return torch.export.export(model, (image,), dynamic_shapes=shapes)


def write_onnx(program: ExportedProgram, path: Path) -> int:
    """Convert and save, one file; the number of its nodes."""
    onnx = torch.onnx.export(
        program, dynamo=True, verbose=False, optimize=False, input_names=["image"], output_names=["output"]
    )
    from onnxscript import optimizer

    # Unlike in torch, what is made of aggregation kernels alone becomes a constant, too, however large.
    optimizer.optimize(onnx.model, input_size_limit=FOLDED, output_size_limit=FOLDED)
    onnx.save(path)
    return len(onnx.model.graph)


def write_open_onnx(model: nn.Module, max_size: int, path: Path, batch: int = 1) -> int:
    """Convert an exportable model, height and width left open, and save, one file; the number of its nodes.

    By the tracer of TorchScript: torch.export would work out sizes in symbols, which takes many minutes.
    """
    import onnx
    import onnx_ir
    from onnx_ir.passes import common

    image, target = torch.zeros(batch, model.in_chans, max_size, max_size), io.BytesIO()
    names = dict(input_names=["image"], output_names=["output"])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # channels are taken for constants, which they are; and the tracer is old
        torch.onnx.export(
            model, (image,), target, dynamo=False, opset_version=18, dynamic_axes={"image": {2: "H", 3: "W"}}, **names
        )
    found = onnx_ir.from_proto(onnx.load_from_string(target.getvalue()))
    for clean in (
        common.CommonSubexpressionEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.RemoveUnusedNodesPass(),
    ):
        clean(found)
    onnx_ir.save(found, path)
    return len(found.graph)


def onnx_runner(path: Path):
    """The file in onnxruntime on the CPU, as a function of a tensor."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"image": x.numpy()})[0])


def check_sizes(max_size: int, min_size: int = MIN_SIZE) -> list[tuple[int, int]]:
    """Three sizes a factor of two apart, so of different levels; the second one is odd."""
    sizes = [(max_size, 3 * max_size // 4), (max_size // 2 - 1, max_size // 3), (max_size // 4, max_size // 4)]
    return [(max(min_size, height), max(min_size, width)) for height, width in sizes]


def compare(eager: nn.Module, runners: dict, batch: int, sizes: list[tuple[int, int]]):
    """Yield (runner, height, width, levels of each stage, largest difference over the largest output)."""
    for height, width in sizes:
        x = torch.randn(batch, eager.in_chans, height, width)
        grids = [(-(-height // s), -(-width // s)) for s in (info["reduction"] for info in eager.feature_info)]
        cells = [stage.blocks[0].attn.cell_size for stage in eager.stages]
        levels = [fma2d.num_levels(grid, cell) for grid, cell in zip(grids, cells, strict=True)]
        with torch.no_grad():
            expected = eager(x)
            for name, runner in runners.items():
                yield name, height, width, levels, ((runner(x) - expected).abs().max() / expected.abs().max()).item()


def timed(what: str, function, *args):
    """Call, and print how long it took."""
    print(f"{what} ...", end=" ", flush=True)
    start = time.monotonic()
    result = function(*args)
    print(f"{time.monotonic() - start:.0f} s", flush=True)
    return result


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
