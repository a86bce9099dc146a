"""The referee on meshes, on simulated jax devices and gloo processes: a device that is wrong in what it computes alone,
in its copy of a parameter at rest or in a sum is seen at the next check, and named as far as the others can tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from portatrain.backends.base import missing
from portatrain.runs.events import Kind
from portatrain.runs.run_dir import RunDir
from portatrain.system.processes import run_processes

GROUPS = {
    "jax": (1, 4, "replica=2,fsdp=2", ("", "weights", "activations", "copy", "sum")),
    "torch": (2, 2, "fsdp=2", ("", "gradients", "backward", "copy", "sum")),
}
WRONG = 1
"""The position of the wrong device."""


@pytest.mark.full
@pytest.mark.parametrize("backend", [name for name in GROUPS if not missing(name)])
def test_the_wrong_device_is_named(backend: str, tmp_path: Path) -> None:
    processes, devices, mesh, sites = GROUPS[backend]
    cells = [(site or "clean", mesh, site, WRONG) for site in sites]
    given = {"backend": backend, "by": "devices", "devices": devices, "cells": cells, "folder": str(tmp_path)}
    assert run_processes(processes, "tests.support.referee_worker:main", given) == 0
    for name, _, site, _ in cells:
        said, run = (tmp_path / f"{name}.txt").read_text(), RunDir(tmp_path / name)
        events = run.events(Kind.DISAGREED)
        if not site:
            assert not said and not events and [e["step"] for e in run.events(Kind.AGREED)] == [2, 4, 6]
            continue
        (event,) = events
        check(event, backend, site, said, devices)
        assert run.committed() == (event["agreed"] or None)


def check(event: dict[str, Any], backend: str, site: str, said: str, devices: int) -> None:
    named = {d["device"] for d in event["devices"]}
    # The wrong sum of jax is in the program, so from the first step on; all others begin between the checks 2 and 4.
    assert (event["step"], event["agreed"]) == ((2, 0) if (backend, site) == ("jax", "sum") else (4, 2)), said
    if site == "sum":
        assert "another loss or gradient norm" in said and named == set(range(devices)) and not event["certain"]
    elif site == "copy" and devices == 2:  # nobody else has a copy
        assert "a copy of params/down" in said and named == {0, 1} and not event["certain"]
    else:
        # Of two devices that differ in what they compute, the processor of the host says which is wrong.
        assert named == {WRONG} and event["certain"], said
        assert ("a copy of params/down" if site == "copy" else "for one part of the batch") in said
