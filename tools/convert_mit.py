"""Turn a published MiT / SegFormer checkpoint into one that warm-starts an FMA2D model.

    python tools/convert_mit.py mit_b2.pth fma2d_tiny.mit.safetensors

MiT-B0 becomes fma2d_nano, B2 fma2d_tiny, B3 fma2d_small: the same skeleton with another attention. Read are the key
styles of NVlabs/SegFormer, of mmsegmentation's MixVisionTransformer and of Hugging Face transformers (as its files are
published, and as transformers 5 names its modules), backbones, classifiers and whole segmentors. Everything has a place
but two things: MiT's reduction of keys and values, as multipole attention reads them at full resolution, and the decode
head. The result is a warm start, to be fine-tuned: its attention sees more than what the weights were trained with.

FMA2D's LayerNorms have eps 1e-6. So have mmsegmentation's; NVlabs' have 1e-5 in the patch embeddings, those of
transformers 1e-5 throughout (the layer_norm_eps of its config is not used there).

LICENCE: as far as known, all published MiT and SegFormer weights carry NVIDIA's Source Code License for SegFormer,
which allows non-commercial use (research or evaluation) only. Converting them does not change that.
"""

import argparse
import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors.torch import save
from torch import Tensor

import fma2d
from fma2d.checkpoint import FORMAT_VERSION, write_whole
from tools.ending import InputError, ending
from tools.training.checkpoints import read_tensors

LICENCE = (
    "NVIDIA Source Code License for SegFormer, non-commercial use (research or evaluation) only; "
    "inherited from the MiT weights, as far as known"
)
# Channels and blocks of each stage: the size's name in the SegFormer paper, and the model with that skeleton.
SIZES = {
    ((32, 64, 160, 256), (2, 2, 2, 2)): ("MiT-B0", "fma2d_nano"),
    ((64, 128, 320, 512), (2, 2, 2, 2)): ("MiT-B1", None),
    ((64, 128, 320, 512), (3, 4, 6, 3)): ("MiT-B2", "fma2d_tiny"),
    ((64, 128, 320, 512), (3, 4, 18, 3)): ("MiT-B3", "fma2d_small"),
    ((64, 128, 320, 512), (3, 8, 27, 3)): ("MiT-B4", None),
    ((64, 128, 320, 512), (3, 6, 40, 3)): ("MiT-B5", None),
}
READABLE = ", ".join(f"{size} ({model})" for size, model in SIZES.values() if model)
REDUCTION = "reduces keys and values, which multipole attention reads at full resolution"
DECODE_HEAD = "belongs to a decode head, not to the backbone"


@dataclass(frozen=True)
class Style:
    """How a project names MiT's layers; `*` stands for the numbers of stage and block.

    Attributes:
        name: of the project.
        first: its number for the first stage.
        block: of a block.
        inside: its names of a block's layers to ours, None for what has no place. Several that map to one are
            concatenated in this order: query, key, value.
        outside: its names of the other layers to ours.
    """

    name: str
    first: int
    block: str
    inside: dict[str, str | None]
    outside: dict[str, str]

    def rules(self) -> dict[str, str | None]:
        """Its patterns to ours; the numbers come in the same order."""
        rules = {name: f"stages.*.{ours}" if "*" in name else ours for name, ours in self.outside.items()}
        for name, ours in self.inside.items():
            rules[f"{self.block}.{name}"] = ours and f"stages.*.blocks.*.{ours}"
        return rules


