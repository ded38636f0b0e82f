"""The parts of the image trainer against what is computed by hand: scores, updates, averages, images, targets."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from tools.ending import InputError
from tools.training.data import eval_transform, open_image, train_transform
from tools.training.engine import Processes, Training, evaluate
from tools.training.folder import RunFolder
from tools.training.recipe import make_recipe
from tools.training.seeding import seed_at

CPU = Processes(torch.device("cpu"))


class Fixed(nn.Module):
    """Gives the batch, as logits."""

    def forward(self, x):
        return x


def test_scores_are_those_of_ranks():
    """Of eight labels two are the likeliest, none the second, and one each of those from the third to the last."""
    logits = torch.arange(8.0, 0, -1).expand(8, 8).contiguous()
    labels = torch.tensor([0, 0, 2, 3, 4, 5, 6, 7])
    batches = [(logits[:5], labels[:5]), (logits[5:], labels[5:])]
    scores = evaluate(Fixed().train(), batches, CPU)
    assert (scores["top1"], scores["top5"], scores["count"]) == (200 / 8, 500 / 8, 8)
    assert scores["loss"] == pytest.approx(F.cross_entropy(logits.double(), labels).item(), rel=1e-6)
    few = evaluate(Fixed(), [(logits[:4, :3], labels[:3].repeat(2)[:4])], CPU)  # fewer classes than five
    assert few["top5"] == 100


class Linear(nn.Linear):
    num_classes = 4


def training(updates=10, **keys):
    """A training of a linear model by plain gradient descent."""
    plain = dict(opt="momentum", opt_kwargs=dict(momentum=0.0), lr=0.5, weight_decay=0.0, smoothing=0.0, batch_size=8)
    torch.manual_seed(0)
    return Training(make_recipe(plain | keys, "test"), Linear(6, 4), CPU, updates, accum=1)


def step(run, update):
    """One update on a batch of its own; the gradient of the weight before it was clipped."""
    generator = torch.Generator().manual_seed(update)
    images = 50 * torch.randn(8, 6, generator=generator)
    run.batch_loss(images, torch.randint(4, (8,), generator=generator)).backward()
    gradients = [parameter.grad.clone() for parameter in run.model.parameters()]
    run._update(update)
    return gradients


@pytest.mark.parametrize("mode", [None, "norm", "value"])
def test_gradients_are_clipped(mode):
    run = training(clip_grad=0.1, clip_mode=mode) if mode else training()
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    gradients = step(run, 0)
    total = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert total > 10, "there must be something to clip"
    for parameter, old, gradient in zip(run.model.parameters(), before, gradients, strict=True):
        expected = {"norm": gradient * 0.1 / total, "value": gradient.clamp(-0.1, 0.1)}.get(mode, gradient)
        torch.testing.assert_close(old - parameter, 0.5 * expected, rtol=1e-4, atol=1e-5)


def test_the_average_is_what_counts_and_is_saved(tmp_path, monkeypatch):
    run = training(ema_decay=0.7)
    average = None
    for update in range(3):
        step(run, update)
        weight = run.model.weight.detach().clone()
        average = weight if average is None else 0.7 * average + 0.3 * weight
    assert (average - weight).abs().max() > 1e-2
    torch.testing.assert_close(run.weights.weight, average)
    torch.testing.assert_close(run.state_dict()["ema"]["weight"], average)
    assert training().weights.weight is not None and training().ema is None
    saved = []
    monkeypatch.setattr("tools.training.folder.save_weights", lambda model, *rest: saved.append(model))
    monkeypatch.setattr(RunFolder, "_metadata", lambda *args: {})
    RunFolder(tmp_path, run.recipe, None).save(run, tmp_path / "x.safetensors", {}, None)
    assert saved == [run.weights]


def test_the_best_epoch_is_kept(tmp_path, monkeypatch):
    folder, saved = RunFolder(tmp_path, make_recipe({}, "test"), None), []
    folder.log = type("Log", (), dict(append=lambda *_: None))()
    monkeypatch.setattr(folder, "save", lambda training, path, row, _: saved.append((row["epoch"], path.stem)))
    monkeypatch.setattr(folder, "data_facts", dict)
    run = training()
    for epoch, score in enumerate((30.0, 50.0, None, 40.0, 50.0), 1):
        folder.record(run, dict(epoch=epoch) | ({} if score is None else dict(top1=score)))
    assert [epoch for epoch, name in saved if name == "best"] == [1, 2]
    assert [epoch for epoch, name in saved if name == "last"] == [1, 2, 3, 4, 5]
    assert folder.best == dict(epoch=2, top1=50.0)


def test_targets_are_smoothed_with_mixup_and_without():
    """Mixup makes the targets itself, and has to be told of the smoothing."""
    images, labels = torch.randn(8, 6), torch.arange(8) % 4
    seen = []

    def targets(**keys):
        run = training(smoothing=0.2, **keys)
        run.loss = lambda logits, target: seen.append(target) or logits.sum()
        run.batch_loss(images.clone(), labels)
        return seen[-1]

    hard = 0.8 * F.one_hot(labels, 4) + 0.2 / 4
    torch.testing.assert_close(targets(mixup=0.8, mixup_prob=0.0), hard)
    mixed = targets(mixup=0.8)
    share = ((mixed - hard.flip(0)) / (hard - hard.flip(0)))[hard != hard.flip(0)]
    assert 0.01 < share[0] < 0.99 and torch.allclose(share, share[0].expand_as(share), atol=1e-5)
    plain = training(smoothing=0.2)
    expected = F.cross_entropy(plain.model(images), labels, label_smoothing=0.2)
    torch.testing.assert_close(plain.batch_loss(images, labels), expected)


MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
STILL = dict(img_size=32, scale=[1.0, 1.0], ratio=[1.0, 1.0], hflip=0.0, color_jitter=None)


def transformed(**keys):
    """An image of 32 px that has been through the training transform, and what it is if nothing is done to it."""
    config = dict(input_size=(3, 32, 32), mean=MEAN, std=STD, interpolation="bicubic", crop_pct=0.5, crop_mode="center")
    pixels = np.random.default_rng(0).integers(1, 255, (32, 32, 3), dtype=np.uint8)
    seed_at(0)
    found = train_transform(make_recipe(STILL | keys, "test"), config)(Image.fromarray(pixels))
    plain = torch.from_numpy(pixels).permute(2, 0, 1) / 255 - torch.tensor(MEAN)[:, None, None]
    return found, plain / torch.tensor(STD)[:, None, None]


def test_images_are_changed_as_the_recipe_says():
    def assert_is(found, expected):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    found, plain = transformed()
    assert_is(found, plain)
    assert_is(transformed(hflip=1.0)[0], plain.flip(2))
    assert_is(transformed(vflip=1.0)[0], plain.flip(1))
    for keys in (dict(scale=[0.3, 0.5]), dict(color_jitter=0.9), dict(auto_augment="rand-m9-n3")):
        assert not torch.allclose(transformed(**keys)[0], plain, atol=0.1), keys
    erased = {count: transformed(reprob=1.0, remode="const", recount=count)[0] for count in (1, 3)}
    gone = {count: (image == 0).all(0) for count, image in erased.items()}
    boxes = {count: mask.any(0)[None] & mask.any(1)[:, None] for count, mask in gone.items()}
    assert gone[1].any() and torch.equal(gone[1], boxes[1]) and not torch.equal(gone[3], boxes[3])
    assert torch.equal(erased[1][:, ~gone[1]], found[:, ~gone[1]])
    assert (transformed(reprob=1.0, remode="pixel")[0] != plain).any()


def test_validation_sees_the_middle():
    config = dict(input_size=(3, 16, 16), mean=MEAN, std=STD, interpolation="nearest", crop_pct=0.5, crop_mode="center")
    _, plain = transformed()
    pixels = np.random.default_rng(0).integers(1, 255, (32, 32, 3), dtype=np.uint8)
    torch.testing.assert_close(
        eval_transform(config)(Image.fromarray(pixels)), plain[:, 8:24, 8:24], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_read_the_right_way_up_and_in_8_bits(tmp_path, channels):
    """16 bits were cut at 255, so that nearly all was white, and the tag of a camera was ignored."""
    wide = (np.arange(20 * 12).reshape(20, 12) * 273).astype(np.uint16)
    exif = Image.Exif()
    for orientation, turn in ((1, lambda x: x), (3, lambda x: x[::-1, ::-1]), (6, lambda x: np.rot90(x, -1))):
        exif[0x0112] = orientation
        for suffix in ("png", "tif", "pgm"):
            if suffix == "pgm" and orientation > 1:
                continue
            Image.fromarray(wide).save(tmp_path / f"x.{suffix}", **({} if suffix == "pgm" else dict(exif=exif)))
            found = np.asarray(open_image(str(tmp_path / f"x.{suffix}"), channels)).reshape(*turn(wide).shape, channels)
            assert (found == (turn(wide) >> 8)[..., None]).all(), (suffix, orientation)
        Image.fromarray((wide >> 8).astype(np.uint8)).save(tmp_path / "x.tif", exif=exif)
        found = np.asarray(open_image(str(tmp_path / "x.tif"), channels)).reshape(*turn(wide).shape, channels)
        assert (found == (turn(wide) >> 8)[..., None]).all(), orientation
    Image.fromarray(wide.astype(np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match=r"x\.tif: values of 32 bits have no range of their own"):
        open_image(str(tmp_path / "x.tif"), channels)
