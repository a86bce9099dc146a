"""config.json decides what imported weights compute: whatever changes transformers' logits is refused, with the mend.

The oracle is transformers itself: the same weights under a changed config.json. Cases are made from the fields of its
own config classes, so a field that a new release adds is a case too.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints_format import Box
from portatrain.checkpoint.interop import hub_config, huggingface
from portatrain.checkpoint.interop.families import sizes_from
from portatrain.cli import main
from portatrain.data import Stdlib
from portatrain.errors import UserError
from portatrain.model.rope import RopeScaling
from portatrain.recipe import Recipe, apply_overrides, load_recipe
from recipes.models.decoder import DecoderConfig
from tests.support.hub_models import FAMILIES, random_config
from tests.support.hub_models import made as random_model

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

SIZES = DecoderConfig(
    vocab=64, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=48, tied=False, rope_theta=500.0, norm_eps=1e-5
)
SCALED = replace(SIZES, rope_scaling=RopeScaling(factor=4.0, low=1.0, high=4.0, original=16))
TOKENS = np.random.default_rng(0).integers(0, 20, (2, 24))


def recipe(model: DecoderConfig) -> Recipe:
    return replace(load_recipe("tiny-lm"), model=model, data=Stdlib(seq_len=40))


def saved(folder: Path, model: DecoderConfig) -> dict[str, Any]:
    """Random weights of `model` as transformers saves them, with a config.json that agrees; that config."""
    torch.manual_seed(0)
    config = dict(model.huggingface().config)
    made = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.uniform_(0.5, 1.5) if "norm" in name else p.normal_(0, 0.3)
    made.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def logits(folder: Path) -> np.ndarray | None:
    """What transformers computes from a folder; None if it refuses it."""
    try:
        made, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=False, attn_implementation="eager"
        )
        if info["missing_keys"] or info["unexpected_keys"]:
            return None
        with torch.no_grad():
            return made.eval()(torch.tensor(TOKENS)).logits.numpy()
    except Exception:  # whatever kind a release chooses
        return None


def refused(folder: Path, model: Any) -> str:
    try:
        hub_config.check(folder, model.huggingface(), "mine")
    except UserError as error:
        return str(error)
    return ""


ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16},
    {
        **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        **{"original_max_position_embeddings": 16},
    },
)


def other_values(value: Any) -> list[Any]:
    """Values of the same kind that a field could have instead."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 2 * value, max(1, value // 2)]
    if isinstance(value, float):
        return [2 * value + 0.25, value * (1 + 1e-3)]
    if isinstance(value, str):
        return ["gelu", "relu"]
    return [2, True]


