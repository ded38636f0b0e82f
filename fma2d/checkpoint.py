"""Checkpoints: files with metadata, and loads that are checked once and say in one line what they did."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from uuid import uuid4

from safetensors.torch import save
from timm.utils import unwrap_model
from torch import Tensor, distributed, nn

from .kernels import check_adaptable

FORMAT_VERSION = 1
# Suffix of a file that is being written.
UNFINISHED = ".unfinished"
SETTINGS = ("cell_size", "rank", "levels", "variant", "aggregation", "share_heads")

# Weights that were not loaded must not go unseen, so reports reach stderr also where nobody has set up logging; of
# several processes, which load the same, those of the first.
logger = logging.getLogger(__name__)
logger.setLevel(logging.INFO)
_to_stderr = logging.StreamHandler()
_to_stderr.addFilter(lambda record: not logging.getLogger().handlers and _is_first_process())
logger.addHandler(_to_stderr)


def _is_first_process() -> bool:
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank())


def write_whole(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Have `write(temporary path)` write a file, and put it in its place only when it is on disk.

    What goes wrong is raised as it is: what was at `path` is as before then, and nothing else is left.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}{UNFINISHED}")  # another process may write the same file
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(model: nn.Module, path: str | os.PathLike, **metadata) -> str:
    """Write a model's weights to a safetensors file, whole or not at all.

    The file's metadata holds `format_version`, the settings of the attention layers (`cell_size`, `rank`, `levels`,
    `variant`, `aggregation`, `share_heads`: one value, or a list of one per layer), the timm `architecture` where the
    model has one, and what the caller adds. All of it is for people to read: loading goes by shapes and names alone.

    Args:
        model: may be wrapped by DDP, `torch.compile` or timm's ModelEma.
        path: ends in `.safetensors`.
        metadata: more entries; what is no string is written as JSON.

    Returns:
        The file's sha256; equal weights and metadata give equal files.

    Raises:
        TypeError: for a `model` or a `path` of another kind, and metadata that JSON does not know.
        ValueError: if `path` has another suffix.
        FileNotFoundError: if there is no such folder.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a path, got {path!r}")
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path}")
    model = unwrap_model(model)
    entries = describe(model) | metadata
    texts = {}
    for name, value in entries.items():
        try:
            texts[name] = value if isinstance(value, str) else json.dumps(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"metadata {name} must be a string or fit JSON: {error}") from None
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must be in a folder that exists, got {path}")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    data = _sorted_header(save(tensors, metadata=texts))
    write_whole(path, lambda temporary: temporary.write_bytes(data))
    return hashlib.sha256(data).hexdigest()


def describe(model: nn.Module) -> dict:
    """What a file of weights tells of a model as metadata, see `save_checkpoint`."""
    layers = [m for m in model.modules() if hasattr(m, "load_notes")]
    values = {name: [getattr(layer, name) for layer in layers] for name in SETTINGS}
    settings = {name: v[0] if len(set(v)) == 1 else v for name, v in values.items() if v}
    architecture = getattr(model, "pretrained_cfg", {}).get("architecture")
    return dict(format_version=FORMAT_VERSION, **settings, **(dict(architecture=architecture) if architecture else {}))


def _sorted_header(data: bytes) -> bytes:
    """The same safetensors file with its metadata in order, which safetensors leaves to chance."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def check_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    optional: str | None = None,
    shapes: bool = True,
    prefix: str = "",
) -> None:
    """Raise unless a state dict holds all that `model` needs, in its shapes, before anything is loaded.

    Learned kernels need not be there and may have other shapes: modules adapt them. A model with `report_loads` does
    this at every load; before that only what is done between reading a file and loading it needs it.

    Args:
        optional: a pattern of the names, without `prefix`, that may be missing.
        shapes: check shapes too.
        prefix: of the model's names in the state dict.

    Raises:
        RuntimeError: naming the first keys of each kind.
    """
    own = {prefix + name: tuple(t.shape) for name, t in model.state_dict().items() if not name.endswith(".kernels")}
    missing = [
        name
        for name in own
        if name not in state_dict and not (optional and re.match(optional, name.removeprefix(prefix)))
    ]
    misshapen = [
        f"{name} ({list(state_dict[name].shape)} in the file, {list(shape)} in the model)"
        for name, shape in own.items()
        if shapes and name in state_dict and tuple(state_dict[name].shape) != shape
    ]
    for name, layer in model.named_modules():
        name = f"{prefix}{name}.kernels"
        stored = state_dict.get(name) if getattr(layer, "kernels", None) is not None else None
        try:
            if stored is not None and len(stored):
                check_adaptable(stored.shape, layer.kernels.shape)
        except ValueError as error:
            misshapen.append(f"{name} ({error})")
    if not missing and not misshapen:
        return
    problems = [_some("missing", missing), _some("of another shape", misshapen)]
    if missing:
        named = [name for name in state_dict if name.startswith(prefix)]
        if not named:
            problems.append(f"no name starts with {prefix!r}")
        unknown = [name for name in named if name not in own and not name.endswith(".kernels")]
        problems.append(_some("that the model does not have", unknown))
        if all(name.startswith(f"{prefix}head.") for name in missing):
            problems.append(
                "there is no classifier in it: create the model with num_classes=0 or features_only=True, or load with "
                "strict=False to keep the model's own"
            )
    raise RuntimeError(
        f"the state dict does not fit {type(model).__name__} ({len(own)} keys without kernels): "
        + "; ".join(filter(None, problems))
    )


def _some(kind: str, names: list[str], most: int = 3) -> str:
    """`2 missing: a, b`, of many names the first ones; nothing if there are none."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {kind}: {', '.join(names[:most])}{more}" if names else ""


