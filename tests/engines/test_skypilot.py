"""Task files for SkyPilot, read by SkyPilot's own parser: `make test-skypilot`, in an environment of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from launchers import skypilot
from launchers.yaml_text import to_yaml
from portatrain.system.exit_codes import RESUMABLE
from tests.support.jobs import CASES, job

os.environ["SKYPILOT_DISABLE_USAGE_COLLECTION"] = "1"
sky = pytest.importorskip("sky", reason="SkyPilot is not installed; it has an environment of its own")

pytestmark = pytest.mark.engines

TASKS = [name for name, (engine, *_) in CASES.items() if engine == "skypilot"]


def read(path: Path, data: dict[str, Any]) -> Any:
    path.write_text(to_yaml(data))
    return sky.Task.from_yaml(str(path))


@pytest.mark.parametrize("name", TASKS)
def test_it_reads_what_was_meant(name: str, tmp_path: Path) -> None:
    made = job(*CASES[name])
    data = skypilot.task(made)
    found = read(tmp_path / "task.yaml", data)
    assert (found.name, found.num_nodes, found.run) == (made.name, data["num_nodes"], data["run"])
    assert found.setup == data.get("setup")
    assert dict(found.envs) == data.get("envs", {})
    asked = data["resources"].get("any_of", [data["resources"]])
    seen = {(*_only(one.accelerators), one.infra.to_str().lower(), one.use_spot) for one in found.resources}
    assert seen == {(*_parts(one["accelerators"]), one["infra"], bool(one.get("use_spot"))) for one in asked}
    for one in found.resources:
        assert one.job_recovery["recover_on_exit_codes"] == [RESUMABLE]
        assert one.job_recovery["max_restarts_on_errors"] == made.max_restarts


@pytest.mark.parametrize(
    "change",
    [
        {"nodes": 8},
        {"resources": {"accelerator": "H100:8"}},
        {"num_nodes": "many"},
        {"resources": {"job_recovery": {"recover_on_exit_codes": ["eighty-five"]}}},
        {"resources": {"any_of": {"accelerators": "H100:8"}}},
    ],
)
def test_it_is_strict(change: dict[str, Any], tmp_path: Path) -> None:
    """What it would have refused: so that it did not only let everything pass."""
    data = skypilot.task(job(*CASES["skypilot-h100"]))
    with pytest.raises(ValueError):
        read(tmp_path / "task.yaml", {**data, **change})


def _only(accelerators: dict[str, float]) -> tuple[str, int]:
    ((name, count),) = accelerators.items()
    return name, int(count)


def _parts(text: str) -> tuple[str, int]:
    name, _, count = text.partition(":")
    return name, int(count)
