"""Names, shapes, axes and initial values of every shipped model, and the hash of every shipped recipe, as text.
Checkpoints and runs depend on all of them.

After an intended change ``python tests/golden/test_golden.py`` rewrites the files; read the difference. A changed hash
means that runs which began with the recipe no longer match it: declare a new field with `config.added_later`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from portatrain.model.module import Constant, Definition, Module, describe
from portatrain.recipe import load_recipe, shipped_recipes
from recipes.models.class_token_vit import ClassTokenViTConfig
from recipes.models.decoder import DecoderConfig
from recipes.models.vit import ViTConfig

HERE = Path(__file__).parent

_DECODER = DecoderConfig(vocab=256, embed=64, layers=2, heads=4, kv_heads=2)
_VIT = ViTConfig(rows=8, columns=8, channels=1, patch=2, classes=10, embed=32, layers=2, heads=4)

MODELS: dict[str, Callable[[], Module]] = {
    "decoder": _DECODER.build,
    "decoder-untied-qk-norm": replace(_DECODER, tied=False, qk_norm=True).build,
    "vit": _VIT.build,
    "class-token-vit": ClassTokenViTConfig(
        rows=8, columns=8, channels=1, patch=2, classes=10, embed=32, layers=2, heads=4
    ).build,
    "tiny-lm": lambda: load_recipe("tiny-lm").model.build(),
    "tiny-siglip": lambda: load_recipe("tiny-siglip").model.build(),
    "tiny-dit": lambda: load_recipe("tiny-dit").model.build(),
    "tiny-vit": lambda: load_recipe("tiny-vit").model.build(),
    "llama3-8b": lambda: load_recipe("llama3-8b").model.build(),
    "llama3-1b": lambda: load_recipe("llama3-1b").model.build(),
}


def render(definition: Definition) -> str:
    """One line a tensor: role, name, axes with sizes, inputs, initial values."""
    lines = []
    for info in definition.tensors.values():
        axes = ", ".join(f"{axis}={size}" for axis, size in zip(info.axes, info.shape, strict=True))
        start = f"constant {info.init.value:g}" if isinstance(info.init, Constant) else f"normal {info.init.std:.6g}"
        lines.append(f"{info.role} {info.name} ({axes}) inputs={info.fan_in_axes} batch_dims={info.batch_dims} {start}")
    return "\n".join([*lines, f"{definition.parameters} parameters", ""])


def hashes() -> str:
    """Return one line for every shipped recipe: its name and the SHA-256 of the resolved recipe."""
    return "".join(f"{name} {load_recipe(name).sha256}\n" for name in sorted(shipped_recipes()))


def compare(path: Path, found: str) -> None:
    """Fail with the difference unless the file holds ``found``."""
    recorded = path.read_text(encoding="utf-8") if path.exists() else ""
    if found != recorded:
        lines = difflib.unified_diff(recorded.splitlines(), found.splitlines(), "recorded", "found", lineterm="")
        pytest.fail(
            f"{path.name} differs:\n" + "\n".join(lines) + "\nIf this is intended: python tests/golden/test_golden.py",
            pytrace=False,
        )


@pytest.mark.parametrize("name", MODELS)
def test_model_is_as_recorded(name: str) -> None:
    compare(HERE / f"model-{name}.txt", render(describe(MODELS[name]())))


def test_recipe_hash_is_pinned() -> None:
    compare(HERE / "recipe-hashes.txt", hashes())


if __name__ == "__main__":
    for name, make in MODELS.items():
        path = HERE / f"model-{name}.txt"
        path.write_text(render(describe(make())), encoding="utf-8")
        print(f"wrote {path}")
    (HERE / "recipe-hashes.txt").write_text(hashes(), encoding="utf-8")
