"""Checkpoints on every road: what fits is carried over and counted, what does not is one error that names it."""

import hashlib
import json
import logging
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models import load_checkpoint, resume_checkpoint, save_for_hf

from fma2d import FMA1d, FMA2d, checkpoint
from fma2d.checkpoint import save_checkpoint
from fma2d.text import CausalLM

SOURCE = dict(num_classes=4, img_size=512, cell_size=4, rank=4)
TARGET = dict(num_classes=4, img_size=96, cell_size=8, rank=2, variant="loglinear")
# Keys of fma2d_nano without kernels: 4 stages of 2 blocks, and the head.
PLAIN = 4 * (6 + 2 * 14) + 2


def create(**options):
    return timm.create_model("fma2d_nano", **options).eval()


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(1)
    model = create(**SOURCE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.05)
    return model


@pytest.fixture(scope="module")
def files(source, tmp_path_factory):
    """The source's weights in the kinds of file that there are."""
    folder = tmp_path_factory.mktemp("weights")
    save_checkpoint(source, folder / "own.safetensors")
    torch.save(source.state_dict(), folder / "bare.pth")
    torch.save(dict(state_dict=source.state_dict(), epoch=3, version=2), folder / "last.pth.tar")
    save_for_hf(source, folder / "hub", safe_serialization=True)
    return folder


def load_plain(files, **options):
    model = create(**options)
    model.load_state_dict(torch.load(files / "bare.pth"))
    return model


def load_timm(files, **options):
    model = create(**options)
    load_checkpoint(model, files / "own.safetensors")
    return model


def resume(files, **options):
    model = create(**options)
    assert resume_checkpoint(model, files / "last.pth.tar") == 4
    return model


def overlay(files, name="own.safetensors", **options):
    classes = dict(num_classes=options["num_classes"]) if "num_classes" in options else {}
    cfg = dict(file=str(files / name), **classes)
    return create(pretrained=True, pretrained_cfg_overlay=cfg, **options)


ROADS = {
    "load_state_dict": load_plain,
    "load_checkpoint": load_timm,
    "resume": resume,
    "overlay": overlay,
    "checkpoint_path": lambda files, **options: create(checkpoint_path=files / "own.safetensors", **options),
    "local-dir": lambda files, **options: timm.create_model(
        f"local-dir:{files}/hub", pretrained=True, **options
    ).eval(),
}


@pytest.mark.parametrize("road", ROADS)
def test_every_road_carries_over_and_reports(road, source, files, caplog):
    expected = create(**TARGET)
    expected.load_state_dict(source.state_dict())
    caplog.clear()
    model = ROADS[road](files, **TARGET)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    (record,) = [r for r in caplog.records if "matched" in r.message]
    layers = sum(p.endswith("kernels") for p in model.state_dict())
    assert f"{PLAIN + layers} of {PLAIN + layers} weights matched, 0 missing, 0 unexpected, 0 init" in record.message
    assert f"kernels adapted in {layers} layers" in record.message and record.levelno == logging.WARNING


def test_same_settings_are_no_warning(source, caplog):
    create(**SOURCE).load_state_dict(source.state_dict())
    (record,) = [r for r in caplog.records if "matched" in r.message]
    assert record.levelno == logging.INFO and "adapted" not in record.message