STYLES = (
    Style(
        name="NVlabs/SegFormer",
        first=1,
        block="block*.*",
        inside={
            "norm1": "norm1",
            "attn.q": "attn.qkv",
            "attn.kv": "attn.qkv",
            "attn.proj": "attn.proj",
            "attn.sr": None,
            "attn.norm": None,
            "norm2": "norm2",
            "mlp.fc1": "mlp.fc1",
            "mlp.dwconv.dwconv": "mlp.dwconv",
            "mlp.fc2": "mlp.fc2",
        },
        outside={
            "patch_embed*.proj": "patch_embed.proj",
            "patch_embed*.norm": "patch_embed.norm",
            "norm*": "norm",
            "head": "head.fc",
        },
    ),
    Style(
        name="mmsegmentation",
        first=0,
        block="layers.*.1.*",
        inside={
            "norm1": "norm1",
            "attn.attn.in_proj": "attn.qkv",
            "attn.attn.out_proj": "attn.proj",
            "attn.sr": None,
            "attn.norm": None,
            "norm2": "norm2",
            "ffn.layers.0": "mlp.fc1",
            "ffn.layers.1": "mlp.dwconv",
            "ffn.layers.4": "mlp.fc2",
        },
        outside={
            "layers.*.0.projection": "patch_embed.proj",
            "layers.*.0.norm": "patch_embed.norm",
            "layers.*.2": "norm",
        },
    ),
    Style(
        name="transformers",
        first=0,
        block="encoder.block.*.*",
        inside={
            "layer_norm_1": "norm1",
            "attention.self.query": "attn.qkv",
            "attention.self.key": "attn.qkv",
            "attention.self.value": "attn.qkv",
            "attention.output.dense": "attn.proj",
            "attention.self.sr": None,
            "attention.self.layer_norm": None,
            "layer_norm_2": "norm2",
            "mlp.dense1": "mlp.fc1",
            "mlp.dwconv.dwconv": "mlp.dwconv",
            "mlp.dense2": "mlp.fc2",
        },
        outside={
            "encoder.patch_embeddings.*.proj": "patch_embed.proj",
            "encoder.patch_embeddings.*.layer_norm": "patch_embed.norm",
            "encoder.layer_norm.*": "norm",
            "classifier": "head.fc",
        },
    ),
    Style(
        name="transformers 5, modules in memory",
        first=0,
        block="stages.*.blocks.*",
        inside={
            "layernorm_before": "norm1",
            "attention.q_proj": "attn.qkv",
            "attention.k_proj": "attn.qkv",
            "attention.v_proj": "attn.qkv",
            "attention.o_proj": "attn.proj",
            "attention.sequence_reduction.sequence_reduction": None,
            "attention.sequence_reduction.layer_norm": None,
            "layernorm_after": "norm2",
            "mlp.fc1": "mlp.fc1",
            "mlp.dwconv.dwconv": "mlp.dwconv",
            "mlp.fc2": "mlp.fc2",
        },
        outside={
            "stages.*.patch_embeddings.proj": "patch_embed.proj",
            "stages.*.patch_embeddings.layer_norm": "patch_embed.norm",
            "stages.*.layer_norm": "norm",
            "classifier": "head.fc",
        },
    ),
)


@dataclass(frozen=True)
class Conversion:
    """What became of a checkpoint.

    Attributes:
        style: whose names its keys had.
        size: its name in the SegFormer paper.
        model: the timm name of the model it fits.
        state: the model's state dict, aggregation kernels left out.
        sources: for each key of `state`, the keys it was made from.
        dropped: keys that have no place, and why.
    """

    style: str
    size: str
    model: str
    state: dict[str, Tensor]
    sources: dict[str, list[str]]
    dropped: dict[str, str]

    def account(self) -> str:
        """Every key of the file and of the model, by kind of layer; numbers are those of the file's tensors."""
        placed = Counter()
        for key, keys in self.sources.items():
            placed[" + ".join(map(_pattern, keys)), _pattern(key)] += len(keys)
        lost = Counter((_pattern(key), reason) for key, reason in self.dropped.items())
        lines = [f"{self.style} keys, {self.size} -> {self.model}"]
        lines += [f"placed: {placed.total()} tensors, in {len(self.sources)} of the model"]
        lines += [f"  {count:4d}  {source} -> {key}" for (source, key), count in placed.items()]
        lines += [f"dropped: {len(self.dropped)} tensors"]
        lines += [f"  {count:4d}  {key}: {reason}" for (key, reason), count in lost.items()]
        lines += ["initialised when loaded: stages.*.blocks.*.attn.kernels, at their start value"]
        if "head.fc.weight" in self.state:
            lines += [f"classifier: {len(self.state['head.fc.weight'])} classes"]
        else:
            lines += ["classifier: none in the file; load with num_classes=0 or features_only=True"]
        return "\n".join(lines)


def _pattern(key: str) -> str:
    """A key without the numbers of stage and block, weight and bias."""
    return re.sub(r"(?<=\.)\d+(?=\.)|(?<=block)\d|(?<=patch_embed)\d", "*", re.sub(r"[._](weight|bias)$", "", key))


def convert(state: dict[str, Tensor]) -> Conversion:
    """Place every tensor of a MiT checkpoint.

    Raises:
        ValueError: if it is not a whole MiT-B0, B2 or B3 in one of the known styles; says what was found.
    """
    found = [(style, _match(state, style)) for style in STYLES]
    style, matches = max(found, key=lambda pair: len(pair[1]))
    if not matches:
        raise ValueError(f"no key is one of a MiT; there are {len(state)}, e.g. {_some(state)}")
    sources, dropped, unknown = {}, {}, []
    for key in state:
        if key in matches:
            order, target = matches[key]
            if target is None:
                dropped[key] = REDUCTION
            else:
                sources.setdefault(target, []).append((order, key))
        elif re.match(r"(module\.)?(decode|auxiliary)_head\.", key):
            dropped[key] = DECODE_HEAD
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(f"{len(unknown)} keys are none of a MiT with {style.name} names, e.g. {_some(unknown)}")
    sources = {target: [key for _, key in sorted(keys)] for target, keys in sources.items()}

    size, model = _size(state, sources)
    shapes = _shapes(model, state, sources)
    if missing := shapes.keys() - sources.keys():
        raise ValueError(f"{size} lacks {len(missing)} of {model}'s tensors, e.g. {_some(sorted(missing))}")
    placed = {}
    for target, shape in shapes.items():
        tensor = torch.cat([state[key] for key in sources[target]])
        if tensor.shape == (*shape, 1, 1):  # a linear layer as a convolution
            tensor = tensor.reshape(shape)
        if tensor.shape != shape:
            keys = " + ".join(sources[target])
            raise ValueError(f"{keys} has shape {tuple(tensor.shape)}, {target} needs {tuple(shape)}")
        placed[target] = tensor.contiguous()
    return Conversion(style.name, size, model, placed, {target: sources[target] for target in placed}, dropped)


