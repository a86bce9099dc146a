"""Requests to stop only get stronger: what comes while the processes agree is not forgotten."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest

from portatrain.system.stop_signals import STRENGTHS, StopSignals
from portatrain.training.trainer import Trainer


@pytest.mark.parametrize("mine", STRENGTHS, ids=str)
@pytest.mark.parametrize("theirs", STRENGTHS, ids=str)
def test_the_stronger_of_two_requests_stays(mine: str | None, theirs: str | None) -> None:
    signals = StopSignals()
    signals.strengthen(mine)
    signals.strengthen(theirs)
    assert signals.asked == max(mine, theirs, key=STRENGTHS.index)


@pytest.mark.parametrize("came", ["preempt", "interrupt"])
def test_a_request_that_comes_while_processes_agree_is_agreed_on_the_next_time(came: str) -> None:
    signals = StopSignals()
    said: list[int] = []

    def agree(value: int) -> int:
        said.append(value)
        signals.strengthen(came)  # as the thread that hears signals does, after our value has been sent
        return value

    trainer: Any = object.__new__(Trainer)
    trainer.backend, trainer._stop = SimpleNamespace(agree=agree), signals
    assert trainer._stop_requested() is None and signals.asked == came
    assert trainer._stop_requested() == came and said == [0, 1 + STRENGTHS.index(came)]  # 1 is a save


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_the_first_signal_here_is_no_second_one_after_what_others_were_asked(number: int) -> None:
    """Ctrl-C reaches the processes one after the other; one that has agreed already must not leave at once."""
    asked: list[str] = []
    with StopSignals() as signals:
        signals.trained = True
        signals.on_asked = asked.append
        signals.strengthen("interrupt")
        os.kill(os.getpid(), number)
        end_s = time.monotonic() + 5
        while not asked and time.monotonic() < end_s:
            time.sleep(0.01)
        assert asked and signals.asked == "interrupt"


def test_what_others_were_asked_starts_the_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTATRAIN_GRACE_S", "60")
    signals = StopSignals()
    signals.strengthen("preempt")
    assert time.monotonic() - signals._first_s < 5
