"""The golden checkpoints: made again byte for byte, read by the package, by a stranger, by safetensors."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import checkpoints_format
from checkpoints_format import LocalStore, Reader
from checkpoints_format.vectors import make

FOLDER = Path(checkpoints_format.__file__).parent
VECTORS = FOLDER / "vectors"
EXPECTED: dict[str, dict[str, str]] = json.loads((VECTORS / "expected.json").read_text())


def _independent_reader() -> ModuleType:
    path = FOLDER / "examples" / "independent_reader.py"
    spec = importlib.util.spec_from_file_location("independent_reader", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _sha(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def test_made_again_byte_for_byte(tmp_path: Path) -> None:
    make.make(tmp_path)
    made = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    kept = sorted(
        p.relative_to(VECTORS)
        for p in VECTORS.rglob("*")
        if p.is_file() and p.suffix != ".py" and "__pycache__" not in p.parts
    )
    assert made == kept
    for path in made:
        assert (tmp_path / path).read_bytes() == (VECTORS / path).read_bytes(), path


@pytest.mark.parametrize("vector", EXPECTED)
def test_package_reads_them(vector: str) -> None:
    with LocalStore(VECTORS / vector) as store:
        reader = Reader(store)
        assert reader.verify_all() == sum(t.nbytes for t in reader.layout.tensors)
        assert {name: _sha(reader.read(name)) for name in reader.names} == EXPECTED[vector]
        assert reader.meta == {"step": 12, "loss": 2.5, "rng": {"seed": 7}}


@pytest.mark.parametrize("vector", EXPECTED)
def test_a_stranger_reads_them(vector: str) -> None:
    found = _independent_reader().read(VECTORS / vector)
    assert {name: _sha(array) for name, array in found.items()} == EXPECTED[vector]


def test_the_stranger_is_short_and_imports_nothing_of_ours() -> None:
    text = (FOLDER / "examples" / "independent_reader.py").read_text()
    assert len(text.splitlines()) < 150
    imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE))
    assert imported == {"__future__", "hashlib", "itertools", "json", "math", "sys", "pathlib", "numpy"}


def test_the_stranger_sees_damage(tmp_path: Path) -> None:
    read = _independent_reader().read
    for name in ("COMMIT", "root-golden-1.json", "pack-golden-1-00001-0000.safetensors"):
        folder = tmp_path / name
        folder.mkdir()
        for file in (VECTORS / "v1-mesh").iterdir():
            data = bytearray(file.read_bytes())
            if file.name == name:
                data[-3] ^= 4
            (folder / file.name).write_bytes(data)
        with pytest.raises((SystemExit, FileNotFoundError)):
            read(folder)


@pytest.mark.parametrize("vector", EXPECTED)
def test_safetensors_opens_every_pack(vector: str) -> None:
    safetensors = pytest.importorskip("safetensors")
    layout = make.VECTORS[vector]()
    seen: set[str] = set()
    for path in (VECTORS / vector).glob("*.safetensors"):
        with safetensors.safe_open(path, "numpy") as file:
            assert file.metadata()["format"] == "portatrain-checkpoint"
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                name, at, rest = key.partition("@")
                if not at:
                    assert re.fullmatch(r"__pad\d+__|__crc32c__", key)
                    continue
                seen.add(name)
                tensor = layout.tensor(name)
                # A tensor that is one tile in one box reads as itself, with no help from us.
                if rest == f"{','.join('0' * len(tensor.shape))}:{','.join(map(str, tensor.shape))}#0-1" and (
                    tensor.dtype in ("float32", "int32", "float64", "uint8")
                ):
                    assert np.array_equal(file.get_tensor(key), make.values(tensor), equal_nan=True)
    assert seen == {t.name for t in layout.tensors if t.nbytes}


def _conforms(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """The part of JSON Schema that schema.json uses."""
    if "$ref" in schema:
        return _conforms(value, root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root)
    if "oneOf" in schema:
        return sum(_conforms(value, option, root) for option in schema["oneOf"]) == 1
    if "const" in schema or "enum" in schema:
        return value in schema.get("enum", [schema.get("const")])
    kind = {"object": dict, "array": list, "string": str, "integer": int}[schema["type"]]
    if type(value) is not kind:
        return False
    if kind is dict:
        known = schema.get("properties")
        if known is None:
            return True
        return set(schema["required"]) <= set(value) <= set(known) and all(
            _conforms(v, known[k], root) for k, v in value.items()
        )
    if kind is list:
        return schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 1 << 60) and all(
            _conforms(v, schema["items"], root) for v in value if "items" in schema
        )
    if kind is str:
        return len(value) <= schema.get("maxLength", 1 << 20) and bool(re.search(schema.get("pattern", ""), value))
    return schema.get("minimum", 0) <= value <= schema.get("maximum", 1 << 62)


@pytest.mark.parametrize("vector", EXPECTED)
def test_schema(vector: str) -> None:
    schema = json.loads((FOLDER / "schema.json").read_text())
    for path in (VECTORS / vector).iterdir():
        if path.suffix == ".json" or path.name == "COMMIT":
            value = json.loads(path.read_bytes())
            assert _conforms(value, schema, schema), path.name
            for key in value:
                assert not _conforms({k: v for k, v in value.items() if k != key}, schema, schema), (path.name, key)
            assert not _conforms(value | {"extra": 1}, schema, schema)


def test_spec_fits_two_screens() -> None:
    lines = (FOLDER / "SPEC.md").read_text().splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 130