def report_loads(model: nn.Module) -> None:
    """Have every load of the model's weights, by whatever road, say in one line what it did.

    Misshapen weights are refused before anything is loaded: torch would raise only after the report had counted them as
    matched, and mmengine never. So are missing ones where the model's `loads_strictly` is True.
    """
    model._register_load_state_dict_pre_hook(_begin_load, with_module=True)
    model.register_load_state_dict_post_hook(_report_load)


def report_layer(layer: nn.Module, _) -> None:
    """Hook after a load of an attention layer: what became of its kernels, unless the model around it says so."""
    if layer.load_notes and not layer.is_reported:
        notes = "; ".join(f"aggregation kernels {kind}: {note}" for kind, note in layer.load_notes.items())
        logger.warning("%s: %s", type(layer).__name__, notes)


def _begin_load(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_) -> None:
    """Hook before a load of `module`, under whatever prefix; its layers need not report then."""
    strip_compiled(module, state_dict, prefix)
    optional = None if getattr(module, "loads_strictly", False) else ".*"
    check_state_dict(module, state_dict, optional, prefix=prefix)
    module.load_prefix = prefix
    for layer in module.modules():
        if hasattr(layer, "load_notes"):
            layer.is_reported = True


def strip_compiled(module: nn.Module, state_dict: dict, prefix: str = "") -> None:
    """Rename, in place, what was saved from a model that `torch.compile` had wrapped, whole or in parts.

    Its names hold `_orig_mod.`; where it is `module` that has wrapped parts, they get it.
    """
    wrapped = {name.replace("_orig_mod.", ""): name for name in module.state_dict() if "_orig_mod." in name}
    for name in [name for name in state_dict if name.startswith(prefix)]:
        plain = name.removeprefix(prefix).replace("_orig_mod.", "")
        if (new := prefix + wrapped.get(plain, plain)) != name:
            state_dict[new] = state_dict.pop(name)


def _report_load(module: nn.Module, incompatible) -> None:
    """Hook after a load: what it did, in one line, a warning unless all weights matched."""
    own = list(module.state_dict())
    prefix = module.load_prefix
    missing = [k.removeprefix(prefix) for k in incompatible.missing_keys if k.startswith(prefix)]
    unexpected = [k.removeprefix(prefix) for k in incompatible.unexpected_keys if k.startswith(prefix)]
    layers = {name: m.load_notes for name, m in module.named_modules() if getattr(m, "load_notes", None)}
    anew = [f"{name}.kernels" for name, notes in layers.items() if notes.get("initialised") == "all kernels"]
    counts = dict(missing=missing, unexpected=unexpected, initialised=anew)
    line = f"{type(module).__name__}: {len(own) - len(missing) - len(anew)} of {len(own)} weights matched, "
    line += ", ".join(_some(kind, names) or f"0 {kind}" for kind, names in counts.items())
    for kind in ("adapted", "initialised", "dropped"):
        notes = [f"{name}: {n[kind]}" for name, n in layers.items() if kind in n]
        if notes:
            line += f"; aggregation kernels {kind} in {len(notes)} layers, e.g. {notes[0]}"
    logger.log(logging.WARNING if missing or unexpected or layers else logging.INFO, line)


def take_backbone_keys(features: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """Hook before a load into a timm feature extractor: a backbone's state dict comes under the extractor's names.

    The classifier and the stages that the extractor does without are left out.
    """
    strip_compiled(features, state_dict, prefix)
    own = [name.replace("_orig_mod.", "") for name in features.state_dict()]
    place, dot = re.match(r"(.*?)stages([._])\d", own[0]).groups()
    for key in [k for k in state_dict if k.startswith(prefix)]:
        match = re.match(r"(?:stages\.(\d+)|head)\.(.*)", key.removeprefix(prefix))
        if match:
            value, stage = state_dict.pop(key), f"{place}stages{dot}{match[1]}."
            if any(name.startswith(stage) for name in own):
                state_dict[prefix + stage + match[2]] = value
