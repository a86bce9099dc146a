"""`--track FILE.py:CLASS`: the class is found, its file may import its neighbours, and a mistake is one paragraph."""

from __future__ import annotations

from pathlib import Path

import pytest

from portatrain.commands.options import check_track
from portatrain.errors import UserError
from portatrain.runs.jobs import Job
from portatrain.training.metrics.trackers import tracker

METHODS = "\n".join(f"    def {name}(self, *a, **k): pass" for name in ("start", "step", "eval", "event", "end"))
FILE = f"""
from neighbour_of_a_tracker import NAME

class Good:
    name = NAME
{METHODS}

class Short:
    def start(self, info): pass

class Asks:
    def __init__(self, key): pass
{METHODS}

thing = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "mine.py").write_text(FILE)
    (tmp_path / "lab" / "broken.py").write_text("import no_such_module_at_all\n")
    (tmp_path / "lab" / "neighbour_of_a_tracker.py").write_text("NAME = 'beside'\n")
    return tmp_path


def test_a_class_in_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = check_track("--track", ["lab/mine.py:Good", "wandb", f"{folder}/lab/mine.py:Good"])
    assert given == (f"{folder}/lab/mine.py:Good", "wandb")  # a job may run in another folder
    monkeypatch.chdir("/")
    found = tracker(given[0])
    assert type(found).__name__ == "Good" and found.name == "beside"  # type: ignore[attr-defined]
    job = Job(run_dir="run", recipe="tiny-lm", overrides=(), cluster="local", engine="local", track=given)
    assert job.train()[-4:-2] == ["--track", given[0]]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lab/none.py:Good", "--track lab/none.py:Good: expected a Python file at"),
        ("lab/mine.py:Goood", "expected a class Goood in lab/mine.py, got none of that name"),
        ("lab/mine.py:thing", "thing, which is no class"),
        ("lab/mine.py:", "Name the class"),
        ("lab/broken.py:Good", "no_such_module_at_all"),
        ("lab/mine.py:Short", "without step, eval, event, end"),
        ("lab/mine.py:Asks", "a class that can be made without arguments"),
        ("mine", "FILE.py:CLASS"),
    ],
)
def test_a_mistake_ends_in_one_paragraph(name: str, said: str, folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        for one in check_track("--track", [name]):
            tracker(one)
    assert said in str(caught.value) and "\n" not in str(caught.value)