@pytest.mark.parametrize("rank", [None, 0, 1])
def test_reports_reach_stderr_where_logging_is_not_set_up(rank, source, capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(checkpoint.logger.handlers[0], "stream", sys.stderr)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: rank is not None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    create(**SOURCE).load_state_dict(source.state_dict())
    line = f"{PLAIN + 8} of {PLAIN + 8} weights matched, 0 missing, 0 unexpected"
    assert (line in capsys.readouterr().err) == (rank != 1)


@pytest.mark.parametrize("feature_cls", ["getter", "list", "hook", "fx"])
@pytest.mark.parametrize("road", ["overlay", "checkpoint_path", "local-dir"])
def test_features_only_takes_the_same_files(road, feature_cls, source, files, caplog):
    model = ROADS[road](files, **SOURCE, features_only=True, feature_cls=feature_cls, out_indices=(0, 2))
    x = torch.randn(1, 3, 64, 72)
    with torch.no_grad():
        expected = source.forward_intermediates(x, intermediates_only=True)
        assert all(torch.equal(f, expected[i]) for f, i in zip(model(x), (0, 2), strict=True))
    assert any("matched, 0 missing" in r.message for r in caplog.records)
    model.load_state_dict(model.state_dict())


@pytest.mark.parametrize("features_only", [False, True])
@pytest.mark.parametrize("road", ["overlay", "checkpoint_path"])
def test_a_missing_backbone_key_is_an_error(road, features_only, source, tmp_path):
    """timm itself loads loosely where the classifier differs, as for features, and says it at the info level."""
    state = source.state_dict()
    del state["stages.1.blocks.0.attn.qkv.weight"]
    torch.save(state, tmp_path / "part.pth")
    kwargs = dict(checkpoint_path=tmp_path / "part.pth")
    if road == "overlay":
        kwargs = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "part.pth"), num_classes=9))
    with pytest.raises(RuntimeError, match=r"stages\.1\.blocks\.0\.attn\.qkv\.weight"):
        create(**SOURCE, **kwargs, features_only=features_only)


def test_what_does_not_fit_is_one_error_and_changes_nothing(source):
    model = create(**SOURCE)
    before = {name: p.clone() for name, p in model.named_parameters()}
    half = dict(list(source.state_dict().items())[::2])
    other_heads = create(**SOURCE, head_dim=16).state_dict()
    for state, words in [
        (half, r"\d+ missing: stages\.0\.\S+, \S+, \S+ and \d+ more"),
        (dict(half, epoch=3), "that the model does not have: epoch"),
        (
            create(**SOURCE | dict(num_classes=0)).state_dict(),
            r"2 missing: head\.fc\.\S+, .*; .* num_classes=0 or featu",
        ),
        (timm.create_model("fma2d_tiny", num_classes=4).state_dict(), r"\[64, 3, 7, 7\] in the file, \[32, 3, 7, 7\]"),
        (create(**SOURCE | dict(num_classes=9)).state_dict(), r"head\.fc\.weight \(\[9, 256\] in the file"),
        (other_heads, r"blocks\.0\.attn\.kernels \(kernels of 2 axes, 2 heads"),
    ]:
        with pytest.raises(RuntimeError, match=words) as error:
            model.load_state_dict(state)
        assert len(str(error.value)) < 1000
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_loose_loading_is_pytorchs_and_loud(source, caplog):
    model = create(**SOURCE)
    state = {n: t for n, t in source.state_dict().items() if not n.startswith("stages.3")}
    result = model.load_state_dict(dict(state, extra=torch.zeros(1)), strict=False)
    assert all(k.startswith("stages.3") for k in result.missing_keys) and result.unexpected_keys == ["extra"]
    (record,) = [r for r in caplog.records if "matched" in r.message]
    assert record.levelno == logging.WARNING and "36 missing: stages.3" in record.message
    assert "1 unexpected: extra" in record.message and "0 initialised" in record.message