def cases(config: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name, changed config): every field, in the file or with a default in the config class, changed by itself."""
    own = transformers.AutoConfig.for_model(config["model_type"]).to_dict()
    base = transformers.PretrainedConfig().to_dict()
    fields = sorted({*config, *(own.keys() - base.keys())} - {"model_type", "architectures", "rope_parameters"})
    made = [
        (f"{field}={value!r}", {**config, field: value})
        for field in fields
        for value in other_values(config.get(field, own.get(field)))
    ]
    if "rope_theta" not in config.get("rope_parameters", {}):  # none, or a set for each kind of layers
        return made + [(f"without {f}", {k: v for k, v in config.items() if k != f}) for f in sorted(config)]
    plain = {k: v for k, v in config.items() if k not in ("rope_parameters", "rope_scaling", "rope_theta")}
    theta = config["rope_parameters"]["rope_theta"]
    for rope in ROPES:
        made.append(
            (f"rope_parameters {rope['rope_type']}", {**plain, "rope_parameters": {**rope, "rope_theta": theta}})
        )
        old = {k if k != "rope_type" else "type": v for k, v in rope.items()}
        made.append((f"rope_scaling {rope['rope_type']}", {**plain, "rope_theta": theta, "rope_scaling": old}))
    made += [
        ("no rope at all", plain),
        ("theta beside", {**plain, "rope_theta": 2 * theta}),
        ("theta inside", {**plain, "rope_parameters": {"rope_type": "default", "rope_theta": 2 * theta}}),
        ("theta the same, beside", {**plain, "rope_theta": theta}),
        ("partial rotary", {**config, "partial_rotary_factor": 0.5}),
        *((f"without {field}", {k: v for k, v in config.items() if k != field}) for field in sorted(config)),
    ]
    return made


@pytest.mark.parametrize("kind", ["llama", "llama3 rope", "mistral"])
def test_whatever_changes_the_logits_is_refused(kind: str, tmp_path: Path) -> None:
    model = {"llama": SIZES, "llama3 rope": SCALED, "mistral": replace(SIZES, window=8)}[kind]
    check_changes(tmp_path, model, saved(tmp_path / "hub", model))


@pytest.mark.full
@pytest.mark.parametrize("kind", FAMILIES[2:])
def test_whatever_changes_the_logits_of_a_family_is_refused(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    random_model(random_config(kind, rng), 0).save_pretrained(tmp_path / "hub")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    check_changes(tmp_path, sizes_from(config), config)


def check_changes(tmp_path: Path, model: Any, config: dict[str, Any]) -> None:
    right = logits(tmp_path / "hub")
    assert right is not None and refused(tmp_path / "hub", model) == ""
    wrong, same = [], 0
    for name, changed in cases(config):
        (tmp_path / "hub" / "config.json").write_text(json.dumps(changed))
        told, found = refused(tmp_path / "hub", model), logits(tmp_path / "hub")
        if found is not None and not np.allclose(found, right, rtol=0, atol=1e-6 * np.abs(right).max()) and not told:
            wrong.append(name)
        same += found is not None and not told
    assert wrong == [] and same >= 5  # and not all is refused: what changes nothing passes


@pytest.mark.parametrize(
    "kind", ["gemma", "granite", "helium", "smollm3", "qwen2", "qwen3", "phi3", "cohere", "olmo", "starcoder2"]
)
def test_other_families_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SIZES.huggingface().config, "model_type": kind}))
    assert "model_type" in refused(tmp_path, SIZES)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 700.0},
        {"norm_eps": 1e-6},
        {"window": 7},
        {"heads": 8, "head_dim": 4},
        {"tied": True},
        {"kv_heads": 4},
        {"layers": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_overrides_that_are_named_mend_it(change: dict[str, Any], tmp_path: Path) -> None:
    theirs = replace(SIZES, **change)
    config = dict(theirs.huggingface().config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = refused(tmp_path, SIZES)
    words = [word for part in told.split("--set ")[1:] for word in [part.split(")")[0]]]
    mended = apply_overrides(recipe(SIZES), words).model
    assert told and isinstance(mended, DecoderConfig) and refused(tmp_path, mended) == "", told


def read(folder: Path, model: DecoderConfig) -> dict[str, np.ndarray]:
    made = recipe(model)
    shapes = {f"params/{n}": t.shape for n, t in made.describe().params.items()}
    found = huggingface.read(folder, made, shapes)
    return {name.removeprefix("params/"): values(Box.whole(shapes[name])) for name, values in found.items()}


def test_the_cache_of_huggingface_hub_is_read(tmp_path: Path) -> None:
    """There a snapshot holds links into blobs/."""
    saved(tmp_path / "plain", SIZES)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted((tmp_path / "plain").iterdir())):
        shutil.copyfile(file, blobs / str(number))
        os.symlink(os.path.relpath(blobs / str(number), snapshot), snapshot / file.name)
    here, there = read(tmp_path / "plain", SIZES), read(snapshot, SIZES)
    assert here.keys() == there.keys() and all((here[k] == there[k]).all() for k in here)


def two_files(folder: Path) -> dict[str, Any]:
    """The weights of `folder` in two files and an index; each holds a wrong copy of a tensor of the other's too."""
    from safetensors.numpy import load_file, save_file

    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(held)
    half, decoy = len(names) // 2, names[0]
    save_file({n: held[n] for n in names[:half]}, folder / "a.safetensors")
    save_file({n: held[n] for n in names[half:]} | {decoy: held[decoy] + 1}, folder / "b.safetensors")
    index = {"weight_map": {n: "a.safetensors" if i < half else "b.safetensors" for i, n in enumerate(names)}}
    (folder / huggingface.INDEX).write_text(json.dumps(index))
    return index


