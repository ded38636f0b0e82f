"""Transformers for text with heads for causal and masked language modelling and for sequence classification."""

from collections.abc import Iterator, Sequence
from functools import partial
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint import report_loads
from ..checks import MOST, check_bool, check_number, check_positive
from .attention import Attention
from .cache import Cache, LayerCache
from .generation import check_sampling, decode, prompt_mask, sample


class Block(nn.Module):
    """Pre-norm attention and pre-norm MLP with residuals, on `[B, N, dim]`; dropout at the end of both."""

    def __init__(self, attention: Attention, mlp_ratio: float, dropout: float):
        super().__init__()
        dim, hidden = attention.dim, int(attention.dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim)
        self.attention = attention
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.dropout = dropout

    def forward(self, x: Tensor, key_mask: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        # What is generated depends on no mode of the model, so that generation need not change it.
        rate = self.dropout if self.training and cache is None else 0.0
        x = x + F.dropout(self.attention(self.norm1(x), key_mask, cache), rate)
        return x + F.dropout(self.mlp(self.norm2(x)), rate)


class TextModel(nn.Module):
    """Token ids to features: embedding, blocks with rotary positions, norm. Its subclasses put heads on it.

    Args:
        vocab_size: ids are 0 to `vocab_size - 1`.
        dim: channels.
        depth: blocks.
        num_heads: attention heads; `dim / num_heads` must be even.
        attention: "fma" (learned kernels), "fma-linear" (far queries aggregated too; bidirectional models only),
            "mean" (FMA with fixed averaging), "full" (dense), "local" (FMA's near field alone).
        cell_size, rank: of the three FMA kinds; `local` takes the cell size. `rank` must divide `cell_size`.
        context: the length for which every level gets kernels of its own; any length runs.
        mlp_ratio: hidden channels of the MLP over dim.
        dropout: rate at the end of each attention layer and MLP, in training.
        count_bias: of the FMA kinds, whether a summary token counts for as many as it stands for. Without, attention
            starts near and thins out with the distance.

    Raises:
        TypeError, ValueError: for options that do not fit; the message names the option.
    """

    causal = False

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        *,
        attention: str = "fma",
        cell_size: int = 32,
        rank: int = 4,
        context: int = 1024,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        count_bias: bool = True,
    ):
        super().__init__()
        sizes = dict(vocab_size=vocab_size, dim=dim, depth=depth, num_heads=num_heads)
        sizes |= dict(cell_size=cell_size, rank=rank, context=context)
        for name, value in sizes.items():
            check_positive(name, value)
        check_number("dropout", dropout, 0)
        check_number("mlp_ratio", mlp_ratio, 0, MOST / dim)
        check_bool("count_bias", count_bias)
        if dropout >= 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        if int(dim * mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio must leave at least one hidden channel, got {mlp_ratio}")
        # All that makes another model like this one; kept in its files.
        self.options = dict(sizes, attention=attention, mlp_ratio=mlp_ratio, dropout=dropout, count_bias=count_bias)
        self.note: dict = {}  # what its file says about it; see `save_model`
        self.vocab_size = vocab_size
        self.embed = nn.Embedding(vocab_size, dim)
        cells = dict(cell_size=cell_size, rank=rank, context=context, count_bias=count_bias)
        layers = [Attention(dim, num_heads, attention, causal=self.causal, **cells) for _ in range(depth)]
        self.blocks = nn.ModuleList(Block(layer, mlp_ratio, dropout) for layer in layers)
        self.norm = nn.LayerNorm(dim)
        self._init_weights()
        report_loads(self)

    @torch.no_grad()
    def _init_weights(self) -> None:
        """GPT-2's start values, 0.02 at 768 channels; what is added to the residual stream shrinks with the depth."""
        std = 0.02 * sqrt(768 / self.embed.embedding_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            for layer in (block.attention.proj, block.mlp[2]):
                layer.weight /= sqrt(2 * len(self.blocks))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the aggregation kernels, for timm's optimizers."""
        return {name for name, _ in self.named_parameters() if name.endswith(".kernels")}

    def features(self, ids: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Features `[B, N, dim]` of ids `[B, N]`; those of an absent token are finite and mean nothing."""
        check_ids(ids, key_mask, self.vocab_size)
        return self._features(ids, key_mask)

    def _features(self, ids: Tensor, key_mask: Tensor | None, caches: Sequence[LayerCache] = ()) -> Tensor:
        if key_mask is not None:
            ids = ids.masked_fill(~key_mask, 0)
        x = self.embed(ids) * sqrt(self.embed.embedding_dim)  # tied embeddings are small, for the output layer's sake
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, key_mask, cache)
        return self.norm(x)


class CausalLM(TextModel):
    """Predicts the next token; the embedding is also the output layer. Arguments as in `TextModel`."""

    causal = True

    def forward(self, ids: Tensor, key_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Logits `[B, N, vocab_size]` of the token after each.

        Args:
            ids: `[B, N]`, int64.
            key_mask: bool `[B, N]`, True where a token exists, in each row the first ones.
            cache: of `new_cache`: the ids go on where earlier calls ended, without gradients and dropout.

        Raises:
            TypeError, ValueError: for ids or a mask that do not fit; the message says how.
        """
        return self.logits(self.features(ids, key_mask, cache))

    def features(self, ids: Tensor, key_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        if cache is None:
            return super().features(ids, key_mask)
        check_ids(ids, key_mask, self.vocab_size)
        if not isinstance(cache, Cache):
            raise TypeError(f"cache must be one of new_cache(), got {type(cache).__name__}")
        with torch.no_grad():
            return torch.cat([self._features(*part, cache.layers) for part in cache.steps(ids, key_mask)], 1)

    def logits(self, features: Tensor) -> Tensor:
        return F.linear(features, self.embed.weight)

    def new_cache(self) -> Cache:
        """An empty cache: to be filled by `forward`, for any number of rows, with the weights as now."""
        return Cache([block.attention for block in self.blocks])

    def stream(
        self, prompt: Tensor, max_new_tokens: int, *, lengths: Tensor | None = None, eos: int | None = None, **sampling
    ) -> Iterator[Tensor]:
        """Go on from prompts: new ids `[B]`, one after another as they are drawn, without dropout and gradients.

        Args:
            prompt: ids `[B, N]`, int64.
            max_new_tokens: how many; fewer where every row has ended.
            lengths: `[B]`, how many ids of each row are its prompt, the first ones; default all.
            eos: an id that ends a row; all that follows in it is `eos`.
            sampling: `temperature` (1.0), what logits are divided by before one is drawn, 0 takes the likeliest;
                `top_k` (None), to draw from the `k` likeliest only; `top_p` (None), to draw from the likeliest that
                together reach this probability only, one at least; `generator` of the random numbers.

        Raises:
            TypeError, ValueError: for arguments that do not fit, before anything is computed.
        """
        check_sampling(**sampling)
        mask = prompt_mask(prompt, lengths) if lengths is not None and isinstance(prompt, Tensor) else None
        check_ids(prompt, mask, self.vocab_size, "prompt")
        if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be an integer of at least 0, got {max_new_tokens!r}")
        if eos is not None and not (isinstance(eos, int) and 0 <= eos < self.vocab_size):
            raise ValueError(f"eos must be None or an id, 0 to {self.vocab_size - 1}, got {eos!r}")
        return decode(self, prompt, mask, max_new_tokens, partial(sample, **sampling), eos)

    def generate(self, prompt: Tensor, max_new_tokens: int, **options) -> Tensor:
        """What `stream` gives, with its arguments, as one tensor `[B, M]`, without the prompt."""
        ids = list(self.stream(prompt, max_new_tokens, **options))
        return torch.stack(ids, 1) if ids else prompt[:, :0]


class MaskedLM(TextModel):
    """Predicts tokens from both sides; the embedding is also the output layer. Arguments as in `TextModel`, whose
    `vocab_size` counts the id that stands for a masked token, of the caller's choice."""

    def forward(self, ids: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Logits `[B, N, vocab_size]`; ids, mask and errors as in `CausalLM`."""
        return F.linear(self.features(ids, key_mask), self.embed.weight)


class SequenceClassifier(TextModel):
    """One of `num_classes` for each sequence, from the mean of its features; other arguments as in `TextModel`."""

    def __init__(self, vocab_size: int, num_classes: int, dim: int, depth: int, num_heads: int, **options):
        check_positive("num_classes", num_classes)
        super().__init__(vocab_size, dim, depth, num_heads, **options)
        self.options["num_classes"] = num_classes
        self.head = nn.Linear(dim, num_classes)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Logits `[B, num_classes]`; ids, mask and errors as in `CausalLM`. A row without tokens gets the bias."""
        x = self.features(ids, key_mask)
        if key_mask is None:
            return self.head(x.mean(1))
        total = torch.where(key_mask[..., None], x, 0).sum(1)
        return self.head(total / key_mask.sum(1, keepdim=True).clamp(min=1))


def check_ids(ids: Tensor, key_mask: Tensor | None, vocab_size: int, name: str = "ids") -> None:
    """Raise TypeError or ValueError unless ids and mask are what a model takes; `name` is what messages call the ids.

    Values are looked at on the CPU only, where that waits for nothing.
    """
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, got {getattr(ids, 'dtype', type(ids).__name__)}")
    if ids.dim() != 2 or not ids.shape[1]:
        raise ValueError(f"{name} must be [B, N] with at least one token a row, got shape {tuple(ids.shape)}")
    if key_mask is not None and (not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool):
        raise TypeError(f"key_mask must be a bool tensor, got {getattr(key_mask, 'dtype', type(key_mask).__name__)}")
    if key_mask is not None and key_mask.shape != ids.shape:
        raise ValueError(f"key_mask must have the shape of ids, {tuple(ids.shape)}, got {tuple(key_mask.shape)}")
    if torch.compiler.is_compiling() or ids.device.type != "cpu":
        return
    if key_mask is not None and (key_mask[:, 1:] & ~key_mask[:, :-1]).any():
        raise ValueError("key_mask has a hole: a row's tokens must come first and its padding after them")
    wrong = (ids < 0) | (ids >= vocab_size)
    wrong = wrong if key_mask is None else wrong & key_mask
    if wrong.any():
        raise ValueError(f"{name} must be 0 to {vocab_size - 1}, got {ids[wrong][0].item()}")