def test_loading_the_classifier_alone_leaves_trained_kernels(source, caplog):
    """Kernels of layers that a state dict had nothing of were set back to their start value."""
    model = create(**SOURCE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict({n: t for n, t in source.state_dict().items() if n.startswith("head.")}, strict=False)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == ["head.fc.weight", "head.fc.bias"]


def test_layers_and_text_models_tell_of_their_kernels(caplog):
    """On plain PyTorch's road nothing but the attribute `load_notes` told of them."""
    layer = FMA2d(8, 2, cell_size=2, levels=1)
    stored = FMA2d(8, 2, cell_size=2, levels=2, variant="loglinear").state_dict()
    torch.nn.Sequential(layer).load_state_dict({f"0.{name}": tensor for name, tensor in stored.items()})
    notes = "".join(f"; aggregation kernels {kind}: {note}" for kind, note in layer.load_notes.items())
    assert [r.message for r in caplog.records] == ["FMA2d: " + notes[2:]] and "levels 1 of the file" in notes
    caplog.clear()
    model = CausalLM(9, 8, 2, 2, cell_size=4, rank=2, context=32)
    model.load_state_dict({n: t for n, t in model.state_dict().items() if not n.endswith("kernels")})
    (record,) = caplog.records
    assert record.message.startswith("CausalLM: ") and "aggregation kernels initialised in 2 layers" in record.message


def test_another_classifier_or_input_is_adapted_and_said(files, source, caplog):
    model = create(num_classes=7, in_chans=1, pretrained=True, pretrained_cfg_overlay=dict(file=f"{files}/bare.pth"))
    assert model.head.fc.out_features == 7 and model.in_chans == 1
    stem = source.stages[0].patch_embed.proj.weight
    assert torch.allclose(model.stages[0].patch_embed.proj.weight, stem.sum(1, keepdim=True), atol=1e-6)
    text = " ".join(r.message for r in caplog.records)
    assert "classifier (4 classes) is dropped: the model has 7 classes, its pretrained_cfg 1000" in text
    assert "2 missing: head.fc.weight, head.fc.bias" in text
    caplog.clear()
    create(num_classes=0, pretrained=True, pretrained_cfg_overlay=dict(file=f"{files}/bare.pth"))
    assert "is dropped" not in " ".join(r.message for r in caplog.records)  # as it was asked for


def test_inside_another_module_only_its_own_keys_are_counted(source, caplog):
    segmentor = torch.nn.ModuleDict(dict(backbone=create(**SOURCE), decoder=torch.nn.Linear(3, 3)))
    state = {f"backbone.{name}": tensor for name, tensor in source.state_dict().items()}
    result = segmentor.load_state_dict(state, strict=False)
    assert result.missing_keys == ["decoder.weight", "decoder.bias"]
    (record,) = [r for r in caplog.records if "matched" in r.message]
    assert f"{PLAIN + 8} of {PLAIN + 8} weights matched, 0 missing" in record.message


@pytest.mark.parametrize("kind", ["qkv.weight", "kernels"])
def test_inside_another_module_misshapen_weights_are_not_counted_as_matched(kind, source, caplog):
    """torch raised in the end, mmengine did not; both after a line that said that all matched."""
    segmentor = torch.nn.ModuleDict(dict(backbone=create(**SOURCE)))
    state, key = segmentor.state_dict(), f"backbone.stages.1.blocks.0.attn.{kind}"
    state[key] = state[key][..., :-1, :]
    with pytest.raises(RuntimeError, match=f"1 of another shape: {key} "):
        segmentor.load_state_dict(state, strict=False)
    assert not any("matched" in r.message for r in caplog.records)


def test_a_failed_write_leaves_what_was_there_and_nothing_else(source, tmp_path, monkeypatch):
    """A full disk left `model.safetensors.partial` behind, the same for all who were writing the file."""
    path, written = tmp_path / "model.safetensors", []
    digest = save_checkpoint(source, path)

    def full(temporary, data):
        written.append(temporary.name)
        with open(temporary, "wb") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(source, path, metric=1)
    assert list(tmp_path.iterdir()) == [path] and hashlib.sha256(path.read_bytes()).hexdigest() == digest
    assert len(set(written)) == 2 and path.name not in written


def test_files_tell_their_settings_and_are_the_same_every_time(source, tmp_path):
    """safetensors writes metadata in random order, which would make every file's sha256 another one."""
    path = tmp_path / "model.safetensors"
    digest = save_checkpoint(source, path, recipe=dict(lr=0.1), metric="96 %")
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        assert all(torch.equal(file.get_tensor(n), t) for n, t in source.state_dict().items())
    assert metadata["metric"] == "96 %" and json.loads(metadata["recipe"]) == dict(lr=0.1)
    assert metadata["architecture"] == "fma2d_nano" and metadata["variant"] == "linear"
    assert json.loads(metadata["levels"]) == [4, 4, 3, 3, 2, 2, 1, 1] and metadata["cell_size"] == "4"
    assert metadata["format_version"] == "1" and metadata["rank"] == "4"
    header = json.loads(path.read_bytes()[8:].split(b"}}", 1)[0] + b"}}")["__metadata__"]
    assert list(header) == sorted(header)
    wrapped = torch.nn.parallel.DataParallel(source)
    assert save_checkpoint(wrapped, path, metric="96 %", recipe=dict(lr=0.1)) == digest
    with pytest.raises(ValueError, match=r"\.safetensors"):
        save_checkpoint(source, tmp_path / "model.pth")
    text = FMA1d(8, 2, 4, 2, levels=1)
    save_checkpoint(text, path)
    text.load_state_dict(load_file(path))
