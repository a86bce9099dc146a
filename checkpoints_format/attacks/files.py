"""Attack the files of a checkpoint: damage, lose, exchange or replace them.

Each attack takes the folder of a valid checkpoint, a copy of the golden vector ``v1-mesh``, and spoils it. The text
beside an attack is a pattern for the message that the reader must give.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

Attack = Callable[[Path], None]
PACK, OTHER = "pack-golden-1-00000-0000.safetensors", "pack-golden-1-00001-0000.safetensors"
ROOT, COMMIT = "root-golden-1.json", "COMMIT"


def flip(name: str, at: int, bit: int = 0) -> Attack:
    """Flip one bit of byte ``at`` (from the end if negative)."""

    def attack(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[at] ^= 1 << bit
        (folder / name).write_bytes(data)

    return attack


def resize(name: str, change: int) -> Attack:
    """Cut off or append bytes; a cut never goes below an empty file."""

    def attack(folder: Path) -> None:
        size = (folder / name).stat().st_size
        os.truncate(folder / name, max(0, size + change))

    return attack


def delete(name: str) -> Attack:
    """Remove a file."""
    return lambda folder: (folder / name).unlink()


def swap(folder: Path) -> None:
    """Exchange two packs of different writers."""
    (folder / PACK).rename(folder / "between")
    (folder / OTHER).rename(folder / PACK)
    (folder / "between").rename(folder / OTHER)


def duplicate(name: str, onto: str) -> Attack:
    """Put a copy of one file in the place of another."""

    def attack(folder: Path) -> None:
        shutil.copyfile(folder / name, folder / onto)

    return attack


def swap_equal_length(folder: Path) -> None:
    """Exchange two packs that have the same length, so that only checksums can tell."""
    first, second = folder / PACK, folder / OTHER
    size = max(first.stat().st_size, second.stat().st_size)
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two[: len(one)].ljust(len(one), b"\0"))
    second.write_bytes(one[: len(two)].ljust(len(two), b"\0"))
    assert size >= len(one)


def link(name: str) -> Attack:
    """Replace a file by a symbolic link to the same bytes elsewhere."""

    def attack(folder: Path) -> None:
        outside = folder.parent / f"outside-{name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return attack


def pipe(name: str) -> Attack:
    """Replace a file by a named pipe, on which a careless reader waits forever."""

    def attack(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return attack


def sparse(name: str, size: int) -> Attack:
    """Make a file enormous without writing it."""
    return lambda folder: os.truncate(folder / name, size)


def folder_instead(name: str) -> Attack:
    """Replace a file by a folder."""

    def attack(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return attack


ATTACKS: dict[str, tuple[Attack, str]] = {
    "flip in header length": (flip(PACK, 0), f"{PACK}, header"),
    "flip in header": (flip(PACK, 300), f"{PACK}, header"),
    "flip in header padding": (flip(PACK, 4000), f"{PACK}, header"),
    "flip in value": (flip(PACK, 4096), f"{PACK}, tensor 'params/wide'"),
    "flip in crc table": (flip(PACK, -1), f"{PACK}.*crc table"),
    "flip in root": (flip(ROOT, 50), f"{ROOT}.*SHA-256"),
    "flip in COMMIT": (flip(COMMIT, 20), "COMMIT"),
    "last byte of pack": (resize(PACK, -1), f"{PACK}.*bytes"),
    "byte after pack": (resize(PACK, 1), f"{PACK}.*bytes"),
    "empty pack": (resize(PACK, -(1 << 30)), f"{PACK}.*bytes"),
    "last byte of root": (resize(ROOT, -1), f"{ROOT}.*bytes, as COMMIT says"),
    "byte after root": (resize(ROOT, 1), f"{ROOT}.*bytes, as COMMIT says"),
    "empty COMMIT": (resize(COMMIT, -(1 << 30)), "COMMIT.*JSON"),
    "no pack": (delete(PACK), f"{PACK}, tensor 'params/wide'.*no such file"),
    "no last pack": (delete("pack-golden-1-00003-0000.safetensors"), "pack-golden-1-00003-0000.*no such file"),
    "no root": (delete(ROOT), f"{ROOT}.*the file"),
    "no COMMIT": (delete(COMMIT), "COMMIT.*whole"),
    "packs swapped": (swap, f"{PACK}|{OTHER}"),
    "packs swapped at equal length": (swap_equal_length, f"{PACK}|{OTHER}"),
    "pack duplicated": (duplicate(PACK, OTHER), OTHER),
    "root is COMMIT": (duplicate(COMMIT, ROOT), f"{ROOT}.*as COMMIT says"),
    "COMMIT is root": (duplicate(ROOT, COMMIT), "COMMIT"),
    "pack is a link": (link(PACK), f"{PACK}.*symbolic link"),
    "COMMIT is a link": (link(COMMIT), "COMMIT.*symbolic link"),
    "pack is a pipe": (pipe(PACK), f"{PACK}.*regular file"),
    "COMMIT is a pipe": (pipe(COMMIT), "COMMIT.*regular file"),
    "root is a folder": (folder_instead(ROOT), f"{ROOT}.*regular file"),
    "COMMIT of 1 TiB": (sparse(COMMIT, 1 << 40), "COMMIT.*at most 4096 bytes"),
    "root of 1 TiB": (sparse(ROOT, 1 << 40), f"{ROOT}.*at most"),
    "pack of 1 TiB": (sparse(PACK, 1 << 40), f"{PACK}.*bytes"),
}