def _match(state: Iterable[str], style: Style) -> dict[str, tuple[int, str | None]]:
    """Of the keys that `style` knows: the order of their rule and our key, None if it has no place."""
    rules = []
    for name, ours in style.rules().items():
        pattern = re.escape(name).replace(r"\*", r"(\d+)")
        rules.append((re.compile(rf"(?:module\.)?(?:backbone\.|segformer\.)?{pattern}[._](weight|bias)"), ours))
    matches = {}
    for key in state:
        for order, (pattern, ours) in enumerate(rules):
            if match := pattern.fullmatch(key):
                *numbers, parameter = match.groups()
                if numbers:
                    numbers[0] = int(numbers[0]) - style.first
                matches[key] = order, ours and f"{ours.replace('*', '{}')}.{parameter}".format(*numbers)
    return matches


def _size(state: dict[str, Tensor], sources: dict[str, list[str]]) -> tuple[str, str]:
    """The size's name, and the model for it."""
    dims, depths = [], []
    while (target := f"stages.{len(dims)}.patch_embed.proj.weight") in sources:
        blocks = {match[1] for key in sources if (match := re.match(rf"stages\.{len(dims)}\.blocks\.(\d+)\.", key))}
        dims.append(len(state[sources[target][0]]))
        depths.append(len(blocks))
    size, model = SIZES.get((tuple(dims), tuple(depths)), ("no MiT", None))
    if model is None:
        raise ValueError(
            f"stages of {dims} channels and {depths} blocks, that is {size}: there is no FMA2D model for it. "
            f"Read are {READABLE}"
        )
    return size, model


def _shapes(model: str, state: dict[str, Tensor], sources: dict[str, list[str]]) -> dict[str, torch.Size]:
    """Shapes of the model's state dict without kernels, its classifier and input channels as in the file."""
    head, stem = sources.get("head.fc.weight"), sources["stages.0.patch_embed.proj.weight"]
    options = dict(num_classes=len(state[head[0]]) if head else 0, in_chans=state[stem[0]].shape[1], levels=0)
    with torch.device("meta"):
        return {key: tensor.shape for key, tensor in timm.create_model(model, **options).state_dict().items()}


def _some(keys: Iterable[str]) -> str:
    return ", ".join(list(keys)[:4])


def read(path: Path) -> dict[str, Tensor]:
    """The state dict in a file of safetensors or of `torch.save`.

    Raises:
        InputError: if there is none.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}; give one of NVlabs, mmsegmentation or Hugging Face")
    state = read_tensors(path)
    if others := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise InputError(f"{path} holds no state dict: {others[0]} is no tensor")
    return state


@ending(ValueError, OSError)
def main(argv: list[str] | None = None) -> None:
    """Convert a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the published checkpoint: .pth, .bin or .safetensors")
    parser.add_argument("output", type=Path, nargs="?", help="(beside the source, as SOURCE.MODEL.safetensors)")
    args = parser.parse_args(argv)
    conversion = convert(read(args.source))
    output = args.output or args.source.with_suffix(f".{conversion.model}.safetensors")
    if output.exists():
        raise ValueError(f"{output} is there already")
    metadata = {
        "format": "pt",
        "format_version": str(FORMAT_VERSION),
        "architecture": conversion.model,
        "source": args.source.name,
        "source_sha256": hashlib.sha256(args.source.read_bytes()).hexdigest(),
        "source_style": conversion.style,
        "license": LICENCE,
        "made_by": f"fma2d {fma2d.__version__}, tools/convert_mit.py",
    }
    # Not save_file, whose files only their owner can read.
    write_whole(output, lambda temporary: temporary.write_bytes(save(conversion.state, metadata)))
    print(conversion.account())
    print(f"licence: {LICENCE}")
    print(f"written: {output}")


if __name__ == "__main__":
    sys.exit(main())
