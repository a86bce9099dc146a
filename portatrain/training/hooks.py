"""Hooks, which add code to the training loop, and the hooks that come with portatrain.

A hook is a frozen dataclass listed in `Recipe.hooks`, with any of the methods of `Hook`; it is part of the recipe, so
it is saved with the run and has no state of its own between runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from portatrain.data.own import gives_documents
from portatrain.data.spec import DataSpec, Mixture, PackedTokens, Preferences, has_text
from portatrain.errors import UserError
from portatrain.runs.events import Kind
from portatrain.training.metrics.record import EvalRecord, StepRecord

if TYPE_CHECKING:
    from portatrain.model.module import Definition
    from portatrain.recipe import Recipe
    from portatrain.training.view import TrainingView


@dataclass(frozen=True, kw_only=True)
class Hook:
    """Base class of hooks. Override the methods that you need; ``run`` gives access to the training."""

    def check(self, recipe: Recipe, definition: Definition) -> None:
        """Raise UserError if the hook does not fit the recipe. It is called before the run writes anything."""

    def on_start(self, run: TrainingView) -> None:
        """Run before the first step of an attempt."""

    def on_step(self, run: TrainingView, record: StepRecord) -> None:
        """Run after every step, when the sinks have its record."""

    def on_evaluation(self, run: TrainingView, record: EvalRecord) -> None:
        """Run after every evaluation."""

    def on_save(self, run: TrainingView) -> None:
        """Run after a save has begun: the state after ``run.step`` steps is being written."""

    def on_end(self, run: TrainingView) -> Mapping[str, Any]:
        """Run after the last step and evaluation; return entries of the run's summary.

        If this method raises an error, the run still ends as done.
        """
        return {}


@dataclass(frozen=True, kw_only=True)
class TrigramBaseline(Hook):
    """A hook that scores an interpolated Kneser-Ney byte 3-gram model on the run's own split, for comparison."""

    def check(self, recipe: Recipe, definition: Definition) -> None:
        _require_bytes(self, recipe)
        if isinstance(recipe.data, (Mixture, Preferences)):
            kind = type(recipe.data).__name__
            raise _unfit(self, recipe, "one source of text", f"{kind}, which has no single stream of bytes")

    def on_end(self, run: TrainingView) -> Mapping[str, Any]:
        from portatrain.data import KneserNey

        streams = run.data.streams
        if not {"train", "validation"} <= set(streams):
            return {}
        run.event(Kind.SCORING)
        bits = KneserNey(streams["train"]).bits_per_byte(streams["validation"])
        return {"references": {"byte 3-gram model (Kneser-Ney), bits per byte": bits}}


@dataclass(frozen=True, kw_only=True)
class TextSample(Hook):
    """A hook that lets a byte-level language model continue `prompt` by `length` bytes, at `temperature`."""

    prompt: str = "def "
    """The text to continue."""
    length: int = 200
    """The number of bytes to generate."""
    temperature: float = 0.7
    """The divisor of the logits before a byte is drawn."""

    def check(self, recipe: Recipe, definition: Definition) -> None:
        _require_bytes(self, recipe)
        if not callable(getattr(definition.model, "predict", None)):
            got = f"{type(definition.model).__name__}, which has none"
            raise _unfit(self, recipe, "a model with a method predict(ops, batch)", got)

    def on_end(self, run: TrainingView) -> Mapping[str, Any]:
        from portatrain.data.texts import texts_of

        run.event(f"sampling_{self.length}_bytes")
        texts = texts_of(run.recipe.data)
        (found,) = run.generate([texts.ids(self.prompt)], max_tokens=self.length, temperature=self.temperature)
        return {"sample": f"{self.prompt}{texts.after(found.prompt, found.tokens)}"}


@dataclass(frozen=True, kw_only=True)
class Tasks(Hook):
    """A hook that runs tasks of lm-evaluation-harness on the live model, after every evaluation of the run.

    The results are on the run's curve at their step, in the report and in trackers, as those of `portatrain eval`.
    """

    tasks: tuple[str, ...]
    """The names of tasks, groups or tags."""
    folder: str | None = None
    """The folder with definitions of tasks (YAML); then only these are known. None: those of the package."""
    fewshot: int | None = None
    """Examples before each question. None: as each task says."""
    limit: int | None = None
    """Take the first documents of each task only. None: all."""
    rows: int = 8
    """Texts of a batch."""

    def check(self, recipe: Recipe, definition: Definition) -> None:
        from portatrain.training.harness import check_tasks

        if not callable(getattr(definition.model, "predict", None)):
            got = f"{type(definition.model).__name__}, which has none"
            raise _unfit(self, recipe, "a model with a method predict(ops, batch)", got)
        check_tasks(self.tasks, self.folder)

    def on_evaluation(self, run: TrainingView, record: EvalRecord) -> None:
        from portatrain.training.harness import evaluate_tasks
        from portatrain.training.trained import TrainedModel

        found = evaluate_tasks(
            TrainedModel(run.recipe, run.step, *run.live()),
            self.tasks,
            folder=self.folder,
            fewshot=self.fewshot,
            limit=self.limit,
            rows=self.rows,
            bootstraps=0,
        )
        for task, metrics in found.metrics.items():
            if metrics:
                run.event(
                    Kind.TASK,
                    step=record.step,
                    task=task,
                    metrics=dict(metrics),
                    samples=found.samples.get(task),
                    shots=found.shots.get(task),
                    backend=run.backend,
                    version=found.versions.get(task, ""),
                    release=f"lm_eval {found.release}",
                )


def _require_bytes(hook: Hook, recipe: Recipe) -> None:
    """Raise UserError unless each token of the data is a byte of text."""
    for source in _sources(recipe.data):
        kind = type(source).__name__
        if isinstance(source, PackedTokens):
            from portatrain.data.store.reading import gives_bytes

            if not gives_bytes(source):
                raise _unfit(hook, recipe, "text in which each byte is a token", "a packed store of other tokens")
        elif not (has_text(source) or gives_documents(source)):
            raise _unfit(hook, recipe, "text in which each byte is a token", kind)
        tokenizer = getattr(source, "tokenizer", None)
        if tokenizer is not None:
            raise _unfit(hook, recipe, "text in which each byte is a token", f"{kind} with tokenizer={tokenizer}")


def _sources(data: DataSpec) -> tuple[DataSpec, ...]:
    return data.sources if isinstance(data, Mixture) else (data,)


def _unfit(hook: Hook, recipe: Recipe, expected: str, got: str) -> UserError:
    return UserError(
        f"hook {type(hook).__name__} of recipe {recipe.name}",
        expected=expected,
        got=got,
        do="Leave the hook out of the recipe's hooks, or with --set hooks=() leave out all of them.",
    )
