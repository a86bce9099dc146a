"""A run directory in an object store: the claim, the record, and the copy on each machine. The store is obstore's, in
memory; tests/faults/test_s3.py has one behind HTTP."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from portatrain.checkpoint import object_store
from portatrain.cli import launch_main, main
from portatrain.data import Mixture, TextFiles, open_data
from portatrain.errors import StorageError, UserError
from portatrain.runs import jobs, remote_claim, remote_run_dir
from portatrain.runs.claim import Owner
from portatrain.runs.code_snapshot import pack
from portatrain.runs.history import read_history
from portatrain.runs.jobs import Job
from portatrain.runs.open import find, names, open_run
from portatrain.runs.run_dir import RunDir
from portatrain.system import json_files
from portatrain.system import object_store as connection
from portatrain.system.environment import CLAIM, SCRATCH
from portatrain.system.object_store import Objects
from tests.support import tiny_fork
from tests.support.running import BACKENDS
from tests.support.small_recipe import make

obstore = pytest.importorskip("obstore")
RECIPE = make()
URL = "s3://bucket/runs/one"


class Below:
    """A prefix of a store in memory, with obstore's functions over it."""

    def __init__(self, url: str) -> None:
        self.prefix = url.partition("://")[2].rstrip("/") + "/"


class Api:
    """obstore's functions on `Below`."""

    exceptions = obstore.exceptions

    def __init__(self) -> None:
        self.memory = obstore.store.MemoryStore()

    def __getattr__(self, name: str) -> Any:
        function = getattr(obstore, name)

        def call(store: Below, path: str, *args: Any, **more: Any) -> Any:
            return function(self.memory, store.prefix + path, *args, **more)

        return call

    def _cut(self, store: Below, rows: Any) -> list[dict[str, Any]]:
        return [{**row, "path": row["path"].removeprefix(store.prefix)} for row in rows]

    def list(self, store: Below, prefix: str = "") -> Any:
        for batch in obstore.list(self.memory, prefix=store.prefix + prefix):
            yield self._cut(store, batch)

    def list_with_delimiter(self, store: Below) -> Any:
        found = obstore.list_with_delimiter(self.memory, prefix=store.prefix)
        return {"objects": self._cut(store, found["objects"]), "common_prefixes": found["common_prefixes"]}


