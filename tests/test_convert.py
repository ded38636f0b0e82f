"""Multipole attention in timm's vision transformers."""

import copy
import io
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fma2d
from fma2d.ops import reference
from fma2d.ops.call import Call, Options

SMALL = dict(depth=2, embed_dim=48, num_heads=3)
VARIANTS = ("loglinear", "linear")


def vit(name="vit_tiny_patch16_224", **options):
    """A small ViT in float64 whose attention is far from even, so that mistakes in it show."""
    model = timm.create_model(name, num_classes=5, **{**SMALL, **options})
    for key, parameter in model.named_parameters():
        spread = {"qkv.weight": 0.3, "cls_token": 1.0, "reg_token": 1.0, "pos_embed": 1.0}
        nn.init.normal_(parameter, 0.0, next((s for end, s in spread.items() if key.endswith(end)), 0.1))
        if key.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma")):
            nn.init.normal_(parameter, 1.0, 0.3)
    return model.double().eval()


def image(height, width, batch=2):
    return torch.randn(batch, 3, height, width, dtype=torch.float64)


class Oracle(nn.Module):
    """The converted attention as a full matrix over all tokens, from the definition of the operator's cover.

    Kernels at their start value only average, so then the matrix is the attention map; learned ones give other values
    than tokens have, and the far field comes from the definition's output instead.
    """

    def __init__(self, attn, grid):
        super().__init__()
        self.attn, self.grid = attn, grid

    def forward(self, x, **_):
        attn, prefix, scale = self.attn, self.attn.prefix, self.attn.head_dim**-0.5
        q, k, v = attn.qkv(x).reshape(*x.shape[:2], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        patches = [t[:, :, prefix:].unflatten(2, self.grid) for t in (q, k, v)]
        kernels = [] if attn.kernels is None else [attn.kernels]
        options = Options(attn.cell_size, attn.rank, attn.variant, False, True, scale)
        call = Call(*patches, kernels, None, options)
        out, lse = reference.attention(call)
        scores = q @ k.mT * scale
        near = scores[:, :, prefix:, :prefix].exp()
        total = lse.flatten(2).exp()[..., None] + near.sum(-1, keepdim=True)
        share = lse.flatten(2).exp()[..., None] / total
        if attn.kernels is None:
            shares = reference.attention_map(call)
            rows = torch.cat((near / total, shares.flatten(2, 3).flatten(3) * share), -1)
            rows = torch.cat((scores[:, :, :prefix].softmax(-1), rows), 2)
            assert torch.allclose(rows.sum(-1), torch.ones_like(rows[..., 0])) and rows.min() >= 0
            out = rows @ v
        else:
            out = share * out.flatten(2, 3) + near / total @ v[:, :, :prefix]
            out = torch.cat((scores[:, :, :prefix].softmax(-1) @ v, out), 2)
        return attn.proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "name, options, prefix",
    [
        ("vit_tiny_patch16_224", {}, 1),
        ("vit_tiny_patch16_224", dict(qk_norm=True, scale_attn_norm=True), 1),
        ("deit_tiny_distilled_patch16_224", {}, 2),
        ("deit3_small_patch16_224", dict(init_values=0.5), 1),
        ("vit_small_patch14_dinov2", dict(init_values=0.5), 1),
        ("vit_small_patch14_reg4_dinov2", dict(init_values=0.5), 5),
        ("vit_medium_patch16_reg4_gap_256", {}, 4),
        ("vit_base_patch16_siglip_gap_224", {}, 0),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_without_coarse_levels_nothing_changes(name, options, prefix, fused):
    """Grids of at most two base cells a side: logits, features and gradients are those of the original."""
    before = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(fused)
    try:
        patch = 14 if "patch14" in name else 16
        original = vit(name, img_size=(7 * patch, 10 * patch), **options)
        assert original.num_prefix_tokens == prefix
        if "qk_norm" in options:
            for block in original.blocks:
                block.attn.gate = nn.Linear(48, 48).double()
        model = fma2d.convert_attention(copy.deepcopy(original), cell_size=5)
        x = image(7 * patch, 10 * patch)
        results, counts = [], []
        for m in (original, model):
            y = x.clone().requires_grad_()
            with FlopCounterMode(display=False) as counter:
                logits = m(y)
            counts.append(counter.get_total_flops())
            (gradient,) = torch.autograd.grad(logits.square().sum(), y)
            results.append((m.forward_features(x), logits, gradient))
        for expected, found in zip(*results, strict=True):
            assert expected.abs().max() > 1e-3
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        assert not fused or counts[0] == counts[1]  # nor is anything computed twice
    finally:
        timm.layers.set_fused_attn(before)


@pytest.mark.parametrize("levels", [0, 2])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "prefix", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_gap_224"]
)
def test_with_coarse_levels_values_and_gradients_are_those_of_the_cover(prefix, variant, levels):
    patch = 14 if "patch14" in prefix else 16
    grid = (5, 11)
    assert fma2d.num_levels(grid, 2) == 2
    model = vit(prefix, img_size=(grid[0] * patch, grid[1] * patch))
    original = copy.deepcopy(model)
    fma2d.convert_attention(model, 2, 4, variant, levels=levels)
    if levels:
        for block in model.blocks:
            nn.init.normal_(block.attn.kernels, 1.0, 0.5)
    oracle = copy.deepcopy(model)
    for block in oracle.blocks:
        block.attn = Oracle(block.attn, grid)
    x = image(grid[0] * patch, grid[1] * patch)
    cotangent = torch.randn_like(model.forward_features(x))

    def run(m):
        y = x.clone().requires_grad_()
        features = m.forward_features(y)
        parameters = {name.replace("attn.attn.", "attn."): p for name, p in m.named_parameters()}
        inputs = {"image": y} | {
            name: p for name, p in parameters.items() if name.split(".")[0] not in ("head", "fc_norm", "attn_pool")
        }
        gradients = torch.autograd.grad((features * cotangent).sum(), list(inputs.values()))
        return {"features": features} | dict(zip(inputs, gradients, strict=True))

    found, expected = run(model), run(oracle)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9 * value.abs().max().item(), msg=name)
    # It is not dense attention any more, and what a prefix token starts from gets a gradient.
    assert not torch.allclose(found["features"], original.forward_features(x), atol=1e-3)
    tokens = [name for name in expected if name.endswith("_token")]
    assert all(found[name].abs().max() > 1e-3 for name in ["image", *tokens])


