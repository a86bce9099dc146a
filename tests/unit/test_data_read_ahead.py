"""Reading ahead: order, errors, and no thread left behind."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from portatrain.data import Split, prefetch
from portatrain.data.read_ahead import Prefetch


class Numbers(Split):
    """Samples that are their own numbers; reading from ``fails_at`` on raises."""

    name, windows, fingerprint = "train", 100, "numbers"

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.reads = 0

    def batch(self, start: int, count: int) -> dict[str, np.ndarray]:
        self.reads += 1
        if self.fails_at is not None and start + count > self.fails_at:
            raise OSError("the disk is gone")
        return {"sample": np.arange(start, start + count)}

    def blank(self, count: int) -> dict[str, np.ndarray]:
        return {"sample": np.full(count, -1)}


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "portatrain-prefetch"]


@pytest.fixture(autouse=True)
def no_thread_left():
    yield
    gc.collect()
    deadline = time.monotonic() + 5
    while readers() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not readers()


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_batches_come_in_order(depth):
    with prefetch(Numbers(), 30, 4, depth) as batches:
        for i in range(12):
            assert next(batches)["sample"].tolist() == list(range(30 + 4 * i, 34 + 4 * i))


def test_batches_of_sizes_that_change():
    with prefetch(Numbers(), 5, iter([2, 2, 3, 7])) as batches:
        found = [next(batches)["sample"].tolist() for _ in range(4)]
    assert [len(one) for one in found] == [2, 2, 3, 7]
    assert [n for one in found for n in one] == list(range(5, 19))


def test_no_more_than_depth_is_read_ahead():
    split = Numbers()
    with prefetch(split, 0, 1, depth=3) as batches:
        next(batches)
        time.sleep(0.3)
        assert split.reads <= 1 + 3 + 1  # taken, waiting, and one in the reader's hand


def test_an_error_surfaces_at_its_batch_and_stays():
    with prefetch(Numbers(fails_at=10), 0, 4) as batches:
        assert [next(batches)["sample"][0] for _ in range(2)] == [0, 4]
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                next(batches)


def test_leaving_by_an_exception_closes():
    with pytest.raises(KeyboardInterrupt), prefetch(Numbers(), 0, 4):
        raise KeyboardInterrupt
    assert not readers()


def test_a_closed_reader_ends_its_iteration_and_closes_twice():
    batches = prefetch(Numbers(), 0, 4)
    next(batches)
    batches.close()
    batches.close()
    assert not readers()
    assert list(batches) == []


def test_a_forgotten_reader_ends():
    batches = Prefetch(Numbers(), 0, 4)
    next(batches)
    (thread,) = readers()
    del batches
    gc.collect()
    thread.join(timeout=5)
    assert not thread.is_alive()


@pytest.mark.parametrize(("count", "depth"), [(0, 2), (1, 0)])
def test_sizes(count, depth):
    with pytest.raises(ValueError, match="at least 1"):
        Prefetch(Numbers(), 0, count, depth)


SCRIPT = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with it ignored
import numpy as np
from portatrain.data import Split, prefetch
class Slow(Split):
    name, windows, fingerprint = "train", 9, "slow"
    def batch(self, start, count):
        time.sleep(0.2)
        return {"sample": np.arange(start, start + count)}
    def blank(self, count): ...
try:
    with prefetch(Slow(), 0, 1) as batches:
        print("ready", flush=True)
        for batch in batches: ...
except KeyboardInterrupt:
    import threading
    print([t.name for t in threading.enumerate()], flush=True)
"""


def test_ctrl_c_leaves_at_once_and_cleanly():
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "['MainThread']\n", "")
