"""`portatrain ckpt`: what it says of checkpoints, and that what leaves in other formats is what comes back."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from checkpoints_format import LocalStore, Reader
from portatrain.backends.base import backend_class, missing
from portatrain.backends.program import make_program
from portatrain.checkpoint.interop import huggingface
from portatrain.checkpoint.interop.hub_tokenizer import GENERATION
from portatrain.checkpoint.saver import reads
from portatrain.cli import main
from portatrain.errors import UserError
from portatrain.recipe import Recipe, apply_overrides, load_recipe
from portatrain.runs.run_dir import RunDir
from portatrain.testing import mutants
from portatrain.training.trained import load
from portatrain.training.trainer import train

BACKEND = [n for n in ("jax", "torch") if not missing(n)][-1]
SIZES = [
    "model.layers=2",
    "model.embed=32",
    "model.mlp=64",
    "data.seq_len=64",
    "batch=8",
    "steps=12",
    "schedule.warmup=2",
    "eval_every=none",
    "hooks=()",
    "ema_decay=0.9",
]
STEP = "checkpoints/step-00000004"


def sizes(*more: str) -> list[str]:
    return [word for size in (*SIZES, *more) for word in ("--set", size)]


def small(*more: str) -> Recipe:
    return apply_overrides(load_recipe("tiny-lm"), [*SIZES, *more])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    assert train(small("checkpoint_every=2"), RunDir(path), backend=BACKEND, stop_at=4) == 85
    return path


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def values(path: Path) -> dict[str, np.ndarray]:
    with LocalStore(path) as store:
        reader = Reader(store)
        return {name: reader.read(name) for name in reader.names}


def test_ls_show_and_verify(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["ckpt", "ls", str(run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["step"], r["state"]) for r in rows] == [(2, "committed"), (4, "committed")]
    assert rows[1]["bytes"] == sum(p.stat().st_size for p in (run / STEP).glob("pack-*"))
    assert main(["ckpt", "show", str(run), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["meta"]["step"] == 4
    table = next(t for t in shown["tensors"] if t["name"] == "opt/v/embed/table")
    assert (table["shape"], table["axes"]) == ([256, 32], ["vocab", "embed"])
    assert main(["ckpt", "verify", str(run)]) == 0
    assert "good" in capsys.readouterr().out
    for what in ("ls", "show"):
        assert main(["ckpt", what, str(run)]) == 0
        assert "4" in capsys.readouterr().out


def test_verify_names_a_renamed_folder(copy: Path, capsys: pytest.CaptureFixture) -> None:
    renamed = copy / "checkpoints/step-00000020"
    (copy / STEP).rename(renamed)
    for path in (copy, renamed):
        assert main(["ckpt", "verify", str(path), "--json"]) == 1
        row = json.loads(capsys.readouterr().out)[-1]
        assert row["step"] == 20 and "got the checkpoint of step 4" in " ".join(row["problems"])
    shutil.copytree(renamed, copy / "of another name")
    assert main(["ckpt", "verify", str(copy / "of another name")]) == 0


def test_a_long_verify_says_how_far_it_is(
    run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10**6, 3))
    fast = SimpleNamespace(monotonic=lambda: float(next(clock)))
    monkeypatch.setattr("portatrain.commands.ckpt.time", fast)
    assert main(["ckpt", "verify", str(run)]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if " of " in line]
    assert told and all(re.search(r"step-\d+: (\S+) of (\S+) GiB$", line) for line in told)
    done, total = told[-1].split(": ")[-1].removesuffix(" GiB").split(" of ")
    assert done == total


def test_verify_names_every_damaged_file(copy: Path, capsys: pytest.CaptureFixture) -> None:
    pack = next((copy / STEP).glob("pack-*"))
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.write_bytes(data)
    assert main(["ckpt", "verify", str(copy)]) == 1
    out = capsys.readouterr().out
    assert pack.name in out and "tensor" in out
    assert f"{copy / 'checkpoints/step-00000002'}: good" in out
    (copy / STEP / "COMMIT").unlink()
    assert main(["ckpt", "verify", str(copy)]) == 0
    assert "not committed" in capsys.readouterr().out


def test_diff_says_which_tensors_differ_and_by_how_much(copy: Path, run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["ckpt", "diff", str(copy), str(run)]) == 0
    assert "0 of" in capsys.readouterr().out

    def change(given: dict[str, np.ndarray], meta: dict[str, Any], recipe: Recipe) -> None:
        given["opt/m/blocks/attn/wq"][1, 3, 0, 2] += np.float32(0.5)
        meta["data"]["next_sample"] = 1

    mutants.rewrite(copy / STEP, change, small())
    assert main(["ckpt", "diff", str(run), str(copy), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    (tensor,) = found["tensors"]
    assert (tensor["name"], tensor["elements"]) == ("opt/m/blocks/attn/wq", 1)
    assert tensor["largest"] == pytest.approx(0.5, rel=1e-6)
    assert found["meta"] == ["data.next_sample"]
    assert main(["ckpt", "diff", str(run / "checkpoints/step-00000002"), str(run)]) == 1
    assert "of its scale" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["orbax", "dcp"])
def test_the_whole_state_leaves_and_comes_back_as_the_same_run(
    kind: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip({"orbax": "orbax.checkpoint", "dcp": "torch"}[kind])
    out, back = tmp_path / "out", tmp_path / "back"
    assert main(["ckpt", "export", str(run), str(out), "--to", kind]) == 0
    words = ["--run-dir", str(back), "--from", kind, *sizes("checkpoint_every=2")]
    assert main(["ckpt", "import", str(out), "tiny-lm", *words]) == 0, capsys.readouterr().err
    before, after = values(run / STEP), values(back / STEP)
    assert before.keys() == after.keys()
    assert all(before[k].tobytes() == after[k].tobytes() for k in before)
    assert train(small("checkpoint_every=2"), RunDir(back), backend=BACKEND, stop_at=5) == 85
    assert [s["verdict"] for s in RunDir(back).events("resumed")] == ["continuous"]


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize("more", [(), ("model.tied=false", "model.kv_heads=1", "model.head_dim=16")])
def test_transformers_loads_what_is_exported_and_we_what_it_saves(more: tuple[str, ...], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    recipe, run, out = small(*more), tmp_path / "run", tmp_path / "hub"
    assert train(recipe, RunDir(run), backend=BACKEND, stop_at=4) == 85
    assert main(["ckpt", "export", str(run), str(out), "--to", "huggingface"]) == 0
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)
    ours = predicted(recipe, run / STEP, tokens)
    np.testing.assert_allclose(logits(model.eval(), tokens), ours, rtol=0, atol=2e-5 * np.abs(ours).max())

    # And the other way: what transformers saves begins a run of ours, with the same logits.
    model.save_pretrained(tmp_path / "theirs")
    back = tmp_path / "back"
    words = ["--run-dir", str(back), "--from", "huggingface", *sizes(*more)]
    assert main(["ckpt", "import", str(tmp_path / "theirs"), "tiny-lm", *words]) == 0
    theirs = json.loads(
        (tmp_path / "theirs" / GENERATION).read_bytes()
    )  # how to generate goes along without a tokenizer, too
    assert not (out / GENERATION).exists() and not (out / "tokenizer.json").exists()
    assert main(["ckpt", "export", str(back), str(tmp_path / "again"), "--to", "huggingface"]) == 0
    assert json.loads((tmp_path / "again" / GENERATION).read_bytes()) == theirs
    there, here = values(back / "checkpoints/step-00000000"), values(run / STEP)
    params = [k for k in here if k.startswith("params/")]
    assert all(there[k].tobytes() == here[k].tobytes() for k in params)
    assert all(there[k.replace("params/", "ema/", 1)].tobytes() == here[k].tobytes() for k in params)
    assert not any(there[k].any() for k in there if k.startswith("opt/"))
    assert train(small(*more), RunDir(back), backend=BACKEND, stop_at=1) == 85
    assert [s["verdict"] for s in RunDir(back).events("resumed")] == ["imported"]
    shutil.rmtree(tmp_path / "theirs")  # the run keeps it, at every step and without the folder
    assert main(["ckpt", "export", str(back), str(tmp_path / "later"), "--to", "huggingface"]) == 0
    assert json.loads((tmp_path / "later" / GENERATION).read_bytes()) == theirs


def test_a_run_that_began_from_a_folder_of_transformers_names_it() -> None:
    recipe = load_recipe("tiny-lm")
    for meta, init, folder in (
        ({}, None, None),
        ({"imported": {"format": "orbax", "path": "/a"}}, None, None),
        ({"imported": {"format": "huggingface", "path": "/a"}}, None, "/a"),
        ({"began_from": {"format": "huggingface", "path": "/a"}}, None, "/a"),
        ({"began_from": "damaged"}, None, None),
        ({}, "/b", "/b"),
    ):
        reader: Any = SimpleNamespace(meta=meta)
        assert huggingface.begun_from(reader, dataclasses.replace(recipe, init=init)).get("path") == folder


def predicted(recipe: Recipe, path: Path, tokens: np.ndarray) -> np.ndarray:
    backend = backend_class(BACKEND)(make_program(recipe))
    with LocalStore(path) as store:
        state = backend.restore_state(reads(Reader(store)))
    return backend.predict(state, {"tokens": tokens, "sample": np.arange(len(tokens), dtype=np.int64)})


def test_a_plain_state_dict_and_a_plain_nnx_state(run: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    assert main(["ckpt", "export", str(run), str(tmp_path / "t"), "--to", "torch"]) == 0
    module = backend_class("torch")(make_program(small())).lower()
    found = module.load_state_dict(torch.load(tmp_path / "t/model.pt", weights_only=True))
    assert not found.missing_keys and not found.unexpected_keys
    wq = dict(module.named_parameters())["blocks.1.attn.wq"].detach().numpy()
    assert np.array_equal(wq, values(run / STEP)["params/blocks/attn/wq"][1])

    nnx = pytest.importorskip("flax.nnx")
    from flax import serialization

    assert main(["ckpt", "export", str(run), str(tmp_path / "n"), "--to", "nnx"]) == 0
    pure = serialization.msgpack_restore((tmp_path / "n/state.msgpack").read_bytes())
    module = backend_class("jax")(make_program(small())).lower()
    state = nnx.state(module, nnx.Param)
    nnx.replace_by_pure_dict(state, pure)
    nnx.update(module, state)
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    (wq,) = [np.asarray(leaf[...]) for path, leaf in flat if path[-1] == "wq"]
    assert np.array_equal(wq, values(run / STEP)["params/blocks/attn/wq"])


def test_a_trained_model_predicts_from_the_checkpoint_of_any_step(run: Path, copy: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 256, (2, 8)).astype(np.int32)
    newest, second = load(run, backend=BACKEND), load(run, step=2, backend=BACKEND)
    assert (newest.step, second.step) == (4, 2)
    np.testing.assert_array_equal(newest.predict({"tokens": tokens}), predicted(small(), run / STEP, tokens))
    assert np.abs(newest.predict({"tokens": tokens}) - second.predict({"tokens": tokens})).max() > 1e-4

    with pytest.raises(UserError, match="tensors of this model"):
        load(run, backend=BACKEND, recipe=small("model.layers=3"))
    with pytest.raises(UserError, match="a run directory or a checkpoint"):
        load(_empty(copy / "none"))

    def forget(given: dict[str, np.ndarray], meta: dict[str, Any], recipe: Recipe) -> None:
        meta["recipe"] = {"class": "recipe_file_gone:Gone"}

    mutants.rewrite(copy / STEP, forget, small())
    with pytest.raises(UserError, match=r"recipe=load_recipe\("):
        load(copy, backend=BACKEND)
    assert load(copy, backend=BACKEND, recipe=small()).step == 4


def _empty(path: Path) -> Path:
    path.mkdir()
    return path


def _foreign(path: Path) -> Path:
    path.mkdir()
    (path / "model.bin").write_bytes(b"x")
    return path


def _file(path: Path) -> Path:
    path.write_text("x")
    return path


BAD: dict[str, Callable[[Path, Path], list[str]]] = {
    "no such path": lambda run, tmp: ["ls", str(tmp / "none")],
    "empty folder": lambda run, tmp: ["show", str(_empty(tmp / "e"))],
    "foreign folder": lambda run, tmp: ["verify", str(_foreign(tmp / "f"))],
    "a file": lambda run, tmp: ["show", str(_file(tmp / "x"))],
    "a step that is not there": lambda run, tmp: ["show", str(run), "--step", "3"],
    "unknown command": lambda run, tmp: ["list", str(run)],
    "unknown format": lambda run, tmp: ["export", str(run), str(tmp / "o"), "--to", "keras"],
    "a place that is taken": lambda run, tmp: ["export", str(run), str(_foreign(tmp / "o")), "--to", "nnx"],
    "import of nothing": lambda run, tmp: [
        "import",
        str(tmp / "none"),
        "tiny-lm",
        "--run-dir",
        str(tmp / "r"),
        "--from",
        "dcp",
    ],
    "import of an empty folder": lambda run, tmp: [
        "import",
        str(_empty(tmp / "e")),
        "tiny-lm",
        "--run-dir",
        str(tmp / "r"),
        "--from",
        "huggingface",
    ],
    "import of no orbax": lambda run, tmp: [
        "import",
        str(_foreign(tmp / "e")),
        "tiny-lm",
        "--run-dir",
        str(tmp / "r"),
        "--from",
        "orbax",
    ],
    "import of no dcp": lambda run, tmp: [
        "import",
        str(_foreign(tmp / "e")),
        "tiny-lm",
        "--run-dir",
        str(tmp / "r"),
        "--from",
        "dcp",
    ],
    "import without a recipe of a folder without a config.json": lambda run, tmp: [
        *("import", str(_foreign(tmp / "e")), "--run-dir", str(tmp / "r"), "--from", "huggingface")
    ],
    "import without a recipe of a format that names no model": lambda run, tmp: [
        *("import", str(_foreign(tmp / "e")), "--run-dir", str(tmp / "r"), "--from", "dcp")
    ],
    "import into a run": lambda run, tmp: [
        "import",
        str(_foreign(tmp / "e")),
        "tiny-lm",
        "--run-dir",
        str(run),
        "--from",
        "dcp",
    ],
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_paragraph_and_changes_nothing(
    case: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = BAD[case](run, tmp_path)
    before = sorted(str(p) for root in (run, tmp_path) for p in root.rglob("*"))
    assert main(["ckpt", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "expected" in error and "got" in error
    assert "Traceback" not in error and error.count("\n") == 1
    assert sorted(str(p) for root in (run, tmp_path) for p in root.rglob("*")) == before


def test_another_models_tensors_are_listed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["ckpt", "export", str(run), str(tmp_path / "o"), "--to", "nnx"]) == 0
    for kind in ("huggingface", "dcp"):
        out = tmp_path / kind
        assert main(["ckpt", "export", str(run), str(out), "--to", kind]) == 0
        if kind == "huggingface":  # a config.json that agrees, beside weights that do not
            config = json.loads((out / "config.json").read_text())
            config |= {"intermediate_size": 96, "num_hidden_layers": 3}
            (out / "config.json").write_text(json.dumps(config))
        else:  # without the recipe, which would be compared first
            (out / "portatrain.json").unlink()
        capsys.readouterr()
        words = ["--run-dir", str(tmp_path / "r"), "--from", kind, *sizes("model.mlp=96", "model.layers=3")]
        assert main(["ckpt", "import", str(out), "tiny-lm", *words]) == 2
        error = capsys.readouterr().err
        assert "other shapes" in error or "not there" in error, error
        assert "layers.2" in error or "for [3, " in error, error
        assert not (tmp_path / "r").exists()


def test_low_rank_factors_are_trained_beside_imported_weights_and_leave_merged(run: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    base, tuned, merged = tmp_path / "base", tmp_path / "tuned", tmp_path / "merged"
    assert main(["ckpt", "export", str(run), str(base), "--to", "huggingface"]) == 0
    more = ("lora=LoRA", "lora.rank=4", "lora.targets=*/attn/*,*/down", "ema_decay=none")
    words = ["--run-dir", str(tuned), "--from", "huggingface", *sizes(*more)]
    assert main(["ckpt", "import", str(base), "tiny-lm", *words]) == 0
    begun, recipe = values(tuned / "checkpoints/step-00000000"), small(*more)
    assert begun["params/blocks/attn/wq/lora_a"].std() > 0.05  # drawn, or no gradient would ever reach the other
    assert not begun["params/blocks/attn/wq/lora_b"].any()
    assert train(recipe, RunDir(tuned), backend=BACKEND, stop_at=3) == 85
    after = values(tuned / "checkpoints/step-00000003")
    changed = {n for n in after if n.startswith("params/") and (after[n] != begun[n]).any()}
    factors = {n for n in after if "/lora_" in n and n.startswith("params/")}
    assert changed == factors and len(factors) == 10
    assert {n.partition("/params/")[0].split("/")[1] for n in after if n.startswith("opt/")} == {"m", "v", "count"}
    assert main(["ckpt", "export", str(tuned), str(merged), "--to", "huggingface"]) == 0
    tokens = np.random.default_rng(0).integers(0, 256, (2, 16)).astype(np.int32)
    ours = predicted(recipe, tuned / "checkpoints/step-00000003", tokens)
    before, theirs = (
        logits(transformers.AutoModelForCausalLM.from_pretrained(path).eval(), tokens) for path in (base, merged)
    )
    bound = 2e-5 * np.abs(ours).max()
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=bound)
    assert np.abs(before - ours).max() > 100 * bound