def test_any_size_that_the_model_takes_and_copies_of_it():
    """Each image brings its own grid, equal numbers of patches or not; a copy (an EMA, say) keeps its own."""
    model = vit(dynamic_img_size=True)
    fma2d.convert_attention(model, 2)
    copies = {size: copy.deepcopy(model) for size in [(64, 256), (256, 64), (128, 128), (16, 48)]}
    images = {size: image(*size) for size in copies}
    with torch.no_grad():
        results = {size: model(images[size]) for size in copies}
        for size, other in copies.items():
            assert torch.equal(other(images[size]), results[size])
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        assert torch.equal(loaded(images[64, 256]), results[64, 256])
        padded = vit(dynamic_img_size=True, dynamic_img_pad=True)
        padded.load_state_dict(model.state_dict())
        padded = fma2d.convert_attention(padded, 2)
        cut = images[64, 256][..., :60, :250]
        assert torch.equal(padded(cut), model(F.pad(cut, (0, 6, 0, 4))))
    intermediates = model.forward_intermediates(images[64, 256], intermediates_only=True)
    assert [tuple(features.shape) for features in intermediates] == [(2, 48, 4, 16)] * 2
    model.set_input_size((64, 256))
    torch.testing.assert_close(model(images[64, 256]), results[64, 256])


