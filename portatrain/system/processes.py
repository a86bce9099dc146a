"""Running one command as several processes on this machine, for backends with one process per device.

`run_processes` starts them with the environment variables of torchrun, forwards signals to them, and waits. If one
fails, it ends the others within seconds and shows the error of the first.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from portatrain.errors import MachineError, StorageError, UserError, storage_error, users_code
from portatrain.system import environment, proxies
from portatrain.system.exit_codes import FAILED, INTERRUPTED, NOT_FAILURES, OK, RESUMABLE
from portatrain.system.stop_signals import note_left, stopping_signals

GRACE_S = 3.0
"""Seconds in which the other processes may end by themselves after one has failed."""
LEAVING_S = 10.0
"""Seconds in which the other processes may end after one has exited at once."""


def rank() -> int:
    """Return the rank of this process among those of the run; 0 if it is the only one."""
    found, n = environment.RANK.get(), world_size()
    if n is not None and found >= n:
        raise UserError(
            f"environment variable {environment.RANK.name}",
            expected=f"a number below {environment.WORLD_SIZE.name}, which is {n}",
            got=str(found),
            do="Correct it, or start the processes by torchrun or `launch`.",
        )
    return found


def world_size() -> int | None:
    """Return the number of processes if the environment says it (torchrun, `run_processes`); otherwise None."""
    return environment.WORLD_SIZE.get() if os.environ.get(environment.RANK.name) else None


def run_processes(n: int, entry: str, args: Mapping[str, Any], *, host: int = 0, hosts: int = 1) -> int:
    """Run `entry` in `n` processes on this host and return their exit code.

    Args:
        entry: 'package.module:function', a function from an argparse.Namespace to an exit code.
        args: the contents of the namespace.
        host, hosts: number of this host and number of hosts. With several hosts, each of them makes this call, and the
            environment must have MASTER_ADDR and MASTER_PORT.

    Only the first process on this host writes to this process's standard output and error. If a process fails without
    a UserError, its error is printed and the result is 1.

    Raises:
        UserError: the process that failed first ended with it.
    """
    with tempfile.TemporaryDirectory(prefix="portatrain-") as folder:
        shared = {
            **os.environ,
            "WORLD_SIZE": str(n * hosts),
            "LOCAL_WORLD_SIZE": str(n),
            **({} if hosts > 1 else {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}),
            environment.REPORTS.name: folder,
            environment.PARENT.name: str(os.getpid()),
        }
        proxies.bypass(shared.get("MASTER_ADDR", ""), env=shared)
        # Simulated devices share the cores of one machine.
        shared.setdefault("OMP_NUM_THREADS", "1")
        command = [sys.executable, "-m", "portatrain.system.processes", entry, json.dumps(dict(args))]
        started: list[subprocess.Popen[bytes]] = []
        with forwarding(started):
            try:
                for r in range(n):
                    env = {**shared, "RANK": str(host * n + r), "LOCAL_RANK": str(r)}
                    started.append(_start(command, env, Path(folder), r))
                failed = _wait(started, Path(folder))
            finally:
                for process in started:
                    if process.poll() is None:
                        process.kill()
                    process.wait()
        if failed:
            return _explain(started, failed, Path(folder))
        return _end_of_all([p.returncode for p in started])


def _start(command: list[str], env: dict[str, str], folder: Path, r: int) -> subprocess.Popen[bytes]:
    # With a session of its own, a child does not get Ctrl-C from the terminal; this process forwards it once.
    if r == 0:
        return subprocess.Popen(command, env=env, start_new_session=True)
    logs = environment.LOGS.get()
    with (logs / f"rank-{r}.log" if logs else folder / f"stderr-{r}").open("ab") as errors:
        return subprocess.Popen(
            command,
            env=env,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=errors if logs else subprocess.DEVNULL,
            stderr=errors,
        )


def _wait(processes: list[subprocess.Popen[bytes]], folder: Path) -> list[int]:
    """Wait until all have ended, or some seconds after the first failure; return the ranks that failed by themselves.

    If one exits at once, as after a signal to it alone, the others would wait for it. They are asked to stop too. If
    that does not end them, they are asked a second time, at which a process that is stuck leaves at once and records
    it; then they are killed.
    """
    deadline: float | None = None
    asked = 0
    while True:
        codes = [p.poll() for p in processes]
        leaving = [(folder / f"left-{r}").exists() for r in range(len(codes))]
        left = any(leaving) or any(code is not None and _end(code) != code for code in codes)
        failed = [r for r, code in enumerate(codes) if code is not None and _end(code) not in NOT_FAILURES]
        if left:  # what fails in the others is a consequence
            failed = []
        if None not in codes:
            return failed
        if failed and deadline is None:
            deadline = time.monotonic() + GRACE_S
        if left and (not asked or (asked == 1 and time.monotonic() > (deadline or 0))):
            asked, deadline = asked + 1, time.monotonic() + (GRACE_S if asked else LEAVING_S)
            for process, leaves in zip(processes, leaving, strict=True):
                if process.poll() is None and not leaves:  # it ends by itself, with the exit code of its own request
                    process.send_signal(signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            return failed
        time.sleep(0.05)


def _end(code: int) -> int:
    """The exit code of a process, where a signal to stop that came before it could listen counts as heard."""
    if code == -signal.SIGINT:
        return INTERRUPTED
    return RESUMABLE if -code in stopping_signals() else code


def _end_of_all(codes: list[int]) -> int:
    """The exit code of processes of which none failed; those that were killed for waiting in vain do not count."""
    ends = [_end(code) for code in codes if _end(code) in NOT_FAILURES]
    if _end(codes[0]) == OK:  # it has written that the run is done
        return OK
    return max(ends, default=FAILED)


def _explain(processes: list[subprocess.Popen[bytes]], failed: list[int], folder: Path) -> int:
    """Show the first failure, of which the others are consequences."""
    reports = {r: json.loads(p.read_text()) for r in failed if (p := folder / f"report-{r}.json").exists()}
    silent = [r for r in failed if r not in reports]
    if silent:  # ended by a signal or by a library, so it wrote no report
        r = silent[0]
        code = processes[r].returncode
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        logs = environment.LOGS.get()
        errors = logs / f"rank-{r}.log" if logs is not None else folder / f"stderr-{r}"
        tail = errors.read_text(errors="replace")[-4000:].strip() if errors.exists() else ""
        print(f"error: process {r} of {len(processes)} was ended {how}; the others were stopped.", file=sys.stderr)
        if tail:
            print(tail, file=sys.stderr)
        return FAILED
    r = min(reports, key=lambda k: reports[k]["unix_s"])
    found = reports[r]
    if found["user"] is not None:
        kinds: tuple[type[UserError], ...] = (StorageError, MachineError)
        kind = next((one for one in kinds if one.code == found["code"]), UserError)
        said = found["user"]
        error = kind(said["what"], expected=said["expected"], got=said["got"], do=said["do"])
        error.trace, error.kept = said["trace"], said["kept"]
        raise error
    print(f"error: process {r} of {len(processes)} failed; the others were stopped.\n{found['text']}", file=sys.stderr)
    return FAILED


@contextmanager
def forwarding(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """While entered, forward the signals that stop a run to every process; this process ignores them."""

    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in stopping_signals():
            before[number] = signal.signal(number, forward)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def free_port() -> int:
    """Return a port that is free at this moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ---- in a process


