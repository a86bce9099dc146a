"""Supervise a job on its first host: `python -m launchers.supervisor RUN_DIR JOB`.

The supervisor takes the claim, so that only one of several acceptable jobs runs. It starts attempts, forwards signals
to them, and decides what follows by the record and the exit code of an attempt:

    0 and DONE       the run is over
    85               the run is saved: requeue the job if the scheduler preempted it; if a user ended it, do not; if it
                     went back before a spike, start another attempt
    2                a user's mistake: the run is over, with no second try
    anything else    a failure, also of storage (75): start another attempt, until --max-restarts attempts in a row
                     brought no new commit
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from launchers.base import Job, JobRuntime, launcher, runtime_of
from portatrain.errors import StorageError, UserError
from portatrain.runs import jobs
from portatrain.runs.attempt import Attempt
from portatrain.runs.claim import ClaimHandle
from portatrain.runs.code_snapshot import differences
from portatrain.runs.events import Kind, last, of_kind, why_it_ended
from portatrain.runs.history import committed
from portatrain.runs.open import open_run
from portatrain.system import environment
from portatrain.system.exit_codes import FAILED, INTERRUPTED, MISTAKE, OK, RESUMABLE
from portatrain.system.stop_signals import SAME_S, stopping_signals
from portatrain.system.text import counted
from portatrain.system.urls import is_remote
from portatrain.system.watchdog import host_name

STORE_TRIES, STORE_EVERY_S = 20, 30.0
BACKOFF_S = (0.0, 1.0, 5.0, 15.0, 60.0)


class Supervisor:
    """Runs the attempts of one job. `signals` has the signals that it received."""

    def __init__(self, job: Job, runtime: JobRuntime) -> None:
        self.job, self.runtime, self.run = job, runtime, open_run(job.run_dir, work=True)
        self.signals: list[int] = []
        self.asked = ""
        """The meaning of the last signal: 'preempt', 'cancel' or 'unclear'; '' if there was none."""
        self._child: subprocess.Popen[bytes] | None = None
        self._last_s: dict[int, float] = {}

    def main(self) -> int:
        """Run until the run or this job's part in it is over; return the exit code."""
        for number in stopping_signals():
            signal.signal(number, self._signal)
        if self._over():
            self.runtime.on_exit("over")
            return 0
        self.runtime.yield_to_preferred()
        try:
            claim = self.run.acquire()
        except UserError as error:
            self._step_aside(error)
            self.runtime.on_exit("superseded")
            return RESUMABLE
        code, outcome = RESUMABLE, "unclear"
        try:
            code, outcome = self._patiently(claim)
        except UserError as error:
            if isinstance(error, StorageError) or claim.held:
                raise
            self._step_aside(error)
            outcome = "superseded"
        finally:
            for last in (self.run.send, claim.release):
                with contextlib.suppress(StorageError):  # the lease runs out
                    last()
            self.runtime.on_exit(outcome)
        return code

    def _step_aside(self, error: UserError) -> None:
        text = f"job {self.job.number} ends here, because another job or process has the run: {error}"
        print(text, file=sys.stderr, flush=True)

    def _patiently(self, claim: ClaimHandle) -> tuple[int, str]:
        """Call `_attempts`, and retry for some minutes if the run's store is unavailable."""
        for left in reversed(range(STORE_TRIES)):
            try:
                return self._attempts(claim)
            except StorageError as error:
                print(str(error), file=sys.stderr, flush=True)
                if not left or not self._pause(STORE_EVERY_S):
                    raise
        raise AssertionError("unreachable")

    def _over(self) -> bool:
        return any(self.run.marked(mark) for mark in ("DONE", "CANCELLED"))

    def _given_up(self) -> bool:
        """Return whether a job that was submitted together with this one has given the run up. That job also cancels
        this one, but it releases the claim first, so this one may start in between."""
        mine = self.job.submission
        return bool(mine) and any(e.get("submission") == mine for e in self.run.events(Kind.GAVE_UP))

    def _attempts(self, claim: ClaimHandle) -> tuple[int, str]:
        if self._over():  # the run ended while this job waited for the claim
            return OK, "over"
        if self._given_up():
            return MISTAKE, "over"
        self.runtime.on_claimed()
        dead = claim.taken_over
        while True:
            failures = self._failures_without_progress()
            if failures and not self._pause(BACKOFF_S[min(failures, len(BACKOFF_S)) - 1]):
                return self._asked_end()
            attempt = self.run.new_attempt(claim)
            if dead is not None:
                attempt.event(Kind.CLAIM_TAKEN_OVER, host=dead.host, pid=dead.pid, claimed_unix_s=dead.claimed_unix_s)
                dead = None
            code, outcome, why = self._attempt(attempt)
            if self._over():
                return (OK if self.run.is_done else RESUMABLE), "over"
            if outcome in ("failed", "hung"):
                if code == MISTAKE:
                    attempt.event(Kind.GAVE_UP, why=why, submission=self.job.submission)
                    return code, "over"
                if self._failures_without_progress() > self.job.max_restarts:
                    restarts = counted(self.job.max_restarts, "restarts")
                    text = f"{restarts} in a row brought no new checkpoint; the last attempt: {why}"
                    attempt.event(Kind.GAVE_UP, why=text, submission=self.job.submission)
                    print(text, file=sys.stderr, flush=True)
                    return code or FAILED, "over"
                if not self.asked and self.runtime.restarts:
                    continue
                if not self.asked:
                    return code if code > 0 else FAILED, "failed"
            elif not self.asked and outcome == Kind.WENT_BACK:
                if self.runtime.restarts:
                    continue
                return RESUMABLE, "preempted"
            elif not self.asked and outcome == "preempted":
                # The processes of the attempt received a request to stop and this process did not: it was a notice of
                # the cloud, or a signal that somebody sent to them directly.
                return RESUMABLE, "preempted"
            return self._asked_end()

    def _asked_end(self) -> tuple[int, str]:
        if self.asked == "cancel":  # by the scheduler's own command, which cancels the run and so its other jobs too
            self.run.put("CANCELLED", {"unix_s": time.time(), "by": f"job {self.job.number}"})
            return RESUMABLE, "over"
        return RESUMABLE, "preempted" if self.asked == "preempt" else "unclear"

    def _pause(self, seconds: float) -> bool:
        """Wait; return False if a signal arrived in the meantime."""
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s and not self.asked:
            time.sleep(0.1)
        return not self.asked

    def _failures_without_progress(self) -> int:
        """Return the number of this job's last attempts in a row that failed or hung without a new commit."""
        now, count = committed(self.run), 0
        for number in reversed(self.run.attempt_numbers()):
            left = last(self.run.rows(number, "events"), Kind.LEFT)
            if left is None or left.get("job") != self.job.number or left.get("committed") != now:
                break
            if left.get("outcome") in ("failed", "hung"):
                count += 1
        return count

    def _code(self) -> str | None:
        if self.job.code is None or not is_remote(self.job.code):
            return self.job.code
        from portatrain.runs.remote_run_dir import local_code

        return str(local_code(self.job.code))

    # ---- one attempt

    def _attempt(self, attempt: Attempt) -> tuple[int, str, str]:
        """Run an attempt; return (exit code, outcome, reason).

        The outcome is 'done', 'preempted', 'stopped', 'cancelled', 'went_back', 'failed' or 'hung'.
        """
        where = {"job": self.job.number, "engine": self.job.engine, "cluster": self.job.cluster, "host": host_name()}
        engine = launcher(self.job.engine)
        facts = dict(engine.scheduler_facts(os.environ))
        attempt.event(Kind.LANDED, **where, id=self.job.id, queues=engine.queues, scheduler=facts)
        changed = differences(self._code())
        if changed:
            attempt.event(Kind.ENVIRONMENT_DIFFERS, packages=changed)
        command, more, output = self.runtime.command(attempt.folder)
        token = attempt.token
        env = {
            **os.environ,
            **more,
            environment.CLAIM.name: token,
            environment.ATTEMPT.name: str(attempt.number),
            environment.CLUSTER.name: json.dumps(where),
            environment.LOGS.name: str(attempt.folder),
        }
        with open(output or os.devnull, "ab") as log:
            # The attempt has a session of its own, so a signal to this process's group reaches it once: from here.
            self._child = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log if output else None,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,
            )
            if self.signals:  # a signal came before the attempt had started
                self._child.send_signal(signal.SIGUSR1)
            code = self._child.wait()
        if code not in (OK, RESUMABLE) and _mistake(attempt.folder):
            code = MISTAKE
        outcome, why = self._outcome(attempt, code)
        attempt.event(
            Kind.LEFT,
            outcome=outcome,
            code=code,
            why=why,
            asked=self.asked,
            signals=self.signals,
            committed=committed(self.run),
            job=self.job.number,
        )
        return code, outcome, why

    def _outcome(self, attempt: Attempt, code: int) -> tuple[str, str]:
        events = self.run.rows(attempt.number, "events")
        if self.run.is_done:
            return "done", ""
        if self.run.marked("CANCELLED") or self.asked == "cancel":
            return "cancelled", ""
        hang = next(iter(of_kind(events, Kind.HANG)), None)
        if hang is not None:
            return "hung", f"it hung; {why_it_ended([hang])}"
        if self.asked or code in (RESUMABLE, INTERRUPTED):
            ends = [e.get("status") for e in of_kind(events, Kind.END)]
            if ends or code == RESUMABLE:
                if ends and ends[-1] == Kind.WENT_BACK:
                    return Kind.WENT_BACK.value, ""
                return ("stopped" if ends and ends[-1] in ("stopped", "interrupted") else "preempted"), ""
            return "preempted", "it was ended before it could record a reason"
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return "failed", f"{how}{_last_words(attempt.folder)}"

    def _signal(self, number: int, frame: FrameType | None) -> None:
        first, now_s = not self.signals, time.monotonic()
        again = now_s - self._last_s.get(number, now_s) >= SAME_S
        self._last_s[number] = now_s
        self.signals.append(number)
        # The signal is forwarded before the scheduler is asked for its meaning, and once for each request, because
        # a scheduler may send several signals for one request.
        if (first or again) and self._child is not None and self._child.poll() is None:
            # All launchers forward SIGUSR1: programs between this process and the attempt would end on SIGTERM.
            self._child.send_signal(signal.SIGUSR1)
        meaning = self.runtime.means(number)
        if self.asked in ("", "unclear"):
            self.asked = meaning


def _mistake(folder: Path) -> bool:
    """Return True if one of the processes ended with a user's mistake; the others were killed because of it."""
    return any(path.read_text().strip() == str(MISTAKE) for path in folder.glob("exit-*"))


def _last_words(folder: Path) -> str:
    """Return the last line of process 0's output, or of the first other process that wrote an error."""
    for path in sorted(folder.glob("rank-*.log"), key=lambda p: int(p.stem[5:])):
        lines = path.read_text(errors="replace").strip().splitlines()
        for line in reversed(lines):
            if "error" in line.lower() and not line.startswith(("slurmstepd", "srun")):
                return f": {line.strip()[:500]}"
    return ""


def main() -> int:
    """Run `python -m launchers.supervisor RUN_DIR JOB`."""
    job = jobs.read(sys.argv[1], int(sys.argv[2]))
    if job.cwd and os.path.isdir(job.cwd):
        os.chdir(job.cwd)
    try:
        return Supervisor(job, runtime_of(job)).main()
    except StorageError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.code


if __name__ == "__main__":
    sys.exit(main())