def test_the_index_says_which_file_holds_a_tensor(tmp_path: Path) -> None:
    saved(tmp_path, SIZES)
    before = read(tmp_path, SIZES)
    two_files(tmp_path)
    after = read(tmp_path, SIZES)
    assert all((before[k] == after[k]).all() for k in before)


BAD: dict[str, Callable[[Path], object]] = {
    "an index that is no JSON": lambda f: (f / huggingface.INDEX).write_text("{"),
    "an index without a map": lambda f: (f / huggingface.INDEX).write_text("{}"),
    "a map that is a list": lambda f: (f / huggingface.INDEX).write_text('{"weight_map": ["a"]}'),
    "a map to numbers": lambda f: (f / huggingface.INDEX).write_text('{"weight_map": {"a": 1}}'),
    "a map out of the folder": lambda f: (f / huggingface.INDEX).write_text('{"weight_map": {"a": "../x"}}'),
    "a map to a file that is gone": lambda f: (f / "a.safetensors").unlink(),
    "a tensor that its file lacks": lambda f: one_more(f / huggingface.INDEX),
    "no config.json": lambda f: (f / "config.json").unlink(),
    "a config.json that is a list": lambda f: (f / "config.json").write_text("[]"),
    "a config.json of bytes": lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
    "nested rotary parameters": lambda f: (f / "config.json").write_text(
        json.dumps({**json.loads((f / "config.json").read_text()), "rope_parameters": {"full": {"rope_theta": 1.0}}})
    ),
    "weights in fp8": lambda f: torch_save(f / "b.safetensors"),
}


def one_more(index: Path) -> None:
    found = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {**found["weight_map"], "x": "a.safetensors"}}))


def torch_save(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({n: t.to(torch.float8_e4m3fn) for n, t in load_file(file).items()}, file)


@pytest.mark.parametrize("what", BAD)
def test_a_damaged_folder_ends_in_one_paragraph(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "hub", SIZES)
    two_files(tmp_path / "hub")
    BAD[what](tmp_path / "hub")
    sets = [f"model.{k}={v}" for k, v in (("vocab", 64), ("embed", 32), ("layers", 2), ("heads", 4), ("kv_heads", 2))]
    sets += [f"model.{k}={v}" for k, v in (("head_dim", 8), ("mlp", 48), ("tied", "false"), ("rope_theta", 500))]
    run = tmp_path / "run"
    words = ["tiny-lm", "--from", "huggingface", "--run-dir", str(run)]
    words += [word for text in sets for word in ("--set", text)]
    capsys.readouterr()
    code = main(["ckpt", "import", str(tmp_path / "hub"), *words])
    told = capsys.readouterr().err
    assert code == 2 and told.startswith("error: ") and "Traceback" not in told and not (run / "run.json").exists()


def test_an_export_says_all_that_either_release_of_transformers_reads() -> None:
    config = SCALED.huggingface().config
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500.0
    assert config["rope_scaling"]["rope_type"] == config["rope_parameters"]["rope_type"] == "llama3"
    assert SIZES.huggingface().config["rope_scaling"] is None


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from portatrain.checkpoint.interop.hub_tokenizer import written
    from portatrain.data import TextFiles

    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["<s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    out = tmp_path / "out"
    out.mkdir()
    data = TextFiles(paths="x", seq_len=8, tokenizer=str(tmp_path / "tokenizer.json"), bos="<s>")
    fields, names = written(data, out)
    assert fields == {"bos_token_id": 0, "eos_token_id": 0} and "tokenizer.json" in names
    assert transformers.AutoTokenizer.from_pretrained(out)("a b a")["input_ids"] == [1, 2, 1]
    assert written(Stdlib(seq_len=8), out) == ({"bos_token_id": 0, "eos_token_id": 0}, [])
