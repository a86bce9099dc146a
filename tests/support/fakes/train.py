"""A stand-in for `portatrain train` that keeps the run directory as it does and computes nothing, so that what carries
jobs can be tried at no cost. Its whole state is the number of steps; FAKE says how it misbehaves."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

from portatrain.checkpoint.locations import location_of
from portatrain.commands import options, train
from portatrain.errors import StorageError, UserError
from portatrain.runs.history import committed
from portatrain.runs.open import open_run
from portatrain.runs.run_dir import RunDir
from portatrain.system.exit_codes import RESUMABLE
from portatrain.system.processes import end_with_parent
from portatrain.system.stop_signals import StopSignals
from portatrain.system.watchdog import Watchdog

STEPS, STEP_S = int(os.environ.get("FAKE_STEPS", "60")), float(os.environ.get("FAKE_STEP_S", "0.05"))


def save(run: RunDir, attempt: object, step: int) -> None:
    store = location_of(run.checkpoints()).open(step, create=True)
    time.sleep(float(os.environ.get("FAKE_SAVE_S", "0")))
    with attempt.guard():  # type: ignore[attr-defined]
        store.put_if_absent("COMMIT", json.dumps({"step": step}).encode())


def main() -> int:
    end_with_parent()
    how = os.environ.get("FAKE", "")
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    args = parser.parse_args(sys.argv[sys.argv.index("train") + 1 :])
    recipe = options.resolved_recipe(args)
    if how == "storage":
        raise StorageError("object x", expected="to be written", got="error 500 of some error", do="Wait.")
    if int(os.environ.get("SLURM_PROCID", "0")):
        return follow(open_run(args.run_dir))
    with StopSignals() as signals:
        run = open_run(args.run_dir, work=True)
        first = (committed(run) or 0) + 1
        if how == "crash" or (how == "crash-once" and not run.path.joinpath("crashed").exists()):
            run.path.joinpath("crashed").touch()
            print("some error of a library", file=sys.stderr)
            os._exit(1)
        with run.begin(recipe, {"backend": args.backend, "mesh": args.mesh}) as attempt:
            signals.on_asked = lambda kind: attempt.event("stopping", asked=kind)
            dog = Watchdog(
                attempt.folder,
                process=0,
                processes=1,
                tell=lambda found: attempt.event("hang", **found),
                cancelled=signals.ask,
            )
            with dog:
                signals.trained = True
                if first > 1:
                    attempt.event("resumed", step=first - 1, verdict="continuous")
                step = first - 1
                while step < STEPS and signals.asked is None:
                    step += 1
                    dog.at("step", step)
                    if how == "hang" and step == 10:
                        time.sleep(3600)
                    time.sleep(STEP_S)
                    attempt.metrics({"step": step, "loss": 1 / step, "time_s": 0.0})
                    if how == "spike-once" and step == 25 and attempt.number == 1:
                        attempt.event("went_back", step=20, spike=25, samples=[0, 1])
                        attempt.event("end", status="went_back")
                        return RESUMABLE
                    if step % 20 == 0:
                        save(run, attempt, step)
                save(run, attempt, step)
                if step == STEPS:
                    attempt.finish({"status": "done"})
                    return 0
                attempt.event("end", status="preempted")
    return RESUMABLE


def follow(run: RunDir) -> int:
    """A process that is not the first: until the first has left."""
    with StopSignals() as signals:
        signals.trained = True
        while not run.is_done and signals.asked is None:
            time.sleep(0.05)
        return 0 if run.is_done else RESUMABLE


if __name__ == "__main__":
    try:
        code = main()
    except UserError as error:  # as the command line says it
        print(f"error: {error}", file=sys.stderr)
        code = error.code
    sys.stdout.flush()
    sys.exit(code)
