"""The training loop: data in, steps through a backend, metrics out. It knows no framework.

trainer = Trainer(recipe, run, TrainOptions(backend="jax"))
exit_code = trainer.run()
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

from portatrain.backends import kernels
from portatrain.backends.base import StepResult, backend_class, simulate_devices
from portatrain.backends.program import make_program
from portatrain.checkpoint.format_layout import check_tensors
from portatrain.checkpoint.restore import restored
from portatrain.checkpoint.saver import Checkpoints, check_newest
from portatrain.data import prefetch
from portatrain.errors import UserError
from portatrain.model.layout import unknown_axes
from portatrain.plan.recorded import of_run, ordered
from portatrain.recipe import Recipe
from portatrain.runs.attempt import Attempt, NullAttempt
from portatrain.runs.events import Kind
from portatrain.runs.run_dir import RunDir
from portatrain.system.exit_codes import INTERRUPTED, OK, RESUMABLE
from portatrain.system.processes import peak_rss_bytes
from portatrain.system.stop_signals import STRENGTHS, StopSignals
from portatrain.training import continuity, keep_best
from portatrain.training.evaluation import evaluate
from portatrain.training.hook_calls import HookCalls, check_hooks
from portatrain.training.metrics import EvalRecord, RunInfo, Sink, StepRecord
from portatrain.training.metrics.broadcast import Broadcast
from portatrain.training.metrics.flops import Peak, mfu
from portatrain.training.metrics.jsonl import JsonlSink
from portatrain.training.metrics.plot import draw
from portatrain.training.open_data import data_of
from portatrain.training.save_timer import SaveTimer
from portatrain.training.stop_requests import Leaving
from portatrain.training.view import TrainingView


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Where and how one attempt trains. Nothing here changes the loss curve; the recipe decides that."""

    backend: str
    mesh: str | None = None
    """'fsdp=4,tensor=2'; None: `devices` along fsdp."""
    devices: int | None = None
    stop_at: int | None = None
    """Save after this step and leave with exit code 85; None: train to the end."""
    accept_drift: str | None = None
    """A reason to go on although the continuity check fails; it is recorded."""
    checkpoints: str | None = None
    """A URL of an object store for the checkpoints, kept in the run directory; None: as that says, or inside it."""
    kernels: tuple[tuple[str, str], ...] = ()
    """(operation, kernel) of those named explicitly (`backends/kernels.py`)."""
    sinks: Sequence[Sink] = ()
    source: Mapping[str, Any] | None = None
    """How `portatrain train` was called, for attempt.json: what `launch resume` goes on from."""
    signals: StopSignals | None = None
    """Entered by the caller, so that a request to stop is seen from the start."""


def train(recipe: Recipe, run: RunDir, **options: Any) -> int:
    """Train `recipe` in `run`, going on from its newest checkpoint. `options` are the fields of `TrainOptions`.

    Returns the exit code: 0 done, 85 saved to be resumed, 130 interrupted and saved.

    Raises UserError, before anything is written, for what does not go together, and later for a run that ends in
    losses that are not finite.
    """
    return Trainer(recipe, run, TrainOptions(**options)).run()


