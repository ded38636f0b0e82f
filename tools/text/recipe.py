"""Recipes of trainings on text, and their models."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import nn

from fma2d.text import CausalLM, MaskedLM, SequenceClassifier

from ..ending import InputError
from ..training.recipe import CommonRecipe

BYTES = 256
MODEL_KEYS = ("attention", "cell_size", "rank", "context", "mlp_ratio", "dropout", "count_bias")


@dataclass(frozen=True, kw_only=True)
class TextRecipe(CommonRecipe):
    """The hyper-parameters of a training on text."""

    CHOICES: ClassVar[dict] = CommonRecipe.CHOICES | dict(
        task=("causal", "masked", "classify"), source=("embedded", "bytes", "tokens", "csv")
    )
    AT_LEAST: ClassVar[dict] = CommonRecipe.AT_LEAST | dict(vocab_size=1, updates_per_epoch=1, eval_windows=1)

    task: Annotated[str, "causal or masked language model, or classify"] = "causal"
    source: Annotated[
        str,
        "embedded (the text found inside the Python installation), bytes (text as it is), tokens (numbers of a "
        "tokenizer), csv (with columns text and label)",
    ] = "bytes"
    vocab_size: Annotated[int | None, "for source: tokens, how many there are; the ids are below it"] = None
    context: Annotated[int, "tokens of a window; longer texts to classify are cut"] = 1024

    attention: Annotated[str, "fma, fma-linear (not causal), mean (fixed averaging), full, or local (near field)"] = (
        "fma"
    )
    dim: Annotated[int, "channels"] = 512
    depth: Annotated[int, "blocks"] = 6
    num_heads: Annotated[int, "attention heads, a divisor of dim"] = 8
    cell_size: Annotated[int, "tokens of a base cell"] = 32
    rank: Annotated[int, "summary tokens of a coarse cell, a divisor of the cell size"] = 4
    mlp_ratio: Annotated[float, "channels inside the MLP, in dims"] = 4.0
    dropout: Annotated[float, "dropout"] = 0.0
    count_bias: Annotated[bool, "whether a summary token counts for as many as it stands for"] = True

    updates_per_epoch: Annotated[
        int | None, "updates from one row of the log, validation and checkpoint to the next (null: a pass of the data)"
    ] = None
    eval_windows: Annotated[int | None, "windows of a validation, and of the test, evenly spread (null: all)"] = None

    def check(self, where: str) -> None:
        super().check(where)
        if (self.source == "csv") != (self.task == "classify"):
            raise InputError(f"{where}: task classify and source csv go together, got {self.task} and {self.source}")
        if self.task == "classify" and (self.updates_per_epoch or self.eval_windows):
            raise InputError(f"{where}: task classify takes whole passes, without updates_per_epoch and eval_windows")
        if (self.source == "tokens") != (self.vocab_size is not None):
            raise InputError(f"{where}: vocab_size is needed for source tokens, and for nothing else")
        # The model has checks of its own: it is made here without weights, before texts are read for it.
        with torch.device("meta"):
            text_model(self, num_classes=2)

    @property
    def ids(self) -> int:
        """How many ids the texts have; a masked model has one more, which stands for a token to be predicted."""
        return self.vocab_size or BYTES


def text_model(recipe: TextRecipe, num_classes: int = 0) -> nn.Module:
    """The recipe's model, `num_classes` for task classify; InputError for settings that do not go together."""
    options = {key: getattr(recipe, key) for key in MODEL_KEYS}
    sizes = (recipe.dim, recipe.depth, recipe.num_heads)
    try:
        if recipe.task == "classify":
            return SequenceClassifier(recipe.ids, num_classes, *sizes, **options)
        if recipe.task == "masked":
            return MaskedLM(recipe.ids + 1, *sizes, **options)
        return CausalLM(recipe.ids, *sizes, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"cannot build the model: {error}") from None
