"""`portatrain data pack`, killed at random and gone on with: the same bytes as undisturbed, whatever the workers."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.packed import RECIPE, contents, corpus, tokenizer

ROOT = Path(__file__).parents[2]


def command(at: Path, out: Path, workers: int) -> list[str]:
    more = ["--workers", str(workers), "--shard-mib", "1"]
    return [sys.executable, "-m", "tests.support.pack_worker", str(at / "recipe.py"), str(out), *more]


def begin(at: Path, out: Path, workers: int) -> subprocess.Popen:
    said = (at / "said").open("wb")
    with said:
        return subprocess.Popen(command(at, out, workers), cwd=ROOT, stdout=said, stderr=said)


def killed(at: Path, out: Path, workers: int, kills: int, seed: int, longest_s: float) -> int:
    """Kill the command `kills` times at random moments; return how often it was killed before the store was whole."""
    rng, deaths = random.Random(seed), 0
    for _ in range(kills):
        process = begin(at, out, workers)
        until_s = time.monotonic() + 60
        while not (out / "unfinished").exists() and process.poll() is None and time.monotonic() < until_s:
            time.sleep(0.005)  # so that most kills hit the work and not the imports
        time.sleep(rng.random() * longest_s)
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL, (at / "said").read_text()
        deaths += 1
    assert begin(at, out, workers).wait() == 0, (at / "said").read_text()
    return deaths


def prepared(root: Path, documents: int) -> Path:
    corpus(root / "corpus", documents=documents)
    made = tokenizer(root / "tokenizer.json")
    (root / "recipe.py").write_text(RECIPE.format(paths=str(root / "corpus"), tokenizer=str(made)))
    assert begin(root, root / "whole", 1).wait() == 0, (root / "said").read_text()
    return root


def test_a_few_kills(tmp_path: Path) -> None:
    at = prepared(tmp_path, documents=60)
    deaths = killed(at, at / "out", workers=2, kills=3, seed=1, longest_s=0.6)
    assert contents(at / "out") == contents(at / "whole") and deaths >= 1


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_a_hundred_kills(workers: int, tmp_path: Path) -> None:
    at = prepared(tmp_path, documents=300)
    deaths = round_ = 0
    while deaths < 100:
        round_ += 1
        deaths += killed(
            at, at / f"out{round_}", workers, kills=100 - deaths, seed=100 * workers + round_, longest_s=2.0
        )
        assert contents(at / f"out{round_}") == contents(at / "whole"), round_
    print(f"{workers} workers: {deaths} kills over {round_} stores, all with the same bytes")