class Trainer:
    """One attempt at a run. Hooks see its `view`."""

    def __init__(self, recipe: Recipe, run: RunDir, options: TrainOptions) -> None:
        self.recipe, self.run_dir, self.options, self.sinks = recipe, run, options, Broadcast(options.sinks)
        self.last_step = min(options.stop_at or recipe.steps, recipe.steps)
        mesh, backend = options.mesh, options.backend
        if mesh is None:
            mesh = f"fsdp={options.devices or 1}"
        program = dataclasses.replace(ordered(make_program(recipe, mesh=mesh), recipe), kernels=options.kernels)
        self.definition, self.mesh = program.definition, program.layout.mesh
        check_hooks(recipe, self.definition)
        simulate_devices(backend, self.mesh.devices)
        self.backend = backend_class(backend)(program)
        if self.backend.process:  # process 0 packs, and is the only one that writes or prints
            self.sinks = Broadcast()
            self.backend.agree(0)
        self.data = data_of(recipe, self.definition, run.data())
        if not self.backend.process:
            run.share_data()
            self.backend.agree(0)
        self.state: Any = None
        self.step = 0
        """Steps trained so far."""
        self._skipped: list[int] = []
        self._saved, self._saves, self._history = -1, 0, deque[list[float]](maxlen=32)
        self._save_timer, self._begun = SaveTimer(recipe.checkpoint_every_s), False
        self._replay: continuity.Replay | None = None
        self._last_eval: EvalRecord | None = None
        self._status, self._told = "failed", False
        """How the attempt ends, and whether its sinks have been started."""
        self._summary: dict[str, Any] = {}
        self.view = TrainingView(
            recipe=recipe,
            definition=self.definition,
            data=self.data,
            folder=run.path,
            backend=self.backend,
            state=lambda: self.state,
            step=lambda: self.step,
            event=self.event,
        )
        self.hooks = HookCalls(self.view)

    # ---- the loop

    def run(self) -> int:
        """Train to the end, or to where it is stopped; return the exit code. The curve is drawn however it ends."""
        try:
            return self._run()
        finally:
            if not self.backend.process and self._begun:
                draw(self.run_dir)

    def _run(self) -> int:
        kernels.taken()  # forget the choices of what ran in this process before
        about = self.backend.describe_device()
        info = {"backend": self.backend.name, "mesh": str(self.mesh), **about, "data": self.data.fingerprint}
        if self.options.source is not None:
            info["source"] = dict(self.options.source)
        if not self.backend.process:
            fingerprint = self.data.train.fingerprint if self.options.accept_drift is None else None
            check_newest(self.run_dir.checkpoints(), self.backend.program, fingerprint)
        with ExitStack() as stack:
            attempt = self._begin(info, stack)
            self._began_s, self._begun = time.perf_counter(), True
            try:
                self._train(attempt, about)
            except BaseException as error:
                self._summary = {**self._summary, "why": attempt.keep_error(error)}
                raise
            finally:
                self._end(attempt)
        return {"done": OK, "interrupted": INTERRUPTED}.get(self._status, RESUMABLE)

    def _train(self, attempt: Attempt | NullAttempt, about: Mapping[str, Any]) -> None:
        """The attempt from its first checkpoint to its last; `_status` and `_summary` say how it ended."""
        self.checkpoints = Checkpoints(
            self.run_dir.checkpoints(self.options.checkpoints),
            keep=self.recipe.retention,
            save_name=f"a{attempt.number}",
            process=self.backend.process,
            processes=self.backend.processes,
            guard=attempt.guard,
        )
        found = self._newest(attempt)
        self.step = int(found.meta["step"]) if found else 0
        self._info = self._run_info(attempt.number, about)
        attempt.note("plan.json", of_run(self.recipe, self.mesh, str(about["device"])))
        self._told = True
        self.sinks.start(self._info)
        for unknown in unknown_axes(self.definition, compute=self.recipe.compute, params=self.recipe.params):
            self.event(Kind.WARNING, what=str(unknown))
        if useless := keep_best.no_evaluated_save(self.recipe):
            self.event(Kind.WARNING, what=useless)
        if found:
            self._go_on(found)
        else:
            self.state = self.backend.init_state()
            # What a save on demand would have to compile within the grace.
            if self._stop.signals.grace_s is not None:
                continuity.record(self.backend, self.state, self.recipe, self.data.train, 0)
        if beyond := self.checkpoints.beyond_bytes(self.backend, self.state):
            self.event(Kind.SAVES_EXCEED_MEMORY, training_waits_for_gib_written=round(beyond / 2**30, 3))
        self.hooks.call("on_start")
        self._loop()
        self._stop.at("save", self.step)
        self._save(last=True)
        self.checkpoints.wait()
        self.backend.agree(0)  # together: whoever starts them may end the rest after the first one
        self._stop.at("eval", self.step)
        self._summary = self._finish() if self.step == self.recipe.steps else self._results()
        # Asked in the last evaluation, a run is not done: the next attempt evaluates, and that is all.
        asked = self._asked()
        if asked is None and self.step == self.recipe.steps:
            attempt.finish({"status": "done", **self._summary})
            self._status = "done"
        else:
            ends = {"interrupt": Kind.INTERRUPTED, "preempt": Kind.PREEMPTED}
            self._status = str(ends.get(asked or "", Kind.STOPPED))
            self.event(self._status, step=self.step, of=self.recipe.steps)
            attempt.write("summary.json", {"status": self._status, **self._summary})

    def _end(self, attempt: Attempt | NullAttempt) -> None:
        """Tell the sinks how the attempt ended, or its record alone if they have not been started."""
        if self._told:
            self.sinks.end({"status": self._status, **self._summary})
        else:
            attempt.event(Kind.END, status=self._status, **self._summary)

    def _begin(self, info: Mapping[str, Any], stack: ExitStack) -> Attempt | NullAttempt:
        """The attempt: process 0 begins one, which the others follow. `stack` ends it, and listens for what may."""
        first, signals = not self.backend.process, self.options.signals
        # A request to stop finds an attempt that can be told and closed, or none.
        with signals.staying() if first and signals is not None else nullcontext():
            attempt = self.run_dir.begin(self.recipe, info) if first else self._follow(self.backend.agree(0))
            stack.enter_context(attempt)
            if isinstance(attempt, Attempt):
                self.sinks.record = JsonlSink(attempt)
            self._stop = stack.enter_context(
                Leaving(
                    attempt,
                    self.run_dir.path,
                    process=self.backend.process,
                    processes=self.backend.processes,
                    signals=signals,
                    sinks=self.sinks,
                )
            )
        if first:
            self.backend.agree(attempt.number)
        return attempt

    def _follow(self, number: int) -> NullAttempt:
        return NullAttempt(number, self.run_dir.path / "attempts" / str(number), self.backend.process)

    def _run_info(self, attempt: int, about: Mapping[str, Any]) -> RunInfo:
        """Return what does not change during the attempt; `about` is the backend's description of its device."""
        return RunInfo.of(
            self.recipe,
            self.definition,
            run_dir=self.run_dir.path,
            attempt=attempt,
            first_step=self.step + 1,
            backend=self.backend.name,
            device=str(about["device"]),
            devices=int(about["devices"]),
            mesh=str(self.mesh),
            id=self._run_id(),
        )

    def _run_id(self) -> str:
        """Return the id in run.json; only process 0, which has the sinks, needs it."""
        return "" if self.backend.process else str(self.run_dir.run_info().get("id", ""))

    def _newest(self, attempt: Attempt | NullAttempt) -> Any:
        """The newest checkpoint that verifies, the same for all processes; None where there is none."""
        if not self.backend.process and not self.run_dir.locks:
            self.checkpoints.remove_unfinished()
        found = self.checkpoints.newest(
            lambda text: attempt.event(Kind.CHECKPOINT_DAMAGED, what=text), self.backend.agree
        )
        return found[1] if found else None

    def _asked(self) -> str | None:
        """Return how any process has been asked to stop, or None: all leave after the same step."""
        agreed = self._agreed()
        return None if agreed == "save" else agreed

    def _agreed(self, *, save: bool = False) -> str | None:
        """Return what all processes do now: None, "save" if one wants to `save`, or how to stop (`STRENGTHS`).

        One exchange a step tells both. A stop comes before a save: the state is saved then anyway. What has come to
        this process meanwhile is not in the answer: the others know of that the next time.
        """
        kinds = (None, "save", *STRENGTHS[1:])
        asked = self._stop.asked
        agreed = kinds[self.backend.agree(kinds.index("save" if save and asked is None else asked))]
        if agreed != "save":
            self._stop.strengthen(agreed)
        return agreed

    def _loop(self) -> None:
        recipe, self._ended_s = self.recipe, time.perf_counter()
        self._save_timer.start()
        # Where steps run apart from us, a step's results are read after the next one has been started, so that the
        # device never waits.
        pending: tuple[int, StepResult, float] | None = None
        first = self.step + 1
        counts = map(recipe.batch_at, itertools.count(first))
        with prefetch(self.data.train, recipe.samples_after(self.step), counts) as batches:
            while self.step < self.last_step:
                self.checkpoints.check()  # what failed in the background ends the run here
                step = self.step + 1
                waited_s = time.perf_counter()
                self._stop.at("data", step)
                rows = batches.get(lambda: self._stop.asked is not None)
                waited_s = time.perf_counter() - waited_s
                self._stop.at("agree", step)
                # The clock of process 0 decides.
                due = not self.backend.process and self.step > max(0, self._saved) and self._save_timer.due
                agreed = self._agreed(save=due)
                if agreed == "save":
                    if pending is not None:
                        self._record(*pending)
                        pending = None
                    self._stop.at("save", self.step)
                    self._save(by_time=True)
                    self._ended_s = time.perf_counter()
                elif agreed is not None:
                    break
                if rows is None:
                    break
                batch = recipe.microbatches(rows)
                self._stop.at("step", step)
                scale = recipe.schedule(step, recipe.steps)
                self.state, result = self.backend.step(self.state, batch, step=step, scale=scale)
                self.step, self._stop.trained = step, True
                if step == first:
                    self.event(Kind.KERNELS, choices=kernels.taken())
                if pending is not None:
                    self._record(*pending)
                pending = (step, result, waited_s)
                if not self.backend.async_dispatch:
                    self._record(*pending)
                    pending = None
                evaluates = recipe.eval_every and step % recipe.eval_every == 0 and step < recipe.steps
                saves = recipe.checkpoint_every and step % recipe.checkpoint_every == 0 and step < self.last_step
                if (evaluates or saves) and pending is not None:  # what they follow is on the curve first
                    self._record(*pending)
                    pending = None
                if evaluates:
                    self._stop.at("eval", step)
                    self._evaluate(recipe.eval_batches)
                if saves:
                    self._stop.at("save", step)
                    self._save()
                if evaluates or saves:
                    self._ended_s = time.perf_counter()
        if pending is not None:
            self._record(*pending)

    # ---- stopping and going on

    def _save(self, *, last: bool = False, by_time: bool = False) -> None:
        """Begin to save the state after `self.step`, unless that has been done. One `by_time` waits for no other."""
        if self._saved == self.step:
            return
        with self._save_timer.saving():
            self._begin_save(last=last, by_time=by_time)

    def _begin_save(self, *, last: bool, by_time: bool) -> None:
        recipe = self.recipe
        self._saves += 1
        probes = last or (self._saves - 1) % recipe.probe_every == 0
        found = continuity.record(self.backend, self.state, recipe, self.data.train, self.step, virtual_step=probes)
        found |= {"recipe_sha256": recipe.sha256, "recipe": recipe.to_json(), "history": list(self._history)}
        if self._last_eval is not None and self._last_eval.step == self.step:
            found["metrics"] = {"loss": self._last_eval.loss, **self._last_eval.metrics}
        skips = by_time or (recipe.checkpoint_busy == "skip" and not last)
        if self.checkpoints.save(self.step, self.backend, self.state, found, skip_if_busy=skips):
            self._saved = self.step
            self.event(Kind.SAVING, step=self.step)
            self.hooks.call("on_save")
        else:
            self.event(Kind.SAVE_SKIPPED, step=self.step, why="the one before is still being written")

    def _go_on(self, reader: Any) -> None:
        """Restore, and check that the run is the same run."""
        check_tensors(reader, self.backend.program)
        self.state = restored(self.backend, reader)
        self._saved = self.step
        self._history.extend(reader.meta.get("history", ()))
        now = continuity.record(self.backend, self.state, self.recipe, self.data.train, self.step)
        found = continuity.verdict(reader.meta, now, self.recipe.precision)
        if found["verdict"] == "unproven":
            self._replay = continuity.Replay.of(self.run_dir.curve(), self.step, self.recipe.precision)
        self._judge(self.step, found)

    def _judge(self, step: int, found: Mapping[str, Any]) -> None:
        """Record a verdict of the continuity check; UserError where it is 'broken' and drift is not accepted."""
        self.event(Kind.RESUMED, step=step, **found, accepted=self.options.accept_drift)
        if found["verdict"] == "broken" and self.options.accept_drift is None:
            raise continuity.refusal(step, found)

    def _record(self, step: int, result: StepResult, waited_s: float) -> None:
        loss, norm, skipped = float(result.loss), float(result.grad_norm), bool(int(result.skipped))
        now_s = time.perf_counter()
        step_s, self._ended_s = now_s - self._ended_s, now_s
        info, recipe = self._info, self.recipe
        peak = Peak(flops_per_s=info.peak_flops, source=info.peak_source) if info.peak_flops else None
        share = recipe.batch_at(step) / recipe.batch
        record = StepRecord(
            step=step,
            loss=loss,
            grad_norm=norm,
            lr=recipe.optimizer.lr * recipe.schedule(step, recipe.steps),
            tokens=recipe.samples_after(step) * info.tokens_per_step // recipe.batch,
            time_s=now_s - self._began_s,
            step_s=step_s,
            tokens_per_s=share * info.tokens_per_step / step_s,
            mfu=mfu(flops=info.flops_per_step and share * info.flops_per_step, seconds=step_s, peak=peak),
            memory_bytes=self._memory_bytes(),
            data_wait_s=waited_s,
            skipped=skipped,
            aux={k: float(v) for k, v in result.aux.items()},
        )
        self.sinks.step(record)
        self.view.metrics |= {"loss": loss, "grad_norm": norm, "lr": record.lr, **record.aux}
        self.hooks.call("on_step", record)
        self._history.append([step, loss])
        if self._replay is not None and (found := self._replay.add(step, loss)) is not None:
            self._replay = None
            self._judge(step, found)
        if skipped:
            self._skip(step, loss, norm)

    def _skip(self, step: int, loss: float, norm: float) -> None:
        self._skipped.append(step)
        self.event(Kind.SKIPPED, step=step, loss=loss, grad_norm=norm, skipped=len(self._skipped))
        if len(self._skipped) > self.recipe.max_skips:
            raise UserError(
                f"step {step} of {self.recipe.name}",
                expected=f"at most max_skips={self.recipe.max_skips} steps whose loss or gradient is not finite",
                got=f"loss {loss}, gradient norm {norm}, the {len(self._skipped)}th such step "
                f"(first: step {self._skipped[0]})",
                do="The parameters are those of the last finite step. Lower optimizer.lr, lengthen the warm-up, or "
                "look at the data of that step.",
            )

    def _memory_bytes(self) -> int | None:
        peak = self.backend.describe_memory(self.state).get("peak")
        return peak if peak is not None else peak_rss_bytes()

    # ---- evaluation and the end

    def _evaluate(self, batches: int | None) -> None:
        """Evaluate on the validation split, or on its first `batches` batches."""
        if self.data.validation is None:
            return
        began_s = time.perf_counter()
        found = evaluate(
            self.backend,
            self.state,
            self.data.validation,
            batch=self.recipe.batch,
            batches=batches,
            stopped=lambda: self._asked() is not None,
        )
        if found is None:
            return
        now_s = time.perf_counter()
        loss, samples, metrics = found
        if self._last_eval is None and (unknown := keep_best.no_such_metric(self.recipe, ("loss", *metrics))):
            self.event(Kind.WARNING, what=unknown)
        self._last_eval = EvalRecord(
            step=self.step,
            loss=loss,
            samples=samples,
            metrics=metrics,
            time_s=now_s - self._began_s,
            eval_s=now_s - began_s,
        )
        self.sinks.eval(self._last_eval)
        self.view.metrics |= {"validation_loss": loss, **{f"validation_{k}": v for k, v in metrics.items()}}
        self.hooks.call("on_evaluation", self._last_eval)

    def _results(self) -> dict[str, Any]:
        found: dict[str, Any] = {"step": self.step, "train_s": time.perf_counter() - self._began_s}
        if self._last_eval is not None:
            found |= {"validation_loss": self._last_eval.loss, **self._last_eval.metrics}
        if self._skipped:
            found["skipped_steps"] = self._skipped
        return found

    def _finish(self) -> dict[str, Any]:
        train_s = time.perf_counter() - self._began_s
        final = self.recipe.eval_final_batches
        if final == "all":
            self.event(Kind.EVALUATING)
        self._evaluate(None if final == "all" else final or self.recipe.eval_batches)
        return {**self._results(), "train_s": train_s, **self.hooks.end(lambda: self._asked() is not None)}

    def event(self, kind: str, **fields: Any) -> None:
        """Tell every sink."""
        self.sinks.event(kind, **fields)
