"""Measure what the fingerprints of a checkpoint cost, in ms for a GiB of state.

    python benchmarks/fingerprints.py            # less than a minute

Sums tensors of several shapes in one thread, in time of a core, beside a crc32c of the same bytes, which every save
computes anyway. Then saves and restores a state of one process with and without fingerprints, by the clock, so on a
machine that does nothing else: what training waits for at a save (the copy: the thread that writes takes the sums), and
how long a save and an arrival take.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from checkpoints_format import LocalStore, Reader
from checkpoints_format.crc import crc32c
from checkpoints_format.dtypes import NUMPY
from portatrain.backends.base import LocalBox
from portatrain.backends.program import Program
from portatrain.checkpoint import fingerprints
from portatrain.checkpoint.format_layout import format_layout
from portatrain.checkpoint.saver import Checkpoints, reads
from portatrain.model.layout import Layout
from portatrain.model.module import Module, Param, describe
from portatrain.optim import AdamW

CASES = (
    ("float32", (16384, 4096)),
    ("float32", (32, 1024, 16, 128)),
    ("float32", (4096, 8, 64, 8)),
    ("float32", (1 << 26,)),
    ("float32", (1 << 22, 4)),
    ("bfloat16", (16384, 8192)),
)
GIB = 2**30


def best_s(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    found = []
    for _ in range(3):
        began_s = clock()
        call()
        found.append(clock() - began_s)
    return min(found)


class Large(Module):
    def __init__(self) -> None:
        self.w = Param(rows=4096, columns=4096)


class Holding:
    """A backend as far as a checkpoint needs one: arrays on the host, a parameter and its slots."""

    process, processes = 0, 1

    def __init__(self) -> None:
        made = describe(Large())
        names = frozenset(made.params)
        optimizer = AdamW(lr=1e-3)
        self.program = Program(
            definition=made, layout=Layout.of(made), optimizer=optimizer, trainable=names, decay=names
        )

    def restore_state(self, read: Any) -> dict[tuple[str, str], np.ndarray]:
        found = {}
        for t in format_layout(self.program).tensors:
            role, _, name = t.name.rpartition("/") if t.name != "opt/count" else (t.name, "", "")
            found[role, name] = read(role, name, (0,) * len(t.shape), t.shape)
        return found

    def local_boxes(self, state: dict[tuple[str, str], np.ndarray]) -> Iterator[LocalBox]:
        for (role, name), a in state.items():
            yield LocalBox(role=role, name=name, offset=(0,) * a.ndim, shape=a.shape, fetch=a.copy)

    def irregular_shards(self, state: Any) -> dict[Any, Any]:
        return {}

    def agree(self, value: int) -> int:
        return value


def a_save(folder: Path, backend: Any, state: Any) -> tuple[float, float]:
    """Return the seconds for which training waits, and those until the commit."""
    checkpoints = Checkpoints(folder, budget_bytes=4 * GIB)
    began_s = time.perf_counter()
    checkpoints.save(1, backend, state, {})
    waited_s = time.perf_counter() - began_s
    checkpoints.wait()
    return waited_s, time.perf_counter() - began_s


def main() -> None:
    rng = np.random.default_rng(0)
    print("ms of a core, a GiB          fingerprint   crc32c")
    for dtype, shape in CASES:
        raw = rng.integers(0, 256, math.prod(shape) * NUMPY[dtype].itemsize, np.uint8)
        array = raw.view(NUMPY[dtype]).reshape(shape)
        gib = array.nbytes / GIB
        ours = best_s(lambda a=array: fingerprints.box_sum(a, (0,) * a.ndim), time.thread_time) / gib
        crc = best_s(lambda r=raw: crc32c(r), time.thread_time) / gib
        print(f"  {dtype:9} {'x'.join(map(str, shape)):16} {1e3 * ours:12.0f} {1e3 * crc:8.0f}")
    backend: Any = Holding()
    sizes = format_layout(backend.program).tensors
    gib = sum(t.nbytes for t in sizes) / GIB
    drawn = iter(rng.standard_normal(t.shape).astype(t.dtype) for t in sizes)
    state = backend.restore_state(lambda *box: next(drawn))
    without = mock.patch.object(fingerprints, "box_sum", lambda array, offset: 0)
    print(f"a state of {gib:.2f} GiB, ms a GiB     training waits   save   restore and compare")
    for what, way in (("with fingerprints", contextlib.nullcontext()), ("without", without)):
        with tempfile.TemporaryDirectory(prefix="fingerprints-") as scratch, way:
            saves = [a_save(Path(scratch) / str(i), backend, state) for i in range(3)]
            with LocalStore(Path(scratch) / "0/step-00000001") as store:
                reader = Reader(store)
                saved = fingerprints.saved_in(reader.meta) or {}

                def arrive(reader: Reader = reader, saved: dict[str, str] = saved) -> None:
                    assert fingerprints.compare(backend, backend.restore_state(reads(reader)), saved) == []

                back_s = best_s(arrive)
        waited, ended = (1e3 * min(s[i] for s in saves) / gib for i in (0, 1))
        print(f"  {what:32} {waited:9.0f} {ended:9.0f} {1e3 * back_s / gib:9.0f}")


if __name__ == "__main__":
    main()
