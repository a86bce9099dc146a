"""A checkpoint of another run is refused, with what differs: recipe, axes, corpus, tensors; an import is one too."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints_format import LocalStore, Reader
from portatrain.checkpoint.interop import trees
from portatrain.checkpoint.interop.trusted_code import is_trusted
from portatrain.checkpoint.meta import FIELDS, NEEDED
from portatrain.cli import main
from portatrain.errors import UserError
from portatrain.recipe import Recipe, load_recipe
from portatrain.recipe.same import FREE, changed_fields, deciding_changes
from portatrain.runs.run_dir import RunDir
from portatrain.testing import mutants
from portatrain.training.trained import load
from portatrain.training.trainer import train
from tests.support.running import BACKENDS
from tests.support.shipped import each
from tests.support.short_runs import SMALL, small

BACKEND, STEP = BACKENDS[-1], "checkpoints/step-00000002"


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run that stopped at step 2."""
    run = RunDir(tmp_path_factory.mktemp("runs") / "run")
    assert train(small(), run, backend=BACKEND, stop_at=2) == 85
    return run


def other(left: RunDir, path: Path, recipe: Recipe) -> RunDir:
    """A run of `recipe` with the checkpoints of `left`, as after a copy into the wrong folder."""
    run = RunDir(path)
    run.create(recipe)
    shutil.copytree(left.path / "checkpoints", path / "checkpoints")
    shutil.copytree(left.path / "data", path / "data")
    return run


def without_probe(values: Any, meta: mutants.Meta, recipe: Recipe) -> None:
    del meta["probe"]


