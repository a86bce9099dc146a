"""What a referee concludes from evidence: votes, distances, sums over processes, and which checkpoints it doubts."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portatrain.checkpoint.locations import FolderLocation, step_name
from portatrain.runs import trust
from portatrain.training import evidence
from portatrain.training.evidence import Evidence


@pytest.mark.parametrize(
    ("votes", "named", "sure"),
    [
        ([(0, 7), (1, 7), (2, 7)], set(), True),
        ([(0, 7), (1, 8), (2, 7)], {1}, True),
        ([(0, 7), (1, 8)], {0, 1}, False),
        ([(0, 7), (1, 8), (0, 7), (1, 7)], {1}, True),  # it was wrong once
        ([(0, 7), (1, 8), (2, 9), (3, 7), (4, 7)], {1, 2}, True),
        ([(0, 7), (1, 7), (2, 8), (3, 8)], {0, 1, 2, 3}, False),
    ],
)
def test_more_than_half_of_the_votes_decide(votes: list[evidence.Vote], named: set[int], sure: bool) -> None:
    assert evidence.accused(votes) == (named, sure)


@pytest.mark.parametrize(("rows", "devices", "parts"), [(8, 4, 4), (6, 4, 3), (7, 4, 1), (8, 1, 1), (2, 8, 2)])
def test_a_microbatch_is_cut_into_equal_parts(rows: int, devices: int, parts: int) -> None:
    batch = {"x": np.arange(2 * rows).reshape(2, rows)}
    assert evidence.parts_for(rows, devices) == parts
    found = [evidence.part_of(batch, part, parts)["x"] for part in range(parts)]
    np.testing.assert_array_equal(np.concatenate(found, axis=1), batch["x"])


def test_every_bit_counts_in_a_digest() -> None:
    one = Evidence(loss=1.0, weight=2.0, grads={"w": np.ones(3, np.float32)})
    seen = {one.digest}
    for bit in range(96):
        wrong = one.grads["w"].copy()
        wrong.view(np.uint32)[bit // 32] ^= np.uint32(1 << bit % 32)
        seen.add(Evidence(loss=1.0, weight=2.0, grads={"w": wrong}).digest)
    assert len(seen) == 97 and 0 not in seen


def test_distances_are_relative_to_a_tensor_and_small_tensors_to_the_largest() -> None:
    large, small = np.full(4, 1.0), np.full(4, 1e-6)
    plain = {"a": large, "b": small}
    assert evidence.distance(plain, plain) == 0
    assert evidence.distance({"a": large * 1.01, "b": small}, plain) == pytest.approx(0.01)
    assert evidence.distance({"a": large, "b": small * 2}, plain) == pytest.approx(1e-3)
    assert evidence.distance({"a": large * math.nan, "b": small}, plain) == math.inf
    assert evidence.distance(plain, {"a": large * math.inf, "b": small}) == math.inf
    assert evidence.relative(math.nan, math.inf) == 0 and evidence.relative(1.0, math.nan) == math.inf
    assert evidence.relative(1.0, 2.0) == 0.5


class Process:
    """One of several processes in threads, with the two exchanges of a backend."""

    def __init__(self, number: int, shared: dict[str, Any]) -> None:
        self.process, self.processes, self._shared = number, shared["processes"], shared

    def _all(self, value: Any) -> list[Any]:
        self._shared["values"][self.process] = value
        self._shared["barrier"].wait(10)
        found = list(self._shared["values"])
        self._shared["barrier"].wait(10)
        return found

    def agree(self, value: int) -> int:
        return max(self._all(value))

    def add_up(self, words: np.ndarray) -> np.ndarray:
        return np.sum(self._all(words), axis=0, dtype=np.uint64)


def in_processes(count: int, work: Any) -> list[Any]:
    shared = {"processes": count, "values": [None] * count, "barrier": threading.Barrier(count)}
    found: list[Any] = [None] * count

    def one(number: int) -> None:
        found[number] = work(Process(number, shared))

    threads = [threading.Thread(target=one, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("count", [1, 3])
def test_parts_of_all_processes_add_up_to_the_batch(count: int) -> None:
    """The last of the processes has no part; the sums are those of float64 to 2^-50 of the largest number."""
    draw = np.random.default_rng(0)
    parts = [
        Evidence(loss=float(draw.normal()), weight=float(n + 1), grads={"w": draw.normal(0, 10.0**n, 1000)})
        for n in range(2)
    ]
    weight = sum(p.weight for p in parts)
    loss = sum(p.loss * p.weight for p in parts) / weight
    norm = float(np.linalg.norm(sum(p.weight * p.grads["w"] for p in parts))) / weight

    def work(backend: Any) -> tuple[float, float]:
        mine = parts if count == 1 else parts[backend.process : backend.process + 1]
        return evidence.whole_batch(backend, mine)

    found = in_processes(count, work)
    assert len(set(found)) == 1
    assert found[0] == pytest.approx((loss, norm), rel=1e-13)


def test_a_part_that_is_not_finite_makes_the_batch_so() -> None:
    def work(backend: Any) -> tuple[float, float]:
        grads = {"w": np.array([1.0, math.inf if backend.process else 2.0])}
        return evidence.whole_batch(backend, [Evidence(loss=1.0, weight=1.0, grads=grads)])

    assert all(math.isnan(loss) and math.isnan(norm) for loss, norm in in_processes(2, work))


def test_a_checkpoint_is_doubted_until_a_later_attempt_commits_it_again(tmp_path: Path) -> None:
    def commit(step: int, attempt: int) -> None:
        folder = tmp_path / step_name(step)
        folder.mkdir(exist_ok=True)
        (folder / "COMMIT").write_text(json.dumps({"save": f"a{attempt}"}))

    for step, attempt in ((10, 1), (20, 2), (30, 2), (35, 2)):
        commit(step, attempt)
    (tmp_path / step_name(40)).mkdir()  # not committed
    event = {"attempt": 2, "agreed": 20, "step": 40, "what": "other bits", "devices": [], "certain": True}
    place = FolderLocation(tmp_path)
    assert trust.doubted([], place) == {} and list(trust.doubted([event], place)) == [30, 35]
    assert "after step 20" in trust.doubted([event], place)[30]
    commit(30, 3)
    assert list(trust.doubted([event], place)) == [35]
    # A second disagreement, of attempt 3, doubts what that attempt has committed since the agreement.
    assert list(trust.doubted([event, {**event, "attempt": 3, "agreed": 25}], place)) == [30, 35]
    (tmp_path / step_name(35) / "COMMIT").write_text("no JSON")
    assert 35 in trust.doubted([event], place)


def test_devices_are_named_in_words() -> None:
    one = {"device": 1, "process": 0, "host": "h"}
    assert trust.named({"devices": [one], "certain": True}) == "device 1 (process 0 on h)"
    assert trust.named({"devices": [one], "certain": False}).startswith("probably device 1")
    assert trust.named({"devices": [one, one], "certain": False}).startswith("one of devices 1")
    assert trust.named({"devices": None}) == "no device is named"
