"""Processes that start in milliseconds: forks of one process that has imported the frameworks.

A new Python that imports jax and torch computes for five to eight seconds. Tests whose subject is what processes do,
not how Python starts, run them here: `run` and `start` take a command as `subprocess` does, and `start_group` the
arguments of `benchmarks.matrix.run.start`. The processes of `run_processes` inside such a process are forks too.

There is one server for each process of tests. A connection to it is one process: the command goes there, its process
id and its exit code come back, and if the connection breaks, the process is killed.
"""

from __future__ import annotations

import array
import functools
import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PRELOADED = ("backends.jax", "backends.torch", "checkpoint.saver", "training.trainer", "training.metrics.flops")
ROOT = Path(__file__).parents[2]
SOCKET = "FORKS_OF_TESTS"
FRAMEWORKS = ("JAX_", "TORCH", "OMP_", "MKL_")
"""Variables that a framework reads when it is imported, so a fork must not change them, except QUICK."""
QUICK = "JAX_DISABLE_MOST_OPTIMIZATIONS"
"""Set to 1, it makes XLA leave out the costly passes of LLVM: half of the time to compile a small model."""


def _readable(files: list[Any], timeout: float | None = None) -> list[Any]:
    """Return the files that can be read, also if a number of one is beyond what select() takes."""
    with selectors.DefaultSelector() as selector:
        for file in files:
            selector.register(file, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(timeout)]


class Forked:
    """One process, with the methods of `subprocess.Popen` that are used here."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], folder: Path | None, fds: Sequence[int], path: str
    ) -> None:
        self.returncode: int | None = None
        self.args = list(command)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        asked = json.dumps({"command": list(command), "env": dict(env), "folder": str(folder or Path.cwd())}).encode()
        self._socket.sendmsg(
            [len(asked).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        )
        self._socket.sendall(asked)
        self._answers = self._socket.makefile("r")
        self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        if self.returncode is None and _readable([self._socket], 0):
            self._end()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not _readable([self._socket], timeout):
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            self._end()
        assert self.returncode is not None
        return self.returncode

    def _end(self) -> None:
        self.returncode = int(self._answers.readline() or -signal.SIGKILL)
        self._answers.close()
        self._socket.close()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def server() -> str:
    """Return the path of this process's server; start it at the first call."""
    given = os.environ.get(SOCKET)
    if given is not None:
        return given
    return _Owned().path


class _Owned:
    """A server that ends with this process."""

    def __init__(self) -> None:
        folder = tempfile.mkdtemp(prefix="portatrain-forks-")
        self.path = f"{folder}/socket"
        command = [sys.executable, "-m", "tests.support.forks", self.path]
        # The server ends when its input does, which is when this process ends, however it does.
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
        assert self.process.stdout is not None
        ready = self.process.stdout.readline()
        assert ready == b"ready\n", "the server of forks did not start"
        _KEPT.append(self)


_KEPT: list[_Owned] = []


@contextmanager
def serving() -> Iterator[None]:
    """While entered, commands find a server; it starts at the first one."""
    try:
        yield
    finally:
        server.cache_clear()
        while _KEPT:
            one = _KEPT.pop()
            assert one.process.stdin is not None and one.process.stdout is not None
            one.process.stdin.close()
            one.process.wait(30)
            one.process.stdout.close()
            shutil.rmtree(Path(one.path).parent, ignore_errors=True)


def start(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: int | None = None,
    stdout: int,
    stderr: int,
) -> Forked:
    """Start `[python, "-m", module, ...]` or `[python, "-c", code, ...]`; `stdin` and the like are descriptors."""
    assert command[0] == sys.executable and command[1] in ("-m", "-c"), command
    with open(os.devnull, "rb") as nothing:
        fds = [nothing.fileno() if stdin is None else stdin, stdout, stderr]
        return Forked(command[1:], os.environ if env is None else env, cwd, fds, server())


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 300,
    merged: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a command as `subprocess.run(..., capture_output=True, text=True)` does.

    Args:
        merged: standard error goes into `stdout`.

    Raises:
        subprocess.TimeoutExpired: it was killed after `timeout` seconds; `output` has what it said.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = start(command, env=env, cwd=cwd, stdout=out.fileno(), stderr=(out if merged else err).fileno())
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            process.kill()
            process.wait()
            out.seek(0)
            error.output = out.read()
            raise
        finally:
            process.kill()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(list(command), process.wait(), out.read(), err.read())


