"""The training loop: it feeds data to a backend's steps and records the metrics. It uses no framework itself.

trainer = Trainer(recipe, run, TrainOptions(backend="jax"))
exit_code = trainer.run()
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from typing import Any

from portatrain.backends import choose_kernel
from portatrain.backends.base import StepResult, backend_class, simulate_devices
from portatrain.backends.program import make_program
from portatrain.checkpoint.interop.hub_start import first_state
from portatrain.checkpoint.saver import Checkpoints
from portatrain.data import OpenData, prefetch
from portatrain.errors import users_code
from portatrain.plan.recorded import of_run, ordered
from portatrain.recipe import Recipe
from portatrain.runs.attempt import Attempt, NullAttempt
from portatrain.runs.events import Kind
from portatrain.runs.run_dir import RunDir
from portatrain.system import environment
from portatrain.system.exit_codes import INTERRUPTED, OK, RESUMABLE
from portatrain.system.memory import peak_rss_bytes
from portatrain.training import continuity, profiling
from portatrain.training.arrival import check_before
from portatrain.training.begin import begin, info_of, probable_mistakes
from portatrain.training.changed import arrive_at
from portatrain.training.compile_cache import CompileCache
from portatrain.training.evaluation import Evaluations
from portatrain.training.hook_calls import HookCalls, check_hooks
from portatrain.training.metrics.broadcast import Broadcast
from portatrain.training.metrics.plot import draw
from portatrain.training.open_data import data_of, rows_here
from portatrain.training.options import TrainOptions as TrainOptions
from portatrain.training.profiling import Profile, StepRange
from portatrain.training.referee import StepReferee
from portatrain.training.rewind import Rewind, Spike, go_back, kept
from portatrain.training.saves import Saves
from portatrain.training.start_times import StartTimes
from portatrain.training.statistics import Statistics
from portatrain.training.step_records import StepRecords
from portatrain.training.view import TrainingView


def train(recipe: Recipe, run: RunDir, **options: Any) -> int:
    """Train `recipe` in `run`, from its newest checkpoint. `options` are the fields of `TrainOptions`.

    An attempt that goes back before a spike is followed by another one: here, or by the supervisor that started it.

    Returns the exit code: 0 done, 85 saved to be resumed, 130 interrupted and saved.

    Raises UserError for options that conflict, before anything is written, and later if losses stay non-finite.
    """
    while True:
        trainer = Trainer(recipe, run, TrainOptions(**options))
        code = trainer.run()
        if trainer.rewound is None or environment.CLAIM.get():
            return code
        recipe = trainer.rewound.recipe
        del trainer
        gc.collect()  # there may be memory for one state


class Trainer:
    """One attempt at a run. Hooks see its `view`."""

    def __init__(self, recipe: Recipe, run: RunDir, options: TrainOptions) -> None:
        self._start = StartTimes()
        self.recipe, self.run_dir, self.options, self.sinks = recipe, run, options, Broadcast(options.sinks)
        self.last_step = min(options.stop_at or recipe.steps, recipe.steps)
        self._profiled = None if options.profile is None else StepRange.parse(options.profile, self.last_step)
        mesh, backend = options.mesh or f"fsdp={options.devices or 1}", options.backend
        program = dataclasses.replace(ordered(make_program(recipe, mesh=mesh), recipe), kernels=options.kernels)
        self.definition, self.mesh = program.definition, program.layout.mesh
        check_hooks(recipe, self.definition)
        simulate_devices(backend, self.mesh.devices)
        made = backend_class(backend)
        self._start.mark("import")
        self.backend = made(program)
        self._compile_cache = CompileCache(self.backend)
        self._start.mark("devices")
        self._start.watch(getattr(self.backend, "compiled", None))
        if self._profiled is not None:
            profiling.check_backend(self.backend)
        if self.backend.process:  # only process 0 packs the data, writes and prints
            self.sinks = Broadcast()
            self.backend.agree(0)
        self.data = data_of(recipe, self.definition, run.data())
        if not self.backend.process:
            run.share_data()
            self.backend.agree(0)
        self._start.mark("data")
        self.state: Any = None
        self.step = 0
        """The number of steps trained so far."""
        self.rewound: Rewind | None = None
        """Where another attempt goes on, if this one ended before a spike."""
        self._begun = False
        self._status, self._told = "failed", False
        """The status at the end of the attempt, and True if its sinks have been started."""
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
        self._steps = StepRecords(recipe, self.view, self.hooks, self.sinks, self._judge)
        self._referee = StepReferee(recipe, self.backend, self.event)
        self._evals = Evaluations(
            self.view, self.hooks, self.backend, self.sinks, lambda: self._stop_requested() is not None
        )
        self._statistics = Statistics(recipe, self.backend)
        self._pending: tuple[int, StepResult, float, Mapping[str, Any]] | None = None
        """A step that has been started and not recorded: number, result, wait for data, norms measured before it."""

    # ---- the loop

    def run(self) -> int:
        """Train to the end or until a stop; return the exit code. The curve is drawn in every case."""
        try:
            return self._run()
        finally:
            if not self.backend.process and self._begun:
                draw(self.run_dir)

    def _run(self) -> int:
        choose_kernel.taken()  # forget the choices of an earlier attempt in this process
        about = self.backend.describe_device()
        info = {"backend": self.backend.name, "mesh": str(self.mesh), **about, "data": self.data.fingerprint}
        if self.options.source is not None:
            info["source"] = dict(self.options.source)
        if not self.backend.process:
            self.run_dir.check_location(self.options.checkpoints)
            check_before(self.run_dir, self.backend, self.recipe, self.data, accept_drift=self._accepts)
        with ExitStack() as stack:
            attempt, self._stop = begin(
                self.run_dir, self.recipe, info, self.backend, self.options.signals, self.sinks, stack
            )
            self._start.mark("claim")
            self._began_s = self._steps.began_s = self._evals.began_s = time.perf_counter()
            self._begun = True
            try:
                self._train(attempt, about)
            except BaseException as error:
                mistake = users_code.explained(error)
                self._summary = {**self._summary, "why": attempt.keep_error(mistake or error)}
                if mistake is not None:
                    raise mistake from error
                raise
            finally:
                self._end(attempt)
        return {"done": OK, "interrupted": INTERRUPTED}.get(self._status, RESUMABLE)

    def _train(self, attempt: Attempt | NullAttempt, about: Mapping[str, Any]) -> None:
        """Run the attempt from restore to last save; set `_status` and `_summary`."""
        self.checkpoints = Checkpoints(
            self.run_dir.checkpoints(self.options.checkpoints),
            keep=kept(self.recipe, self.run_dir, self.backend),
            save_name=f"a{attempt.number}",
            process=self.backend.process,
            processes=self.backend.processes,
            guard=attempt.guard,
        )
        self._saves = Saves(self.checkpoints, self.recipe, self.backend, self.data, self.event)
        found = self._newest(attempt)
        self.step = int(found.meta["step"]) if found else 0
        self._referee.begin(self.run_dir, self.checkpoints, self.step)
        self._info = self._steps.info = info_of(
            self.recipe, self.run_dir, self.backend, about, attempt=attempt.number, first_step=self.step + 1
        )
        attempt.note("plan.json", of_run(self.recipe, self.mesh, str(about["device"])))
        self._told = True
        self.sinks.start(self._info)
        self._compile_cache.tell(self.event)
        for sentence in probable_mistakes(self.recipe, self.definition, self.data):
            self.event(Kind.WARNING, what=sentence)
        if found:
            with closing(found.store):
                self._go_on(found)
        else:
            self.state = first_state(self.backend, self.recipe)
            # Compile now the code of a save, which would otherwise compile within the grace period.
            if self._stop.signals.grace_s is not None:
                self._saves.record(self.state, self.step)
            self._start.mark("init")
        if beyond := self.checkpoints.beyond_bytes(self.backend, self.state):
            self.event(Kind.SAVES_EXCEED_MEMORY, training_waits_for_gib_written=round(beyond / 2**30, 3))
        self.hooks.call("on_start")
        try:
            self._loop(Profile(self._profiled, self.backend, attempt.folder, self.step, self.event))
        except Spike as spike:
            self._rewind(attempt, spike)
        else:
            self._stop.at("save", self.step)
            self._save(last=True)
            self.checkpoints.wait()
            self._saves.tell_commits()
        self.backend.agree(0)  # end together: a launcher may kill the other processes after the first exit
        self._stop.at("eval", self.step)
        over = self.rewound is None and self.step == self.recipe.steps
        self._summary = self._finish() if over else self._results()
        # If the request came during the final evaluation, the run is not done: the next attempt only evaluates.
        stop_requested = self._stop_requested()
        if stop_requested is None and over:
            attempt.finish({"status": "done", **self._summary})
            self._status, self._stop.signals.finished = "done", True
        else:
            preempted = Kind.CANCELLED if self._stop.cancelled else Kind.PREEMPTED
            ends = {"interrupt": Kind.INTERRUPTED, "preempt": preempted}
            went = self.rewound is not None
            self._status = str(ends.get(stop_requested or "", Kind.WENT_BACK if went else Kind.STOPPED))
            if not went:  # otherwise its event says from where the run goes on
                self.event(self._status, step=self.step, of=self.recipe.steps)
            if stop_requested is not None:
                self.rewound = None  # no attempt follows at once
            attempt.write("summary.json", {"status": self._status, **self._summary})

    def _rewind(self, attempt: Attempt | NullAttempt, spike: Spike) -> None:
        """Record that the run goes back before `spike`; the step of this attempt is then the one to go on from."""
        self._stop.at("save", self.step)
        self.state = self._pending = None
        self.checkpoints.wait()
        self._saves.tell_commits()
        location, check_end = self.checkpoints.location, self.data.train.check_end
        self.rewound = go_back(spike, self.recipe, self.backend, self.run_dir, attempt, location, check_end, self.event)
        self.step, self._stop.trained = self.rewound.step, False

    def _end(self, attempt: Attempt | NullAttempt) -> None:
        """Report the end of the attempt to the sinks, or only to its record if they have not been started."""
        if self._told:
            self.sinks.end({"status": self._status, **self._summary})
        else:
            attempt.event(Kind.END, status=self._status, **self._summary)

    def _newest(self, attempt: Attempt | NullAttempt) -> Any:
        """Return the newest checkpoint that verifies, the same for all processes; None if there is none."""
        if not self.backend.process and not self.run_dir.locks:
            self.checkpoints.remove_unfinished()
        doubted = {} if self.backend.process else self.run_dir.doubted()
        for step, why in doubted.items():
            attempt.event(Kind.NOT_TRUSTED, step=step, what=why)
        found = self.checkpoints.newest(
            lambda text: attempt.event(Kind.CHECKPOINT_DAMAGED, what=text), self.backend.agree, doubted
        )
        return found[1] if found else None

    def _stop_requested(self) -> str | None:
        """Return the strongest stop request of all processes, or None; all processes stop after the same step."""
        agreed = self._stop.agreed(self.backend.agree)
        return None if agreed == "save" else agreed

    def _loop(self, profile: Profile) -> None:
        recipe = self.recipe
        if not self.backend.process:
            self.data.verify_in_background()
        self._steps.start()
        self._saves.timer.start()
        first = self.step + 1
        counts = map(recipe.batch_at, itertools.count(first))
        begin, rows_of = recipe.samples_after(self.step), rows_here(self.backend, recipe)
        with prefetch(self.data.train, begin, counts, rows=rows_of) as batches, profile:
            while self.step < self.last_step:
                self.checkpoints.check()  # an error of a background save is raised here
                self.data.check()
                self._saves.tell_commits()
                step = self.step + 1
                if profile.begins(step):
                    self._record_pending()
                    profile.start()
                    self._steps.start()
                waited_s = time.perf_counter()
                self._stop.at("data", step)
                rows = batches.get(lambda: self._stop.asked is not None, self._waits)
                waited_s = time.perf_counter() - waited_s
                if step == first:
                    self._start.mark("first_batch")
                self._stop.at("agree", step)
                # The clock of process 0 decides for all processes.
                due = not self.backend.process and self._saves.due(self.step)
                agreed = self._stop.agreed(self.backend.agree, save=due)
                if agreed == "save":
                    self._record_pending()
                    self._stop.at("save", self.step)
                    self._save(by_time=True)
                    self._steps.start()
                elif agreed is not None:
                    break
                if rows is None:
                    break
                batch = recipe.microbatches(rows)
                self._stop.at("step", step)
                scale = recipe.lr_scale(step)
                more = {**self._steps.guard.arguments(step), **self._statistics.arguments(step)}
                norms = self._statistics.before(self.state, batch, step, scale)
                with profile.step(step):
                    self.state, result = self._referee.step(self.state, batch, step=step, scale=scale, more=more)
                self.step, self._stop.trained = step, True
                if step == first:
                    self.event(Kind.KERNELS, choices=choose_kernel.taken())
                # If the backend runs steps asynchronously, the results of a step are read after the next one has been
                # started, so that the device never waits.
                self._record_pending()
                self._pending = (step, result, waited_s, norms)
                evaluates = recipe.eval_every and step % recipe.eval_every == 0 and step < recipe.steps
                saves = recipe.checkpoint_every and step % recipe.checkpoint_every == 0 and step < self.last_step
                profiled = profile.ends(step)
                if not self.backend.async_dispatch or evaluates or saves or profiled or step == first:
                    self._record_pending()
                if step == first:
                    self._start.mark("first_step")
                    self.event(Kind.FIRST_STEP, **self._start.fields())
                if profiled:
                    profile.stop()
                if evaluates:
                    self._stop.at("eval", step)
                    self._evals.run(self.state, step, recipe.eval_batches)
                if saves:
                    self._stop.at("save", step)
                    self._save()
                if evaluates or saves or profiled:
                    self._steps.start()
            self._record_pending()

    def _waits(self, waited_s: float) -> None:
        self.event(Kind.DATA_WAIT, step=self.step + 1, waited_s=round(waited_s, 1))

    def _record_pending(self) -> None:
        """Record the step that has been started and not recorded, if there is one. This waits for the device."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._steps.add(*pending, self._memory_bytes())
            self._referee.saw(pending[1])

    # ---- saving and resuming

    def _save(self, *, last: bool = False, by_time: bool = False) -> None:
        """Begin to save the state after `self.step` unless it is saved; with `by_time`, never during another save."""
        more = self._steps.meta()
        last_eval = self._evals.last
        if last_eval is not None and last_eval.step == self.step:
            more["metrics"] = {"loss": last_eval.loss, **last_eval.metrics}
        if self._saves.save(self.state, self.step, more, last=last, by_time=by_time):
            self.hooks.call("on_save")

    def _go_on(self, reader: Any) -> None:
        """Restore from `reader` and run the continuity check."""
        self.state, found, bounds, effect = arrive_at(
            self.backend, reader, self.recipe, self.data, self.run_dir, self._checked, accept_drift=self._accepts
        )
        self._start.mark("verify")
        if effect is not None:
            self.event(Kind.CHANGE_MEASURED, step=self.step, **effect)
        self._saves.saved = self.step
        # To leave later samples out does not make the window of steps before them another one.
        decides = effect is not None and {name.split(".")[0] for name in found["fields"]} != {"leave_out"}
        self._steps.restore(reader.meta, changed=decides)
        if found["verdict"] == "unproven" and bounds is not None:
            self._steps.replay = continuity.Replay.of(self.run_dir.curve(), self.step, bounds.replay)
        self._judge(self.step, found)

    def _checked(self, state: Any, recipe: Recipe, data: OpenData) -> dict[str, Any]:
        """Return the record of a restored `state` under `recipe`, for the continuity check."""
        self._start.mark("restore")
        found = continuity.record(self.backend, state, recipe, data.train, self.step, validation=data.validation)
        self._start.mark("verify")
        return found

    @property
    def _accepts(self) -> bool:
        return self.options.accept_drift is not None

    def _judge(self, step: int, found: Mapping[str, Any]) -> None:
        """Record a verdict of the continuity check; UserError if it is 'broken' and drift is not accepted."""
        self.event(Kind.RESUMED, step=step, **found, accepted=self.options.accept_drift)
        if found["verdict"] == "broken" and self.options.accept_drift is None:
            raise continuity.refusal(step, found)

    def _memory_bytes(self) -> int | None:
        peak = self.backend.describe_memory(self.state).get("peak")
        return peak if peak is not None else peak_rss_bytes()

    # ---- evaluation and the end

    def _results(self) -> dict[str, Any]:
        found: dict[str, Any] = {"step": self.step, "train_s": time.perf_counter() - self._began_s}
        if (last_eval := self._evals.last) is not None:
            found |= {"validation_loss": last_eval.loss, **last_eval.metrics}
        if self._steps.skipped:
            found["skipped_steps"] = self._steps.skipped
        return found

    def _finish(self) -> dict[str, Any]:
        train_s = time.perf_counter() - self._began_s
        final = self.recipe.eval_final_batches
        if final == "all":
            self.event(Kind.EVALUATING)
        batches = None if final == "all" else final or self.recipe.eval_batches
        self._evals.run(self.state, self.step, batches)
        return {**self._results(), "train_s": train_s, **self.hooks.end(lambda: self._stop_requested() is not None)}

    def event(self, kind: str, **fields: Any) -> None:
        """Send an event to every sink."""
        self.sinks.event(kind, **fields)
