"""Training and scores of text models."""

from itertools import pairwise
from math import exp, log

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..training.data import read
from ..training.engine import Processes, Training, autocast
from .batches import IGNORED
from .recipe import TextRecipe


class TextTraining(Training):
    """A `Training` whose batches are ids, targets and, for classification, a key mask."""

    def prepare_loss(self) -> None:
        pass

    def batch_loss(self, ids: Tensor, targets: Tensor, key_mask: Tensor | None = None) -> Tensor:
        logits = self.forward(ids, key_mask)
        return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def evaluate(model: nn.Module, batches, recipe: TextRecipe, processes: Processes) -> dict:
    """Scores of a model on held-out batches, over all processes.

    Returns:
        `loss` (nats a token or text) and `count` of tokens or texts predicted. Of a classifier `accuracy` (percent). Of
        a language model `bits` (a token; of bytes, bits per character), `perplexity`, and `bits_by_place`: of the
        tokens at the places `0-63`, `64-127`, `128-255` and so on of their window.
    """
    model.eval()
    context = 1 if recipe.task == "classify" else recipe.context
    sums = torch.zeros(3, context, dtype=torch.float64)  # loss, count, hits
    for ids, targets, *key_mask in read(batches, processes.device):
        with autocast(processes.device, recipe.amp):
            logits = model(ids, *key_mask).flatten(0, -2).float()
        loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="none")
        found = torch.stack([loss, targets.flatten() != IGNORED, logits.argmax(-1) == targets.flatten()])
        found = found.unflatten(1, (len(targets), -1)).sum(1, dtype=torch.float64)
        sums[:, : found.shape[1]] += found.cpu()
    loss, count, hits = torch.tensor(processes.sum(sums.flatten().tolist())).view(3, context)
    total = dict(loss=(loss.sum() / count.sum()).item(), count=round(count.sum().item()))
    if recipe.task == "classify":
        return total | dict(accuracy=100 * hits.sum().item() / total["count"])
    ends = [0, *(64 << i for i in range(context.bit_length()) if 64 << i < context), context]
    by_place = {
        f"{start}-{end - 1}": loss[start:end].sum().item() / count[start:end].sum().item() / log(2)
        for start, end in pairwise(ends)
        if count[start:end].sum()
    }
    bits = total["loss"] / log(2)
    return total | dict(bits=bits, perplexity=exp(total["loss"]), bits_by_place=by_place)
