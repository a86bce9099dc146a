"""One command as several processes of this machine: how a backend with a process a device runs without a scheduler.

`run_processes` starts them with the environment that torchrun would set, hands signals on, and waits. Where one fails,
the others are ended within seconds and its error is the one that is shown. No framework.
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

from portatrain.errors import StorageError, UserError
from portatrain.system import environment
from portatrain.system.exit_codes import FAILED, INTERRUPTED, NOT_FAILURES

GRACE_S = 3.0
"""How long the others may take to end by themselves once one has failed."""


def rank() -> int:
    """This process's number among those of the run: 0 where there is one."""
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
    """How many processes there are, where the environment says so (torchrun, `run_processes`)."""
    return environment.WORLD_SIZE.get() if os.environ.get(environment.RANK.name) else None


def run_processes(n: int, entry: str, args: Mapping[str, Any], *, host: int = 0, hosts: int = 1) -> int:
    """Run `entry` ('package.module:function', of an argparse.Namespace, giving an exit code) in `n` processes.

    Of several `hosts`, each of which does the same, this is number `host`; then the environment has MASTER_ADDR and
    MASTER_PORT. Only the first process here has this one's standard output and error. Returns the exit code of all; a
    UserError of the process that failed first is raised here, another failure is printed and gives 1.
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
        # Simulated devices share the cores of one machine.
        shared.setdefault("OMP_NUM_THREADS", "1")
        command = [sys.executable, "-m", "portatrain.system.processes", entry, json.dumps(dict(args))]
        started: list[subprocess.Popen[bytes]] = []
        with forwarding(started):
            try:
                for r in range(n):
                    env = {**shared, "RANK": str(host * n + r), "LOCAL_RANK": str(r)}
                    started.append(_start(command, env, Path(folder), r))
                failed = _wait(started)
            finally:
                for process in started:
                    if process.poll() is None:
                        process.kill()
                    process.wait()
        return started[0].returncode if not failed else _explain(started, failed, Path(folder))


def _start(command: list[str], env: dict[str, str], folder: Path, r: int) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C reaches this process alone, which hands it on once.
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


def _wait(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Until all have ended; the ranks that ended by themselves with a failure, if any did."""
    deadline: float | None = None
    while True:
        codes = [p.poll() for p in processes]
        failed = [r for r, code in enumerate(codes) if code is not None and code not in NOT_FAILURES]
        if None not in codes:
            return failed
        if failed and deadline is None:
            deadline = time.monotonic() + GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            return failed
        time.sleep(0.05)


def _explain(processes: list[subprocess.Popen[bytes]], failed: list[int], folder: Path) -> int:
    """Show the failure that came first: the others are its consequences."""
    reports = {r: json.loads(p.read_text()) for r in failed if (p := folder / f"report-{r}.json").exists()}
    silent = [r for r in failed if r not in reports]
    if silent:  # ended by a signal, or by a library: before the others noticed
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
        kind = StorageError if found["code"] == StorageError.code else UserError
        raise kind(found["user"]["what"], **{k: v for k, v in found["user"].items() if k != "what"})
    print(f"error: process {r} of {len(processes)} failed; the others were stopped.\n{found['text']}", file=sys.stderr)
    return FAILED


@contextmanager
def forwarding(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """While entered, signals that ask a run to stop go to every process, and not to this one."""

    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            before[number] = signal.signal(number, forward)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ---- in a process


def end_with_parent() -> None:
    """Where the environment says who started this process, end it when that one is gone."""
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
    except KeyboardInterrupt:
        return INTERRUPTED
    except UserError as error:
        _report({"what": error.what, "expected": error.expected, "got": error.got, "do": error.do}, error.code)
        return error.code
    except BaseException:
        _report(None)
        return FAILED


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
    """The exit code of `call`; on a failure the process ends here, as tidying up would wait for processes that do not
    answer."""
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


def peak_rss_bytes() -> int:
    """The most host memory that this process has had."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
