"""A training in progress: its epochs, its state, and validation."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ..ending import InputError
from .data import read
from .model import build_optimizer, build_scheduler
from .recipe import CommonRecipe
from .seeding import BATCH, seed_at

AMP = dict(bf16=torch.bfloat16, fp16=torch.float16)


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is, and its device."""

    device: torch.device
    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: list) -> list[float]:
        """The sums over all processes."""
        total = torch.tensor([float(value) for value in values], dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()


def autocast(device: torch.device, amp: str | None):
    """The context of mixed precision."""
    return torch.autocast(device.type, AMP[amp]) if amp else nullcontext()


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, processes: Processes, amp: str | None = None) -> dict[str, float]:
    """Loss, top-1 and top-5 in percent, the number of images, and seconds in the model (rank 0's)."""
    model.eval()
    device, seconds = processes.device, 0.0
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for images, labels in read(loader, device):
        start = _now(device)
        with autocast(device, amp):
            logits = model(images)
        seconds += _now(device) - start
        logits = logits.float()
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels), device=device)])
    loss, top1, top5, count = processes.sum(sums.tolist())
    return dict(loss=loss / count, top1=100 * top1 / count, top5=100 * top5 / count, count=count, seconds=seconds)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Training:
    """Model, optimizer, schedule, scaler, moving average, mixup and loss of a recipe.

    A training on other than images overrides `prepare_loss` and `batch_loss`.

    Args:
        model: on the device of `processes`.
        updates_per_epoch: optimizer steps; each takes `accum` batches of the loader.
        compiled: whether to `torch.compile` the model.
    """

    def __init__(
        self,
        recipe: CommonRecipe,
        model: nn.Module,
        processes: Processes,
        updates_per_epoch: int,
        accum: int,
        compiled: bool = False,
    ):
        self.recipe, self.model, self.processes = recipe, model, processes
        self.updates_per_epoch, self.accum = updates_per_epoch, accum
        self.epoch = 0  # epochs done
        self.optimizer = build_optimizer(recipe, model)
        self.scheduler = build_scheduler(recipe, self.optimizer, updates_per_epoch)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=recipe.amp == "fp16")
        self.ema = ModelEmaV3(model, decay=recipe.ema_decay) if recipe.ema_decay else None
        self.prepare_loss()
        self.forward = torch.compile(model) if compiled else model
        if processes.world > 1:
            devices = [processes.local_rank] if processes.device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.forward, device_ids=devices)

    def prepare_loss(self) -> None:
        """Make what `batch_loss` needs."""
        recipe = self.recipe
        self.mixup, self.loss = None, LabelSmoothingCrossEntropy(recipe.smoothing)
        if recipe.mixup or recipe.cutmix:
            piece = recipe.batch_size // (self.accum * self.processes.world)
            if piece % 2:
                raise InputError(f"mixup and cutmix mix pairs: {piece} images a process and step must be even")
            self.loss = SoftTargetCrossEntropy()
            self.mixup = Mixup(
                recipe.mixup,
                recipe.cutmix,
                prob=recipe.mixup_prob,
                switch_prob=recipe.mixup_switch_prob,
                mode=recipe.mixup_mode,
                label_smoothing=recipe.smoothing,
                num_classes=self.model.num_classes,
            )

    def batch_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of a batch."""
        if self.mixup:
            images, labels = self.mixup(images, labels)
        return self.loss(self.forward(images), labels)

    @property
    def spread(self) -> dict[str, int]:
        """How the images of an update are shared out; the random numbers depend on it."""
        return dict(processes=self.processes.world, grad_accum=self.accum)

    @property
    def weights(self) -> nn.Module:
        """The model that counts: the moving average, where there is one."""
        return self.ema.module if self.ema else self.model

    def train_epoch(self, loader: DataLoader, progress: Callable[[int, Callable[[], float], float], bool]) -> float:
        """One epoch; the mean loss over all processes.

        Args:
            loader: of this process's batches, `accum` an update.
            progress: called after each update with its number, a function that gives its loss, and the learning rate;
                says whether it is a time to look closer.

        Raises:
            InputError: if the weights are no longer finite; for an image that cannot be read.
        """
        self.forward.train()
        device, losses = self.processes.device, torch.zeros((), dtype=torch.float64, device=self.processes.device)
        for step, batch in enumerate(read(loader, device)):
            update, piece = divmod(step, self.accum)
            seed_at(BATCH, self.recipe.seed, self.epoch, step, self.processes.rank)
            last = piece + 1 == self.accum
            hold = self.forward.no_sync() if self.processes.world > 1 and not last else nullcontext()
            with hold:
                with autocast(device, self.recipe.amp):
                    loss = self.batch_loss(*batch)
                self.scaler.scale(loss / self.accum).backward()
            losses += loss.detach()
            if last:
                self._update(update)
                if progress(update + 1, loss.item, self.optimizer.param_groups[-1]["lr"]):
                    self._check_weights()
        self._check_weights()
        self.epoch += 1
        [total] = self.processes.sum([losses])
        return total / (len(loader) * self.processes.world)

    def _check_weights(self) -> None:
        # Not the loss: with fp16 a single one may be infinite, and the scaler then leaves the update out.
        if not torch.stack([parameter.isfinite().all() for parameter in self.model.parameters()]).all():
            raise InputError(
                f"the weights are no longer finite in epoch {self.epoch + 1}; what was saved before is kept. "
                "Try a smaller lr, clip_grad, more warmup_epochs, or amp: bf16 instead of fp16"
            )

    def _update(self, update: int) -> None:
        if self.recipe.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.model.parameters(), self.recipe.clip_grad, self.recipe.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        done = self.epoch * self.updates_per_epoch + update + 1
        if self.ema:
            self.ema.update(self.model, step=done)
        self.scheduler.step_update(done)

    def state_dict(self) -> dict:
        """All that the next epochs depend on; there is no state of random numbers (see `seeding`)."""
        return dict(
            epoch=self.epoch,
            spread=self.spread,
            model=self.model.state_dict(),
            ema=self.ema.module.state_dict() if self.ema else None,
            optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            scaler=self.scaler.state_dict(),
        )

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict` of the same recipe."""
        self.epoch = state["epoch"]
        self.model.load_state_dict(state["model"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
