"""`run_processes`: endings, failures, signals. The processes import no framework."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from portatrain.errors import UserError
from portatrain.system.processes import rank, run_processes, world_size

pytestmark = pytest.mark.meshes

HERE = "tests.distributed.test_processes"


def ending(args: argparse.Namespace) -> int:
    (Path(args.folder) / f"rank-{rank()}").write_text(f"{world_size()} {os.environ['MASTER_PORT']}")
    return int(args.code)


def one_fails(args: argparse.Namespace) -> int:
    """Rank 1 fails as asked; the others wait for it for ever, and rank 0 notices late."""
    if rank() != 1:
        try:
            time.sleep(1.0 if rank() == 0 else 600.0)
        finally:
            (Path(args.folder) / f"alive-{rank()}").touch()
        raise ConnectionError("the others are gone")
    if args.how == "user":
        raise UserError("the data", expected="some", got="none", do="Give some.")
    if args.how == "crash":
        raise ZeroDivisionError("the cause")
    print("the last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def until_told(args: argparse.Namespace) -> int:
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda n, _: told.append(n))
    (Path(args.folder) / f"ready-{rank()}").touch()
    while not told:
        time.sleep(0.01)
    (Path(args.folder) / f"told-{rank()}").write_text(str(told[0]))
    return 130 if told[0] == signal.SIGINT else 85


def one_leaves(args: argparse.Namespace) -> int:
    """Rank 1 gets Ctrl-C before it listens; the others wait until they have been told `times` times."""
    if rank() == 1:
        raise KeyboardInterrupt
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda n, _: told.append(n))
    while len(told) < args.times:
        time.sleep(0.01)
    return 85


@pytest.mark.parametrize("times", [1, 2])
def test_one_that_leaves_ends_the_others_with_its_own_exit_code(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("portatrain.system.processes.LEAVING_S", 1.5)
    assert run_processes(3, f"{HERE}:one_leaves", {"times": times}) == 130


@pytest.mark.parametrize("code", [0, 85, 130])
def test_the_exit_code_of_all(code: int, tmp_path: Path) -> None:
    assert run_processes(3, f"{HERE}:ending", {"code": code, "folder": str(tmp_path)}) == code
    written = {p.read_text() for p in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) == 3
    assert len(written) == 1 and written.pop().startswith("3 ")


def test_a_users_mistake_in_one_is_the_error_of_all(tmp_path: Path) -> None:
    began_s = time.monotonic()
    with pytest.raises(UserError, match="the data: expected some, got none"):
        run_processes(3, f"{HERE}:one_fails", {"how": "user", "folder": str(tmp_path)})
    assert time.monotonic() - began_s < 8


@pytest.mark.parametrize(
    ("how", "said"), [("crash", ["process 1 of 3 failed", "the cause"]), ("kill", ["by SIGKILL", "the last words"])]
)
def test_the_first_failure_is_shown_and_the_others_end(
    how: str, said: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    began_s = time.monotonic()
    assert run_processes(3, f"{HERE}:one_fails", {"how": how, "folder": str(tmp_path)}) == 1
    assert time.monotonic() - began_s < 8
    errors = capfd.readouterr().err
    assert all(text in errors for text in said), errors
    assert "the others are gone" not in errors  # a consequence


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 85), (signal.SIGUSR1, 85)])
def test_signals_reach_every_process(number: signal.Signals, code: int, tmp_path: Path) -> None:
    def tell() -> None:
        while len(list(tmp_path.glob("ready-*"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    teller = threading.Thread(target=tell)
    teller.start()
    assert run_processes(2, f"{HERE}:until_told", {"folder": str(tmp_path)}) == code
    teller.join()
    assert [(tmp_path / f"told-{r}").read_text() for r in range(2)] == [str(int(number))] * 2


def test_they_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    call = (
        f"import portatrain.system.processes as p; p.run_processes(2, '{HERE}:until_told', {{'folder': '{tmp_path}'}})"
    )
    parent = subprocess.Popen([sys.executable, "-c", call], env={**os.environ, "PYTHONPATH": os.getcwd()})
    while len(list(tmp_path.glob("ready-*"))) < 2:
        time.sleep(0.02)
        assert parent.poll() is None
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    if not children.exists():
        parent.terminate()
        parent.wait()
        pytest.skip("this system does not list children")
    theirs = [int(p) for p in children.read_text().split()]
    parent.kill()
    parent.wait()
    deadline_s = time.monotonic() + 5
    while any(_runs(p) for p in theirs):
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
