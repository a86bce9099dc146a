"""A run of the recipe in paced.py, started by `launch` and looked at from outside."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from portatrain.runs.history import History, read_history
from portatrain.runs.run_dir import RunDir

HERE = Path(__file__).parent


def launch(*words: str, code: int = 0) -> str:
    """`launch WORDS`; what it printed, where it ended with `code`."""
    program = "import sys; from portatrain.cli import launch_main; sys.exit(launch_main())"
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=1200)
    assert done.returncode == code, (words, done.returncode, done.stdout, done.stderr)
    return done.stdout + done.stderr


def prepare() -> None:
    """The recipe and its corpus, in the working directory."""
    for name in ("paced.py", "pace.py"):
        shutil.copyfile(HERE / name, name)
    Path("corpus").mkdir()
    for k in range(40):
        lines = (f"{i} times {i} is {i * i}, and that is all.\n" for i in range(100 * k, 100 * k + 100))
        Path("corpus", f"{k}.txt").write_text("".join(lines))


def now(name: str = "story") -> History:
    return read_history(RunDir(Path("runs", name)))


def story_of(name: str = "story") -> str:
    """Everything that a failed test wants to see."""
    run = Path("runs", name)
    parts = [json.dumps(now(name).as_json(), indent=1)]
    for path in sorted([*run.glob("attempts/*/events.jsonl"), *run.glob("attempts/*/*.log"), *run.glob("jobs/*.log")]):
        parts.append(f"=== {path}\n{path.read_text(errors='replace')[-3000:]}")
    return "\n".join(parts)
