"""The folder of a run on text."""

from pathlib import Path

from fma2d.text import save_model

from ..ending import InputError
from ..training.checkpoints import writing
from ..training.engine import Training
from ..training.folder import RunFolder
from ..training.recipe import to_yaml
from .corpus import Corpus
from .recipe import TextRecipe

SCORES = ("val_loss", "bits", "perplexity", "accuracy")
RESULT = "result.json"


class TextFolder(RunFolder):
    """What `RunFolder` has, and `result.json`."""

    columns = ("epoch", "updates", "lr", "train_loss", "per_second", "seconds", "processor_seconds", *SCORES)

    def __init__(self, path: Path, recipe: TextRecipe, corpus: Corpus):
        super().__init__(path, recipe, images=None)
        self.corpus = corpus

    def data_facts(self) -> dict:
        return dict(data=self.corpus.facts)

    def check_data(self, state: dict) -> None:
        if state["data"] != self.corpus.facts:
            was, now = state["data"]["sha256"][:12], self.corpus.sha256[:12]
            raise InputError(f"{self.path} was trained on other data: sha256 {now}... (was {was}...)")

    def is_best(self, row: dict) -> bool:
        better = "val_loss" in row and row["val_loss"] < self.best.get("val_loss", float("inf"))
        if better:
            self.best = dict(epoch=row["epoch"], val_loss=row["val_loss"])
        return better

    def save(self, training: Training, path: Path, row: dict, data_config: dict | None) -> None:
        note = dict(tokens="ids" if self.recipe.source == "tokens" else "bytes", task=self.recipe.task)
        note |= dict(recipe=to_yaml(self.recipe), data=str(self.corpus), classes=self.corpus.classes)
        note |= dict(metrics={key: row[key] for key in ("epoch", "train_loss", *SCORES) if key in row})
        with writing(path):
            save_model(path, training.weights, **note)
