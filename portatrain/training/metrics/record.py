"""The records that the trainer gives to its sinks, and the Protocol of a sink."""

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
    """The run directory on this machine."""
    attempt: int
    """The number of the attempt, from 1."""
    steps: int
    """Steps of the whole run."""
    first_step: int
    """The first step that this attempt trains, from 1."""
    backend: str
    """The name of the backend."""
    device: str
    """The devices in words: ``2 x H100`` or ``CPU``."""
    mesh: str
    """As on the command line: ``fsdp=4,tensor=2``; ``1`` for one device."""
    precision: str
    """The precision of the recipe."""
    parameters: int
    """The number of parameters of the model."""
    trainable: int
    """The number of parameters that are trained."""
    tokens_per_step: int
    """Tokens of a global batch, or samples if a sample has no tokens."""
    unit: str = "tokens"
    """The unit of ``tokens_per_step`` and of ``tokens`` in records: 'tokens' or 'samples'."""
    flops_per_step: float | None = None
    """Model FLOPs of a step, forward and backward (see ``flops``); None if the model has no ``flops_per_sample``."""
    peak_flops: float | None = None
    """The FLOPs a second of all devices, to which MFU is relative; None if unknown."""
    peak_source: str = ""
    """The source of ``peak_flops``."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """The recipe as JSON."""
    id: str = ""
    """The id of the run, the same in all its attempts; '' for a run that began before runs had ids."""

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
    """The norm of the whole gradient before clipping."""
    lr: float
    """The learning rate of the step."""
    tokens: int
    """The number of tokens since the start of the run, this step included."""
    time_s: float
    """Seconds since the attempt began."""
    step_s: float
    """Seconds from the end of the previous step to the end of this one, with the wait for data."""
    tokens_per_s: float
    """The tokens, or samples, of the step divided by step_s."""
    mfu: float | None = None
    """flops_per_step / step_s / peak_flops; None if one of them is unknown."""
    memory_bytes: int | None = None
    """The peak memory of this process's devices, or of the process itself on a CPU."""
    data_wait_s: float = 0.0
    """The part of step_s in which training waited for the batch."""
    skipped: bool = False
    """True if the update was skipped because loss or gradient was not finite."""
    aux: Mapping[str, float] = field(default_factory=dict)
    """The values that the model recorded by ``ops.aux``."""
    statistics: Mapping[str, float] = field(default_factory=dict)
    """The norms of parameters, gradients and updates by tensor and layer, and activations, dead units and attention
    logits by module and layer, in the steps of ``statistics_every``."""
    layers: Mapping[str, Any] = field(default_factory=dict)
    """The values of ``ops.aux`` with ``reduce='layers'``: a number for each layer, or a list of numbers for each, to 6
    digits. Where they are more than 256 numbers, most steps leave them out, so that a step has no more in the mean."""


@dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """One evaluation on the validation split; an event of kind ``eval``."""

    step: int
    """The number of steps trained so far."""
    loss: float
    """The mean loss over the evaluated samples."""
    samples: int
    """The number of evaluated samples."""
    time_s: float
    """Seconds since the attempt began."""
    eval_s: float
    """Seconds that the evaluation took."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The other metrics: accuracy, bits_per_byte."""


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
