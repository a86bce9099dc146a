"""Load the trained model of a checkpoint and use it: predictions and losses, without training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portatrain.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from portatrain.backends.base import Backend
    from portatrain.checkpoint.newest import Reader
    from portatrain.recipe import Recipe


class TrainedModel:
    """A model with the weights of a checkpoint. `load_trained` makes one.

    Attributes:
        recipe: the recipe that it was trained by.
        step: the number of steps that it was trained for.
    """

    def __init__(self, recipe: Recipe, step: int, backend: Backend, state: Any) -> None:
        self.recipe, self.step = recipe, step
        self._backend, self._state = backend, state

    def predict(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the result of the model's method `predict(ops, batch)`. `batch` has arrays with a leading axis B."""
        model = self._backend.program.definition.model
        if not callable(getattr(model, "predict", None)):
            raise UserError(
                f"recipe {self.recipe.name}",
                expected="a model with a method predict(ops, batch)",
                got=f"{type(model).__name__}, which has none",
                do="Write one, or call evaluate(batch), which needs no such method.",
            )
        return self._backend.predict(self._state, batch)

    def evaluate(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return 'loss_B', 'weight_B' and each `ops.aux` by name, one value a sample, without dropout."""
        return self._backend.eval(self._state, batch)


def load_trained(
    path: Path | str, *, step: int | None = None, backend: str | None = None, recipe: Recipe | None = None
) -> TrainedModel:
    """Return the trained model of a checkpoint, on one device of this machine. The run may have used any mesh.

    Args:
        path: a run directory, the folder of one checkpoint, or a URL.
        step: the step of the checkpoint; by default the newest committed one.
        backend: 'jax' or 'torch'; by default jax, if it is installed.
        recipe: the recipe of the run. By default it comes from the checkpoint, which may name code of portatrain and of
            plug-ins alone. Give it if a recipe file defines the model, as `load_recipe("my_model.py")`.

    Raises:
        UserError: there is no committed checkpoint, the backend is not installed, or the recipe is of another model.
    """
    from portatrain.backends.base import backend_class, default_backend
    from portatrain.backends.program import make_program
    from portatrain.checkpoint.format_layout import check_tensors
    from portatrain.checkpoint.restore import restored
    from portatrain.runs.find_checkpoints import opened

    with opened(path, step) as reader:
        chosen = recipe if recipe is not None else _recorded(reader)
        made = backend_class(backend or default_backend())(make_program(chosen))
        check_tensors(reader, made.program)
        return TrainedModel(chosen, int(reader.meta["step"]), made, restored(made, reader))


def _recorded(reader: Reader) -> Recipe:
    """Return the recipe in a checkpoint. Like an export, this imports no code that only the checkpoint names."""
    from portatrain.checkpoint.interop.export_import import recipe_in

    try:
        return recipe_in(reader)
    except UserError as error:
        raise UserError(
            error.what,
            expected=error.expected,
            got=error.got,
            do='Load the recipe file of the run and pass it: load_trained(path, recipe=load_recipe("my_model.py")).',
        ) from error