def end_with_parent() -> None:
    """End this process when its parent ends, if the environment names the parent."""
    parent = environment.PARENT.take()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(FAILED)


def _run(entry: str, args: Mapping[str, Any]) -> int:
    end_with_parent()
    module, _, name = entry.partition(":")
    function: Callable[[argparse.Namespace], int] = getattr(importlib.import_module(module), name)
    try:
        return function(argparse.Namespace(**args))
    except KeyboardInterrupt:  # before it listens for signals; the others wait for this process in vain
        note_left(INTERRUPTED)
        return INTERRUPTED
    except UserError as error:
        return _report_user(error)
    except OSError as error:
        found = storage_error(error) or users_code.explained(error)
        if found is not None:
            return _report_user(found)
        _report(None)
        return FAILED
    except BaseException as error:
        mistake = users_code.explained(error)
        if mistake is not None:
            return _report_user(mistake)
        _report(None)
        return FAILED


def _report_user(error: UserError) -> int:
    said = {"what": error.what, "expected": error.expected, "got": error.got, "do": error.do + users_code.where(error)}
    _report({**said, "trace": error.trace, "kept": error.kept}, error.code)
    return error.code


def _report(user: dict[str, str] | None, code: int = FAILED) -> None:
    path = Path(os.environ[environment.REPORTS.name], f"report-{environment.LOCAL_RANK.get()}.json")
    found = {"unix_s": time.time(), "user": user, "code": code, "text": traceback.format_exc()}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found))
    partial.replace(path)


def main() -> None:
    """`python -m portatrain.system.processes ENTRY ARGS`: one process of `run_processes`."""
    sys.exit(ends_at_once(lambda: _run(sys.argv[1], json.loads(sys.argv[2]))))


def ends_at_once(call: Callable[[], int]) -> int:
    """Return the exit code of `call`, or end the process if it failed.

    It ends without cleanup, because atexit handlers would wait for other processes that do not answer.
    """
    try:
        code = call()
    except BaseException:
        traceback.print_exc()
        code = FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    if code not in NOT_FAILURES:
        os._exit(code)
    return code


if __name__ == "__main__":
    main()
