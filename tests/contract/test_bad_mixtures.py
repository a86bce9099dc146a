"""Mistakes around mixtures and folders of transformers: each ends in one paragraph, and makes no run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portatrain.backends.base import missing
from portatrain.cli import main

pytestmark = [
    pytest.mark.skipif(bool(missing("torch")), reason="torch is not installed"),
    pytest.mark.skipif(not pytest.importorskip("safetensors"), reason="safetensors is not installed"),
]

CONFIG: dict[str, Any] = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 8,
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "max_position_embeddings": 32,
}
DENSE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
DENSE += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
EXAMPLE = "examples/mixture.py"


def config(folder: Path, **changes: Any) -> Path:
    """Write the config.json of a small Mixtral; a change to `...` leaves a field out."""
    folder.mkdir(exist_ok=True)
    fields = {k: v for k, v in {**CONFIG, **changes}.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def dense_weights(folder: Path) -> Path:
    """Write the weights of a Llama beside the config of a Mixtral."""
    from safetensors.numpy import save_file

    names = [f"model.layers.0.{name}.weight" for name in DENSE]
    names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    save_file({name: np.zeros((2, 2), np.float32) for name in names}, config(folder) / "model.safetensors")
    return folder


def many_words(folder: Path) -> Path:
    """Write a tokenizer of more words than the embedding has rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(20)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(config(folder) / "tokenizer.json"))
    (folder / "text.txt").write_text("w1 w2 w19 " * 200)
    return folder


def _recipe(folder: Path) -> str:
    """Write the recipe that a folder implies."""
    assert main(["init", str(folder / "tune.py"), "--from", str(folder)]) == 0
    return str(folder / "tune.py")


def trained(*words: str) -> Callable[[Path], list[str]]:
    return lambda folder: ["train", EXAMPLE, *words, "--run-dir", str(folder / "run"), "--backend", "torch"]


def begun(write: Callable[[Path], Path]) -> Callable[[Path], list[str]]:
    return lambda folder: ["init", str(folder / "tune.py"), "--from", str(write(folder / "hub"))]


def imported(write: Callable[[Path], Path], *words: str) -> Callable[[Path], list[str]]:
    def command(folder: Path) -> list[str]:
        recipe = _recipe(config(folder / "right"))
        source = str(write(folder / "hub"))
        return ["ckpt", "import", source, recipe, "--from", "huggingface", "--run-dir", str(folder / "run"), *words]

    return command


def with_tokenizer(folder: Path) -> list[str]:
    hub = many_words(folder / "hub")
    fields = ["data=TextFiles", "data.validation=0", "data.seq_len=16", "eval_every=none", "eval_final_batches=1"]
    fields += [f"data.paths={hub / 'text.txt'}", f"data.tokenizer={hub}"]
    words = [word for field in fields for word in ("--set", field)]
    recipe = _recipe(config(folder / "right"))
    return ["train", recipe, *words, "--run-dir", str(folder / "run"), "--backend", "torch"]


def nothing(folder: Path) -> Path:
    folder.mkdir()
    return folder


BAD: dict[str, tuple[Callable[[Path], list[str]], tuple[str, ...]]] = {
    "init from a folder without config.json": (begun(nothing), ("config.json", "got none")),
    "import of a folder without config.json": (imported(nothing), ("config.json", "got none")),
    "a run that begins with a folder without config.json": (
        lambda folder: [
            *("train", _recipe(config(folder / "right", vocab_size=256)), "--run-dir", str(folder / "run")),
            *("--backend", "torch"),
            *("--init", str(nothing(folder / "hub"))),
        ],
        ("config.json", "got none"),
    ),
    "weights of another family": (
        imported(dense_weights),
        ("not there", "block_sparse_moe", "not the model's", "mlp.gate_proj"),
    ),
    "the config of another family": (
        imported(lambda folder: config(folder, model_type="qwen3_moe")),
        ("qwen3_moe", "mixtral"),
    ),
    "a tokenizer larger than the embedding": (with_tokenizer, ("vocabulary of at least the data's 21 ids", "with 8")),
    "an architecture that no family covers": (
        begun(lambda folder: config(folder, model_type="granitemoe", residual_multiplier=0.22)),
        ("granitemoe", "the nearest is mixtral", "residual_multiplier"),
    ),
    "a config.json with more chosen experts than there are": (
        begun(lambda folder: config(folder, num_experts_per_tok=5)),
        ("num_experts_per_tok 5", "at most 4, the number of experts"),
    ),
    "a config.json without experts": (
        begun(lambda folder: config(folder, num_local_experts=0)),
        ("num_local_experts",),
    ),
    "more chosen experts than there are": (trained("--set", "model.chosen=9"), ("between 1 and 8", "got 9")),
    "no chosen expert": (trained("--set", "model.chosen=0"), ("between 1 and 8", "got 0")),
    "experts that the axis does not divide": (
        trained("--devices", "3", "--mesh", "expert=3"),
        ("expert=3", "got 8", "nearest sizes that work are 6 or 9"),
    ),
    "an expert axis for a model without experts": (
        lambda folder: ["train", "tiny-lm", "--run-dir", str(folder / "run"), "--devices", "2", "--mesh", "expert=2"],
        ("expert=2", "'experts' axis in the model"),
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_mistake_ends_in_one_paragraph(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, said = BAD[what]
    words = make(tmp_path)
    capsys.readouterr()
    code, told = main(words), capsys.readouterr().err
    paragraph = told[told.index("error: ") :]
    assert code == 2 and "Traceback" not in told and "\n" not in paragraph.strip(), told
    assert all(word in paragraph for word in said), paragraph
    made = {p.name for p in tmp_path.iterdir()} - {"hub", "right"}
    assert "tune.py" not in made and not (tmp_path / "run" / "run.json").exists()
