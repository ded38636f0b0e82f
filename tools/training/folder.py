"""The folder of a run: what is written after each epoch, and what a run goes on from."""

import dataclasses
from pathlib import Path

from fma2d import __version__

from ..ending import InputError, output_folder
from .checkpoints import load_state, remove_unfinished, save_state, save_weights, write_text
from .data import Images
from .engine import Training
from .log import COLUMNS, EpochLog
from .recipe import Recipe, differences, to_yaml


class RunFolder:
    """`recipe.yaml`, `log.csv`, `tensorboard/`, `last.safetensors`, `best.safetensors` and `state.pt`.

    A run on other than images overrides what is said of the data, of the weights and of which epoch was the best.

    Args:
        path: of the folder.
        recipe, images: of the run.
    """

    columns = COLUMNS

    def __init__(self, path: Path, recipe: Recipe, images: Images):
        self.path, self.recipe, self.images = path, recipe, images
        self.best: dict = dict(epoch=0)
        self.log: EpochLog | None = None

    def stored_state(self, resume: bool) -> dict | None:
        """The state to go on from, if there is one.

        Raises:
            InputError: rather than overwrite another run, or go on with other hyper-parameters or data.
        """
        path = self.path / "state.pt"
        if not path.exists():
            if not resume and any(self.path.glob("*.safetensors")):
                raise InputError(f"{self.path} holds weights; choose another --output")
            return None
        if not resume:
            raise InputError(f"{self.path} holds a run; go on with it by --resume, or choose another --output")
        state = load_state(path)
        if changed := differences(self.recipe, state["recipe"]):
            raise InputError(f"{self.path} was trained with other hyper-parameters: {'; '.join(changed)}")
        self.check_data(state)
        self.best = state["best"]
        return state

    def check_data(self, state: dict) -> None:
        """Raise InputError if the stored `data_facts` are others."""
        count, classes = len(self.images.train), self.images.classes
        if (state["classes"], state["images"]) != (classes, count):
            raise InputError(
                f"{self.path} was trained on other data: {state['images']} images of {len(state['classes'])} classes, "
                f"now {count} of {len(classes)}" + (", with other names" if state["classes"] != classes else "")
            )

    def data_facts(self) -> dict:
        """What the state file says of the data."""
        return dict(classes=self.images.classes, images=len(self.images.train))

    def open(self, epochs: int, tensorboard: bool) -> None:
        """Make the folder, clear away what a killed run left unfinished, and begin the log after these epochs."""
        output_folder(self.path)
        remove_unfinished(self.path)
        write_text(self.path / "recipe.yaml", to_yaml(self.recipe))
        self.log = EpochLog(self.path, epochs, tensorboard, self.columns)

    def record(self, training: Training, row: dict, data_config: dict | None = None) -> None:
        """Write what an epoch has brought; `data_config` goes into the weights' metadata.

        The state comes last: what is killed before that is done again, to the bit, by the run that goes on.
        """
        self.log.append(row)
        self.save(training, self.path / "last.safetensors", row, data_config)
        if self.is_best(row):
            self.save(training, self.path / "best.safetensors", row, data_config)
        facts = dict(recipe=dataclasses.asdict(self.recipe), best=self.best) | self.data_facts()
        save_state(self.path / "state.pt", training.state_dict() | facts)

    def is_best(self, row: dict) -> bool:
        """Whether the epoch is the best so far; `best` is then of this one."""
        better = row.get("top1", -1.0) > self.best.get("top1", -1.0)
        if better:
            self.best = dict(epoch=row["epoch"], top1=row["top1"])
        return better

    def save(self, training: Training, path: Path, row: dict, data_config: dict | None) -> None:
        """Write the weights with all that is needed to use them."""
        save_weights(training.weights, path, self._metadata(row, data_config))

    def _metadata(self, row: dict, data_config: dict) -> dict:
        """What is to be known to use the weights: the model, its input, its classes, and how they were made."""
        keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
        return dict(
            architecture=self.recipe.model,
            attention=self.recipe.attention,
            model_kwargs=self.recipe.model_kwargs,
            data_config={key: data_config[key] for key in keys},
            classes=self.images.classes,
            recipe=to_yaml(self.recipe),
            metrics={key: row[key] for key in ("epoch", "train_loss", "val_loss", "top1", "top5") if key in row},
            fma2d=__version__,
        )
