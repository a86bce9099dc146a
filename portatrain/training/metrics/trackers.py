"""The trackers that `--track` can name: Weights & Biases, TensorBoard, trackio, MLflow, those of other packages, and
classes in files.

Each is imported when it is named.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from portatrain.errors import UserError, choice
from portatrain.recipe.loading import import_file
from portatrain.runs.reported import scalars as scalars_of_event
from portatrain.system.plugins import Registry, lacks
from portatrain.training.metrics.record import EvalRecord, RunInfo, Sink, StepRecord


def scalars(record: StepRecord | EvalRecord, prefix: str) -> dict[str, float]:
    """Return the numbers of ``record`` by ``prefix/name``: nested ones flattened, without None and the step.

    A number of a layer is ``prefix/name/layer``; of a list of numbers the least and the largest are
    ``prefix/name/layer/min`` and ``/max``.
    """
    found: dict[str, float] = {}
    fields = asdict(record)
    for name, layers in fields.pop("layers", {}).items():
        for layer, value in enumerate(layers):
            at = f"{prefix}/{name}/{layer}"
            found |= {f"{at}/min": min(value), f"{at}/max": max(value)} if isinstance(value, list) else {at: value}
    for name, value in fields.items():
        for key, number in value.items() if isinstance(value, dict) else ((name, value),):
            if key != "step" and number is not None:
                found[f"{prefix}/{key}"] = float(number)
    return found


def run_key(info: RunInfo) -> str:
    """Return the id of a run; of one that began without an id, the name of its folder in characters that trackers
    take."""
    return info.id or re.sub("[/\\\\#?%:;,']", "-", info.run)


def imported(module: str, extra: str) -> Any:
    """Return a tracker's module; raise UserError, with the command that installs it, if it is missing."""
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"metrics to {extra}",
            expected=f"{module} to be installed",
            got="no such package",
            do=f"Install it: pip install 'portatrain[{extra}]'.",
        )
    return importlib.import_module(module)


class WandbSink:
    """A ``Sink`` to Weights & Biases; WANDB_PROJECT, WANDB_MODE and its other variables apply."""

    def __init__(self) -> None:
        self._wandb = imported("wandb", "wandb")
        self._run: Any = None
        self._at = 0

    def start(self, info: RunInfo) -> None:
        # All attempts are one curve. A run that began without an id is known by the name of its folder; wandb refuses
        # some characters in an id.
        self._run = self._wandb.init(
            id=run_key(info), name=info.run, dir=info.run_dir, config=dict(info.recipe), resume="allow"
        )

    def step(self, record: StepRecord) -> None:
        self._at = record.step
        self._run.log(scalars(record, "train"), step=record.step)

    def eval(self, record: EvalRecord) -> None:
        self._run.log(scalars(record, "validation"), step=record.step)

    def event(self, kind: str, **fields: object) -> None:
        # events.jsonl has the events; wandb has nothing like them, but for the numbers of hooks.
        found = scalars_of_event(kind, fields)
        if self._run is not None and found:
            self._run.log(found, step=fields.get("step", self._at))

    def end(self, summary: Mapping[str, object]) -> None:
        if self._run is not None:
            self._run.summary.update(dict(summary))
            self._run.finish()


class TensorBoardSink:
    """A ``Sink`` that writes TensorBoard event files into the run directory."""

    def __init__(self) -> None:
        self._module = imported("tensorboardX", "tensorboard")
        self._writer: Any = None
        self._at = 0

    def start(self, info: RunInfo) -> None:
        self._writer = self._module.SummaryWriter(f"{info.run_dir}/attempts/{info.attempt}/tensorboard")

    def step(self, record: StepRecord) -> None:
        self._at = record.step
        for name, value in scalars(record, "train").items():
            self._writer.add_scalar(name, value, record.step)

    def eval(self, record: EvalRecord) -> None:
        for name, value in scalars(record, "validation").items():
            self._writer.add_scalar(name, value, record.step)

    def event(self, kind: str, **fields: object) -> None:
        self._writer.add_text(kind, ", ".join(f"{key}={value}" for key, value in fields.items()))
        for name, value in scalars_of_event(kind, fields).items():
            self._writer.add_scalar(name, value, fields.get("step", self._at))

    def end(self, summary: Mapping[str, object]) -> None:
        if self._writer is not None:
            self._writer.close()


TRACKERS = Registry(
    kind="--track",
    group="portatrain.trackers",
    ours={
        "wandb": "portatrain.training.metrics.trackers:WandbSink",
        "tensorboard": "portatrain.training.metrics.trackers:TensorBoardSink",
        "trackio": "portatrain.training.metrics.trackio_sink:TrackioSink",
        "mlflow": "portatrain.training.metrics.mlflow_sink:MlflowSink",
    },
)
"""The trackers that ``--track`` can name. A package adds a class that is made without arguments, by an entry point."""


def resolved(what: str, names: Iterable[str]) -> tuple[str, ...]:
    """Return `names` without repetitions, and the file of FILE.py:CLASS as an absolute path.

    `what` is the option that names them.

    Raises:
        UserError: there is no such tracker, file or class.
    """
    found = []
    for name in names:
        if _in_file(name):
            file, _, of = name.rpartition(":")
            _class_in_file(what, name)
            name = f"{Path(file).resolve()}:{of}"
        elif name not in TRACKERS:
            own = f" One of your own is FILE.py:CLASS, or a name under {TRACKERS.group}: see docs/start/tracker.md."
            raise choice(what, name, TRACKERS.names(), own)
        found.append(name)
    return tuple(dict.fromkeys(found))


def tracker(name: str) -> Sink:
    """Return a new sink of the tracker `name`, which may be FILE.py:CLASS.

    Raises:
        UserError: there is no such tracker, its package is missing or broken, it is no sink, or it cannot be made.
    """
    found = _class_in_file("--track", name) if _in_file(name) else TRACKERS.load(name)
    if missing := lacks(found, Sink):
        raise UserError(
            f"--track {name}",
            expected="a class with the methods of portatrain.training.metrics.Sink",
            got=f"{getattr(found, '__qualname__', found)}, without {', '.join(missing)}",
            do="Add them to " + ("that file." if _in_file(name) else "the package that registers it."),
        )
    try:
        sink: Sink = found()
    except UserError:
        raise
    except Exception as error:  # the user's code
        raise UserError(
            f"--track {name}",
            expected="a class that can be made without arguments",
            got=f"{type(error).__name__}: {error}",
            do="Correct its __init__.",
        ) from error
    return sink


def _in_file(name: str) -> bool:
    return ".py:" in name


def _class_in_file(what: str, name: str) -> Any:
    """Return the class of FILE.py:CLASS."""
    file, _, of = name.rpartition(":")
    found = getattr(import_file(Path(file).resolve(), what=f"{what} {name}"), of, None)
    if not isinstance(found, type):
        raise UserError(
            f"{what} {name}",
            expected=f"a class {of} in {file}",
            got="none of that name" if found is None else f"{of}, which is no class",
            do="Name the class of the tracker, as in my_tracker.py:LabTracker.",
        )
    return found
