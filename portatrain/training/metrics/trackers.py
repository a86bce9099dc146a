"""The trackers that come with portatrain: Weights & Biases and TensorBoard. Each is imported when it is named."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from portatrain.errors import UserError
from portatrain.system.plugins import Registry, lacks
from portatrain.training.metrics.record import EvalRecord, RunInfo, Sink, StepRecord


def scalars(record: StepRecord | EvalRecord, prefix: str) -> dict[str, float]:
    """Return the numbers of ``record`` by ``prefix/name``: nested ones flattened, without None and the step."""
    found = {}
    for name, value in asdict(record).items():
        for key, number in value.items() if isinstance(value, dict) else ((name, value),):
            if key != "step" and number is not None:
                found[f"{prefix}/{key}"] = float(number)
    return found


def _import(module: str, extra: str) -> Any:
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
        self._wandb = _import("wandb", "wandb")
        self._run: Any = None

    def start(self, info: RunInfo) -> None:
        # All attempts are one curve. A run that began without an id is known by the name of its folder; wandb refuses
        # some characters in an id.
        self._run = self._wandb.init(
            id=info.id or re.sub("[/\\\\#?%:;,]", "-", info.run),
            name=info.run,
            dir=info.run_dir,
            config=dict(info.recipe),
            resume="allow",
        )

    def step(self, record: StepRecord) -> None:
        self._run.log(scalars(record, "train"), step=record.step)

    def eval(self, record: EvalRecord) -> None:
        self._run.log(scalars(record, "validation"), step=record.step)

    def event(self, kind: str, **fields: object) -> None:
        pass  # events.jsonl has the events; wandb has nothing like them

    def end(self, summary: Mapping[str, object]) -> None:
        if self._run is not None:
            self._run.summary.update(dict(summary))
            self._run.finish()


class TensorBoardSink:
    """A ``Sink`` that writes TensorBoard event files into the run directory."""

    def __init__(self) -> None:
        self._module = _import("tensorboardX", "tensorboard")
        self._writer: Any = None

    def start(self, info: RunInfo) -> None:
        self._writer = self._module.SummaryWriter(f"{info.run_dir}/attempts/{info.attempt}/tensorboard")

    def step(self, record: StepRecord) -> None:
        for name, value in scalars(record, "train").items():
            self._writer.add_scalar(name, value, record.step)

    def eval(self, record: EvalRecord) -> None:
        for name, value in scalars(record, "validation").items():
            self._writer.add_scalar(name, value, record.step)

    def event(self, kind: str, **fields: object) -> None:
        self._writer.add_text(kind, ", ".join(f"{key}={value}" for key, value in fields.items()))

    def end(self, summary: Mapping[str, object]) -> None:
        if self._writer is not None:
            self._writer.close()


TRACKERS = Registry(
    kind="--track",
    group="portatrain.trackers",
    ours={
        "wandb": "portatrain.training.metrics.trackers:WandbSink",
        "tensorboard": "portatrain.training.metrics.trackers:TensorBoardSink",
    },
)
"""The trackers that ``--track`` can name. A package adds a class that is made without arguments, by an entry point."""


def tracker(name: str) -> Sink:
    """Return a new sink of the tracker `name`.

    Raises:
        UserError: there is no such tracker, its package is missing or broken, or it is no sink.
    """
    found = TRACKERS.load(name)
    if missing := lacks(found, Sink):
        raise UserError(
            f"--track {name}",
            expected="a class with the methods of portatrain.training.metrics.Sink",
            got=f"{getattr(found, '__qualname__', found)}, without {', '.join(missing)}",
            do="Add them to the package that registers it.",
        )
    sink: Sink = found()
    return sink
