"""Drawing tokens one by one, with a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


def decode(
    model: nn.Module,
    prompt: Tensor,
    mask: Tensor | None,
    max_new_tokens: int,
    draw: Callable[[Tensor], Tensor],
    eos: int | None,
) -> Iterator[Tensor]:
    """Give new ids `[B]` of a `CausalLM`, drawn from logits `[B, vocab_size]`; of prompts those that `mask` tells.

    Nothing of the model is changed, so others may use it between two draws.
    """
    cache = model.new_cache()
    features = model.features(prompt, mask, cache)
    ends = -1 if mask is None else mask.sum(1) - 1
    last = features[torch.arange(len(prompt), device=prompt.device), ends]
    done = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    for left in range(max_new_tokens - 1, -1, -1):
        with torch.no_grad():
            ids = draw(model.logits(last))
        if eos is not None:
            ids = ids.masked_fill(done, eos)
            done = done | (ids == eos)
        yield ids
        if not left or (eos is not None and done.all()):
            return
        last = model.features(ids[:, None], cache=cache)[:, 0]


def prompt_mask(prompt: Tensor, lengths: Tensor) -> Tensor:
    """The mask `[B, N]` of prompts of the given lengths `[B]`; ValueError for lengths that do not fit."""
    try:
        lengths = torch.as_tensor(lengths, device=prompt.device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"lengths must be integers, one a row, got {lengths!r}") from None
    if lengths.shape != prompt.shape[:1] or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be an integer for each of the {len(prompt)} rows, got {lengths.tolist()}")
    if lengths.min() < 1 or lengths.max() > prompt.shape[1]:
        raise ValueError(f"lengths must be 1 to {prompt.shape[1]}, got {lengths.tolist()}")
    return torch.arange(prompt.shape[1], device=prompt.device) < lengths[:, None]


def check_sampling(
    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, generator: object = None
) -> None:
    """Raise ValueError for options that `sample` cannot take."""
    most, least = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny  # logits are divided in float32
    if not isinstance(temperature, int | float) or not (temperature == 0 or least <= temperature <= most):
        raise ValueError(
            f"temperature must be 0 (the likeliest token) or from {least:.1e} to {most:.1e}, got {temperature!r}"
        )
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
    """Draw an id a row from logits `[B, vocab_size]`: `[B]`. The options are those of `CausalLM.stream`."""
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
