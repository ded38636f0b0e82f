"""Transformers for text with heads for causal and masked language modelling and for sequence classification."""

from collections.abc import Iterator
from functools import partial
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint import report_loads
from ..geometry import check_positive
from .attention import make_attention
from .cache import Cache, MultipoleCache
from .checks import check_ids, check_prompt
from .convolution import RecentTokens, TokenConvolution
from .generation import check_sampling, decode, sample
from .positions import sinusoids

POSITIONS = ("sinusoidal", "rotary")
Caches = list[Cache | RecentTokens]  # of the blocks in their order, and behind them of the convolution, if there is one


class Block(nn.Module):
    """Pre-norm attention and pre-norm MLP with residuals, on `[B, N, dim]`."""

    def __init__(self, dim: int, attention: nn.Module, mlp_ratio: float, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = attention
        self.norm2 = nn.LayerNorm(dim)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, key_mask: Tensor | None, cache: Cache | None) -> Tensor:
        x = x + self.attention(self.norm1(x), key_mask, cache)
        return x + self.mlp(self.norm2(x))


class TextModel(nn.Module):
    """Token ids to features: embedding, positions, blocks, norm. Its subclasses put heads on it.

    Args:
        vocab_size: ids are 0 to `vocab_size - 1`.
        dim: channels, an even number.
        depth: blocks.
        num_heads: attention heads, a divisor of dim.
        attention: "fma" (learned kernels), "fma-linear" (far queries aggregated too; bidirectional models only),
            "mean" (FMA with fixed averaging), "full" (dense), "local" (FMA's near field alone).
        cell_size, rank: of the three FMA kinds; `local` takes the cell size. `rank` must divide `cell_size`.
        context: the length for which every level gets kernels of its own; any length runs.
        mlp_ratio: hidden channels of the MLP over dim.
        dropout: rate at the input and at the end of each attention layer and MLP.
        position: "sinusoidal" (added to the embedding, any length) or "rotary" (queries and keys are turned; a
            summary token then tells positions apart only where the turn's period is longer than the cell).
        conv_reach: by how many tokens a convolution of the embeddings reaches back, and in bidirectional models ahead;
            0 for none. See `TokenConvolution`.
        count_bias: of the three FMA kinds, whether a summary token counts for as many as it stands for. Without, all
            summary tokens start with equal weight, so that attention starts near and thins out with the distance.
        share_heads: one set of kernels for all heads.
        backend: of the FMA kinds, see `fma2d.multipole_attention`.

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
        position: str = "sinusoidal",
        conv_reach: int = 0,
        count_bias: bool = True,
        share_heads: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        sizes = dict(vocab_size=vocab_size, dim=dim, depth=depth, num_heads=num_heads)
        sizes |= dict(cell_size=cell_size, rank=rank, context=context)
        for name, value in sizes.items():
            check_positive(name, value)
        if dim % num_heads or dim % 2:
            raise ValueError(f"dim must be even and divisible by num_heads {num_heads}, got {dim}")
        if position not in POSITIONS:
            raise ValueError(f"position must be one of {POSITIONS}, got {position!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        if not isinstance(conv_reach, int) or conv_reach < 0:
            raise ValueError(f"conv_reach must be an integer of at least 0, got {conv_reach!r}")
        if int(dim * mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio must leave at least one hidden channel, got {mlp_ratio}")
        shared = dict(attention=attention, cell_size=cell_size, rank=rank, context=context, share_heads=share_heads)
        shared |= dict(count_bias=count_bias, dropout=dropout, backend=backend)
        # All that makes another model like this one; kept in its files.
        self.options = dict(sizes, **shared, mlp_ratio=mlp_ratio, position=position, conv_reach=conv_reach)
        # What its file says about it; see `save_model`.
        self.note: dict = {}
        self.vocab_size, self.dim, self.position = vocab_size, dim, position
        self.embed = nn.Embedding(vocab_size, dim)
        self.convolution = TokenConvolution(dim, conv_reach, self.causal) if conv_reach else None
        self.dropout = nn.Dropout(dropout)
        layers = [
            make_attention(dim=dim, num_heads=num_heads, causal=self.causal, rotary=position == "rotary", **shared)
            for _ in range(depth)
        ]
        self.blocks = nn.ModuleList(Block(dim, layer, mlp_ratio, dropout) for layer in layers)
        self.norm = nn.LayerNorm(dim)
        self._init_weights()
        report_loads(self)

    @torch.no_grad()
    def _init_weights(self) -> None:
        """GPT-2's start values, 0.02 at 768 channels; what is added to the residual stream shrinks with the depth."""
        std = 0.02 * sqrt(768 / self.dim)
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

    def features(self, ids: Tensor, key_mask: Tensor | None = None, cache: Caches | None = None) -> Tensor:
        """Features `[B, N, dim]` of ids `[B, N]`; what they hold in the place of an absent token means nothing."""
        check_ids(ids, key_mask, self.vocab_size)
        before = None if cache is None else cache[0].lengths  # tokens that each row has seen
        if before is not None and len(before) != len(ids):
            raise ValueError(f"the cache is of {len(before)} rows, got {len(ids)}")
        if key_mask is not None:
            ids = ids.masked_fill(~key_mask, 0)
        x = self.embed(ids) * sqrt(self.dim)  # so that tied embeddings, which are small, count beside the positions
        if self.convolution is not None:
            x = self.convolution(x, key_mask, None if cache is None else cache[-1])
        if self.position == "sinusoidal":
            positions = torch.arange(ids.shape[1], device=ids.device)
            if before is not None:
                positions = positions + before[:, None]
            x = x + sinusoids(positions, self.dim).to(x.dtype)
        x = self.dropout(x)
        if self.causal and cache is None:
            key_mask = None  # absent tokens are to the right of all others, where no causal query looks
        for i, block in enumerate(self.blocks):
            x = block(x, key_mask, None if cache is None else cache[i])
        return self.norm(x)