CHANGES = [
    "optimizer.weight_decay=0.10003",
    "optimizer.b1=0.91",
    "model.dropout=0.11",
    "model.rope_theta=10000.5",
    "ema_decay=0.91",
    "clip_norm=0.9",
    "max_skips=11",
    "steps=13",
    "no_decay=('*/wq',)",
    "accumulation=4",
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_of_another_recipe_is_refused_by_the_field(change: str, left: RunDir, tmp_path: Path) -> None:
    run = other(left, tmp_path / "run", small(change))
    for probe in (True, False):
        if not probe:
            mutants.rewrite(run.path / STEP, without_probe, small())
        with pytest.raises(UserError, match="another recipe, which differs in") as told:
            train(small(change), run, backend=BACKEND)
        assert change.partition("=")[0] in str(told.value)
        assert run.attempt_numbers() == []  # said before an attempt begins


def test_another_recipe_can_be_accepted_and_is_recorded(left: RunDir, tmp_path: Path) -> None:
    recipe = small("optimizer.weight_decay=0.2")
    run = other(left, tmp_path / "run", recipe)
    assert train(recipe, run, backend=BACKEND, stop_at=3, accept_drift="less decay") == 85
    (seam,) = run.events("resumed")
    assert (seam["verdict"], seam["accepted"]) == ("broken", "less decay")
    assert "recipe.optimizer.weight_decay" in seam["differs"]


def test_fields_that_do_not_decide_the_curve_may_differ(left: RunDir, tmp_path: Path) -> None:
    recipe = small("checkpoint_every=3", "eval_every=4", "remat=block", "probe_every=2")
    run = other(left, tmp_path / "run", recipe)
    assert train(recipe, run, backend=BACKEND, stop_at=3) == 85
    assert [e["verdict"] for e in run.events("resumed")] == ["continuous"]


def test_every_field_of_a_recipe_decides_or_is_listed_as_free() -> None:
    """A new field decides until someone says otherwise; no listed name is misspelt."""
    fields = set(Recipe.__dataclass_fields__)
    assert set(FREE) <= fields
    assert fields - set(FREE) >= {"model", "optimizer", "schedule", "seed", "batch", "precision", "max_skips", "decay"}


def test_a_recipe_of_an_older_release_is_the_same() -> None:
    recipe = small()
    stored = json.loads(json.dumps(recipe.to_json()))
    assert changed_fields(stored, recipe) == {}
    stored["model"]["class"] = "gone.module:Sizes"  # not installed here: compared as JSON
    assert set(changed_fields(stored, recipe)) == {"model.class"}
    assert deciding_changes({"step": 1}, recipe, trusted=is_trusted) == {}


def test_a_hash_beside_an_edited_recipe_is_not_trusted() -> None:
    recipe = small()
    stored = json.loads(json.dumps(recipe.to_json()))
    meta = {"recipe": stored, "recipe_sha256": recipe.sha256}
    assert deciding_changes(meta, recipe, trusted=is_trusted) == {}
    stored["optimizer"]["weight_decay"] = 0.25
    assert set(deciding_changes(meta, recipe, trusted=is_trusted)) == {"optimizer.weight_decay"}


def naming_other_code(values: Any, meta: mutants.Meta, recipe: Recipe) -> None:
    meta["recipe"]["model"]["class"], meta["recipe_sha256"] = "code_of_others:Sizes", "0" * 64


@pytest.fixture
def imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that exists once the module `code_of_others` has been imported."""
    code, mark = tmp_path / "code", tmp_path / "imported"
    code.mkdir()
    (code / "code_of_others.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(code))
    monkeypatch.delitem(sys.modules, "code_of_others", raising=False)
    return mark


def test_the_recipe_of_a_checkpoint_imports_no_code(left: RunDir, tmp_path: Path, imports: Path) -> None:
    run = other(left, tmp_path / "run", small())
    mutants.rewrite(run.path / STEP, naming_other_code, small())
    with pytest.raises(UserError, match=r"another recipe, which differs in model\.class"):
        train(small(), run, backend=BACKEND)
    assert not imports.exists()
    with pytest.raises(UserError, match=r"recipe=load_recipe\("):
        load(run.path, backend=BACKEND)
    assert not imports.exists()
    assert load(run.path, backend=BACKEND, recipe=small()).step == 2
    assert train(small(), run, backend=BACKEND, stop_at=3, accept_drift="renamed") == 85
    assert "recipe.model.class" in run.events("resumed")[0]["differs"]
    assert not imports.exists()


def test_the_recipe_of_an_export_imports_no_code(
    exported: dict[str, Path], tmp_path: Path, imports: Path, capsys: pytest.CaptureFixture
) -> None:
    if "dcp" not in exported:
        pytest.skip("torch is not installed")
    source = tmp_path / "edited"
    shutil.copytree(exported["dcp"], source)
    meta = json.loads((source / trees.META).read_text())
    naming_other_code({}, meta, small())
    (source / trees.META).write_text(json.dumps(meta))
    assert imported(source, "dcp", tmp_path / "run") == 2
    assert "another recipe, which differs in model.class" in capsys.readouterr().err
    assert not imports.exists()


def with_axes(path: Path, rename: dict[str, str]) -> None:
    """Rewrite the checkpoint with other names of axes, as another definition would have them."""
    import dataclasses

    from checkpoints_format import Writer, commit

    with LocalStore(path) as store:
        reader = Reader(store)
        meta = dict(reader.meta)
        values = {n: reader.read(n) for n in reader.names}
        layout = reader.layout
    tensors = tuple(
        dataclasses.replace(t, axes=tuple(rename.get(a, a) for a in t.axes)) if t.name.endswith("attn/wq") else t
        for t in layout.tensors
    )
    shutil.rmtree(path)
    with LocalStore(path, create=True) as store:
        layout = dataclasses.replace(layout, tensors=tensors)
        Writer(store, layout, save="axes").write(values)
        commit(store, layout, save="axes", meta=meta)


def test_axes_in_another_order_are_refused(left: RunDir, tmp_path: Path) -> None:
    run = other(left, tmp_path / "run", small())
    with_axes(run.path / STEP, {"heads": "head_dim", "head_dim": "heads"})
    with pytest.raises(UserError, match=r"other names: params/blocks/attn/wq \(layers embed head_dim heads for"):
        train(small(), run, backend=BACKEND)
    assert train(small(), run, backend=BACKEND, stop_at=3, accept_drift="renamed") == 85


@pytest.fixture(scope="module")
def exported(left: RunDir, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoint of `left` in both formats of whole states."""
    folder = tmp_path_factory.mktemp("exported")
    found = {}
    for kind, needs in (("dcp", "torch"), ("orbax", "orbax.checkpoint")):
        if importlib.util.find_spec(needs.partition(".")[0]) is not None:
            found[kind] = folder / kind
            assert main(["ckpt", "export", str(left.path), str(found[kind]), "--to", kind]) == 0
    return found


def imported(source: Path, kind: str, into: Path, *more: str, drift: str | None = None) -> int:
    sizes = [word for size in (*SMALL, *more) for word in ("--set", size)]
    accepted = [] if drift is None else ["--accept-drift", drift]
    return main(["ckpt", "import", str(source), "tiny-lm", "--run-dir", str(into), "--from", kind, *sizes, *accepted])


@pytest.mark.parametrize("kind", ["dcp", "orbax"])
@pytest.mark.parametrize("change", CHANGES)
def test_an_export_is_not_imported_under_another_recipe(
    kind: str, change: str, exported: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if kind not in exported:
        pytest.skip(f"{kind} is not installed")
    assert imported(exported[kind], kind, tmp_path / "run", change) == 2
    said = capsys.readouterr().err
    assert "another recipe" in said and change.partition("=")[0] in said
    assert not list((tmp_path / "run").rglob("*.json"))


def test_another_recipe_of_an_import_is_accepted_twice_and_recorded(
    exported: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, change = RunDir(tmp_path / "run"), "optimizer.weight_decay=0.2"
    assert imported(exported["dcp"], "dcp", run.path, change, drift="less decay") == 0
    assert "--accept-drift 'less decay'" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"optimizer\.weight_decay"):
        train(small(change), run, backend=BACKEND)
    assert train(small(change), run, backend=BACKEND, stop_at=3, accept_drift="less decay") == 85
    assert run.events("resumed")[0]["accepted"] == "less decay"


def edited(kind: str, source: Path, out: Path, change: Any) -> Path:
    """A copy of an export with changed tensors, as a script of its reader may leave it."""
    read = {"orbax": trees.from_orbax, "dcp": trees.from_dcp}[kind]
    held = {n: np.array(a) for n, a in read(source).items()}
    change(held)
    out.mkdir()
    shutil.copy(source / trees.META, out)
    if kind == "orbax":
        with trees._checkpointer() as checkpointer:
            checkpointer.save((out / "state").absolute(), trees.nested(held))
    else:
        import torch.distributed.checkpoint as dcp

        with trees._alone():
            dcp.save({n: trees._as_torch(a) for n, a in held.items()}, checkpoint_id=out, no_dist=True)
    return out


def scaled(name: str, by: float) -> Any:
    def change(held: dict[str, np.ndarray]) -> None:
        held[name] *= np.float32(by)

    return change


EDITS = {
    "opt/v/blocks/attn/wq": 1.001,
    "opt/m/blocks/mlp/up": 0.99,
    "params/embed/table": 1.0001,
    "ema/blocks/mlp/down": -1.0,
}


@pytest.mark.parametrize("kind", ["dcp", "orbax"])
@pytest.mark.parametrize("name", EDITS)
def test_changed_tensors_of_an_export_are_refused_without_a_probe(
    name: str, kind: str, exported: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if kind not in exported:
        pytest.skip(f"{kind} is not installed")
    source = edited(kind, exported[kind], tmp_path / "edited", scaled(name, EDITS[name]))
    meta = json.loads((source / trees.META).read_text())
    del meta["probe"]
    (source / trees.META).write_text(json.dumps(meta))
    run = RunDir(tmp_path / "run")
    assert imported(source, kind, run.path) == 2
    assert f"other bits in {name}." in capsys.readouterr().err
    assert imported(source, kind, run.path, drift="edited") == 0
    with pytest.raises(UserError, match=f"bits different in {name}"):
        train(small(), run, backend=BACKEND)


ODD = (None, "x", "²", -1, 1.5, 10**30, True, [], [[1]], {}, {"a": {"b": None}})
"""Values that a field of a meta may have after a hand or another program has edited it."""


@pytest.mark.parametrize("name", [*FIELDS, "the file"])
def test_an_export_with_a_damaged_record_is_refused_by_the_field(
    name: str, exported: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if "dcp" not in exported:
        pytest.skip("torch is not installed")
    source = tmp_path / "edited"
    shutil.copytree(exported["dcp"], source)
    file, meta = source / trees.META, json.loads((exported["dcp"] / trees.META).read_text())
    texts = [(json.dumps({**meta, name: v}), name in FIELDS and FIELDS[name][0](v)) for v in ODD]
    if name == "the file":
        texts = [(text, False) for text in ("7", "null", "[]", '"x"', "{}", "[" * 100_000, "\xff")]
    elif name in NEEDED:
        texts.append((json.dumps({k: v for k, v in meta.items() if k != name}), False))
    for text, good in texts:
        file.write_text(text)
        code = imported(source, "dcp", tmp_path / "run")
        said = capsys.readouterr().err
        if good:  # of the right type: the continuity check sees what is in it
            assert code == 0, said
            shutil.rmtree(tmp_path / "run")
            continue
        assert code == 2 and "the JSON that an export of a run wrote" in said, (text[-60:], said)
        assert name == "the file" or f"{name}: " in said, said
        assert not list((tmp_path / "run").rglob("*.json")), text[-60:]


@pytest.mark.parametrize(("name", "value"), [("probe", []), ("data", "x"), ("history", 7), ("step", True)])
def test_a_checkpoint_whose_record_was_changed_after_the_save_is_refused(
    name: str, value: Any, left: RunDir, tmp_path: Path
) -> None:
    def change(values: Any, meta: mutants.Meta, recipe: Recipe) -> None:
        meta[name] = value

    run = other(left, tmp_path / "run", small())
    mutants.rewrite(run.path / STEP, change, small())
    with pytest.raises(UserError, match=f"{name} in its meta: expected"):
        train(small(), run, backend=BACKEND)
    assert run.attempt_numbers() == []


def leaves(data: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value of a recipe's JSON that is no object, with its path."""
    if not isinstance(data, dict):
        yield path, data
        return
    for key, inner in data.items():
        yield from leaves(inner, (*path, key))


def another(value: Any) -> Any:
    """The value nearest to `value`, or one more."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, float):
        return math.nextafter(value, math.inf)
    return value + 1 if isinstance(value, int) else [*value, "x"] if isinstance(value, list) else f"{value}x"


@pytest.mark.parametrize("name", each())
def test_every_field_of_every_shipped_recipe_decides_or_is_free(name: str) -> None:
    """Each value of the stored recipe is changed by the least that there is."""
    recipe = load_recipe(name)
    stored = json.dumps(recipe.to_json())
    found = list(leaves(json.loads(stored)))
    for path, value in found:
        data = json.loads(stored)
        inner = data
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = another(value)
        changes = deciding_changes({"recipe": data, "recipe_sha256": "0" * 64}, recipe, trusted=is_trusted)
        assert bool(changes) == (path[0] not in FREE), (path, value, changes)
    assert len(found) > 50


def test_another_validation_document_is_noticed(exported: dict[str, Path], tmp_path: Path) -> None:
    meta = json.loads((exported["dcp"] / trees.META).read_text())
    source = edited("dcp", exported["dcp"], tmp_path / "edited", lambda held: None)
    meta["data"]["validation"] = "0" * 64  # as of a corpus with another document held out
    (source / trees.META).write_text(json.dumps(meta))
    run = RunDir(tmp_path / "run")
    assert imported(source, "dcp", run.path) == 0
    with pytest.raises(UserError, match="a run on this validation split, fingerprint"):
        train(small(), run, backend=BACKEND)
    assert train(small(), run, backend=BACKEND, stop_at=3, accept_drift="another document") == 85
    assert run.events("resumed")[0]["differs"] == ["data.validation"]
