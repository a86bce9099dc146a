"""Hostile texts in records, checkpoints and options: nothing of them is run, imported, or shown raw."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import sys
import tarfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints_format import LocalStore, Reader, SaveLayout, Tensor, Writer, commit, tile_shape
from checkpoints_format.attacks.roots import ROOT, seal
from launchers.base import launcher
from launchers.yaml_text import to_yaml
from portatrain import config
from portatrain.checkpoint.format_layout import check_tensors, format_layout
from portatrain.checkpoint.interop.trusted_code import is_trusted
from portatrain.cli import launch_main, main
from portatrain.errors import UserError, visible
from portatrain.recipe import Recipe, load_recipe
from portatrain.runs import code_snapshot, jobs
from portatrain.runs.history import read_history
from portatrain.runs.jobs import Job
from portatrain.runs.report.page import page
from portatrain.runs.run_dir import RunDir
from tests.support.held_arrays import Holding
from tests.support.small_recipe import make

EVIL = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\r\x9b1A\u202e<script>alert(1)</script>&\udc80"
TAG = re.compile(r"<script|<img|\"onload", re.IGNORECASE)


def poisoned(value: Any, path: str = "") -> Any:
    """Every text of a JSON value, at its end, with EVIL; keys, numbers and the shape stay."""
    if isinstance(value, dict):
        return {k: poisoned(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(v, path) for v in value]
    if isinstance(value, str) and path not in ("event", "class", "named", "verdict", "outcome"):
        return value + EVIL
    return value


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A run of which every text of every record is poisoned, but those that decide how the record is read."""
    run = RunDir(tmp_path / "runs" / "one")
    with run.begin(make(), {"backend": "jax", "mesh": "fsdp=1", "device": "cpu"}) as attempt:
        attempt.event("start", backend="jax", mesh="m", device="d", devices=1, steps=4, unit="tokens", framework="f")
        attempt.metrics({"step": 1, "loss": 1.0, "grad_norm": 1.0, "time_s": 0.1, "step_s": 0.1, "tokens_per_s": 1.0})
        attempt.event("resumed", verdict="continuous", step=1, why="w", failed={"loss": "x"})
        attempt.event("eval", step=1, loss=1.0, metrics={"bits": 1.0}, samples=1)
        attempt.event("end", status="failed", why="because")
        attempt.note("plan.json", {"planned": False, "why": "no"})
    Job(run_dir=str(run.path), recipe="tiny-lm", cluster="c", engine="local", id="7").write()
    for file in (run.path / "attempts").rglob("*.json*"):
        lines = [json.dumps(poisoned(json.loads(line))) for line in _values(file)]
        file.write_text("\n".join(lines) + "\n")
    for file in (run.path / "jobs").glob("*.json"):
        row = json.loads(file.read_text())
        file.write_text(json.dumps(row | {"cluster": "c" + EVIL, "id": "7" + EVIL}))
    return run.path


def _values(file: Path) -> list[str]:
    text = file.read_text()
    return text.splitlines() if file.suffix == ".jsonl" else [text]


@pytest.mark.parametrize("words", ["status", "list", "logs", "reconcile", "resume", "cancel"])
def test_no_command_writes_a_control_character_of_a_record(hostile: Path, capsys: Any, words: str) -> None:
    named = [] if words == "list" else ["one"]
    launch_main([words, *named, "--runs", str(hostile.parent)])
    out = capsys.readouterr()
    assert out.out + out.err and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", out.out + out.err)


def test_the_report_holds_no_tag_of_a_record(hostile: Path, capsys: Any) -> None:
    assert not TAG.search(page(read_history(RunDir(hostile)), [{"step": 1, "committed": 1, "bytes": 1, "save": EVIL}]))
    assert main(["report", str(hostile), "--out", str(hostile / "r.html")]) == 0
    assert not TAG.search((hostile / "r.html").read_text(errors="replace"))


