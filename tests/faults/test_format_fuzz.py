"""Random damage and random malice: a FormatError or the right answer, never another exception, never a bomb."""

from __future__ import annotations

import copy
import json
import random
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

import checkpoints_format
from checkpoints_format import FormatError, LocalStore, Reader
from checkpoints_format.attacks.roots import ROOT, seal

GOLDEN = Path(checkpoints_format.__file__).parent / "vectors" / "v1-mesh"
NASTY: list[Any] = [
    0,
    1,
    -1,
    2,
    3,
    7,
    63,
    64,
    255,
    1 << 20,
    1 << 31,
    1 << 40,
    (1 << 62) - 1,
    1 << 62,
    1 << 64,
    1.5,
    1e300,
    True,
    False,
    None,
    "",
    "a",
    "..",
    "/",
    "params/w",
    "fsdp",
    "float32",
    "int4",
    "\n",
    "x" * 600,
    [],
    [0],
    [[]],
    [0, [0], [1]],
    {},
    {"a": 1},
    ["fsdp"],
    ["fsdp", "fsdp"],
]


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every node below the root."""
    found = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found.append((*path, key))
        found += _places(item, (*path, key))
    return found


def _mutated(root: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """The root with one to three nodes replaced, removed, doubled or exchanged for another of its nodes."""
    root = copy.deepcopy(root)
    for _ in range(draw.randint(1, 3)):
        places = _places(root)
        path = draw.choice(places)
        at: Any = root
        for key in path[:-1]:
            at = at[key]
        kind, last = draw.randrange(5), path[-1]
        if kind == 0:
            del at[last]
        elif kind == 1 and isinstance(at, list):
            at.insert(draw.randint(0, len(at)), copy.deepcopy(at[last]))
        elif kind == 2 and type(at[last]) is int:
            at[last] += draw.choice((-1, 1, 1 << draw.randrange(60)))
        elif kind == 3:
            other: Any = root
            for key in draw.choice(places):
                other = other[key]
            at[last] = copy.deepcopy(other)
        else:
            at[last] = copy.deepcopy(draw.choice(NASTY))
    return root


def _survives(folder: Path) -> bool:
    """Use the checkpoint in every way; True if it is taken for good."""
    try:
        with LocalStore(folder) as store:
            reader = Reader(store)
            for name in reader.names:
                reader.read(name)
            reader.verify_all()
    except FormatError:
        return False
    return True


def _fuzz_roots(folder: Path, seeds: range) -> int:
    root = json.loads((GOLDEN / ROOT).read_bytes())
    good = 0
    tracemalloc.start()
    try:
        for seed in seeds:
            value = _mutated(root, random.Random(seed))
            seal(folder, json.dumps(value, separators=(",", ":")).encode())
            good += _survives(folder)
        assert tracemalloc.get_traced_memory()[1] < 256 << 20
    finally:
        tracemalloc.stop()
    return good


def _fuzz_bytes(folder: Path, seeds: range) -> int:
    """Splice, repeat and overwrite pieces of any file, checksums left as they were."""
    good = 0
    names = sorted(path.name for path in GOLDEN.iterdir() if not path.name.startswith("receipt"))
    for seed in seeds:
        draw = random.Random(seed)
        name = draw.choice(names)
        before = (GOLDEN / name).read_bytes()
        data = bytearray(before)
        for _ in range(draw.randint(1, 4)):
            at, n = draw.randrange(len(data) or 1), draw.randint(1, 40)
            kind = draw.randrange(4)
            if kind == 0:
                del data[at : at + n]
            elif kind == 1:
                data[at:at] = draw.randbytes(n)
            elif kind == 2:
                data[at : at + n] = draw.randbytes(n)
            else:
                data[at : at + n] = data[at // 2 : at // 2 + n]
        (folder / name).write_bytes(data)
        survived = _survives(folder)
        assert not survived or bytes(data) == before, (seed, name)
        good += survived
        (folder / name).write_bytes(before)
    return good


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "checkpoint"))


def test_roots(folder: Path) -> None:
    good = _fuzz_roots(folder, range(800))
    assert good < 400, "most changes are refused; what is not is data that no file depends on, such as meta and roles"


def test_bytes(folder: Path) -> None:
    _fuzz_bytes(folder, range(500))


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_many(folder: Path) -> None:
    _fuzz_roots(folder, range(1000, 61_000))
    shutil.copytree(GOLDEN, folder, dirs_exist_ok=True)
    _fuzz_bytes(folder, range(1000, 41_000))
