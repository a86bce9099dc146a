"""Turn the result of every step into a record: for the sinks, the hooks, the history of losses and the skip count."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from portatrain.backends.base import StepResult
from portatrain.backends.limits import Limits
from portatrain.checkpoint.begun import BEGAN, begun
from portatrain.errors import UserError
from portatrain.recipe import Recipe
from portatrain.runs.events import Kind
from portatrain.training import continuity
from portatrain.training.hook_calls import HookCalls
from portatrain.training.metrics import RunInfo, StepRecord
from portatrain.training.metrics.broadcast import Broadcast
from portatrain.training.metrics.flops import Peak, mfu
from portatrain.training.rewind import Spike
from portatrain.training.spike_guard import SpikeGuard
from portatrain.training.statistics import flat
from portatrain.training.view import TrainingView

NUMBERS = 256
"""The numbers of layers that a step records in the mean, at most."""


def _layers(found: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Return the metrics of layers as lists, if they are due at this step."""
    n = sum(math.prod(value.shape) for value in found.values())
    return {k: _rounded(v.tolist()) for k, v in found.items()} if n and step % -(-n // NUMBERS) == 0 else {}


def _above(*values: tuple[str, float, float]) -> str:
    """Return the values, given as (name, value, limit), that are above their limits or not finite, in words."""
    found = [
        f"{name} {x:.6g} above {most:.6g}" if x > most else f"{name} {x}" for name, x, most in values if not x <= most
    ]
    return " and ".join(found)


def _rounded(x: Any) -> Any:
    return [_rounded(y) for y in x] if isinstance(x, list) else float(f"{x:.6g}")


class StepRecords:
    """The records of one attempt's steps.

    history: [step, loss] of the last steps, for checkpoints. skipped: the steps that changed nothing, because the loss
    or the gradient was not finite or a spike. replay: the continuity check that compares losses with those of an
    earlier attempt, while it lasts; `judge(step, verdict)` gets its verdict. guard: the rule for spikes.
    """

    info: RunInfo
    began_s: float

    def __init__(
        self,
        recipe: Recipe,
        view: TrainingView,
        hooks: HookCalls,
        sinks: Broadcast,
        judge: Callable[[int, Mapping[str, Any]], None],
    ) -> None:
        self._recipe, self._view, self._hooks, self._sinks, self._judge = recipe, view, hooks, sinks, judge
        self.history: deque[list[float]] = deque(maxlen=32)
        self.skipped: list[int] = []
        self.replay: continuity.Replay | None = None
        self.guard = SpikeGuard(recipe.spikes, view.backend)
        self._began: Mapping[str, Any] = {}

    def start(self) -> None:
        """Time the next step from now, so that a save or an evaluation is not part of a step."""
        self._ended_s = time.perf_counter()

    def add(
        self, step: int, result: StepResult, waited_s: float, statistics: Mapping[str, Any], memory_bytes: int | None
    ) -> None:
        """Record a step that took until now and waited `waited_s` for data. This waits for the device.

        statistics: norms that were measured before the step; without any, those of the result.

        Raises UserError if more than `max_skips` steps were skipped, or if the replay finds another curve; Spike if the
        run is to go back before this step.
        """
        loss, norm, skipped = float(result.loss), float(result.grad_norm), bool(int(result.skipped))
        now_s = time.perf_counter()
        step_s, self._ended_s = now_s - self._ended_s, now_s
        info, recipe = self.info, self._recipe
        peak = Peak(flops_per_s=info.peak_flops, source=info.peak_source) if info.peak_flops else None
        share = recipe.batch_at(step) / recipe.batch
        record = StepRecord(
            step=step,
            loss=loss,
            grad_norm=norm,
            lr=recipe.optimizer.lr * recipe.lr_scale(step),
            tokens=recipe.tokens_after(step, info.tokens_per_step // recipe.batch),
            time_s=now_s - self.began_s,
            step_s=step_s,
            tokens_per_s=share * info.tokens_per_step / step_s,
            mfu=mfu(flops=info.flops_per_step and share * info.flops_per_step, seconds=step_s, peak=peak),
            memory_bytes=memory_bytes,
            data_wait_s=waited_s,
            skipped=skipped,
            aux={k: float(v) for k, v in result.aux.items()},
            statistics=flat(statistics or result.statistics),
            layers=_layers(result.layers, step),
        )
        self._sinks.step(record)
        self._view.metrics |= {"loss": loss, "grad_norm": norm, "lr": record.lr, **record.aux}
        self._hooks.call("on_step", record)
        self.history.append([step, loss])
        if self.replay is not None and (found := self.replay.add(step, loss)) is not None:
            self.replay = None
            self._judge(step, found)
        limits = self.guard.add(step, loss, norm, skipped=skipped)
        if skipped:
            self._skip(step, loss, norm, limits)

    def meta(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the last steps, and of the import from which the run began."""
        return {"history": list(self.history), **self.guard.meta(), **({BEGAN: self._began} if self._began else {})}

    def restore(self, meta: Mapping[str, Any], *, changed: bool) -> None:
        """Go on from what a checkpoint keeps. `changed`: the recipe decides other steps from here on, to which the
        window for spikes says nothing."""
        self.history.extend(meta.get("history", ()))
        self._began = begun(meta)
        if not changed:
            self.guard.restore(meta)

    def _skip(self, step: int, loss: float, norm: float, limits: Limits | None) -> None:
        """Record a step that changed nothing; `limits`: those that it was beyond, if it is a spike."""
        self.skipped.append(step)
        counted = {"step": step, "loss": loss, "grad_norm": norm, "skipped": len(self.skipped)}
        if limits is None:
            self._sinks.event(Kind.SKIPPED, **counted)
        else:
            known = {"loss_limit": limits[0], "grad_norm_limit": limits[1]}
            self._sinks.event(Kind.SPIKE, **counted, **known, samples=list(self._recipe.numbers_of(step)))
            if self.guard.rewinds:
                raise Spike(step, _above(("loss", loss, limits[0]), ("gradient norm", norm, limits[1])))
        if len(self.skipped) > self._recipe.max_skips:
            raise UserError(
                f"step {step} of {self._recipe.name}",
                expected=f"at most max_skips={self._recipe.max_skips} steps whose loss or gradient is not finite"
                f"{' or is a spike' if self._recipe.spikes else ''}",
                got=f"loss {loss}, gradient norm {norm}, the {len(self.skipped)}th such step "
                f"(first: step {self.skipped[0]})",
                do="The parameters are from the last step with an update. Lower optimizer.lr, lengthen the warm-up, or "
                "check the data of that step.",
            )