def test_errors_show_every_hidden_character() -> None:
    error = UserError(EVIL, expected=EVIL, got=EVIL, do=EVIL)
    assert "\x1b" not in str(error) and "\\x1b" in str(error) and str(error).encode()
    assert visible("a\tb\r\nc\rd") == "a\tb\nc\\rd"


# ---- a recipe in a checkpoint


class NotFrozen:
    def __init__(self, **fields: Any) -> None:
        raise AssertionError("called")


@dataclasses.dataclass
class Thawed(NotFrozen):
    x: int = 1

    def __post_init__(self) -> None:
        raise AssertionError("called")


@pytest.mark.parametrize("name", ["NotFrozen", "Thawed"])
def test_only_frozen_dataclasses_are_called(name: str) -> None:
    for trusted in (is_trusted, lambda module: True):
        with pytest.raises(UserError, match=r"frozen dataclass|the module"):
            config.from_json({"class": f"{__name__}:{name}"}, trusted=trusted)


@pytest.mark.parametrize("key", ["class", "named"])
@pytest.mark.parametrize(
    "name", ["evil_module:Config", "os:system", "portatrain.cli:os.system", "subprocess:Popen", "portatrain.config:sys"]
)
def test_a_checkpoint_imports_and_reaches_no_other_code(tmp_path: Path, monkeypatch: Any, name: str, key: str) -> None:
    (tmp_path / "evil_module.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="recipe class"):
        Recipe.from_json({**make().to_json(), "model": {key: name}}, trusted=is_trusted)
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize("name", [7, None, ["a"], {"a": 1}])
def test_a_name_that_is_no_text(name: object) -> None:
    for key in ("class", "named"):
        with pytest.raises(UserError, match="module:name"):
            config.from_json({key: name})


def test_the_recipe_of_a_run_is_trusted_as_its_code_is() -> None:
    assert Recipe.from_json(make().to_json()) == make()
    shipped = load_recipe("tiny-lm")
    assert Recipe.from_json(shipped.to_json(), trusted=is_trusted) == shipped


# ---- the copy of the code


def tar(path: Path, *members: tuple[str, bytes | None, dict[str, Any]]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data, more in members:
            info = tarfile.TarInfo(name)
            for field, value in more.items():
                setattr(info, field, value)
            info.size = len(data or b"")
            file.addfile(info, io.BytesIO(data or b""))
    return path


def name_of(files: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for target in sorted(files):
        digest.update(target.encode() + b"\0" + hashlib.sha256(files[target]).digest())
    return digest.hexdigest()[:16]


CODE = {"portatrain/__init__.py": b"x = 1\n", "recipe/my.py": b"y = 2\n"}
GOOD = [(f"./{k}", v, {}) for k, v in CODE.items()] + [("./environment.json", b"{}", {})]
TARS: dict[str, tuple[list[Any], str]] = {
    "another content": ([(n, b"evil" if n.endswith("my.py") else d, m) for n, d, m in GOOD], "files that give"),
    "one file more": ([*GOOD, ("./sitecustomize.py", b"evil", {})], "files that give"),
    "one file less": (GOOD[1:], "files that give"),
    "a file twice": ([*GOOD, ("./recipe/my.py", b"evil", {})], "twice"),
    "a path out": ([*GOOD, ("../../out.py", b"evil", {})], "the path"),
    "an absolute path": ([*GOOD, ("/tmp/out.py", b"evil", {})], "the path"),
    "a link": ([*GOOD, ("./a.py", None, {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"})], "link or a device"),
    "a hard link": ([*GOOD, ("./a.py", None, {"type": tarfile.LNKTYPE, "linkname": "recipe/my.py"})], "link or a dev"),
    "a device": ([*GOOD, ("./a.py", None, {"type": tarfile.CHRTYPE})], "link or a device"),
    "a pipe": ([*GOOD, ("./a.py", None, {"type": tarfile.FIFOTYPE})], "link or a device"),
}


@pytest.mark.parametrize("attack", TARS)
def test_the_copy_of_the_code_is_checked_before_it_runs(tmp_path: Path, attack: str) -> None:
    members, said = TARS[attack]
    with pytest.raises(UserError, match=said):
        code_snapshot.extract(tar(tmp_path / "a.tar", *members), tmp_path / "in" / "made", name_of(CODE))
    assert not (tmp_path / "out.py").exists() and not (tmp_path / "in" / "out.py").exists()


def test_a_good_copy_is_extracted_without_what_was_compiled(tmp_path: Path) -> None:
    compiled = ("./recipe/__pycache__/my.cpython-311.pyc", b"evil", {})
    code_snapshot.extract(tar(tmp_path / "a.tar", *GOOD, compiled), tmp_path / "made", name_of(CODE))
    assert sorted(p.name for p in (tmp_path / "made").rglob("*") if p.is_file()) == [
        "__init__.py",
        "environment.json",
        "my.py",
    ]
    for data in (b"", b"no tar", (tmp_path / "a.tar").read_bytes()[:700]):
        (tmp_path / "b.tar").write_bytes(data)
        with pytest.raises(UserError, match="copy of the code"):
            code_snapshot.extract(tmp_path / "b.tar", tmp_path / "other", name_of(CODE))


def test_what_is_packed_is_what_is_extracted(tmp_path: Path) -> None:
    folder, _ = code_snapshot.pack(tmp_path, "tiny-lm")
    (folder / "portatrain" / "__pycache__").mkdir()
    (folder / "portatrain" / "__pycache__" / "x.pyc").write_bytes(b"evil")
    code_snapshot.archive(folder, tmp_path / "a.tar")
    code_snapshot.extract(tmp_path / "a.tar", tmp_path / "made", folder.name)
    assert (tmp_path / "made" / "portatrain" / "cli.py").is_file()


# ---- secrets and options


def job(tmp_path: Path, **options: Any) -> Job:
    return Job(run_dir=str(tmp_path / "one"), recipe="tiny-lm", cluster="lab", engine="slurm", options=options)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_variables_of_a_job_are_their_owners_alone(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        written = job(tmp_path, env={"HF_TOKEN": "secret"}, partition="p").write().submitted("7")
    finally:
        os.umask(before)
    for path in (tmp_path / "one").rglob("*"):
        mode = path.stat().st_mode & 0o777
        assert mode & umask == 0, path
        if path.is_file() and "secret" in path.read_text():
            assert mode == 0o600, path
    assert jobs.read(tmp_path / "one", 1).options == {"env": {"HF_TOKEN": "secret"}, "partition": "p"}
    (tmp_path / "one/jobs/1.env.json").unlink()  # as another account sees it
    seen = jobs.read(tmp_path / "one", 1)
    assert seen.options == {"env": {"HF_TOKEN": None}, "partition": "p"}
    with pytest.raises(UserError, match="launch resume one --cluster lab"):
        launcher("slurm").materialize(seen)
    written.forget()
    assert not list((tmp_path / "one/jobs").iterdir())


SBATCH = ["partition", "account", "qos", "gres", "constraint", "time", "mem", "cpus_per_task"]


@pytest.mark.parametrize("bad", ["a\nrm -rf ~", "a\r\nb", "a\x0bb", "a\x1b[0m", "a\u2028b"])
@pytest.mark.parametrize("name", [*SBATCH, "sbatch"])
def test_no_option_of_sbatch_becomes_a_line_of_the_script(tmp_path: Path, name: str, bad: str) -> None:
    with pytest.raises(UserError, match="text on one line"):
        launcher("slurm").materialize(job(tmp_path, **{name: [bad] if name == "sbatch" else bad}))


@pytest.mark.parametrize("name", ["A B", "1A", "A;rm", "A\nB", "", "A=B", "$(id)"])
@pytest.mark.parametrize("engine", ["slurm", "kubernetes", "gcp_tpu", "skypilot", "local"])
def test_no_name_of_a_variable_becomes_code(tmp_path: Path, engine: str, name: str) -> None:
    from launchers.base import variables

    given = dataclasses.replace(job(tmp_path, env={name: "x"}), engine=engine)
    with pytest.raises(UserError, match="names of letters"):
        variables(given) if engine == "local" else launcher(engine).materialize(given)


TEXTS = ["a\nb", "a\n\n", "a\n b\n", "\ta", "é", "😀", "\x7f\x1b", "a: b", "- a", "#", "'\"\\", "null", "~", "1e3", ""]


@pytest.mark.parametrize("text", TEXTS)
def test_yaml_means_the_text_that_was_given(text: str) -> None:
    yaml = pytest.importorskip("yaml")
    data = {"key": text, text or "empty": [text, {"in": text}]}
    assert yaml.safe_load(to_yaml(data)) == data


# ---- a root that was sealed again


def _transposed(tile: list[int], shape: list[int]) -> list[int] | None:
    turned = tile[::-1]
    return turned if turned != tile and all(t <= n for t, n in zip(turned, shape, strict=True)) else None


def _flat(tile: list[int], shape: list[int]) -> list[int] | None:
    return [tile[0] // 2, tile[1] * 2] if tile[0] % 2 == 0 and 2 * tile[1] <= shape[1] else None


@pytest.mark.parametrize("change", [_transposed, _flat])
def test_no_sealed_root_changes_the_shape_of_a_tile(tmp_path: Path, change: Callable[..., Any], capsys: Any) -> None:
    folder = tmp_path / "step-00000001"
    layout = SaveLayout(tensors=(Tensor(name="params/w", dtype="float32", shape=(96, 96), axes=("a", "b")),))
    values = np.arange(96 * 96, dtype=np.float32).reshape(96, 96)
    with LocalStore(folder, create=True) as store:
        Writer(store, layout, save="golden-1").write({"params/w": values})
        commit(store, layout, save="golden-1", meta={"step": 1, "recipe_sha256": "x"})
    assert main(["ckpt", "verify", str(folder)]) == 0
    data = json.loads((folder / ROOT).read_text())
    at, tile = next(
        (i, new) for i, t in enumerate(data["tensors"]) if len(t["tile"]) > 1 and (new := change(t["tile"], t["shape"]))
    )
    data["tensors"][at]["tile"] = tile
    seal(folder, json.dumps(data, separators=(",", ":")).encode())
    for words in (["verify"], ["show"], ["export", "--to", "orbax"]):
        more = [str(tmp_path / "out"), *words[1:]] if words[0] == "export" else []
        code = main(["ckpt", words[0], str(folder), *more])
        out = capsys.readouterr()
        assert code and "tile" in out.out + out.err and "Traceback" not in out.err


@pytest.mark.parametrize(("tile", "refused"), [("rule", ()), ("one row", (True,)), ("turned", (True, False))])
def test_a_run_takes_the_tiles_of_its_model_alone(tmp_path: Path, tile: str, refused: tuple[bool, ...]) -> None:
    program = Holding().program
    layout = format_layout(program)
    (w,) = (t for t in layout.tensors if t.name == "params/w")
    by_rule = tile_shape(w.shape, w.item_bytes)
    made = {"rule": by_rule, "one row": tile_shape(w.shape, w.item_bytes, 1), "turned": by_rule[::-1]}
    assert len(set(made.values())) == 3
    tensors = tuple(dataclasses.replace(t, tile=made[tile]) if t is w else t for t in layout.tensors)
    layout = dataclasses.replace(layout, tensors=tensors)
    with LocalStore(tmp_path, create=True) as store:
        Writer(store, layout, save="a").write({t.name: np.zeros(t.shape, t.dtype) for t in tensors})
        commit(store, layout, save="a", meta={"step": 1, "recipe_sha256": "x"})
        for axes in (True, False):
            with pytest.raises(UserError, match=r"params/w.*tiles of") if axes in refused else nullcontext():
                check_tensors(Reader(store), program, axes=axes)
