"""Fine-tune from a folder of transformers: `init --from` writes the recipe, `init=` gives the weights, each process its
own ranges."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from portatrain.backends.base import backend_class
from portatrain.backends.program import make_program
from portatrain.checkpoint.interop.hub_start import first_state, first_weights
from portatrain.cli import main
from portatrain.errors import UserError
from portatrain.model.lora import LoRA
from portatrain.recipe import Recipe, load_recipe
from portatrain.runs.run_dir import RunDir
from recipes.models.gemma import GemmaConfig
from tests.support.hub_models import made, ours
from tests.support.running import BACKENDS, everything

pytest.importorskip("transformers")

CONFIG = {
    **{"model_type": "gemma3_text", "vocab_size": 256, "hidden_size": 16, "intermediate_size": 24, "head_dim": 4},
    **{"num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8},
    **{"query_pre_attn_scalar": 4, "max_position_embeddings": 32, "pad_token_id": None},
    "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "model"
    made(CONFIG, 0).save_pretrained(path)
    return path


def written(folder: Path, tmp_path: Path, *words: str) -> Recipe:
    assert main(["init", str(tmp_path / "tune.py"), "--from", str(folder), *words]) == 0
    return load_recipe(str(tmp_path / "tune.py"))


def test_the_recipe_is_that_of_the_folder(folder: Path, tmp_path: Path) -> None:
    recipe = written(folder, tmp_path)
    assert recipe.model == ours(folder)[0].model and isinstance(recipe.model, GemmaConfig)
    assert recipe.init == str(folder) and recipe.name == "tune"
    text = (tmp_path / "tune.py").read_text()
    assert "(True, False) * 2 + (True,)" in text and "rope_local" not in text


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_begins_with_the_weights(folder: Path, tmp_path: Path, backend: str) -> None:
    recipe = replace(written(folder, tmp_path), ema_decay=0.9, lora=LoRA(rank=2, targets=("*/wq",)))
    made_by = backend_class(backend)(make_program(recipe))
    state = everything(made_by, first_state(made_by, recipe))
    fresh = everything(made_by, made_by.init_state())
    _, params, _ = ours(folder)
    for name, array in params.items():
        assert (state[f"params/{name}"] == array).all()
    for name in state.keys() - {f"params/{n}" for n in params}:  # factors, averages of factors, slots, count
        assert (state[name] == fresh[name]).all(), name


def test_each_process_reads_its_own_ranges(folder: Path, tmp_path: Path) -> None:
    """Every box of every device of a mesh, put together, is the folder."""
    recipe = written(folder, tmp_path)
    program = make_program(recipe, mesh="fsdp=2,tensor=2")
    read, (_, params, _) = first_weights(recipe, program), ours(folder)
    for name, whole in params.items():
        found = np.full(whole.shape, np.nan, np.float32)
        for device in range(4):
            at = program.layout.mesh.coordinates(device)
            offset, shape = program.layout.box(program.definition.params[name], at, role="params")
            found[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))] = read(
                "params", name, offset, shape
            )
        assert (found == whole).all()


def test_a_folder_of_another_model_leaves_no_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "tiny-lm", "--run-dir", str(tmp_path / "run"), "--backend", BACKENDS[-1], "--init", str(folder)]
    capsys.readouterr()
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "gemma3_text" in told and "Traceback" not in told and not (tmp_path / "run" / "run.json").exists()


def test_an_import_finds_the_recipe_in_config_json(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, words = (
        tmp_path / "tuned",
        ["--from", "huggingface", "--set", "schedule.warmup=0", "--set", "batch=2", "--set", "steps=1"],
    )
    assert main(["ckpt", "import", str(folder), "--run-dir", str(run), *words]) == 0
    told = capsys.readouterr().out
    assert f"{run / 'recipe.py'}: the recipe that config.json implies, a GemmaConfig of recipes.models.gemma" in told
    assert f"portatrain init my_recipe.py --from {folder}" in told
    recipe = load_recipe(str(run / "recipe.py"))
    assert (recipe.name, recipe.init, recipe.model) == ("tuned", None, ours(folder)[0].model)
    # The command that it prints goes on from these weights, with the fields that were set.
    command = told.strip().rpartition("Continue with: portatrain ")[2].split()
    assert main([*command, "--backend", BACKENDS[-1]]) == 0
    (resumed,) = RunDir(run).events("resumed")
    assert resumed["verdict"] == "imported" and len(RunDir(run).curve()) == 1

    other = tmp_path / "granite"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**CONFIG, "model_type": "granite"}))
    assert main(["ckpt", "import", str(other), "--run-dir", str(tmp_path / "none"), "--from", "huggingface"]) == 2
    assert "model_type 'granite': expected one of" in capsys.readouterr().err and not (tmp_path / "none").exists()
    # Weights that are not of its config.json: neither the recipe nor the directory stays.
    (other / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 300}))
    (other / "model.safetensors").symlink_to(folder / "model.safetensors")
    assert main(["ckpt", "import", str(other), "--run-dir", str(tmp_path / "none"), "--from", "huggingface"]) == 2
    assert "other shapes" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_texts_without_a_tokenizer_are_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 300}))
    assert written(other, tmp_path).data.vocab == 300  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="tokenizer"):
        from portatrain.commands.init_from_hub import recipe_text

        recipe_text("", other, ["texts"])
