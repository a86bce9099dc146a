"""The run directory: attempts, the merged curve, the claim, files that survive a crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portatrain.errors import UserError
from portatrain.runs.claim import Claim, Owner, boot_id, holder, process_start
from portatrain.runs.events import Kind
from portatrain.runs.history import read_history
from portatrain.runs.run_dir import RunDir, merge
from portatrain.system import json_files
from tests.support.small_recipe import make

RECIPE = make()


def test_a_run_from_begin_to_done(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / "one")
    assert not run.path.exists()
    with run.begin(RECIPE, {"backend": "jax"}) as attempt:
        assert holder(run.path / "claim") is not None
        attempt.metrics({"step": 1, "loss": 1 / 3, "grad_norm": float("inf")})
        attempt.event("eval", step=1, loss=0.25)
        attempt.finish({"status": "done", "loss": 1 / 3})
    assert sorted(path.name for path in run.path.iterdir()) == [".lock", "DONE", "attempts", "run.json", "summary.json"]
    assert run.is_done
    assert run.recipe() == RECIPE
    assert run.run_info()["recipe_sha256"] == RECIPE.sha256
    assert run.curve() == [{"step": 1, "loss": 1 / 3, "grad_norm": float("inf"), "attempt": 1}]
    assert [(e["event"], e["attempt"], e["loss"]) for e in run.events("eval")] == [("eval", 1, 0.25)]
    assert run.summary() == {"status": "done", "loss": 1 / 3}
    assert json_files.read_json(run.path / "attempts" / "1" / "attempt.json")["backend"] == "jax"
    with pytest.raises(UserError, match="finished"):
        run.begin(RECIPE)


def test_later_attempts_replace_what_they_trained_again(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for steps, loss in ((range(1, 6), 1.0), (range(4, 8), 2.0), (range(0), 3.0)):
        with run.begin(RECIPE) as attempt:
            for step in steps:
                attempt.metrics({"step": step, "loss": loss})
    curve = [(row["step"], row["loss"], row["attempt"]) for row in run.curve()]
    assert curve == [(1, 1.0, 1), (2, 1.0, 1), (3, 1.0, 1), (4, 2.0, 2), (5, 2.0, 2), (6, 2.0, 2), (7, 2.0, 2)]
    assert run.attempt_numbers() == [1, 2, 3]


@pytest.mark.parametrize("ended", ["interrupted", "preempted", "stopped"])
@pytest.mark.parametrize(
    ("landed", "state"),
    [
        (None, "STOPPED"),
        ({"engine": "local", "queues": False}, "STOPPED"),
        ({"engine": "local"}, "STOPPED"),  # as earlier releases wrote it
        ({"engine": "slurm"}, "REQUEUED"),
        ({"engine": "acme", "queues": True}, "REQUEUED"),
    ],
)
def test_a_run_is_requeued_only_if_something_starts_it_again(
    landed: dict[str, object] | None, state: str, ended: str, tmp_path: Path
) -> None:
    run = RunDir(tmp_path)
    with run.begin(RECIPE) as attempt:
        if landed is not None:
            attempt.event(Kind.LANDED, **landed)
        attempt.metrics({"step": 1, "loss": 1.0})
        attempt.event(Kind.END, status=ended)
    assert read_history(run).state == state


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), max_size=5))
def test_merged_curve_is_increasing_and_the_last_word(spans: list[tuple[int, int]]) -> None:
    attempts = {k: [{"step": s} for s in range(first, first + n)] for k, (first, n) in enumerate(spans, start=1)}
    curve = merge(attempts)
    steps = [row["step"] for row in curve]
    assert steps == sorted(set(steps))
    for row in curve:  # nobody after the row's attempt began at or before its step
        later = [rows for k, rows in attempts.items() if k > row["attempt"] and rows]
        assert all(rows[0]["step"] > row["step"] for rows in later)


# --- what is refused, with nothing changed -------------------------------------------------------


def test_foreign_folder_is_left_alone(tmp_path: Path, unchanged: Callable[[Path], None]) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    unchanged(tmp_path)
    with pytest.raises(UserError, match=r"thesis\.tex"):
        RunDir(tmp_path).begin(RECIPE)


def test_file_in_the_way(tmp_path: Path, unchanged: Callable[[Path], None]) -> None:
    (tmp_path / "file").write_text("")
    unchanged(tmp_path)
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="a file"):
            RunDir(path).begin(RECIPE)


def test_another_recipe_is_refused_by_field(tmp_path: Path, unchanged: Callable[[Path], None]) -> None:
    RunDir(tmp_path).begin(RECIPE).close()
    unchanged(tmp_path)
    with pytest.raises(UserError, match=r"differs in optimizer\.lr, steps"):
        RunDir(tmp_path).begin(make(steps=11, optimizer=replace(RECIPE.optimizer, lr=0.5)))


def test_damaged_record_is_refused(tmp_path: Path, unchanged: Callable[[Path], None]) -> None:
    (tmp_path / "run.json").write_text('{"recipe": ')
    unchanged(tmp_path)
    with pytest.raises(UserError, match=r"run\.json"):
        RunDir(tmp_path).begin(RECIPE)


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write anywhere, so the answer of the system is replaced rather than the folder's mode.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="permission"):
        RunDir(tmp_path / "deep" / "run").check(RECIPE)


# --- the claim -----------------------------------------------------------------------------------


def test_claim_of_a_living_process_is_respected(tmp_path: Path, unchanged: Callable[[Path], None]) -> None:
    held = Claim.acquire(tmp_path / "claim")
    unchanged(tmp_path)
    for act in (lambda: Claim.acquire(tmp_path / "claim"), lambda: RunDir(tmp_path).begin(RECIPE)):
        with pytest.raises(UserError, match=f"process {os.getpid()}"):
            act()
    assert held.held


def test_claim_of_a_dead_process_is_taken_over_with_an_event(tmp_path: Path) -> None:
    code = f"import pathlib, portatrain.runs.claim as c; c.Claim.acquire(pathlib.Path({str(tmp_path)!r}, 'claim'))"
    subprocess.run([sys.executable, "-c", code], check=True)
    dead = holder(tmp_path / "claim")
    assert dead is not None
    assert dead.is_gone
    run = RunDir(tmp_path)
    with run.begin(RECIPE):
        pass
    (event,) = run.events("claim_taken_over")
    assert event["pid"] == dead.pid


def test_claim_of_an_earlier_process_with_our_number_is_stale() -> None:
    me = Owner.this_process()
    assert not me.is_gone
    assert replace(me, process_start=f"{boot_id()}/1").is_gone
    assert not replace(me, process_start="another boot/1").is_gone  # it may be another machine of this name
    assert not replace(me, host="elsewhere", process_start="").is_gone  # nothing is known of another host
    assert process_start(2**22 + 1) is None


def test_who_lost_the_claim_writes_no_more(tmp_path: Path) -> None:
    attempt = RunDir(tmp_path).begin(RECIPE)
    other = replace(Owner.this_process(), host="elsewhere")
    (tmp_path / "claim").write_text(json.dumps(asdict(other)))
    acts = (
        lambda: attempt.metrics({"step": 1}),
        lambda: attempt.event("x"),
        lambda: attempt.write("summary.json", {}),
        lambda: attempt.finish({}),
    )
    for act in acts:
        with pytest.raises(UserError, match="elsewhere"):
            act()
    attempt.close()
    assert holder(tmp_path / "claim") == other  # and does not release what is not its own
    assert not (tmp_path / "DONE").exists()
    assert RunDir(tmp_path).curve() == []


RACER = """
import sys, time
from pathlib import Path
from portatrain.runs.claim import Claim
from portatrain.errors import UserError
folder = Path(sys.argv[1])
(folder / f"ready-{sys.argv[2]}").touch()
while not (folder / "go").exists():
    time.sleep(0.001)
