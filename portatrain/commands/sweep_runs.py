"""The run of one point of a sweep: what state it is in, and how it begins, goes on and stops."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys

from portatrain.commands import resume, submit
from portatrain.commands.sweep_points import Point
from portatrain.errors import UserError
from portatrain.runs import changes, jobs
from portatrain.runs.history import History, read_history
from portatrain.runs.open import open_run
from portatrain.system.text import duration


class PointRun:
    """The run of `point` at the path or URL `where`. args: the words of `portatrain sweep`."""

    def __init__(self, point: Point, where: str, args: argparse.Namespace) -> None:
        self.point, self.where, self._args = point, where, args
        self.started = False
        """Whether this process has begun or resumed it."""

    def look(self) -> str:
        """Return 'new', 'done', 'active' (a process or a scheduler has it) or 'stopped'."""
        run = open_run(self.where)
        if run.is_done:
            return "done"
        if run.owner() is not None:
            return "active"
        there = jobs.of(self.where)
        if not there and not (run.path / "run.json").exists():
            return "new"
        if any(self._is_active(job) for job in there):
            # It may have ended between the two looks.
            return "done" if open_run(self.where).is_done else "active"
        return "done" if open_run(self.where).is_done else "stopped"

    def _is_active(self, job: jobs.Job) -> bool:
        from launchers.base import launcher

        if job.id is None:
            return False
        try:
            return launcher(job.engine).describe(job).state != "gone"
        except UserError as error:
            print(f"job {job.number} of {self.point.name} could not be asked for: {error}", file=sys.stderr)
            return True

    def check(self) -> None:
        """Raise UserError if the run that is there has another recipe. Writes nothing."""
        run = open_run(self.where)
        if (run.path / "run.json").exists():
            changes.wanted(run.path, self.where, changes.settled(run.path, self.point.recipe), run.committed)
        else:
            run.check(self.point.recipe)

    def start(self, *, check: bool) -> str:
        """Begin the run, or resume it; return what was done, in words. `check`: try a new recipe at small size."""
        self.started = True
        before = self.look()
        if before in ("done", "active"):  # another sweep was faster
            return "is done" if before == "done" else "is being trained by another process; waiting for it"
        # A run that was killed before it had a job begins.
        fresh = not jobs.of(self.where) and not open_run(self.where).attempt_numbers()
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            if fresh:
                submit.run(self._words(run=self.point.name, no_check=self._args.no_check or not check))
            else:
                resume.run(self._words(run=self.where, **self._moved()))
        if fresh:
            return "begins"
        step = open_run(self.where).committed()
        return "resumes, from " + (f"step {step}" if step is not None else "the start")

    def _words(self, **more: object) -> argparse.Namespace:
        """Return the arguments of `launch` or `launch resume`."""
        mine = {name: getattr(self._args, name) for name in ("recipe", "cluster", "runs", "backend", "mesh", "devices")}
        rest = {"max_restarts": self._args.max_restarts, "track": self._args.track, "profile": None, "detach": True}
        given = {"overrides": list(self.point.overrides), "dry_run": False}
        return argparse.Namespace(**{**mine, **rest, **given, **more})

    def _moved(self) -> dict[str, object]:
        """Return the arguments of `launch resume` that differ from those of `launch`."""
        there = {job.cluster for job in jobs.of(self.where)}
        same = there == set(self._args.clusters)
        return {"cluster": None if same else self._args.cluster, "overrides": [], "new_code": False, "reason": None}

    def stop(self) -> bool:
        """Ask the jobs of this machine to save and stop; return whether there is one."""
        from launchers.base import launcher, tolerantly

        here = [job for job in jobs.of(self.where) if job.id is not None and not launcher(job.engine).queues]
        for job in here:
            tolerantly(lambda one: launcher(one.engine).cancel(one), job)
        return bool(here)

    def history(self) -> History:
        """Return the record of the run so far."""
        return read_history(open_run(self.where))

    def ended(self) -> str:
        """Return how the run ended, in words."""
        now = self.history()
        took = f"{duration(sum(float(row.get('step_s') or 0.0) for row in now.curve))} of training"
        if now.state == "SUCCEEDED":
            loss = "" if now.loss is None else f", loss {now.loss:.4g}"
            return f"is done: step {now.step}{loss}, {took}"
        return f"ended as {now.state} at step {now.step} of {now.steps}{f': {now.why}' if now.why else ''}"

    def progress(self) -> str:
        """Return how far the run is, in words."""
        now = self.history()
        loss = "" if now.loss is None else f", loss {now.loss:.4g}"
        return f"{self.point.name} at step {now.step} of {now.steps}{loss}"