class CausalLM(TextModel):
    """Predicts the next token; the embedding is also the output layer. Arguments as in `TextModel`."""

    causal = True

    def forward(self, ids: Tensor, key_mask: Tensor | None = None, cache: Caches | None = None) -> Tensor:
        """Logits `[B, N, vocab_size]` of the token after each.

        Args:
            ids: `[B, N]`, int64.
            key_mask: bool `[B, N]`, True where a token exists, in each row the first ones; what the logits of the
                others are means nothing, but they are finite.
            cache: of `new_cache`, filled by earlier calls: the ids go on where they ended. No gradients then.

        Raises:
            TypeError, ValueError: for ids or a mask that do not fit; the message says how.
        """
        return self.logits(self.features(ids, key_mask, cache))

    def logits(self, features: Tensor) -> Tensor:
        return F.linear(features, self.embed.weight)

    def new_cache(self) -> Caches:
        """Empty caches of the layers: to be filled by `forward`, for any number of rows, with the weights as now."""
        caches = [block.attention.new_cache() for block in self.blocks]
        multipole = [cache for cache in caches if isinstance(cache, MultipoleCache)]
        for cache in multipole[1:]:
            cache.share_plan(multipole[0])
        return caches if self.convolution is None else [*caches, self.convolution.new_cache()]

    def stream(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        lengths: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """What `generate` gives, one `[B]` after another, as they are drawn. Do not train the model meanwhile."""
        check_sampling(temperature, top_k, top_p)
        mask = check_prompt(prompt, lengths, self.vocab_size)
        if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be an integer of at least 0, got {max_new_tokens!r}")
        if eos is not None and not (isinstance(eos, int) and 0 <= eos < self.vocab_size):
            raise ValueError(f"eos must be None or an id, 0 to {self.vocab_size - 1}, got {eos!r}")
        draw = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        return decode(self, prompt, mask, max_new_tokens, draw, eos)

    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        lengths: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Go on from prompts: the new ids `[B, M]`, without the prompt; without dropout, and without gradients.

        Args:
            prompt: ids `[B, N]`, int64.
            max_new_tokens: most `M`; it is less where every row has ended.
            lengths: `[B]`, how many ids of each row are its prompt, the first ones; default all.
            temperature: what logits are divided by before one is drawn; 0 takes the likeliest.
            top_k: draw from the `k` likeliest only.
            top_p: draw from the likeliest that together reach this probability only, one at least.
            eos: an id that ends a row; all that follows in it is `eos`.
            generator: of the random numbers, on the model's device.

        Raises:
            TypeError, ValueError: for arguments that do not fit, before anything is computed.
        """
        options = dict(lengths=lengths, temperature=temperature, top_k=top_k, top_p=top_p, eos=eos)
        ids = list(self.stream(prompt, max_new_tokens, generator=generator, **options))
        return torch.stack(ids, 1) if ids else prompt[:, :0]


class MaskedLM(TextModel):
    """Predicts tokens from both sides; the embedding is also the output layer. Arguments as in `TextModel`.

    Which id stands for a masked token is the caller's choice; count it in `vocab_size`.
    """

    def forward(self, ids: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Logits `[B, N, vocab_size]`; ids, mask and errors as in `CausalLM`."""
        return F.linear(self.features(ids, key_mask), self.embed.weight)


class SequenceClassifier(TextModel):
    """One class for each sequence, from the mean of its features; arguments as in `TextModel`.

    Args:
        num_classes: of the output.
    """

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
