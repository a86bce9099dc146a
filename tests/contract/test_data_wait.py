"""A source that stalls: the run waits, says so in its record, and trains what it would have trained."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from portatrain.backends.base import missing
from portatrain.data import read_ahead
from portatrain.runs.events import Kind
from portatrain.runs.run_dir import RunDir
from portatrain.training.trainer import train
from tests.support import spiky

BACKEND = next(name for name in ("torch", "jax") if not missing(name))
STALL_S = 1.5


@dataclass(frozen=True, kw_only=True)
class Stalling(spiky.Points):
    stalls: bool = True
    """Sample 80 comes late, but has the number of the plain source."""

    def sample(self, index: int) -> dict[str, Any]:
        if self.stalls and index == 80:
            time.sleep(STALL_S)
        return super().sample(index)


def test_a_stall_is_an_event_and_part_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "SAY_AFTER_S", 0.3)
    runs = []
    for stalls in (True, False):
        runs.append(RunDir(tmp_path / str(stalls)))
        assert train(spiky.recipe(data=Stalling(stalls=stalls), spikes=None), runs[-1], backend=BACKEND) == 0
    stalled, plain = runs
    said = stalled.events(Kind.DATA_WAIT)
    (step,) = {event["step"] for event in said}
    waits = [event["waited_s"] for event in said]
    # At 0.3 s, and whenever the wait has doubled: at 0.6 and 1.2 s, or fewer times on a busy machine.
    assert 1 <= len(waits) <= 3 and waits[0] >= 0.3 and all(b >= 1.9 * a for a, b in itertools.pairwise(waits))
    longest = max(stalled.curve(), key=lambda row: row["data_wait_s"])
    assert longest["step"] == step and longest["step_s"] >= longest["data_wait_s"] >= STALL_S / 2
    assert [row["loss"] for row in stalled.curve()] == [row["loss"] for row in plain.curve()]