def crops():
    """Images of as many patches in grids of other shapes, and other numbers of them."""
    return [image(*size) for size in [(64, 256), (256, 64), (128, 128), (96, 80)]]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_grid_is_the_calls_own(checkpointing):
    """Several sizes before one backward pass, that pass on another thread, and forward passes in threads meanwhile.

    The grid lay on the module once: outputs were those of another image's grid, without an error where the numbers of
    patches agree, and a checkpoint recomputed with the grid of the last image.
    """
    model = fma2d.convert_attention(vit(dynamic_img_size=True), 2, levels=1).train()
    images, parameters = crops(), list(model.parameters())
    losses = [model(x).square().sum() for x in images]
    expected = [torch.autograd.grad(loss, parameters) for loss in losses]
    total = [sum(each) for each in zip(*expected, strict=True)]
    model.set_grad_checkpointing(checkpointing)
    assert model.grad_checkpointing is checkpointing
    runs = [0]
    handle = model.blocks[1].mlp.register_forward_pre_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    with ThreadPoolExecutor(len(images)) as pool:
        again = list(pool.map(lambda x: model(x).square().sum(), images))
        assert runs[0] == len(images)
        assert all(torch.allclose(a, b) for a, b in zip(again, losses, strict=True))
        summed = pool.submit(torch.autograd.grad, sum(again), parameters).result()
        assert runs[0] == len(images) * (2 if checkpointing else 1)
        separate = list(pool.map(lambda x: torch.autograd.grad(model(x).square().sum(), parameters), images))
    handle.remove()
    for found, value in zip([summed, *separate], [total, *expected], strict=True):
        for a, b in zip(found, value, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6 * b.abs().max().item())  # kernels are float32

    # Features of blocks keep their inputs alone, too, and no gradients, no checkpoints.
    x, runs[0] = images[0], 0
    handle = model.blocks[0].mlp.register_forward_pre_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)[0].sum().backward()
    assert runs[0] == (2 if checkpointing else 1)
    handle.remove()


def test_copies_that_share_weights_run_side_by_side():
    """What DataParallel does: replicas of the modules, one thread each."""
    model = fma2d.convert_attention(vit(dynamic_img_size=True), 2)

    def replica(module):
        twin = module._replicate_for_data_parallel()
        twin._parameters = module._parameters
        for name, child in module.named_children():
            twin._modules[name] = replica(child)
        return twin

    images = crops()
    with torch.no_grad(), ThreadPoolExecutor(len(images)) as pool:
        expected = [model(x) for x in images]
        found = pool.map(torch.no_grad()(lambda x: replica(model)(x)), images)
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, expected, strict=True))


def test_scores_of_prefix_tokens_neither_overflow_nor_round_in_half_precision():
    """In float16 their product is infinite before it is scaled, and off by whole numbers after."""
    attn = fma2d.convert_attention(vit(embed_dim=256, num_heads=1), 2).blocks[0].attn
    q, k, v = torch.randn(3, 1, 1, 1 + 5 * 11, 256).half()
    q[:, :, 1:, :4], k[..., :4] = 250, 80  # 5 000 of each score
    expected = attn.attend(q.double(), k.double(), v.double(), (5, 11))
    shares = (q.double()[0, 0, 1:] @ k.double()[0, 0].T / 16).softmax(-1)[:, 0]
    assert 0.001 < shares.mean() < 0.9  # neither the prefix nor the patches are all
    found = attn.attend(q, k, v, (5, 11))
    assert found.dtype == torch.float16
    assert (found - expected)[:, 1:].abs().max() < 0.01


