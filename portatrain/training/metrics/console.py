"""Metrics for a person: a live line with the time left on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from portatrain.errors import visible
from portatrain.runs import first_steps, profiles
from portatrain.runs.events import Kind
from portatrain.runs.verdict import effect_in_words, in_words
from portatrain.system.text import counted, duration, si
from portatrain.training.metrics.record import EvalRecord, RunInfo, StepRecord


class ConsoleSink:
    """A ``Sink`` on ``stream`` (standard error), where progress does not mix with answers.

    "mean loss" is a running mean over about the last ten steps; metrics.jsonl has the loss of every step.
    """

    def __init__(self, stream: TextIO | None = None, *, every_s: float = 5.0) -> None:
        """``every_s``: seconds between two lines if the stream is not a terminal."""
        self._stream = stream or sys.stderr
        self._every_s = every_s
        self._printed_s = float("-inf")
        self._info: RunInfo | None = None
        self._progress: Any = None
        self._task: Any = None
        self._rate = 0.0  # smoothed units a second
        self._loss = float("nan")  # smoothed
        self._last: StepRecord | None = None
        self._steps = 0  # of this attempt
        self._last_printed = 0

    def start(self, info: RunInfo) -> None:
        self._info = info
        peak = ""
        if info.peak_flops:
            peak = f"; MFU is relative to {info.peak_flops / 1e12:.3g} TFLOP/s ({info.peak_source})"
        self._line(
            f"{info.run}: {info.parameters / 1e6:.2f} M parameters, {counted(info.steps, 'steps')} of "
            f"{info.tokens_per_step} {info.unit}, {info.precision}, {info.backend} on {info.device}, mesh {info.mesh}"
            f"{peak}"
        )
        if self._stream.isatty():
            self._start_progress(info)

    def _start_progress(self, info: RunInfo) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(compact=True),
            console=Console(file=self._stream),
            expand=True,
            speed_estimate_period=60,
        )
        self._progress.start()
        self._task = self._progress.add_task(
            "train", total=info.steps, completed=info.first_step - 1, status="compiling the first step"
        )

    def step(self, record: StepRecord) -> None:
        # The rate of one step jumps about; this one forgets with a time constant of ten steps. It begins at the
        # second step, as the first one compiles.
        self._steps += 1
        self._rate = record.tokens_per_s if self._steps <= 2 else 0.9 * self._rate + 0.1 * record.tokens_per_s
        if record.loss == record.loss:
            started = self._loss == self._loss
            self._loss = 0.9 * self._loss + 0.1 * record.loss if started else record.loss
        self._last = record
        if self._progress is not None:
            self._progress.update(self._task, completed=record.step, status=self._status(record))
        elif time.monotonic() - self._printed_s >= self._every_s:
            self._plain(record)

    def _status(self, record: StepRecord) -> str:
        unit = self._info.unit if self._info else "tokens"
        parts = [f"mean loss {self._loss:.4f}", f"{si(self._rate)} {unit}/s"]
        if record.mfu is not None and record.tokens_per_s > 0:  # of the same steps as the rate
            parts.append(f"MFU {record.mfu * self._rate / record.tokens_per_s:.1%}")
        if record.step_s > 0 and record.data_wait_s / record.step_s > 0.05:
            parts.append(f"data wait {record.data_wait_s / record.step_s:.0%}")
        if record.skipped:
            finite = math.isfinite(record.loss) and math.isfinite(record.grad_norm)
            parts.append("skipped: a spike" if finite else "skipped: not finite")
        return "  ".join(parts)

    def _plain(self, record: StepRecord) -> None:
        steps = self._info.steps if self._info else record.step
        per_step_s = self._info.tokens_per_step / self._rate if self._info and self._rate > 0 else 0.0
        left_s = per_step_s * (steps - record.step)
        eta = f"  eta {duration(left_s)}" if self._steps > 1 else ""
        self._line(f"step {record.step}/{steps}  {self._status(record)}{eta}")
        self._printed_s = time.monotonic()
        self._last_printed = record.step

    def eval(self, record: EvalRecord) -> None:
        more = "".join(f"  {name.replace('_', ' ')} {value:.4g}" for name, value in record.metrics.items())
        self._line(f"step {record.step}: validation loss {record.loss:.4f}{more}")

    def event(self, kind: str, **fields: object) -> None:
        if kind == Kind.RESUMED:
            self._line(f"resumed from the checkpoint of step {fields.get('step')}. Continuity: {in_words(fields)}")
            return
        if kind == Kind.CHANGE_MEASURED:
            self._line(f"the change after step {fields.get('step')} alone: {effect_in_words(fields)}")
            return
        if kind == Kind.COMMITTED:  # said when it began: saving
            return
        if kind == Kind.KERNELS:  # events.jsonl has the reasons against the others
            chosen = fields.get("choices")
            names = {f"{c['operation']}={c['kernel']}" for c in chosen} if isinstance(chosen, list) else set()
            if names:
                self._line(f"kernels: {', '.join(sorted(names))}")
            return
        if kind == Kind.COMPILE_CACHE:  # events.jsonl has the folder
            return
        if kind == Kind.FIRST_STEP:
            self._line(first_steps.in_words(fields))
            return
        if kind == Kind.PROFILED:
            folder = f"{self._info.run_dir}/attempts/{self._info.attempt}" if self._info else "."
            for line in profiles.in_words(fields, folder):
                self._line(line)
            return
        what = f": {fields.pop('what')}" if "what" in fields else ""
        short = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in fields.items()}
        more = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in short.items())
        self._line(f"{kind.replace('_', ' ')}{what}{': ' + more if more else ''}")

    def end(self, summary: Mapping[str, object]) -> None:
        if self._progress is not None:
            with contextlib.suppress(OSError, ValueError):
                self._progress.stop()
            self._progress = None
        elif self._last is not None and self._last_printed != self._last.step:
            self._plain(self._last)

    def _line(self, text: str) -> None:
        text = visible(text)
        with contextlib.suppress(OSError, ValueError):  # the terminal is gone: the run continues without it
            if self._progress is not None:
                self._progress.console.print(text, markup=False, highlight=False)
            else:
                print(text, file=self._stream, flush=True)
