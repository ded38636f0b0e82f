"""Libraries that take a backbone, each with fma2d's as it is; `make test-clients` has them all, others skip here."""

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fma2d  # noqa: F401  (registers the models)

SIZE, STRIDES, DIMS = (64, 96), (4, 8, 16, 32), (32, 64, 160, 256)


def nano(**options):
    """`fma2d_nano` in evaluation mode, its aggregation kernels away from their start value."""
    model = timm.create_model("fma2d_nano", **dict(num_classes=3, img_size=64) | options).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".kernels"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.fixture
def x():
    return torch.randn(2, 3, *SIZE)


@pytest.fixture
def alone():
    """A process group of one process."""
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("decoder", ["Unet", "FPN"])
def test_segmentation_models_pytorch(x, decoder):
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = getattr(smp, decoder)("tu-fma2d_nano", encoder_weights=None, classes=5)
    logits = model(x)
    assert logits.shape == (2, 5, *SIZE)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.encoder.parameters())


def test_timm_backbone_of_transformers(x):
    transformers = pytest.importorskip("transformers")
    config = transformers.TimmBackboneConfig(
        backbone="fma2d_nano", use_pretrained_backbone=False, out_indices=(0, 1, 2, 3)
    )
    model = transformers.TimmBackbone(config).eval()
    maps = model(x).feature_maps
    assert [tuple(m.shape) for m in maps] == [
        (2, dim, SIZE[0] // stride, SIZE[1] // stride) for dim, stride in zip(DIMS, STRIDES, strict=True)
    ]
    assert all(m.isfinite().all() and m.std() > 0 for m in maps)


def test_timm_wrapper_of_transformers_saves_and_loads(x, tmp_path):
    transformers = pytest.importorskip("transformers")
    wrapper = transformers.TimmWrapperForImageClassification
    config = transformers.TimmWrapperConfig(
        architecture="fma2d_nano", num_labels=3, model_args=dict(img_size=64), do_pooling=True
    )
    model = wrapper(config).eval()
    model.timm_model.load_state_dict(nano().state_dict())
    with torch.no_grad():
        expected = model(x).logits
        model.save_pretrained(tmp_path)
        found = wrapper.from_pretrained(tmp_path).eval()(x).logits
    assert expected.isfinite().all() and torch.equal(found, expected)


def test_peft_trains_a_few_weights_and_merges_them(x):
    peft = pytest.importorskip("peft")
    model = nano()
    with torch.no_grad():
        start = model(x)
    config = peft.LoraConfig(r=4, target_modules=["qkv", "proj"], modules_to_save=["head.fc"])
    model = peft.get_peft_model(model, config)
    trained, total = model.get_nb_trainable_parameters()
    assert 0 < trained < total / 20
    torch.testing.assert_close(model.eval()(x), start)  # LoRA starts at nothing
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):  # the second half of a pair gets a gradient from the second step on
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        expected = model(x)
        assert (expected - start).abs().max() > 1e-3
        torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-3, atol=1e-4)


def test_feature_extractor_of_torchvision(x):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = nano()
    features = extraction.create_feature_extractor(model, {"stages.1": "fine", "stages.3": "coarse"})(x)
    maps = model.forward_intermediates(x, [1, 3], intermediates_only=True)
    for found, expected in zip(features.values(), maps, strict=True):
        torch.testing.assert_close(found.reshape(-1).sort()[0], expected.reshape(-1).sort()[0])


def test_fsdp2(x, alone):
    """Sharded block by block, forward and backward are those of the model alone."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("this torch has no fully_shard")
    model, sharded = nano(), nano()
    sharded.load_state_dict(model.state_dict())
    for stage in sharded.stages:
        for block in stage.blocks:
            fsdp.fully_shard(block, mesh=alone)
    fsdp.fully_shard(sharded, mesh=alone)
    for one in (model, sharded):
        F.cross_entropy(one(x), torch.tensor([0, 2])).backward()
    for (name, p), q in zip(model.named_parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(q.grad.full_tensor(), p.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_distributed_checkpoint(x, tmp_path):
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    model, other = nano(), nano()
    torch.nn.init.normal_(other.head.fc.weight)
    checkpoint.save(model.state_dict(), checkpoint_id=tmp_path / "saved")
    state = other.state_dict()
    checkpoint.load(state, checkpoint_id=tmp_path / "saved")
    other.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))


def test_int8_weights_of_torchao(x):
    quantization = pytest.importorskip("torchao.quantization")
    model = nano()
    with torch.no_grad():
        expected = model(x)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        found = model(x)
    assert "int8" in str(type(model.stages[0].blocks[0].attn.qkv.weight)).lower()
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = nano()

        def training_step(self, batch, _):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(param_groups_weight_decay(self.model, 0.05), 1e-3)

    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 2)
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(max_steps=2, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    module = Classifier()
    trainer.fit(module, loader)
    loaded = Classifier.load_from_checkpoint(trainer.checkpoint_callback.best_model_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded.model(images), module.eval().model(images))


def fvcore_count(model, x):
    counter = pytest.importorskip("fvcore.nn").FlopCountAnalysis(model, x)
    return counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()


def mmengine_count(model, x):
    analysis = pytest.importorskip("mmengine.analysis")
    return analysis.get_model_complexity_info(model, inputs=(x,), show_table=False, show_arch=False)["flops"]


def thop_count(model, x):
    return pytest.importorskip("thop").profile(model, (x,), verbose=False)[0]


def ptflops_count(model, x):
    ptflops = pytest.importorskip("ptflops")
    options = dict(as_strings=False, print_per_layer_stat=False, verbose=False, backend="aten")
    return ptflops.get_model_complexity_info(model, tuple(x.shape[1:]), **options)[0]


@pytest.mark.parametrize("count", [fvcore_count, mmengine_count, thop_count, ptflops_count])
def test_other_counters_miss_the_attention_and_nothing_else(count):
    """torch's counts all. Others know aten's operators or modules, and count multiply-adds, half as many."""
    x = torch.randn(1, 3, 128, 128)  # on a CPU, torch counts nothing where attention is dense, and the others neither
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        nano()(x)
    whole = counter.get_total_flops()
    attention = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "fma2d" in str(op))
    assert attention > 0
    assert 2 * float(count(nano(), x)) == pytest.approx(whole - attention, rel=0.03)
