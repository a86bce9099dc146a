"""A run that waits at the beginning of a phase until a test has sent its signals.

`python -m tests.support.stop_worker PHASE FOLDER train ...` is `portatrain train ...`. Each process writes
FOLDER/at-RANK when it reaches PHASE, and goes on when the file FOLDER/go exists.

`python -m tests.support.stop_worker serve FOLDER` imports the frameworks once and runs each case in a fork: it reads
lines 'PHASE FOLDER OUTPUT train ...' (JSON lists) and prints the process id of each case, then its exit code.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PHASES = ("start", "join", "restore", "compile", "data", "step", "evaluation", "save", "final", "exit")
UNTRAINED = PHASES[:4]
"""The phases in which there is nothing to save."""
AT_STEP = 3
"""The step of the phases data, step and save."""


class Pause:
    """Waits once in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.done = folder, False

    def __call__(self) -> None:
        if self.done:
            return
        self.done = True
        self.arrive()
        self.wait()

    def arrive(self) -> None:
        (self.folder / f"at-{os.environ.get('RANK', '0')}").touch()

    def wait(self) -> None:
        end_s = time.monotonic() + 120
        while not (self.folder / "go").exists() and time.monotonic() < end_s:
            time.sleep(0.02)

    def before(self, holder: Any, name: str, when: Callable[..., bool] = lambda *a, **k: True) -> None:
        """Wait before a call of `holder.name` for whose arguments `when` is true."""
        whole = getattr(holder, name)

        @functools.wraps(whole)
        def call(*args: Any, **options: Any) -> Any:
            if when(*args, **options):
                self()
            return whole(*args, **options)

        setattr(holder, name, call)


def arrange(phase: str, folder: Path) -> None:
    """Make this process wait at the beginning of `phase`."""
    pause = Pause(folder)
    if phase == "start":
        from portatrain.commands import options

        pause.before(options, "resolved_recipe")
        return
    from portatrain.checkpoint.saver import Checkpoints
    from portatrain.data import read_ahead
    from portatrain.training import arrival, evaluation, trainer
    from portatrain.training.stop_requests import StopRequests

    if phase == "join":
        pause.before(trainer, "simulate_devices")
    elif phase == "restore":
        pause.before(arrival, "restored")
    elif phase in ("compile", "step"):
        at, loop = 1 if phase == "compile" else AT_STEP, trainer.Trainer._loop

        def waiting_loop(self: Any, profile: Any) -> None:
            pause.before(self.backend, "step", lambda *_, step, **__: step == at)
            loop(self, profile)

        trainer.Trainer._loop = waiting_loop  # type: ignore[method-assign]
    elif phase == "data":
        read = read_ahead._read

        class Waits:
            def __init__(self, split: Any) -> None:
                self.split = split

            def __getattr__(self, name: str) -> Any:
                return getattr(self.split, name)

            def batch(self, start: int, count: int) -> Any:
                if start >= (AT_STEP - 1) * count:
                    pause.wait()
                return self.split.batch(start, count)

        read_ahead._read = lambda split, *rest: read(Waits(split), *rest)  # type: ignore[arg-type]
        at_step = StopRequests.at

        def at_phase(self: StopRequests, phase: str, step: int) -> None:
            if (phase, step) == ("data", AT_STEP):
                pause.arrive()
            at_step(self, phase, step)

        StopRequests.at = at_phase  # type: ignore[method-assign]
    elif phase == "evaluation":
        pause.before(evaluation, "evaluate")
    elif phase == "save":
        pause.before(Checkpoints, "save")
    elif phase == "final":
        pause.before(trainer.Trainer, "_results")
    elif phase == "exit":
        pause.before(trainer.Trainer, "_end")


def train(args: argparse.Namespace) -> int:
    """Run one of several processes."""
    from portatrain.commands.train import train as whole

    arrange(os.environ["STOP_PHASE"], Path(os.environ["STOP_FOLDER"]))
    return whole(args)


def main(phase: str, folder: str, words: list[str]) -> int:
    from portatrain.cli import main as portatrain
    from portatrain.system import processes

    os.environ |= {"STOP_PHASE": phase, "STOP_FOLDER": folder}
    several = any(word.startswith("--mesh") for word in words)
    run_processes = processes.run_processes
    processes.run_processes = lambda n, entry, args, **o: run_processes(  # type: ignore[assignment]
        n, "tests.support.stop_worker:train", args, **o
    )
    if not several:
        arrange(phase, Path(folder))
    sys.argv = ["portatrain", *words]
    return portatrain()


def serve() -> None:
    """Answer each line with the case's process id; a line with its exit code follows when it has ended."""
    for name in ("backends.jax", "backends.torch", "checkpoint.saver", "training.trainer"):
        importlib.import_module(f"portatrain.{name}")

    for line in sys.stdin:
        phase, folder, output, *words = json.loads(line)
        pid = os.fork()
        if not pid:
            os.setsid()
            with open(output, "wb") as log:
                for number in (1, 2):
                    os.dup2(log.fileno(), number)
            code = 1
            try:
                code = main(phase, folder, words)
            except SystemExit as error:
                code = int(error.code or 0)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    # A shell makes its background commands ignore these two.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if sys.argv[1] == "serve":
        serve()
    else:
        sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
