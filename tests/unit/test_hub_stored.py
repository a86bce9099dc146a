"""Tensors of a folder of transformers under other names, and cut at other places."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints_format import Box
from portatrain.backends.state import full_name
from portatrain.checkpoint.interop import Row, huggingface
from portatrain.errors import UserError
from portatrain.model.module import describe
from portatrain.recipe import Recipe, load_recipe
from recipes.models.olmo_hybrid import OTHER_NAMES, OlmoHybridConfig

pytest.importorskip("safetensors")

Arrays = dict[str, np.ndarray]
SIZES = OlmoHybridConfig(
    **{"vocab": 256, "embed": 8, "layers": 3, "heads": 2, "mlp": 8, "recurrent": (True, False, True)},
    **{"key_heads": 1, "value_heads": 2, "key_size": 3, "value_size": 6},
)
KERNELS = "model.layers.0.linear_attn.{}_conv1d.weight"


def recipe() -> Recipe:
    return replace(load_recipe("tiny-lm"), name="hybrid", model=SIZES, hooks=())


def ours() -> Arrays:
    rng, definition = np.random.default_rng(0), describe(SIZES.build())
    return {name: rng.normal(size=info.shape).astype(np.float32) for name, info in definition.params.items()}


def theirs(params: Arrays) -> Arrays:
    found = {}
    for row in SIZES.huggingface().rows:
        found[row.theirs] = np.ascontiguousarray(row.out(params[row.ours][row.leading]))
    return found


def as_transformers_saves(held: Arrays) -> Arrays:
    """Three equal parts of the joined kernels, and names of norms that are replaced wherever they occur."""
    found = dict(held)
    for layer in (0, 2):
        names = [f"model.layers.{layer}.linear_attn.{part}_conv1d.weight" for part in "qkv"]
        parts = np.split(np.concatenate([found[name] for name in names]), 3)
        found |= dict(zip(names, (np.ascontiguousarray(part) for part in parts), strict=True))
    for other, known in OTHER_NAMES.items():
        found = {name.replace(known, other): array for name, array in found.items()}
    return found


def as_released(held: Arrays) -> Arrays:
    """Other names of norms in recurrent layers alone."""
    found = dict(held)
    for layer in (0, 2):
        for other, known in OTHER_NAMES.items():
            found[f"model.layers.{layer}.{other}.weight"] = found.pop(f"model.layers.{layer}.{known}.weight")
    return found


def write(folder: Path, held: Arrays) -> Path:
    from safetensors.numpy import save_file

    folder.mkdir()
    save_file(held, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SIZES.huggingface().config))
    return folder


@pytest.mark.parametrize("saved", [dict, as_transformers_saves, as_released])
def test_every_form_of_the_files_is_read(saved: Callable[[Arrays], Arrays], tmp_path: Path) -> None:
    params = ours()
    shapes = {full_name("params", name): a.shape for name, a in params.items()}
    read = huggingface.read(write(tmp_path / "hub", saved(theirs(params))), recipe(), shapes)
    assert read.keys() == shapes.keys()
    for name, array in params.items():
        values, whole = read[full_name("params", name)], Box.whole(array.shape)
        assert np.array_equal(values(whole), array), name
        last = tuple(n // 2 for n in array.shape)
        part = Box(last, tuple(n - a for n, a in zip(array.shape, last, strict=True)))
        assert np.array_equal(values(part), array[tuple(slice(a, None) for a in last)]), name


def test_what_is_written_has_the_sizes_of_queries_keys_and_values() -> None:
    held = theirs(ours())
    assert [held[KERNELS.format(part)].shape for part in "qkv"] == [(3, 1, 4), (3, 1, 4), (12, 1, 4)]
    assert "model.layers.0.input_layernorm.weight" in held
    assert "model.layers.1.post_feedforward_layernorm.weight" in held


def test_kernels_of_another_size_are_named(tmp_path: Path) -> None:
    params = ours()
    held = theirs(params)
    held[KERNELS.format("k")] = np.zeros((4, 1, 4), np.float32)
    shapes = {full_name("params", name): a.shape for name, a in params.items()}
    with pytest.raises(UserError, match=r"0\.linear_attn\.k_conv1d\.weight of \[4, 1, 4\] for \[3, 1, 4\]"):
        huggingface.read(write(tmp_path / "hub", held), recipe(), shapes)


def test_two_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    params = ours()
    held: dict[str, Any] = theirs(params)
    held["model.layers.0.attention_layer_norm.weight"] = np.zeros(8, np.float32)
    shapes = {full_name("params", name): a.shape for name, a in params.items()}
    with pytest.raises(UserError, match="attention_layer_norm"):
        huggingface.read(write(tmp_path / "hub", held), recipe(), shapes)


def test_a_depthwise_kernel_is_its_transpose_with_an_axis_between() -> None:
    row = Row(theirs="conv", ours="kernel", rows=1, depthwise=True)
    kernel = np.arange(24.0).reshape(4, 2, 3)
    out = row.out(kernel)
    assert out.shape == row.their_shape(kernel.shape) == (6, 1, 4)
    assert out[4, 0].tolist() == kernel[:, 1, 1].tolist()
    assert np.array_equal(row.taken(out, Box.whole(kernel.shape), kernel.shape), kernel)
