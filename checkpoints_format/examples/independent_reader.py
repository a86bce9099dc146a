"""Read a checkpoint with nothing but SPEC.md, NumPy and the standard library: python independent_reader.py DIR

It shares no code with the package, so that each can find the other's mistakes. It reads whole tensors in one process,
for clarity before speed. dtypes that NumPy lacks become raw bytes: (shape..., item bytes) uint8.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np

WIDTH = {"bool": 1, "bfloat16": 2, "complex64": 8, "complex128": 16}
WIDTH |= {f"{kind}int{bits}": bits // 8 for kind in ("", "u") for bits in (8, 16, 32, 64)}
WIDTH |= {f"float{bits}": bits // 8 for bits in (16, 32, 64)}
for kind in ("e4m3fn", "e5m2", "e8m0fnu", "e4m3", "e3m4", "e4m3fnuz", "e5m2fnuz", "e4m3b11fnuz"):
    WIDTH[f"float8_{kind}"] = 1


TABLE = list(range(256))
for _ in range(8):
    TABLE = [n >> 1 ^ (0x82F63B78 if n & 1 else 0) for n in TABLE]


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def need(ok: bool, message: str) -> None:
    if not ok:
        raise SystemExit(f"refused: {message}")


def load_root(folder: Path) -> dict:
    commit = json.loads((folder / "COMMIT").read_bytes())
    need(commit["format"] == "portatrain-checkpoint" and commit["version"] == 1, "not version 1")
    name = f"root-{commit['save']}.json"
    need(commit["root"] == name and "/" not in name, "COMMIT names another root")
    text = (folder / name).read_bytes()
    need(len(text) == commit["length"], "root has another length")
    need(hashlib.sha256(text).hexdigest() == commit["sha256"], "root differs")
    root = json.loads(text)
    need(not root["features"] and root["save"] == commit["save"], "unknown feature or save")
    return root


def boxes_by_writer(root: dict, number: int) -> list[list[tuple]]:
    """Return, for each writer in order, (offset, shape, share or None, shares) of tensor ``number``."""
    tensor, writers = root["tensors"][number], root["writers"]
    found: list[list[tuple]] = [[] for _ in range(writers)]
    if "boxes" in tensor:
        for writer, offset, shape in tensor["boxes"]:
            found[writer].append((offset, shape, 0, 1))
        return found
    mesh = root["meshes"][tensor["mesh"]]
    names, sizes = [a for a, _ in mesh["axes"]], [n for _, n in mesh["axes"]]
    used = [axis for axes in tensor["spec"] for axis in axes]
    for position, coordinates in enumerate(itertools.product(*map(range, sizes))):
        at, size = dict(zip(names, coordinates, strict=True)), dict(zip(names, sizes, strict=True))
        offset, shape = [], []
        for n, axes in zip(tensor["shape"], tensor["spec"], strict=True):
            parts, part = 1, 0
            for axis in axes:
                parts, part = parts * size[axis], part * size[axis] + at[axis]
            need(n % parts == 0, f"{tensor['name']} does not divide")
            offset.append(part * (n // parts))
            shape.append(n // parts)
        replicas, replica = 1, 0
        for axis in names:
            if axis not in used:
                replicas, replica = replicas * size[axis], replica * size[axis] + at[axis]
        nbytes = math.prod(shape) * WIDTH[tensor["dtype"]]
        shares = max(1, min(replicas, nbytes // root["share_bytes"]))
        writer = mesh["writers"][position] if "writers" in mesh else position * writers // math.prod(sizes)
        for i in range(shares):
            if (number + i * (replicas // shares)) % replicas == replica:
                found[writer].append((offset, shape, i, shares))
    return found


def tiles_of(offset: list[int], shape: list[int], tile: list[int]) -> list[tuple[slice, ...]]:
    """Return the tiles of a box in order, as slices of the global tensor."""
    cuts = []
    for begin, n, t in zip(offset, shape, tile, strict=True):
        lines = [begin, *range(begin - begin % t + t, begin + n, t), begin + n]
        cuts.append([slice(a, b) for a, b in itertools.pairwise(lines) if b > a])
    return list(itertools.product(*cuts))


def read(folder: Path) -> dict[str, np.ndarray]:
    """Return every tensor of the checkpoint in ``folder``."""
    root = load_root(folder)
    result = {t["name"]: np.empty((*t["shape"], WIDTH[t["dtype"]]), np.uint8) for t in root["tensors"]}
    written = {t["name"]: np.zeros(t["shape"], np.uint8) for t in root["tensors"]}
    assigned = [boxes_by_writer(root, number) for number in range(len(root["tensors"]))]
    for writer in range(root["writers"]):
        packs: list[list[tuple]] = []  # for each pack its tiles: (name, where, offset in data, bytes)
        at = 0
        for number, tensor in enumerate(root["tensors"]):
            for offset, shape, share, shares in assigned[number][writer]:
                tiles = tiles_of(offset, shape, tensor["tile"])
                run = tiles[share * len(tiles) // shares : (share + 1) * len(tiles) // shares]
                sizes = [math.prod(s.stop - s.start for s in tile) * WIDTH[tensor["dtype"]] for tile in run]
                align, fresh = 4096 if sum(sizes) >= 4096 else 64, True
                for tile, nbytes in zip(run, sizes, strict=True):
                    begin = at + -at % align if fresh else at
                    if not packs or begin + nbytes > root["pack_bytes"] or len(packs[-1]) == 1 << 22:
                        packs.append([])
                        begin = 0
                    packs[-1].append((tensor["name"], tile, begin, nbytes))
                    at, fresh = begin + nbytes, False
        need(len(packs) == len(root["packs"][writer]), f"writer {writer} has another number of packs")
        for number, (pack, record) in enumerate(zip(packs, root["packs"][writer], strict=True)):
            length, data_begin, header_crc, table_crc = record
            file = f"pack-{root['save']}-{writer:05d}-{number:04d}.safetensors"
            data = (folder / file).read_bytes()
            need(len(data) == length and crc32c(data[:data_begin]) == header_crc, f"{file}: length or header")
            table = data[-4 * len(pack) :]
            need(crc32c(table) == table_crc, f"{file}: table")
            for crc, (name, where, begin, nbytes) in zip(np.frombuffer(table, "<u4"), pack, strict=True):
                values = data[data_begin + begin : data_begin + begin + nbytes]
                need(crc32c(values) == crc, f"{file}: {name}")
                target = result[name][where]
                target[...] = np.frombuffer(values, np.uint8).reshape(target.shape)
                written[name][where] += 1
    need(all((count == 1).all() for count in written.values()), "a tensor is not covered exactly")
    for tensor in root["tensors"]:
        if hasattr(np, tensor["dtype"]):
            result[tensor["name"]] = result[tensor["name"]].view(tensor["dtype"])[..., 0]
    return result


if __name__ == "__main__":
    for key, value in read(Path(sys.argv[1])).items():
        print(key, value.dtype, value.shape, hashlib.sha256(value.tobytes()).hexdigest()[:16])