@pytest.fixture(autouse=True)
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    made = Api()
    for module in (connection, object_store):
        monkeypatch.setattr(module, "connect", lambda url, options: Below(url))
        monkeypatch.setattr(module, "obstore_module", lambda: made)
    monkeypatch.setenv(SCRATCH.name, str(tmp_path / "scratch"))
    yield made


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Be another machine: with a copy of its own."""

    def go(name: str) -> None:
        monkeypatch.setenv(SCRATCH.name, str(tmp_path / name))

    return go


def held_by(objects: Objects, **changes: object) -> Owner:
    """Make somebody else the owner."""
    owner = replace(Owner.this_process(), **changes)
    objects.put("claim", json.dumps({**asdict(owner), "beat": "x"}).encode())
    return owner


def test_a_run_from_begin_to_done(elsewhere: Any) -> None:
    run = open_run(URL, work=True)
    with run.begin(RECIPE, {"backend": "jax"}) as attempt:
        assert read_history(open_run(URL)).state == "STARTING"
        attempt.metrics({"step": 1, "loss": 1 / 3, "grad_norm": float("inf"), "time_s": 0.5})
        attempt.event("eval", step=1, loss=0.25)
        attempt.finish({"status": "done", "loss": 1 / 3})
    elsewhere("other")
    seen = open_run(URL)
    assert seen.is_done and seen.recipe() == RECIPE and seen.summary() == {"status": "done", "loss": 1 / 3}
    assert [(r["step"], r["loss"], r["attempt"]) for r in seen.curve()] == [(1, 1 / 3, 1)]
    assert [(e["event"], e["loss"]) for e in seen.events("eval")] == [("eval", 0.25)]
    assert seen.owner() is None and read_history(seen).state == "SUCCEEDED"
    with pytest.raises(UserError, match="finished"):
        open_run(URL, work=True).begin(RECIPE)


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"\0" * 40], ids=repr)
def test_a_damaged_copy_on_this_machine_is_fetched_again(damage: bytes) -> None:
    """Every file of the copy, its index too, as a machine leaves it that lost its power."""
    with open_run(URL, work=True).begin(RECIPE, {"backend": "jax"}) as attempt:
        attempt.metrics({"step": 1, "loss": 0.5, "grad_norm": 1.0, "time_s": 0.5})
        attempt.event("eval", step=1, loss=0.25)
        attempt.finish({"status": "done"})
    good = read_history(open_run(URL)).as_json()
    copy = open_run(URL).path
    files = [f for f in copy.rglob("*") if f.is_file() and f.suffix in (".json", ".jsonl")]
    assert {f.name for f in files} >= {"run.json", "metrics.jsonl", "events.jsonl", remote_run_dir.TAGS}
    for file in files:
        file.write_bytes(damage)
        assert read_history(open_run(URL)).as_json() == good, file


def test_a_cut_file_of_packed_data_is_fetched_again() -> None:
    run = open_run(URL, work=True)
    with run.begin(RECIPE):
        pass
    folder = run.data()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("pack.json", "train-tokens.bin"):
        (folder / name).write_bytes(b"x" * 40)
    run.share_data()
    (folder / "train-tokens.bin").write_bytes(b"x" * 7)
    assert (open_run(URL, work=True).data() / "train-tokens.bin").read_bytes() == b"x" * 40


def test_another_machine_goes_on_with_the_next_attempt(elsewhere: Any) -> None:
    with open_run(URL, work=True).begin(RECIPE) as attempt:
        attempt.metrics({"step": 1, "loss": 1.0, "time_s": 0.1})
    elsewhere("other")
    with open_run(URL, work=True).begin(RECIPE) as attempt:
        assert attempt.number == 2
        attempt.metrics({"step": 2, "loss": 0.5, "time_s": 0.1})
    elsewhere("scratch")  # the first one again: its copy is of then
    with open_run(URL, work=True).begin(RECIPE) as attempt:
        assert attempt.number == 3 and [r["step"] for r in attempt.run.curve()] == [1, 2]


def test_two_at_once_and_one_of_them_has_it() -> None:
    outcomes: list[object] = []
    start = threading.Barrier(8)

    def try_it() -> None:
        start.wait()
        try:
            outcomes.append(remote_claim.RemoteClaim.acquire(Objects(URL), lambda: None))
        except UserError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=try_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [o for o in outcomes if isinstance(o, remote_claim.RemoteClaim)]
    assert len(winners) == 1 and winners[0].held
    assert all("a claim of process" in str(o) for o in outcomes if o is not winners[0])
    winners[0].release()
    again = remote_claim.RemoteClaim.acquire(Objects(URL), lambda: None)
    assert again.taken_over is None  # it had been given up
    again.release()


def test_whose_owner_is_gone_or_silent_is_taken_over_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = Objects(URL)
    me = Owner.this_process()
    held_by(objects, host="elsewhere", token="theirs")
    with pytest.raises(UserError, match="on elsewhere"):
        open_run(URL, work=True).begin(RECIPE)
    # Another machine of this one's name: its processes cannot be looked up here.
    held_by(objects, process_start="another-boot/1", token="theirs")
    with pytest.raises(UserError, match=f"process {me.pid}"):
        open_run(URL, work=True).begin(RECIPE)
    monkeypatch.setattr(remote_claim, "LEASE_S", -1.0)  # silent for longer than that
    open_run(URL, work=True).begin(RECIPE).close()
    monkeypatch.undo()


def test_an_owner_of_this_machine_that_has_ended_is_taken_over_at_once() -> None:
    me = Owner.this_process()
    boot = me.process_start.partition("/")[0]
    dead = held_by(Objects(URL), process_start=f"{boot}/1", token="theirs")
    with open_run(URL, work=True).begin(RECIPE) as attempt:
        (event,) = attempt.run.events("claim_taken_over")
        assert event["pid"] == dead.pid


def test_a_loser_commits_nothing_and_leaves_the_winners_claim_alone() -> None:
    run = open_run(URL, work=True)
    attempt = run.begin(RECIPE)
    objects = Objects(URL)
    winner = held_by(objects, host="elsewhere", token="theirs")
    with pytest.raises(UserError, match="on elsewhere"), attempt.guard():
        raise AssertionError("not reached")
    with pytest.raises(UserError, match="on elsewhere"):  # it has been found out: no request is made for a row
        attempt.metrics({"step": 1, "loss": 1.0})
    with pytest.raises(UserError, match="on elsewhere"):
        attempt.finish({"status": "done"})
    attempt.close()
    assert not objects.exists("DONE")
    assert remote_claim.holder(objects) == winner


def test_a_claim_lost_in_the_middle_of_a_guard_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = Objects(URL)
    claim = remote_claim.RemoteClaim.acquire(objects, lambda: None)
    began_s = remote_claim._now_s()
    with pytest.raises(UserError, match="on elsewhere"), claim.guard():
        monkeypatch.setattr(remote_claim, "_now_s", lambda: began_s + 100.0)  # it stood still
        held_by(objects, host="elsewhere", token="theirs")
    claim.release()


def test_a_supervisor_and_its_trainer_hold_one_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(URL, work=True)
    run.put("run.json", {})
    supervisor = run.acquire()
    with pytest.raises(UserError, match="a claim of process"):
        open_run(URL, work=True).acquire()
    monkeypatch.setenv(CLAIM.name, supervisor.owner.token)
    trainer = open_run(URL, work=True).acquire()
    assert trainer.adopted and trainer.held
    for _ in range(3):  # each writes it anew, over the other's version
        with trainer.guard():
            pass
        with supervisor.guard():
            pass
    trainer.release()
    assert supervisor.held
    supervisor.release()
    assert open_run(URL).owner() is None


def test_no_commit_is_ahead_of_its_rows(elsewhere: Any) -> None:
    attempt = open_run(URL, work=True).begin(RECIPE)
    for step in range(1, 4):
        attempt.metrics({"step": step, "loss": 1.0, "time_s": 0.1})
    with attempt.guard():
        elsewhere("other")
        assert [row["step"] for row in open_run(URL).curve()] == [1, 2, 3]
    attempt.close()


def test_what_is_looked_at_is_refreshed_and_marks_that_are_gone_go() -> None:
    run, objects = open_run(URL, work=True), Objects(URL)
    run.create(RECIPE)
    looked = open_run(URL)
    assert read_history(looked).state == "QUEUED"
    objects.put("CANCELLED", b"{}")
    assert read_history(looked).state == "CANCELLED"  # a mark is asked for each time
    looked.refresh()
    assert (looked.path / "CANCELLED").exists()
    looked.remove("CANCELLED")
    looked.refresh()
    assert not (looked.path / "CANCELLED").exists() and read_history(looked).state == "QUEUED"


def test_jobs_have_numbers_of_their_own() -> None:
    open_run(URL, work=True).create(RECIPE)
    job = Job(run_dir=URL, recipe="tiny-lm", cluster="lab", engine="slurm")
    first, second = job.write(), job.write()
    assert (first.number, second.number) == (1, 2) and first.run == "one"
    second.submitted("77")
    assert [(j.number, j.id) for j in jobs.of(URL)] == [(1, None), (2, "77")]
    assert jobs.read(URL, 2).id == "77"
    first.forget()
    assert [j.number for j in jobs.of(URL)] == [2]


def test_data_and_code_go_along(elsewhere: Any, tmp_path: Path) -> None:
    run = open_run(URL, work=True)
    run.data().mkdir(parents=True)
    (run.path / "data" / "train").mkdir()
    (run.path / "data" / "train" / "tokens.bin").write_bytes(b"abc")
    (run.path / "data" / "train" / "pack.json").write_bytes(b"{}")
    run.share_data()
    (tmp_path / "mine.py").write_text("x = 1\n")
    code, _ = pack(tmp_path, str(tmp_path / "mine.py"))
    there = run.share_code(code)
    assert there == f"{URL}/code/{code.name}"
    elsewhere("other")
    assert (open_run(URL, work=True).data() / "train" / "tokens.bin").read_bytes() == b"abc"
    words = remote_run_dir.localized(["train", f"{there}/recipe/mine.py", "--run-dir", URL], there)
    assert Path(words[1]).read_text() == "x = 1\n" and words[3] == URL
    assert Path(words[1]).is_relative_to(tmp_path / "other")


@pytest.mark.parametrize("sent", range(7))
def test_a_corpus_that_was_cut_while_it_was_sent_is_packed_and_sent_anew(
    sent: int, elsewhere: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = TextFiles(paths=str(tmp_path / "*.txt"), seq_len=8, validation=0.4)
    for n in range(6):
        (tmp_path / f"{n}.txt").write_text(f"document {n} " * 5)

    def there() -> str:
        data = open_data(spec, seed=0, pack_dir=open_run(URL, work=True).data())
        open_run(URL, work=True).share_data()
        return data.fingerprint

    puts: list[str] = []
    put = Objects.put

    def cut(objects: Objects, name: str, data: Any) -> None:
        if len(puts) == sent:
            raise KeyboardInterrupt
        puts.append(name)
        put(objects, name, data)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(Objects, "put", cut)
        there()
    assert len(puts) == sent
    (tmp_path / "0.txt").write_text("another document " * 5)  # the files changed meanwhile
    elsewhere("other")
    fingerprint = there()
    elsewhere("third")
    for n in range(6):
        (tmp_path / f"{n}.txt").unlink()
    assert there() == fingerprint


def test_data_verify_reads_the_store_each_time(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("document " * 9)
    run = open_run(URL, work=True)
    open_data(TextFiles(paths=str(tmp_path / "a.txt"), seq_len=8, validation=0), seed=0, pack_dir=run.data())
    run.share_data()
    assert main(["data", "verify", URL]) == 0
    objects = Objects(URL)
    (name,) = (o.name for o in objects.below("data") if o.name.endswith("train-tokens.bin"))
    good = (run.path / name).read_bytes()
    objects.put(name, bytes([good[0] ^ 1]) + good[1:])
    assert main(["data", "verify", URL]) == 1
    objects.put(name, good)
    assert main(["data", "verify", URL]) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_pack_json_is_sent_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("document " * 9)
    text = TextFiles(paths=str(tmp_path / "a.txt"), seq_len=8, validation=0)
    run, sent = open_run(URL, work=True), []
    open_data(Mixture(sources=(text, text), weights=(1.0, 1.0)), seed=0, pack_dir=run.data())
    put = Objects.put
    monkeypatch.setattr(Objects, "put", lambda objects, name, data: (sent.append(name), put(objects, name, data)))
    run.share_data()
    assert len(sent) > 4 and all(name.endswith("pack.json") for name in sent[-2:])
    assert not any(name.endswith("pack.json") for name in sent[:-2])


@pytest.mark.parametrize("begun_here", [True, False])
def test_a_run_begun_again_under_the_name_of_a_deleted_one(elsewhere: Any, begun_here: bool) -> None:
    with open_run(URL, work=True).begin(RECIPE) as attempt:
        attempt.metrics({"step": 1, "loss": 1.0, "time_s": 0.1})
    first = open_run(URL).run_info()["id"]
    (open_run(URL, work=True).path / "data").mkdir()
    objects = Objects(URL)
    for prefix in ("", "attempts", "clock"):
        for one in objects.below(prefix):
            objects.delete(one.name)
    assert open_run(URL).entries() is None
    if not begun_here:
        elsewhere("other")
    other = make(steps=77)
    with open_run(URL, work=True).begin(other) as attempt:
        assert attempt.number == 1
        attempt.metrics({"step": 1, "loss": 2.0, "time_s": 0.1})
    assert json.loads(objects.get("run.json")[0])["id"] not in (first, None)  # type: ignore[index]
    elsewhere("scratch")
    run = open_run(URL, work=True)
    assert not (run.path / "data").exists()
    with run.begin(other) as attempt:
        assert attempt.number == 2 and [r["loss"] for r in attempt.run.curve()] == [2.0]


@pytest.mark.parametrize("verb", ["put", "get", "create", "list", "delete"])
def test_credentials_that_expire_in_mid_run_are_no_mistake(monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    objects = Objects(f"{URL}-{verb}")
    calls = {
        "put": lambda: objects.put("a", b"x"),
        "create": lambda: objects.create(f"b{time.monotonic_ns()}", b"x"),
        "get": lambda: objects.get("a"),
        "list": lambda: objects.below(""),
        "delete": lambda: objects.delete("a"),
    }
    api = connection.obstore_module()
    denied = [True]

    def refuse(*_: Any, **__: Any) -> Any:
        raise obstore.exceptions.PermissionDeniedError("403")

    class Denying:
        exceptions = obstore.exceptions

        def __getattr__(self, name: str) -> Any:
            return refuse if denied[0] else getattr(api, name)

    monkeypatch.setattr(connection, "obstore_module", Denying)
    objects._api = Denying()
    with pytest.raises(UserError, match="no permission") as caught:
        calls[verb]()
    assert caught.value.code == 2  # wrong from the start
    denied[0] = False
    calls[verb]()
    denied[0] = True
    with pytest.raises(StorageError, match="no permission") as caught:
        calls[verb]()
    assert caught.value.code == 75


BESIDE = "s3://bucket/checkpoints/x"


def test_a_url_of_checkpoints_is_one_runs_alone(tmp_path: Path) -> None:
    first, second = RunDir(tmp_path / "first"), RunDir(tmp_path / "second")
    first.check_location(BESIDE)
    for run in (first, second):
        run.create(RECIPE)
    assert first.checkpoints(BESIDE) == BESIDE == first.checkpoints(BESIDE)
    first.check_location(None)
    for ask in (second.check_location, second.checkpoints):
        with pytest.raises(UserError, match=r"that of .*first\. Give each run"):
            ask(BESIDE)
    assert not (second.path / "checkpoints.json").exists()
    assert second.checkpoints(f"{BESIDE}-2") == f"{BESIDE}-2"
    # a run that has lost its folder and is begun again is another one
    third = RunDir(tmp_path / "first-again")
    with pytest.raises(UserError, match="Give each run"):
        third.check_location(BESIDE)


def test_a_url_with_checkpoints_of_an_earlier_release(tmp_path: Path) -> None:
    Objects(BESIDE).put("step-00000007/COMMIT", b"{}")
    known, other = RunDir(tmp_path / "known"), RunDir(tmp_path / "other")
    for run in (known, other):
        run.create(RECIPE)
    json_files.write_json(known.path / "checkpoints.json", {"url": BESIDE})
    known.check_location(None)
    with pytest.raises(UserError, match="another run"):
        other.checkpoints(BESIDE)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"run": 7}', b"\xff"])
def test_a_binding_that_is_damaged_is_not_ours(tmp_path: Path, content: bytes) -> None:
    Objects(BESIDE).put("RUN.json", content)
    run = RunDir(tmp_path / "run")
    run.create(RECIPE)
    with pytest.raises(UserError, match="Give each run"):
        run.checkpoints(BESIDE)


def test_what_is_large_is_fetched_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PART_BYTES", 1000)
    data, objects = bytes(range(256)) * 40, Objects(URL)
    objects.put("x", data)
    objects.fetch("x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == data


def test_names_that_leave_the_folder_are_refused() -> None:
    Objects(URL).put("run.json", b"{}")
    run = open_run(URL, work=True)
    assert isinstance(run, remote_run_dir.RemoteRun)
    with pytest.raises(UserError, match="points outside the run directory"):
        run._fetch("data/../../x")


def test_found_by_name_and_by_url() -> None:
    for name in ("one", "two"):
        open_run(f"s3://bucket/runs/{name}", work=True).create(RECIPE)
    assert names("s3://bucket/runs") == ["one", "two"]
    assert find("two", "s3://bucket/runs").where == find("s3://bucket/runs/two/", "runs").where
    with pytest.raises(UserError, match="Did you mean two"):
        find("twoo", "s3://bucket/runs")
    with pytest.raises(UserError, match=r"none below that URL"):
        find("s3://bucket/runs/three", "runs")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train", "tiny-lm", "--run-dir", "ftp://host/x"), "s3://, gs://, az://"),
        (("train", "tiny-lm", "--run-dir", "s3://bucket"), "a bucket and a name below it"),
        (("report", "s3://bucket/none"), "no such folder"),
        (("ckpt", "import", "x", "tiny-lm", "--run-dir", URL, "--from", "dcp"), "a folder of this machine"),
    ],
)
def test_bad_places(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(list(words)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(Path().glob("s3:*"))


def test_foreign_objects_and_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Objects(URL).put("their.txt", b"x")
    with pytest.raises(UserError, match=r"a folder with their\.txt"):
        open_run(URL, work=True).begin(RECIPE)
    tmp_path.joinpath("file").touch()
    monkeypatch.setenv(SCRATCH.name, str(tmp_path / "file" / "x"))
    with pytest.raises(UserError, match="PORTATRAIN_SCRATCH"):
        open_run(URL)


def test_listed_cancelled_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    with open_run(URL, work=True).begin(RECIPE, {"backend": "jax", "mesh": "1"}) as attempt:
        attempt.metrics({"step": 1, "loss": 0.5, "time_s": 0.1})
    assert launch_main(["list", "--runs", "s3://bucket/runs"]) == 0
    assert "LOST" in capsys.readouterr().out
    assert launch_main(["cancel", URL]) == 0
    assert launch_main(["status", URL, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.partition("\n")[2])["state"] == "CANCELLED"
    assert launch_main(["doctor", "local", "--runs", "s3://bucket/runs"]) == 0
    assert "conditional puts work" in capsys.readouterr().out


def test_a_run_on_a_file_system_is_as_before(tmp_path: Path) -> None:
    assert type(open_run(tmp_path)) is RunDir and open_run(tmp_path).where == str(tmp_path)


def test_a_fork_of_a_run_in_a_store_is_made_and_trained_on_other_machines(tmp_path: Path, elsewhere: Any) -> None:
    backend = BACKENDS[-1]
    file = tiny_fork.write(tmp_path) / "one.py"
    words = ["--set", "steps=8", "--backend", backend]
    assert main(["train", str(file), "--run-dir", "s3://bucket/runs/a", *words]) == 0
    elsewhere("second")
    fork = ["fork", "s3://bucket/runs/a", "--runs", "s3://bucket/runs", "--at", "4", "--run", "b"]
    assert main([*fork, "--set", "optimizer.lr=0.01"]) == 0
    elsewhere("third")
    assert main(["resume", "b", "--runs", "s3://bucket/runs"]) == 0
    elsewhere("fourth")
    made, parent = open_run("s3://bucket/runs/b"), open_run("s3://bucket/runs/a")
    assert [row["step"] for row in made.curve()] == [5, 6, 7, 8] and made.is_done and len(parent.curve()) == 8
    assert [e["verdict"] for e in made.events("resumed")] == ["changed"]
    assert main(["resume", "b", "--runs", "s3://bucket/runs", "--set", "steps=10"]) == 0
    assert len(open_run("s3://bucket/runs/b").curve()) == 6 and read_history(open_run("s3://bucket/runs/b")).steps == 10
    # A surgery writes a checkpoint of its own into the store.
    assert main([*fork[:-1], "wide", "--set", "model.vocab=9", "--surgery", "vocabulary"]) == 0
    elsewhere("fifth")
    assert main(["resume", "wide", "--runs", "s3://bucket/runs"]) == 0
    wide = open_run("s3://bucket/runs/wide")
    assert wide.is_done and [(e["verdict"], e["tensors"]) for e in wide.events("resumed")] == [("changed", "equal")]
    assert "no method predict" in wide.run_info()["parent"]["surgery"]["proof"]["why"]