def start_group(
    n: int, entry: str, args: dict[str, Any], timeout_s: float, python: str = sys.executable
) -> tuple[bool, str]:
    """Do as `benchmarks.matrix.run.start`, in forks that compile quickly if `python` is this one."""
    from benchmarks.matrix import run as matrix

    if python != sys.executable:
        return matrix.start(n, entry, args, timeout_s, python)
    command = [python, "-c", matrix.CALL.format(n=n, entry=entry), json.dumps(args)]
    try:
        return True, run(command, env={**os.environ, QUICK: "1"}, timeout=timeout_s, merged=True).stdout
    except subprocess.TimeoutExpired as error:
        return False, str(error.output)


# ---- the server


def serve(path: str) -> Callable[[], Any] | None:
    """Answer until standard input ends. In a fork, return what the fork is to do."""
    began = _read_at_import(os.environ)
    before = dict(os.environ)
    for name in PRELOADED:
        importlib.import_module(f"portatrain.{name}")
    sys.modules["portatrain.training.metrics.flops"].measured_cpu_peak()  # every run of a fork would take half a second
    made = {k: v for k, v in os.environ.items() if before.get(k) != v}
    gc.freeze()  # so that a collection in a fork does not write to memory that all share
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(64)
    print("ready", flush=True)
    running: dict[int, socket.socket] = {}
    try:
        while True:
            ready = _readable([0, woken, listener, *running.values()])
            if 0 in ready and not os.read(0, 1):
                return None
            if woken in ready:
                woken.recv(4096)
                for pid in list(running):
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if ended:
                        one = running.pop(pid)
                        _say(one, os.waitstatus_to_exitcode(status))
                        one.close()
                continue  # a connection may be closed now
            for pid, one in running.items():
                if one in ready:  # nothing is sent after the command, so it has ended
                    os.kill(pid, signal.SIGKILL)
            if listener in ready:
                one, _ = listener.accept()
                asked, fds = _received(one)
                asked["env"] = {**made, **asked["env"]}
                changed = _read_at_import({k: v for k, v in asked["env"].items() if made.get(k) != v}) ^ began
                pid = os.fork()
                if not pid:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for other in (listener, woken, wake, one, *running.values()):
                        other.close()
                    running = {}
                    return functools.partial(_become, asked, fds, changed)
                for fd in fds:
                    os.close(fd)
                running[pid] = one
                _say(one, pid)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)


def _read_at_import(env: Mapping[str, str]) -> set[tuple[str, str]]:
    return {(k, v) for k, v in env.items() if k.startswith(FRAMEWORKS) and k != QUICK}


def _say(to: socket.socket, number: int) -> None:
    with suppress(BrokenPipeError):  # who asked has ended
        to.sendall(f"{number}\n".encode())


def _received(one: socket.socket) -> tuple[dict[str, Any], list[int]]:
    head, control, *_ = one.recvmsg(8, socket.CMSG_SPACE(3 * 4))
    fds = array.array("i")
    for _, _, data in control:
        fds.frombytes(data)
    text, size = b"", int.from_bytes(head, "big")
    while len(text) < size:
        text += one.recv(size - len(text))
    return json.loads(text), list(fds)


def _become(asked: dict[str, Any], fds: list[int], changed: set[tuple[str, str]]) -> None:
    """Be the process that was asked for."""
    parent = "PORTATRAIN_PARENT"
    os.setsid()
    for to, fd in enumerate(fds):
        os.dup2(fd, to)
    for fd in fds:
        if fd > 2:
            os.close(fd)
    assert not changed, f"not what it was when the server imported the frameworks: {changed}"
    here = os.getppid()
    os.environ.clear()
    os.environ |= {**asked["env"], SOCKET: sys.argv[1]}
    if parent in os.environ:
        os.environ[parent] = str(here)  # it is this process's parent; a broken connection ends what the other started
    os.chdir(asked["folder"])
    folders = asked["env"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [folder for folder in folders if folder and folder not in sys.path]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    how, what, *words = asked["command"]
    import jax

    from portatrain.system import processes

    jax.config.update("jax_disable_most_optimizations", asked["env"].get(QUICK) == "1")
    processes._start = start_rank
    if how == "-c":
        sys.argv = ["-c", *words]
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [what, *words]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*found in sys.modules.*", RuntimeWarning)
            runpy.run_module(what, run_name="__main__", alter_sys=True)


def start_rank(command: list[str], env: dict[str, str], folder: Path, r: int) -> Any:
    """Do as `portatrain.system.processes._start`."""
    from portatrain.system import environment

    if r == 0:
        return start(command, env=env, stdin=0, stdout=1, stderr=2)
    logs = environment.LOGS.get()
    with (
        (logs / f"rank-{r}.log" if logs else folder / f"stderr-{r}").open("ab") as errors,
        open(os.devnull, "wb") as no,
    ):
        return start(command, env=env, stdout=(errors if logs else no).fileno(), stderr=errors.fileno())


if __name__ == "__main__":
    become = serve(sys.argv[1])
    if become is not None:
        become()
