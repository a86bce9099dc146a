"""The records that the trainer hands to its sinks, and what a sink is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from portatrain.training.metrics.flops import measured_cpu_peak

if TYPE_CHECKING:
    from portatrain.model.module import Definition
    from portatrain.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """The facts that stay the same during an attempt. They are known before its first step."""

    run: str
    """The run's name."""
    run_dir: str
    attempt: int
    steps: int
    """Steps of the whole run."""
    first_step: int
    """The first one that this attempt trains, from 1."""
    backend: str
    device: str
    """What it runs on, in words: ``2 x H100`` or ``CPU``."""
    mesh: str
    """As on the command line: ``fsdp=4,tensor=2``; ``1`` for one device."""
    precision: str
    parameters: int
    trainable: int
    """Parameters, and those of them that are trained."""
    tokens_per_step: int
    """Tokens of a global batch, or samples if a sample has no tokens."""
    unit: str = "tokens"
    """What ``tokens`` counts: tokens or samples."""
    flops_per_step: float | None = None
    """Model FLOPs of a step, forward and backward (see ``flops``); None where the model does not say."""
    peak_flops: float | None = None
    """FLOPs a second that MFU is relative to, over all devices; None where none is known."""
    peak_source: str = ""
    """Where that figure comes from."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    """The run's own, the same in all its attempts; '': a run of before there were any."""

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        definition: Definition,
        *,
        run_dir: Path,
        attempt: int,
        first_step: int,
        backend: str,
        device: str,
        devices: int,
        mesh: str,
        id: str = "",
    ) -> RunInfo:
        """Return the facts of an attempt at `recipe` on `devices` devices of the kind `device`."""
        length, per_sample = recipe.data.tokens_per_sample(), recipe.flops_per_sample()
        peak = measured_cpu_peak() if device.startswith("cpu") and per_sample else None
        return cls(
            run=run_dir.name,
            run_dir=str(run_dir),
            attempt=attempt,
            steps=recipe.steps,
            first_step=first_step,
            backend=backend,
            device=f"{devices} x {device}",
            mesh=mesh,
            precision=recipe.precision,
            parameters=definition.parameters,
            trainable=sum(t.size for n, t in definition.params.items() if recipe.trains(n)),
            tokens_per_step=recipe.batch * (length or 1),
            unit="tokens" if length else "samples",
            flops_per_step=None if per_sample is None else per_sample * recipe.batch,
            peak_flops=peak.flops_per_s if peak else None,
            peak_source=peak.source if peak else "",
            recipe=recipe.to_json(),
            id=id,
        )


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step; a line of metrics.jsonl."""

    step: int
    """From 1."""
    loss: float
    """Mean over the weight of the global batch, before the update."""
    grad_norm: float
    """Of the whole gradient, before clipping."""
    lr: float
    tokens: int
    """Seen since the start of the run, this step's included."""
    time_s: float
    """Since the attempt began."""
    step_s: float
    """Of this step, from the end of the one before; waiting for data included."""
    tokens_per_s: float
    mfu: float | None = None
    """flops_per_step / step_s / peak_flops; None where either is not known."""
    memory_bytes: int | None = None
    """Peak on this process's devices, or of its host memory on a CPU."""
    data_wait_s: float = 0.0
    """Part of step_s spent waiting for the batch."""
    skipped: bool = False
    """Whether the update was left out because loss or gradient was not finite."""
    aux: Mapping[str, float] = field(default_factory=dict)
    """What the model reported through ``ops.aux``."""


@dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """One evaluation on the validation split; an event of kind ``eval``."""

    step: int
    """Steps trained so far."""
    loss: float
    samples: int
    time_s: float
    """Since the attempt began."""
    eval_s: float
    """Of the evaluation."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What else was computed: accuracy, bits_per_byte."""


class Sink(Protocol):
    """A receiver of metrics. The trainer calls ``start`` first and ``end`` last, even after an error."""

    def start(self, info: RunInfo) -> None: ...

    def step(self, record: StepRecord) -> None: ...

    def eval(self, record: EvalRecord) -> None: ...

    def event(self, kind: str, **fields: object) -> None:
        """Record an event that is not a step: ``compiled``, ``interrupted``, ``skipped`` ..."""
        ...

    def end(self, summary: Mapping[str, object]) -> None:
        """Record the results of the run. After an interruption or an error, ``summary`` has those known so far, and
        ``status``."""
        ...