try:
    Claim.acquire(folder / "run" / "claim")
except UserError:
    print("refused")
else:
    print("acquired", flush=True)
    time.sleep(1)
"""


def test_of_several_processes_one_gets_a_stale_claim(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    stale = replace(Owner.this_process(), process_start=f"{boot_id()}/1")
    (run / "claim").write_text(json.dumps(asdict(stale)))
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER, str(tmp_path), str(k)], stdout=subprocess.PIPE, text=True)
        for k in range(4)
    ]
    while len(list(tmp_path.glob("ready-*"))) < len(racers):
        assert all(racer.poll() is None for racer in racers)
    (tmp_path / "go").touch()
    answers = sorted(racer.communicate(timeout=60)[0].strip() for racer in racers)
    assert answers == ["acquired", "refused", "refused", "refused"]


# --- files ---------------------------------------------------------------------------------------


@given(cut=st.integers(0, 60))
def test_a_torn_last_line_is_left_out(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.unlink(missing_ok=True)
    log = json_files.JsonLines(path)
    rows = [{"step": step, "loss": 0.1 * step} for step in range(1, 4)]
    for row in rows:
        log.append(row)
    log.close()
    whole = path.read_bytes()
    path.write_bytes(whole[: max(0, len(whole) - cut)])
    found = json_files.read_lines(path)
    assert found == rows[: len(found)]
    kept = path.read_bytes().count(b"\n")
    assert len(found) in (kept, kept + 1)  # one more where only the newline is missing


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        json_files.read_lines(path)
    assert json_files.read_lines(tmp_path / "missing.jsonl") == []


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_keep_all_their_digits(value: float) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        log = json_files.JsonLines(Path(folder) / "log.jsonl")
        log.append({"value": value})
        log.close()
        assert json_files.read_lines(Path(folder) / "log.jsonl") == [{"value": value}]


def test_json_file_is_old_or_new_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    json_files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        json_files.write_json(path, {"a": object()})
    assert json_files.read_json(path) == {"a": 1}

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            json_files.write_json(path, {"a": 2})
    assert json_files.read_json(path) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]