@pytest.mark.slow
def test_compiled_whole_with_any_size():
    model = fma2d.convert_attention(vit(dynamic_img_size=True, depth=1), 2, levels=2)
    eager = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in [(64, 256), (256, 64), (96, 80)]:
        x = image(*size)
        found, expected = compiled(x), eager(x)
        assert torch.allclose(found, expected, atol=1e-12)
        for a, b in zip(
            *(torch.autograd.grad(y.sum(), list(m.parameters())) for y, m in ((found, model), (expected, eager))),
            strict=True,
        ):
            assert torch.allclose(a, b, atol=1e-10)
    exported = torch.export.export(eager, (x,)).module()
    assert torch.allclose(exported(x), expected.detach(), atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_and_low_precision_stay_near(variant):
    model = fma2d.convert_attention(vit("vit_small_patch14_reg4_dinov2", img_size=(70, 154)), 2, variant=variant)
    x = image(70, 154)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = model.float()(x.float())
        half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    for found in (autocast, half):
        assert (found - expected).norm() / expected.norm() < 0.05


def test_weights_keep_their_names_and_kernels_load_by_the_usual_rule(caplog):
    original = vit(img_size=160)
    model = fma2d.convert_attention(vit(img_size=160), 2)
    assert model.state_dict().keys() == original.state_dict().keys()
    assert not any(module.training for module in model.modules())
    model.load_state_dict(original.state_dict())
    learned = fma2d.convert_attention(vit(img_size=160), 2, levels=2)
    kernels = {f"blocks.{i}.attn.kernels" for i in range(2)}
    assert learned.state_dict().keys() - original.state_dict().keys() == kernels <= learned.no_weight_decay()
    learned.load_state_dict(original.state_dict())
    x = image(160, 160)
    with torch.no_grad():
        assert torch.allclose(learned(x), model(x), atol=1e-6)  # kernels are float32
    with caplog.at_level(logging.WARNING, logger="fma2d"):
        model.load_state_dict(learned.state_dict())
    assert "dropped" in caplog.text
    # Levels that a small image does not use get a zero gradient, not None, as DDP asks for.
    small = fma2d.convert_attention(vit(img_size=32), 2, levels=2)
    small(image(32, 32)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for n, p in small.named_parameters() if n in kernels)


class OlderBlock(timm.models.vision_transformer.Block):
    """As timm had them before masks."""

    def forward(self, x):
        return super().forward(x)


def test_what_it_cannot_stand_for_is_refused_by_name():
    cases = [
        (timm.create_model("resnet18"), {}, TypeError, "ResNet"),
        (timm.create_model("eva02_tiny_patch14_224", depth=1), {}, TypeError, "Eva"),
        (timm.create_model("beit_base_patch16_224", depth=1), {}, TypeError, "Beit"),
        (timm.create_model("naflexvit_base_patch16_gap", depth=1), {}, TypeError, "NaFlexVit"),
        (timm.create_model("vit_tiny_patch16_224", depth=3, features_only=True), {}, TypeError, "convert its .model"),
        (vit(attn_layer="diff"), {}, ValueError, "blocks.0 has DiffAttention"),
        (vit(block_fn=timm.models.vision_transformer.ParallelScalingBlock), {}, ValueError, "ParallelScalingBlock"),
        (fma2d.convert_attention(vit()), {}, ValueError, "blocks.0 has ViTAttention"),
        (vit(block_fn=OlderBlock), {}, ValueError, "OlderBlock.forward takes no attn_mask.* newer timm"),
        (vit(patch_drop_rate=0.5), {}, ValueError, "patch_drop_rate"),
        (vit(attn_drop_rate=0.1), {}, ValueError, "attn_drop_rate"),
        (vit(), dict(cell_size=0), ValueError, "cell_size"),
        (vit(), dict(cell_size=6, levels=1, rank=16), ValueError, "rank 16"),
        (vit(), dict(variant="dense"), ValueError, "variant"),
        (vit(), dict(levels=-1), ValueError, "levels"),
    ]
    for model, options, error, words in cases:
        before = [type(module) for module in model.modules()]
        with pytest.raises(error, match=words):
            fma2d.convert_attention(model, **options)
        assert [type(module) for module in model.modules()] == before

    model = fma2d.convert_attention(vit(img_size=64), 2)
    with pytest.raises(RuntimeError, match="patch grid is not known"):
        model.blocks(torch.randn(1, 17, 48, dtype=torch.float64))
    with pytest.raises(ValueError, match="attn_mask"):
        model(image(64, 64), attn_mask=torch.ones(17, 17, dtype=torch.bool))
    with pytest.raises(ValueError, match="is_causal"):
        model(image(64, 64), is_causal=True)
    model.norm_pre = nn.MaxPool1d(1)  # stands for what merges tokens
    model.norm_pre.forward = lambda x: x[:, :-1]
    with pytest.raises(RuntimeError, match="16 tokens where the image has 4 x 4 patches and 1 prefix"):
        model(image(64, 64))
