"""Drawing tokens one by one, with each layer's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .model import CausalLM


@torch.no_grad()
def decode(
    model: CausalLM,
    prompt: Tensor,
    mask: Tensor | None,
    max_new_tokens: int,
    draw: Callable[[Tensor], Tensor],
    eos: int | None,
) -> Iterator[Tensor]:
    """Give new ids `[B]`, drawn from logits `[B, vocab_size]`; `mask` `[B, N]` tells which ids are the prompt."""
    training = model.training
    model.eval()
    try:
        cache = model.new_cache()
        features = model.features(prompt, mask, cache)
        if mask is None:
            last = features[:, -1]
        else:
            last = features[torch.arange(len(prompt), device=prompt.device), mask.sum(1) - 1]
        done = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
        for left in range(max_new_tokens - 1, -1, -1):
            ids = draw(model.logits(last))
            if eos is not None:
                ids = ids.masked_fill(done, eos)
                done = done | (ids == eos)
            yield ids
            if not left or (eos is not None and done.all()):
                return
            last = model.features(ids[:, None], cache=cache)[:, 0]
    finally:
        model.train(training)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError for options that `sample` cannot take."""
    if not isinstance(temperature, int | float) or not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a number of at least 0 (0: the likeliest token), got {temperature!r}")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be None or an integer of at least 1, got {top_k!r}")
    if top_p is not None and (not isinstance(top_p, int | float) or not 0 < top_p <= 1):
        raise ValueError(f"top_p must be None or above 0 and at most 1, got {top_p!r}")


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw an id a row from logits `[B, vocab_size]`: `[B]`.

    Args:
        temperature: what logits are divided by; 0 takes the likeliest.
        top_k: keep the `k` likeliest.
        top_p: of those, keep the likeliest that together reach this probability, one at least.
        generator: of the random numbers, on the device of the logits.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() - logits.amax(-1, keepdim=True)  # so that none becomes infinite
    logits, ids = (logits / temperature).sort(descending=True, stable=True)
    if top_k is not None:
        logits, ids = logits[:, :top_k], ids[:, :top_k]
    probabilities = logits.softmax(-1)
    if top_p is not None:
        more_likely = probabilities.cumsum(-1) - probabilities  # exactly 0 for the first
        probabilities = probabilities.masked_fill(more_likely >= top_p, 0)
    return ids.gather(1, torch.multinomial(probabilities, 1, generator=generator))[:, 0]
