"""The backbone in mmengine's registry, its checkpoints, and every shipped config."""

from pathlib import Path

import pytest
import timm
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, Registry
from mmengine.runner.checkpoint import CheckpointLoader, load_checkpoint
from mmengine.structures import PixelData
from mmseg.registry import MODELS as SEGMENTATION_MODELS
from mmseg.structures import SegDataSample
from mmseg.utils import register_all_modules
from safetensors.torch import save_file

import fma2d.mmseg
from fma2d.mmseg import ARCHS, FMA2D, CheckpointError, load_model
from tools.mmseg_runs import read_config, replace_sync_bn

CONFIGS = sorted(p for p in (Path(__file__).parents[1] / "configs").glob("*/*.py") if p.parent.name != "_base_")
SMALL = dict(dims=(8, 16, 24, 32), depths=(1, 2, 1, 1), head_dim=8)


def read(path):
    cfg = read_config(path)
    replace_sync_bn(cfg.model)
    return cfg


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds_from_a_clean_directory(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = read(path)
    crop = tuple(cfg.crop_size)
    assert cfg.model.data_preprocessor.size == crop
    assert [step.crop_size for step in cfg.train_pipeline if step.type == "RandomCrop"] in ([crop], [])
    # MiT's constructor reads numbers out of tensors, which the meta device has none of.
    with torch.device("cpu" if "_mit" in path.name else "meta"):
        model = MODELS.build(cfg.model)
    if type(model.backbone) is FMA2D:
        assert cfg.model.backbone.img_size == tuple(cfg.get("img_size", crop))
        optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
        undecayed = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
        for name, parameter in model.backbone.named_parameters():
            assert (id(parameter) in undecayed) == ("kernels" in name or "norm" in name), name
    if "large" in path.name or "base" in path.name:
        return
    small = (64, 96)
    cfg.model.data_preprocessor.size = small
    model = MODELS.build(cfg.model)
    labels = PixelData(data=torch.randint(0, cfg.model.decode_head.num_classes, (1, *small)))
    samples = [SegDataSample(gt_sem_seg=labels) for _ in range(2)]
    losses = model.loss(torch.randn(2, 3, *small), samples)
    losses["decode.loss_ce"].backward()
    assert losses["decode.loss_ce"].isfinite()
    assert all(p.grad is not None for p in model.parameters()), "every parameter must take part, for DDP"


@pytest.mark.parametrize("size", [(255, 255), (112, 137), (512, 683)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_features_of_odd_sizes(size):
    model = FMA2D("nano").eval()
    with torch.inference_mode():
        features = model(torch.randn(1, 3, *size))
    expected = [(1, dim, *(-(-n // (4 * 2**i)) for n in size)) for i, dim in enumerate(ARCHS["nano"]["dims"])]
    assert [tuple(f.shape) for f in features] == expected


def test_libraries_find_the_backbone_through_the_root_registry():
    register_all_modules()
    mmdets = Registry("model", parent=MODELS, scope="mmdet_like")
    assert SEGMENTATION_MODELS.get("FMA2D") is mmdets.get("FMA2D") is FMA2D


@pytest.mark.parametrize("arch", ARCHS)
def test_one_state_dict_naming_for_timm_and_mmseg(arch):
    with torch.device("meta"):
        ours, timms = FMA2D(arch).state_dict(), timm.create_model(f"fma2d_{arch}", num_classes=0).state_dict()
    assert {n: w.shape for n, w in ours.items()} == {n: w.shape for n, w in timms.items()}


def classifier():
    return timm.create_model("fma2d_nano", num_classes=5, img_size=64, **SMALL)


@pytest.mark.parametrize("wrap", ["bare", "state_dict", "model", "module", "segmentor", "safetensors", "prefix"])
def test_pretrained_files_of_every_kind(wrap, tmp_path, caplog):
    source = classifier()
    state = source.state_dict()
    path = tmp_path / ("x.safetensors" if wrap == "safetensors" else "x.pth")
    if wrap == "safetensors":
        save_file(state, path, metadata=dict(rank="4"))
    elif wrap in ("state_dict", "model"):
        torch.save({wrap: state, "epoch": 3}, path)
    elif wrap == "bare":
        torch.save(state, path)
    else:
        prefix = dict(module="module.", segmentor="backbone.", prefix="encoder.")[wrap]
        rest = {} if wrap == "module" else {"decode_head.x": torch.zeros(1)}
        torch.save(dict(state_dict={prefix + n: w for n, w in state.items()} | rest), path)
    init_cfg = dict(type="Pretrained", checkpoint=str(path), **(dict(prefix="encoder.") if wrap == "prefix" else {}))
    model = MODELS.build(dict(type="FMA2D", arch=SMALL, img_size=64, init_cfg=init_cfg))
    model.init_weights()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, state[name]), name


def test_kernels_are_carried_to_another_crop(tmp_path):
    """A model built for 64 px, into one for 256 px with more levels: the file's kernels, resampled, never an error."""
    torch.save(classifier().state_dict(), tmp_path / "x.pth")
    model = FMA2D(SMALL, img_size=256, init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "x.pth")))
    model.init_weights()
    assert model.stages[0].blocks[0].attn.kernels.shape[0] > 1


def test_a_list_of_initialisers_loads_as_strictly_as_one(tmp_path):
    """mmengine loaded what stood in a list: any file, and what it did not hold stayed random, unsaid."""
    source, path = classifier(), tmp_path / "x.pth"
    state = source.state_dict()
    torch.save(state, path)
    constant = dict(type="Constant", layer="Conv2d", val=0.5)
    init_cfg = [dict(type="Pretrained", checkpoint=str(path)), constant]
    model = FMA2D(SMALL, img_size=64, init_cfg=init_cfg)
    model.init_weights()
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
    assert model.init_cfg == init_cfg and model.is_init
    model = FMA2D(SMALL, img_size=64, init_cfg=[constant])
    model.init_weights()
    assert (model.stages[0].patch_embed.proj.weight == 0.5).all()
    del state["stages.1.norm.bias"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"1 missing: stages\.1\.norm\.bias"):
        FMA2D(SMALL, img_size=64, init_cfg=init_cfg).init_weights()


def refusals(path, backbone):
    """What a backbone says to a file of its own, and a segmentor around it to one of its kind: a line each."""
    segmentor = torch.nn.Module()
    segmentor.backbone = backbone
    for load in (backbone.load_pretrained, lambda path: load_model(segmentor, path)):
        with pytest.raises(CheckpointError) as error:
            load(str(path))
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        yield str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(arch=SMALL), "2 heads of 4 channels do not fit a module of 2 axes, 1 heads of 8 channels"),
        (dict(arch=SMALL | dict(head_dim=4), share_heads=True), "2 axes, 1 heads of 4 channels"),
    ],
    ids=["another head_dim", "kernels shared by heads"],
)
def test_kernels_that_do_not_fit_are_refused_in_one_line(options, words, tmp_path):
    """They were let through, and `load_state_dict` raised what the tools do not catch."""
    path, settings = tmp_path / "x.pth", dict(img_size=64, cell_size=4)
    state = FMA2D(SMALL | dict(head_dim=4), **settings).state_dict()
    torch.save(state | {f"backbone.{name}": weight for name, weight in state.items()}, path)
    assert all(words in line for line in refusals(path, FMA2D(**options, **settings)))


class Code:
    """Runs when unpickled."""

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_file_is_not_run(tmp_path):
    """mmengine falls back to loading whatever a file holds, and only then were its weights looked at."""
    code, state = Code(), FMA2D(SMALL).state_dict()
    code.path = tmp_path / "ran"
    torch.save(dict(state_dict=state, meta=code), tmp_path / "x.pth")
    assert all("could run code" in line for line in refusals(tmp_path / "x.pth", FMA2D(SMALL)))
    assert not code.path.exists()


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_what_is_no_checkpoint_is_refused_in_one_line(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"no checkpoint")
    assert all("is not a checkpoint" in line for line in refusals(path, FMA2D(SMALL)))
    torch.save(torch.zeros(2), tmp_path / "tensor.pth")
    assert all("no state dict but a Tensor" in line for line in refusals(tmp_path / "tensor.pth", FMA2D(SMALL)))


def test_a_file_that_does_not_fit_is_one_clear_error(tmp_path):
    path = str(tmp_path / "nano.pth")
    with pytest.raises(CheckpointError, match="there is no file"):
        FMA2D(SMALL, init_cfg=dict(type="Pretrained", checkpoint=path)).init_weights()
    state = FMA2D("nano").state_dict()
    torch.save(state, path)
    with (
        pytest.raises(CheckpointError, match=r"file is of arch 'nano' .* the model of arch 'base'"),
        torch.device("meta"),
    ):
        FMA2D("base", init_cfg=dict(type="Pretrained", checkpoint=path)).init_weights()
    del state["stages.1.blocks.1.attn.qkv.bias"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"1 missing: stages\.1\.blocks\.1\.attn\.qkv\.bias"):
        FMA2D("nano", init_cfg=dict(type="Pretrained", checkpoint=path)).init_weights()
    torch.save(dict(conv=torch.zeros(1)), path)
    with pytest.raises(CheckpointError, match="has no weights of an FMA2D backbone"):
        FMA2D("nano", init_cfg=dict(type="Pretrained", checkpoint=path)).init_weights()


def segmentor(**arch):
    backbone = FMA2D(SMALL | arch, img_size=64, cell_size=4)
    return torch.nn.ModuleDict(dict(backbone=backbone, decode_head=torch.nn.Linear(32, 5)))


MISFITS = {
    "another prefix": r"94 missing: backbone\.stages\.0\.\S+, .* and 91 more; no name starts with 'backbone\.'$",
    "qkv.weight": r"1 of another shape: backbone\.stages\.0\.blocks\.0\.attn\.qkv\.weight \(\[23, 8\] in the file",
    "kernels": r"1 of another shape: backbone\.stages\.0\.blocks\.0\.attn\.kernels \(kernels of 2 axes",
    "missing": r"1 missing: backbone\.stages\.2\.norm\.weight$",
    "another size": r"file is of .*channels \(8, 16, 32, 32\).* of .*channels \(8, 16, 24, 32\).* another shape: ",
    "more blocks": r"file is of .*\(1, 2, 3, 1\) blocks\), the model of .*\(1, 2, 1, 1\) blocks\)$",
}


@pytest.mark.parametrize("kind", MISFITS)
def test_mmengine_cannot_load_a_backbone_that_does_not_fit(kind, tmp_path, caplog):
    """It loads loosely and past `load_state_dict`: training began from random weights, said to have matched."""
    arch = {"another size": dict(dims=(8, 16, 32, 32)), "more blocks": dict(depths=(1, 2, 3, 1))}.get(kind, {})
    state, block = segmentor(**arch).state_dict(), "backbone.stages.0.blocks.0.attn."
    if kind == "another prefix":
        state = {name.replace("backbone.", "encoder."): weight for name, weight in state.items()}
    elif block + kind in state:
        state[block + kind] = state[block + kind][..., :-1, :]
    elif kind == "missing":
        del state["backbone.stages.2.norm.weight"]
    torch.save(dict(state_dict=state), tmp_path / "x.pth")
    model = segmentor()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=MISFITS[kind]) as error:
        load_checkpoint(model, str(tmp_path / "x.pth"))
    assert "\n" not in str(error.value) and not any("matched" in r.message for r in caplog.records)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_mmengine_may_load_another_head_and_names_what_it_leaves_out(tmp_path, caplog, capsys):
    source, model = segmentor(), segmentor()
    weights = source.backbone.state_dict()
    state = source.state_dict() | {"decode_head.weight": torch.zeros(7, 32), "backbone.head.fc.bias": torch.zeros(7)}
    torch.save(dict(state_dict=state), tmp_path / "x.pth")
    load_checkpoint(model, str(tmp_path / "x.pth"))
    assert all(torch.equal(weight, weights[name]) for name, weight in model.backbone.state_dict().items())
    (record,) = [r for r in caplog.records if "matched" in r.message]
    counts = f"{len(weights)} of {len(weights)} weights matched, 0 missing, 1 unexpected: head.fc.bias"
    assert counts in record.message
    assert "size mismatch for decode_head.weight" in capsys.readouterr().out
    result = model.backbone.load_state_dict({}, strict=False)
    assert len(result.missing_keys) == len(weights)


