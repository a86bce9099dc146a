"""Load a trained model and use it: predictions, losses, and continuations of texts, without training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portatrain.errors import UserError
from portatrain.system.urls import is_remote

if TYPE_CHECKING:
    import numpy as np

    from portatrain.backends.base import Backend
    from portatrain.backends.program import Program
    from portatrain.checkpoint.newest import Reader
    from portatrain.data import Split
    from portatrain.data.texts import Texts
    from portatrain.recipe import Recipe
    from portatrain.training.generation import Generator, Progress


@dataclass(frozen=True, kw_only=True)
class Generated:
    """The continuation of one prompt.

    Attributes:
        prompt: the prompt's token ids, with the one that opens a text.
        tokens: the ids after them, without the one at which the text ended.
        text: what `tokens` add to the prompt as a text; None if no tokenizer is known.
        stopped: True if the text ended by itself, False if `max_tokens` ended it.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str | None
    stopped: bool


class TrainedModel:
    """A model with the weights of a checkpoint. `load` makes one.

    Attributes:
        recipe: the recipe that it was trained by.
        step: the number of steps that it was trained for; 0 for a folder of transformers.
        backend: the name of the backend.
    """

    def __init__(
        self, recipe: Recipe, step: int, backend: Backend, state: Any, texts: Callable[[], Texts] | None = None
    ) -> None:
        self.recipe, self.step, self.backend = recipe, step, backend.name
        self._backend, self._state, self._texts = backend, state, texts

    def predict(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the result of the model's method `predict(ops, batch)`. `batch` has arrays with a leading axis B."""
        self._check_predict()
        return self._backend.predict(self._state, batch)

    def evaluate(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return 'loss_B', 'weight_B' and each `ops.aux` by name, one value a sample, without dropout."""
        return self._backend.eval(self._state, batch)

    def evaluate_split(
        self, split: Split, *, batch: int, batches: int | None = None, stopped: Callable[[], bool] = lambda: False
    ) -> tuple[float, int, dict[str, float]]:
        """Return (mean loss over the targets, samples, metrics) of a split, or of its first `batches` batches of
        `batch` samples, as an evaluation of the run does. `stopped` is called before every batch."""
        from portatrain.training.evaluation import evaluate

        found = evaluate(self._backend, self._state, split, batch=batch, batches=batches, stopped=stopped)
        if found is None:
            raise InterruptedError("the evaluation was stopped")
        return found

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_tokens: int = 100,
        temperature: float = 0.7,
        top_p: float = 1.0,
        seed: int = 0,
        *,
        stop: Collection[int] | None = None,
        rows: int = 8,
        cache: bool = True,
        progress: Callable[[Progress], None] = lambda told: None,
    ) -> list[Generated]:
        """Continue every prompt by at most `max_tokens` tokens. The model needs a method `predict` that returns logits.

        Args:
            prompts: texts, which the run's tokenizer encodes, or lists of token ids, which are taken as they are.
            temperature: the divisor of the logits; 0 takes the likeliest token every time.
            top_p: draw from the smallest set of likeliest tokens of which the probabilities reach top_p.
            seed: a draw depends on the seed, the number of the prompt in the list and the number of tokens before it,
                so it is the same on every backend and for any `rows`.
            stop: ids at which a text ends. By default the one that opens a document, or the `eos_token_id` of a folder.
            rows: the number of texts that are continued together.
            cache: False runs the model on the whole text for every token. `recomputes` says why, if it does anyway.
            progress: called after every token of a batch.

        Raises:
            UserError: no prompts, a text without a tokenizer, an id outside the vocabulary, a value outside its range,
                logits that are not finite, or a model that does not read from left to right.
        """
        from portatrain.training.drawing import Drawing

        self._check_predict()
        if isinstance(prompts, str):
            raise UserError("prompts", expected="a list of prompts", got="one text", do="Write [prompt].")
        drawing = Drawing(temperature=temperature, top_p=top_p, seed=seed)
        ids = [self.texts.ids(p, f"prompt {n}") if isinstance(p, str) else list(p) for n, p in enumerate(prompts)]
        generator = self._generator if cache else self._without_cache
        stops = self.texts.stops if stop is None else stop
        found = generator(ids, max_tokens=max_tokens, drawing=drawing, stop=stops, rows=rows, progress=progress)
        return [
            Generated(prompt=c.prompt, tokens=c.tokens, text=self.texts.after(c.prompt, c.tokens), stopped=c.stopped)
            for c in found
        ]

    @property
    def recomputes(self) -> str:
        """Why `generate` runs the model on the whole text for every token; '' if it has a cache."""
        self._check_predict()
        return self._generator.recomputes

    @cached_property
    def texts(self) -> Texts:
        """The tokenizer of the run and the ids that open and end a text."""
        from portatrain.data.texts import texts_of

        return texts_of(self.recipe.data) if self._texts is None else self._texts()

    @cached_property
    def _generator(self) -> Generator:
        from portatrain.training.generation import Generator

        return Generator(self._backend, lambda: self._state, context=self.recipe.data.tokens_per_sample())

    @cached_property
    def _without_cache(self) -> Generator:
        from portatrain.training.generation import Generator

        context = self.recipe.data.tokens_per_sample()
        return Generator(self._backend, lambda: self._state, context=context, cache=False)

    def check_left_to_right(self, size: int) -> None:
        """Raise UserError if the model has no `predict`, or if a prediction changes with a later token.

        size: the number of positions to try it on.
        """
        from portatrain.training.left_to_right import check_causal

        check_causal(self.predict, self._backend, size)

    def _check_predict(self) -> None:
        from portatrain.training.generation import no_predict

        model = self._backend.program.definition.model
        if not callable(getattr(model, "predict", None)):
            raise no_predict(f"recipe {self.recipe.name}: model {type(model).__name__}")


def load(
    path: Path | str,
    *,
    step: int | None = None,
    backend: str | None = None,
    recipe: Recipe | None = None,
    ema: bool = False,
) -> TrainedModel:
    """Return the trained model of a checkpoint, on one device of this machine. The run may have used any mesh.

    Args:
        path: a run directory, the folder of one checkpoint, a URL, or a folder of transformers with config.json and
            .safetensors files.
        step: the step of the checkpoint; by default the newest committed one.
        backend: 'jax' or 'torch'; by default jax, if it is installed.
        recipe: the recipe of the run. By default it comes from the checkpoint, which may name code of portatrain and of
            plug-ins alone. Give it if a recipe file defines the model, as `load_recipe("my_model.py")`.
        ema: take the averaged weights.

    Raises:
        UserError: there is no committed checkpoint, the backend is not installed, the recipe is of another model, or
            the run keeps no averages.
    """
    from portatrain.checkpoint.interop.hub_folder import is_hub_folder
    from portatrain.runs.find_checkpoints import opened

    if not is_remote(path) and is_hub_folder(Path(path)):
        return _from_hub(Path(path), backend, recipe, step=step, ema=ema)
    with opened(path, step) as reader:
        chosen = recipe if recipe is not None else _recorded(reader)
        made, state = _restored(reader, chosen, backend, ema=ema)
        return TrainedModel(chosen, int(reader.meta["step"]), made, state)


def load_trained(
    path: Path | str, *, step: int | None = None, backend: str | None = None, recipe: Recipe | None = None
) -> TrainedModel:
    """The former name of `load`, deprecated."""
    warnings.warn("load_trained is now portatrain.load", DeprecationWarning, stacklevel=2)
    return load(path, step=step, backend=backend, recipe=recipe)


def _restored(reader: Reader, recipe: Recipe, backend: str | None, *, ema: bool) -> tuple[Backend, Any]:
    """Return a backend and the weights of a checkpoint, without the state of the optimizer."""
    from portatrain.backends.program import make_program
    from portatrain.checkpoint.format_layout import check_tensors
    from portatrain.checkpoint.restore import Restoring, boxes_of

    whole = make_program(recipe)
    check_tensors(reader, whole)
    if ema and not whole.ema:
        raise UserError(
            f"recipe {recipe.name}", expected="averaged weights", got="none", do="Leave ema out: it keeps no averages."
        )
    made = _backend(whole, backend)
    taken = {f"params/{name}": f"ema/{name}" for name in whole.ema} if ema else {}
    boxes = {taken.get(name, name): box for name, box in boxes_of(made.program).items()}
    with Restoring(reader, boxes) as restoring:

        def read(role: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
            role = "ema" if f"{role}/{name}" in taken else role
            return restoring.read(role, name, offset, shape)

        return made, made.restore_state(read)


def _from_hub(folder: Path, backend: str | None, recipe: Recipe | None, *, step: int | None, ema: bool) -> TrainedModel:
    from portatrain.backends.program import make_program
    from portatrain.checkpoint.interop.hub_folder import recipe_of, texts_of_folder
    from portatrain.checkpoint.interop.hub_start import reader_of

    if step is not None or ema:
        what = "a step" if step is not None else "averages"
        raise UserError(f"folder {folder}", expected=f"a run, which has {what}", got="one model", do="Leave it out.")
    chosen = recipe if recipe is not None else recipe_of(folder)
    made = _backend(make_program(chosen), backend)
    state = made.restore_state(reader_of(folder, chosen, made.program))
    return TrainedModel(chosen, 0, made, state, lambda: texts_of_folder(folder))


def _backend(program: Program, name: str | None) -> Backend:
    """Return a backend on one device that holds the weights of a program alone."""
    from portatrain.backends.base import backend_class, default_backend
    from portatrain.backends.program import weights_alone

    return backend_class(name or default_backend())(weights_alone(program))


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
            do='Load the recipe file of the run and pass it: load(path, recipe=load_recipe("my_model.py")).',
        ) from error
