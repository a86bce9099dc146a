"""The forks of tests/support: they end, say, fail and are killed as new processes do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import forks

pytest.importorskip("torch")
pytest.importorskip("jax")

GROUP = "tests.support.fork_entry"


@pytest.fixture(scope="module", autouse=True)
def serving() -> Iterator[None]:
    with forks.serving():
        yield


def python(code: str, *words: str) -> list[str]:
    return [sys.executable, "-c", code, *words]


def test_output_exit_code_environment_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = "import os, sys; print(sys.argv[1:], os.environ['MINE'], os.getcwd()); print('e', file=sys.stderr); exit(7)"
    done = forks.run(python(code, "a", "b"), env={**os.environ, "MINE": "1"})
    assert (done.returncode, done.stdout, done.stderr) == (7, f"['a', 'b'] 1 {tmp_path}\n", "e\n")
    merged = forks.run(python("1 / 0"), merged=True)
    assert merged.returncode == 1 and merged.stdout.endswith("ZeroDivisionError: division by zero\n")
    assert "atexit" in forks.run(python("import atexit; atexit.register(print, 'atexit')")).stdout
    assert forks.run([sys.executable, "-m", "portatrain.cli", "--version"]).stdout.startswith("portatrain ")


def test_a_variable_that_a_framework_reads_at_its_import_is_refused() -> None:
    done = forks.run(python("pass"), env={**os.environ, "JAX_ENABLE_X64": "1"})
    assert done.returncode == 1 and "JAX_ENABLE_X64" in done.stderr
    code = "import jax; print(jax.config.read('jax_disable_most_optimizations'))"
    assert forks.run(python(code), env={**os.environ, forks.QUICK: "1"}).stdout == "True\n"
    assert forks.run(python(code)).stdout == "False\n"


def test_signals_and_time_limits() -> None:
    process = forks.start(python("import time; time.sleep(60)"), stdout=1, stderr=2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        forks.run(python("import time; print('begun', flush=True); time.sleep(60)"), timeout=1)
    assert caught.value.output == "begun\n"


def test_a_process_ends_with_what_asked_for_it() -> None:
    inner = python("import time; time.sleep(60)")
    outer = f"""
import os, time
from tests.support import forks
print(forks.start({inner!r}, stdout=1, stderr=2).pid, flush=True)
os.kill(os.getpid(), 9)
"""
    found = forks.run(python(outer))
    assert found.returncode == -signal.SIGKILL
    end_s = time.monotonic() + 10
    while Path(f"/proc/{int(found.stdout)}").exists():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def test_a_group_of_processes(tmp_path: Path) -> None:
    good = forks.start_group(2, f"{GROUP}:note", {"folder": str(tmp_path)}, 60)
    assert good == (True, "rank 0\n")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"0": "2", "1": "2"}
    in_time, said = forks.start_group(2, f"{GROUP}:fail", {}, 60)
    assert in_time and "process 1 of 2 failed" in said and "ZeroDivisionError" in said
