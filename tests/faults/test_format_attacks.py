"""Every attack of checkpoints_format/attacks is refused: with the file named, quickly, in little memory."""

from __future__ import annotations

import random
import re
import shutil
import time
import tracemalloc
from pathlib import Path

import pytest

import checkpoints_format
from checkpoints_format import FormatError, LocalStore, Reader
from checkpoints_format.attacks.files import ATTACKS
from checkpoints_format.attacks.roots import COMMITS, ROOT, ROOTS, change_root, seal

GOLDEN = Path(checkpoints_format.__file__).parent / "vectors" / "v1-mesh"
PACKS = sorted(path.name for path in GOLDEN.glob("*.safetensors"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "checkpoint"))


def _use(folder: Path) -> None:
    """All that a user may do with a checkpoint."""
    with LocalStore(folder) as store:
        reader = Reader(store)
        for name in reader.names:
            reader.read(name)
        reader.verify_all()


def _refused(folder: Path, message: str, *, bytes_: int = 300 << 20, seconds: float = 30) -> str:
    tracemalloc.start()
    began = time.perf_counter()
    try:
        with pytest.raises(FormatError) as caught:
            _use(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    text = str(caught.value)
    assert re.search(message, text), text
    assert len(text) < 1500 and "\n" not in text
    assert peak < bytes_ and time.perf_counter() - began < seconds
    return text


def test_the_golden_one_is_good(folder: Path) -> None:
    _use(folder)


@pytest.mark.parametrize("attack", ATTACKS)
def test_files(attack: str, folder: Path) -> None:
    spoil, message = ATTACKS[attack]
    spoil(folder)
    _refused(folder, message, bytes_=4 << 20, seconds=5)


@pytest.mark.parametrize("attack", ROOTS)
def test_roots(attack: str, folder: Path) -> None:
    change, message = ROOTS[attack]
    change_root(folder, change)
    text = _refused(folder, message)
    assert ROOT in text or any(pack in text for pack in PACKS)


@pytest.mark.parametrize("attack", COMMITS)
def test_commits(attack: str, folder: Path) -> None:
    fields, message = COMMITS[attack]
    seal(folder, (folder / ROOT).read_bytes(), **fields)
    _refused(folder, message, bytes_=4 << 20, seconds=5)


def _flips() -> list[tuple[str, int]]:
    """Each bit of COMMIT, and some of the root and of every pack."""
    draw = random.Random(0)
    chosen = [("COMMIT", bit) for bit in range(8 * (GOLDEN / "COMMIT").stat().st_size)]
    chosen += [(ROOT, draw.randrange(8 * (GOLDEN / ROOT).stat().st_size)) for _ in range(100)]
    for pack in PACKS:
        chosen += [(pack, draw.randrange(8 * (GOLDEN / pack).stat().st_size)) for _ in range(40)]
    return chosen


def _all_flips(of: str) -> list[tuple[str, int]]:
    """Every bit of COMMIT, of the root, of a pack's header; or, of all files, 10,000 at random."""
    sizes = {name: (GOLDEN / name).stat().st_size for name in ("COMMIT", ROOT, *PACKS)}
    if of in sizes:
        return [(of, bit) for bit in range(8 * min(sizes[of], 4096 if of in PACKS else sizes[of]))]
    draw = random.Random(1)
    names = [draw.choice(list(sizes)) for _ in range(10_000)]
    return [(name, draw.randrange(8 * sizes[name])) for name in names]


def _flip_each(folder: Path, flips: list[tuple[str, int]]) -> None:
    """Flip one bit, expect a refusal that names the file, flip it back."""
    good = {name: (folder / name).read_bytes() for name in ("COMMIT", ROOT, *PACKS)}
    for name, bit in flips:
        data = bytearray(good[name])
        data[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(data)
        with LocalStore(folder) as store, pytest.raises(FormatError) as caught:
            Reader(store).verify_all()
        # A COMMIT that names another root sends the reader there: then that name is what is missing.
        assert name in str(caught.value) or (name == "COMMIT" and "root-" in str(caught.value)), (name, bit)
        (folder / name).write_bytes(good[name])


def test_single_bits(folder: Path) -> None:
    _flip_each(folder, _flips())


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("of", ["COMMIT", ROOT, *PACKS, "random"])
def test_every_single_bit(of: str, folder: Path) -> None:
    _flip_each(folder, _all_flips(of))


@pytest.mark.parametrize("name", ["COMMIT", ROOT, *PACKS])
def test_every_truncation(name: str, folder: Path) -> None:
    good = (folder / name).read_bytes()
    step = 1 if len(good) < 2000 else 97
    for length in [*range(0, len(good), step), len(good) - 1]:
        (folder / name).write_bytes(good[:length])
        with LocalStore(folder) as store, pytest.raises(FormatError, match=name):
            Reader(store).verify_all()


def test_a_flip_never_changes_a_value_silently(folder: Path) -> None:
    """Reading alone, without verify: refused, or the flip was where no value is and the values are right."""
    with LocalStore(folder) as store:
        reader = Reader(store)
        right = {name: reader.read(name).tobytes() for name in reader.names}
    draw = random.Random(2)
    for _ in range(120):
        path = folder / draw.choice(PACKS)
        good = path.read_bytes()
        data = bytearray(good)
        at = draw.randrange(len(data))
        data[at] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        try:
            with LocalStore(folder) as store:
                reader = Reader(store)
                assert {name: reader.read(name).tobytes() for name in reader.names} == right
        except FormatError as error:
            assert path.name in str(error) and "tensor" in str(error)
        path.write_bytes(good)


def test_problems_lists_every_damaged_file(folder: Path) -> None:
    for name in PACKS[:3]:
        data = bytearray((folder / name).read_bytes())
        data[4096] ^= 1
        (folder / name).write_bytes(data)
    with LocalStore(folder) as store:
        found = [str(problem) for problem in Reader(store).problems()]
    assert len(found) == 3 and all(name in text for name, text in zip(PACKS[:3], found, strict=True))