def test_a_whole_model_loads_whole_or_not_at_all(tmp_path):
    path = next(path for path in CONFIGS if "fma2d-nano_1xb4" in path.name)
    cfg = read(path)
    model = MODELS.build(cfg.model)
    state = model.state_dict()
    save_file(state, tmp_path / "all.safetensors")
    other = MODELS.build(cfg.model)
    load_model(other, str(tmp_path / "all.safetensors"))
    assert all(torch.equal(weight, state[name]) for name, weight in other.state_dict().items())
    del state["decode_head.conv_seg.bias"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing: decode_head\.conv_seg\.bias$"):
        load_model(other, str(tmp_path / "part.safetensors"))
    state = model.state_dict() | {f"more.{i}": torch.zeros(1) for i in range(500)}
    save_file(state, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"Unexpected key.*more\.1.*\[\.\.\.\]$") as error:
        load_model(other, str(tmp_path / "more.safetensors"))
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_safetensors_wherever_mmengine_takes_a_checkpoint(tmp_path):
    save_file(dict(x=torch.arange(3.0)), tmp_path / "x.safetensors", metadata=dict(rank="4"))
    loaded = CheckpointLoader.load_checkpoint(str(tmp_path / "x.safetensors"), "cpu")
    assert loaded["meta"] == dict(rank="4") and loaded["state_dict"]["x"].tolist() == [0, 1, 2]


def test_settings_of_the_backbone():
    model = FMA2D(SMALL, out_indices=(0, 2), frozen_stages=1, with_cp=True, drop_path_rate=0.2)
    assert model.train() is model and model.eval() is model
    model.train()
    assert len(model.stages) == 3 and not model.stages[0].training and model.stages[1].training
    features = model(torch.randn(1, 3, 64, 64))
    assert [f.shape[1] for f in features] == [8, 24]
    features[-1].sum().backward()
    assert {name.split(".")[1] for name, p in model.named_parameters() if p.grad is None} == {"0"}
    assert model.num_features == 24
    model = FMA2D(SMALL, out_indices=(-3, 3))
    assert model.out_indices == (1, 3) and [len(f[0]) for f in model(torch.randn(1, 3, 64, 64))] == [16, 32]
    for idle in ("cel_size", "drop_rate", "global_pool", "num_classes", "in_chans"):
        with pytest.raises(TypeError, match=idle):
            FMA2D("nano", **{idle: 0})
    for bad in ((), (2, 1), (1, 1), (-1, 3), (4,), (-5, 0)):
        with pytest.raises(ValueError, match="out_indices"):
            FMA2D("nano", out_indices=bad)
    with pytest.raises(TypeError, match="out_indices"):
        FMA2D("nano", out_indices=2)
    for bad in (dict(arch="huge"), dict(frozen_stages=5)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            FMA2D(**(dict(arch="nano") | bad))


def test_recomputing_changes_nothing():
    one, other = FMA2D(SMALL, drop_path_rate=0.0), FMA2D(SMALL, drop_path_rate=0.0, with_cp=True)
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 3, 70, 50)
    for model in (one, other):
        sum(f.square().sum() for f in model(x)).backward()
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_packaged_bases_are_found_whatever_the_distribution_is_called():
    """onedl-mmengine 0.10.12 looked for a distribution "mmsegmentation" only: `mmseg::` bases failed beside onedl's."""
    from mmengine.hub import get_config

    assert fma2d.mmseg.MODULE2PACKAGE["mmseg"] in ("mmseg", "mmsegmentation")
    assert get_config("mmseg::_base_/schedules/schedule_160k.py").train_cfg.max_iters == 160000


@pytest.mark.parametrize(
    "wrong",
    [
        *(dict(arch=3), dict(arch={}), dict(in_channels="3"), dict(out_indices=3), dict(out_indices=(0, 1.0))),
        *(dict(frozen_stages="1"), dict(frozen_stages=5), dict(with_cp="no"), dict(dims=(8, 8, 8, 8))),
    ],
)
def test_wrong_arguments_are_named(wrong):
    (name,) = wrong
    with pytest.raises((TypeError, ValueError), match=name):
        fma2d.mmseg.FMA2D(**dict(arch="nano") | wrong)
