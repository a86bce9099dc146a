"""Compute the seconds of a collective over one mesh axis, from the positions of its devices.

V is the bytes of the gathered array everywhere. Sources: the collective formulas of the jax-ml scaling
book; for a switched domain the ring bound; for a point-to-point mesh the direct exchange.
"""

from __future__ import annotations

from dataclasses import dataclass

TORUS_HOP_S = 1e-6  # scaling book: a collective on a torus takes at least 1 us a hop
SWITCH_HOP_S = 10e-6  # estimate: starting one inside a switched or meshed domain
NETWORK_HOP_S = 20e-6  # estimate: one stage of a tree between domains


@dataclass(frozen=True, slots=True)
class Path:
    """The network between the devices of a mesh axis.

    Each of ``outer`` fast domains has ``inner`` of the devices. ``rate``: bytes per second that one device receives in
    an all-gather inside the domain. ``exchange``: V over the seconds of an all-to-all inside the domain. ``egress``:
    bytes per second of one device between domains. ``latency_s``: the shortest duration of a collective.
    """

    inner: int = 1
    outer: int = 1
    rate: float = 0.0
    exchange: float = 0.0
    egress: float = 0.0
    latency_s: float = 0.0
    where: str = ""

    @property
    def size(self) -> int:
        return self.inner * self.outer


def all_gather(path: Path, gathered_bytes: float) -> float:
    """Return the seconds of an all-gather, or of a reduce-scatter, of V bytes.

    Inside a domain of m it takes V (m-1)/m / rate; between k domains, through the m devices in each of them,
    V (k-1)/k / (m egress). The two overlap: the slower one counts.
    """
    if path.size == 1 or not gathered_bytes:
        return 0.0
    time_s = path.latency_s
    if path.inner > 1:
        time_s = max(time_s, gathered_bytes * (path.inner - 1) / path.inner / path.rate)
    if path.outer > 1:
        share = gathered_bytes * (path.outer - 1) / path.outer
        time_s = max(time_s, share / (path.inner * path.egress))
    return time_s


def all_reduce(path: Path, array_bytes: float) -> float:
    """Return the seconds of an all-reduce: a reduce-scatter and an all-gather."""
    return 2 * all_gather(path, array_bytes)


def all_to_all(path: Path, gathered_bytes: float) -> float:
    """Return the seconds of an all-to-all: every device sends an equal part of its V/N to each other one."""
    if path.size == 1 or not gathered_bytes:
        return 0.0
    time_s = path.latency_s
    if path.inner > 1:
        # What leaves the domain does not load the links inside it.
        time_s = max(time_s, gathered_bytes / path.outer**2 / path.exchange)
    if path.outer > 1:
        share = gathered_bytes / path.size * (path.outer - 1) / path.outer
        time_s = max(time_s, share / path.egress)
    return time_s


def exchange(path: Path, sent_bytes: float) -> float:
    """Return the seconds in which every device sends V bytes to one other, and receives as many. With several domains
    the other one is outside."""
    if path.size == 1 or not sent_bytes:
        return 0.0
    return max(path.latency_s, sent_bytes / (path.egress if path.outer > 1 else path.rate))


def many_reduces(paths: list[Path], array_bytes: float) -> float:
    """Return the seconds of an all-reduce over several axes: reduce-scatter over the fastest, then the rest on the
    share."""
    time_s, remaining = 0.0, array_bytes
    for path in sorted((p for p in paths if p.size > 1), key=lambda p: (p.outer > 1, -p.rate)):
        time_s += all_reduce(path, remaining)
        remaining /= path.size
    return time_s
