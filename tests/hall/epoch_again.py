"""Each host saves how many batches it took from its own part of the data; with other hosts the parts are others."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from portatrain.testing import audit

WHO = "loaders with a position for each host"
LINK = "https://github.com/AI-Hypercomputer/maxtext/issues/1760"
WHAT = "after a change of hosts the data goes on at another place, and rows are seen again"
COST = "MaxText with Grain refuses another number of processes; users ask for the repair"
KINDS = {"data"}
SAYS = "data: batch:"
SAMPLES, BATCH = 96, 12


class Loader:
    """The batches of one host: every `hosts`-th sample, `BATCH / hosts` of them a step."""

    def __init__(self, host: int, hosts: int, position: int) -> None:
        self.part, self.size = np.arange(host, SAMPLES, hosts), BATCH // hosts
        self.position = position

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            at = self.position * self.size % len(self.part)
            self.position += 1
            yield self.part[at : at + self.size]


def next_batch(loaders: list[Loader]) -> np.ndarray:
    return np.sort(np.concatenate([next(iter(loader)) for loader in loaders]))


def fault(wrong: bool) -> audit.Verdict:
    """Save the position of each host, in its own samples (wrong) or in steps of the whole batch."""
    weights = {"w": np.zeros(1)}
    two = [Loader(host, 2, 0) for host in range(2)]
    for _ in range(3):
        next_batch(two)
    saved = two[0].position * two[0].size if wrong else two[0].position
    before = audit.record(weights, batch=next_batch(two))
    three = [Loader(host, 3, 0) for host in range(3)]
    for loader in three:
        loader.position = saved // loader.size if wrong else saved
    return audit.check(before, weights, batch=next_batch(three))
