"""Attack the root: hostile text under a valid COMMIT, which no checksum can detect, so that the parser must refuse it.

Each attack changes the root of the golden vector ``v1-mesh``: a function from the parsed root to another value, or to
the text itself. The text beside it is a pattern for the message that the reader must give.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = "root-golden-1.json"
Change = Callable[[dict[str, Any]], dict[str, Any] | bytes]


def seal(folder: Path, text: bytes, **fields: Any) -> None:
    """Write a root, and a COMMIT that vouches for it."""
    (folder / ROOT).write_bytes(text)
    commit = json.loads((folder / "COMMIT").read_bytes())
    commit |= {"length": len(text), "sha256": hashlib.sha256(text).hexdigest()} | fields
    (folder / "COMMIT").write_bytes(json.dumps(commit, separators=(",", ":")).encode())


def change_root(folder: Path, change: Change) -> None:
    """Apply a change to the root and seal the result."""
    changed = change(json.loads((folder / ROOT).read_bytes()))
    text = changed if isinstance(changed, bytes) else json.dumps(changed, separators=(",", ":")).encode()
    seal(folder, text)


def _put(value: Any, *path: str | int) -> Change:
    """Put ``value`` at a path of keys and indices."""

    def change(root: dict[str, Any]) -> dict[str, Any]:
        at: Any = root
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        return root

    return change


def _without(*path: str | int) -> Change:
    def change(root: dict[str, Any]) -> dict[str, Any]:
        at: Any = root
        for key in path[:-1]:
            at = at[key]
        del at[path[-1]]
        return root

    return change


def _text(old: bytes, new: bytes) -> Change:
    """Replace a part of the text itself, to write what JSON values cannot express."""

    def change(root: dict[str, Any]) -> bytes:
        text = json.dumps(root, separators=(",", ":")).encode()
        assert old in text
        return text.replace(old, new, 1)

    return change


def _one_tensor(**fields: Any) -> Change:
    """Return a root with one writer and one tensor, with these fields changed."""

    def change(root: dict[str, Any]) -> dict[str, Any]:
        tensor = {
            "name": "w",
            "role": "params",
            "dtype": "int8",
            "shape": [8],
            "axes": [],
            "tile": [8],
            "mesh": 0,
            "spec": [[]],
        }
        tensor |= {k: v for k, v in fields.items() if k in tensor or k == "boxes"}
        if "boxes" in fields:
            del tensor["mesh"], tensor["spec"]
        over = {k: v for k, v in fields.items() if k in root}
        base = {"writers": 1, "meshes": [{"axes": [["writer", 1]]}], "packs": [[[4172, 4096, 0, 0]]]}
        return root | base | {"tensors": [tensor]} | over

    return change


def _comb(n: int) -> list[list[Any]]:
    """Return boxes whose volumes add up to the tensor, but which cross one another n^2 times."""
    rows = [[0, [i, 0], [1, n]] for i in range(n // 2)]
    return rows + [[0, [0, i], [n, 1]] for i in range(n // 2)]


_DEEP = 100_000
ROOTS: dict[str, tuple[Change, str]] = {
    "not JSON": (lambda root: b"{", "JSON"),
    "not an object": (lambda root: b"[]", "JSON object"),
    "not text": (lambda root: b"\xff" * 100, "JSON"),
    "deep": (lambda root: b"[" * _DEEP + b"]" * _DEEP, "deep|JSON"),
    "deep meta": (_text(b'"meta":{', b'"meta":{"a":' + b"[" * 500 + b"]" * 500 + b","), "deep"),
    "millions of lists": (lambda root: b"[" + b"[]," * (4 << 20) + b"[]]", "at most .* lists"),
    "millions of items": (lambda root: b"[" + b"0," * (8 << 20) + b"0]", "at most .* items"),
    "number of 10000 digits": (_text(b'"writers":4', b'"writers":4' + b"0" * 10_000), "digits"),
    "duplicate key": (_text(b'"writers":4', b'"writers":4,"writers":5'), "duplicate key"),
    "duplicate key in meta": (_text(b'"step":12', b'"step":12,"step":13'), "duplicate key"),
    "NaN": (_text(b'"loss":2.5', b'"loss":NaN'), "NaN"),
    "infinity": (_text(b'"loss":2.5', b'"loss":1e999'), "float64"),
    "other format": (_put("zip", "format"), "portatrain-checkpoint"),
    "newer version": (_put(2, "version"), "version.*expected 1, got 2"),
    "unknown feature": (_put(["compressed"], "features"), "features.*compressed.*newer version"),
    "another save": (_put("other", "save"), "save.*golden-1"),
    "field missing": (_without("share_bytes"), "share_bytes"),
    "field unknown": (_put(1, "extra"), "extra"),
    "tensor field missing": (_without("tensors", 0, "dtype"), "params/wide.*dtype"),
    "tensor field unknown": (_put(1, "tensors", 0, "pickle"), "params/wide.*pickle"),
    "bool for a number": (_put(True, "writers"), "writers.*int"),
    "float for a number": (_put(4.0, "writers"), "writers.*int"),
    "text for a number": (_put("4", "tensors", 0, "shape", 0), "params/wide"),
    "negative size": (_put(-24, "tensors", 0, "shape", 0), "params/wide"),
    "path as name": (_put("../../etc/passwd", "tensors", 0, "name"), "name of parts"),
    "absolute name": (_put("/etc/passwd", "tensors", 0, "name"), "name of parts"),
    "newline in name": (_put("params/w\n", "tensors", 0, "name"), "name of parts"),
    "long name": (_put("w" * 513, "tensors", 0, "name"), "name of parts"),
    "name twice": (_put("params/wide", "tensors", 1, "name"), "params/wide.*once"),
    "unknown dtype": (_put("object", "tensors", 0, "dtype"), "params/wide.*object"),
    "tile of zero": (_put(0, "tensors", 0, "tile", 0), "params/wide.*tile"),
    "tile of 1 GiB": (_one_tensor(shape=[1 << 30], tile=[1 << 30]), "'w'.*tile"),
    "no tile": (_put([], "tensors", 0, "tile"), "params/wide.*tile"),
    "2^62 elements": (_one_tensor(shape=[(1 << 62) - 1], tile=[8]), "'w'.*elements"),
    "2^50 tiles": (_one_tensor(shape=[1 << 50], tile=[1]), "packs of a writer.*at most 1|bytes"),
    "2^45 packs": (_one_tensor(shape=[1 << 45], tile=[1], pack_bytes=1), "packs of a writer.*at most 1"),
    "2^40 writers": (_put(1 << 40, "writers"), "writers"),
    "2^60 positions": (_put([["a", 1 << 30], ["b", 1 << 30]], "meshes", 0, "axes"), "mesh 0.*positions"),
    "axis of size zero": (_put([["replica", 0]], "meshes", 0, "axes"), "mesh 0"),
    "axis twice in a mesh": (_put([["fsdp", 2], ["fsdp", 2]], "meshes", 0, "axes"), "mesh 0"),
    "mesh that is not there": (_put(9, "tensors", 0, "mesh"), "params/wide.*mesh"),
    "axis twice in a spec": (_put([["fsdp"], ["fsdp"]], "tensors", 0, "spec"), "params/wide.*at most once"),
    "axis unknown": (_put([["a"], []], "tensors", 0, "spec"), "params/wide.*mesh axes"),
    "does not divide": (_put([25, 40], "tensors", 0, "shape"), "params/wide.*divisible"),
    "writer out of range": (_put([9, 1, 0, 2, 2, 0], "meshes", 1, "writers"), "mesh 1.*writers"),
    "hole": (_one_tensor(boxes=[[0, [0], [7]]]), "'w'.*8 elements.*7"),
    "overlap": (_one_tensor(boxes=[[0, [0], [4]], [0, [3], [4]]]), "'w'.*overlap"),
    "box outside": (_one_tensor(boxes=[[0, [4], [8]]]), "'w'.*inside"),
    "empty box": (_one_tensor(boxes=[[0, [0], [8]], [0, [0], [0]]]), "'w'.*non-empty"),
    "box of another rank": (_one_tensor(boxes=[[0, [0, 0], [8, 1]]]), "'w'.*inside"),
    "box of nobody": (_one_tensor(boxes=[[1, [0], [8]]]), "'w'.*writers from 0 to 0"),
    "crossing boxes": (_one_tensor(shape=[4000, 4000], tile=[1, 8], boxes=_comb(4000)), "'w'.*overlap|cover"),
    "too few packs": (_put([], "packs", 0), "packs of writer 0|packs of a writer|golden-1"),
    "too many packs": (lambda root: root | {"packs": [[*w, w[-1]] for w in root["packs"]]}, "packs of writer"),
    "packs of too few writers": (lambda root: root | {"packs": root["packs"][:3]}, "packs of 4 writers"),
    "length of a pack": (_put(1 << 61, "packs", 0, 0, 0), "00000-0000.*bytes by the layout"),
    "data before the file": (_put(0, "packs", 0, 0, 1), "packs as"),
    "data beyond the file": (_put(1 << 40, "packs", 0, 0, 1), "packs as"),
    "crc of a header": (_put(7, "packs", 0, 0, 2), "00000-0000.*header"),
    "crc of a table": (_put(7, "packs", 0, 0, 3), "00000-0000.*crc table"),
    "another dtype of the same size": (_put("float16", "tensors", 0, "dtype"), "header"),
    "another name": (_put("params/other", "tensors", 0, "name"), "header"),
    "two tensors exchanged": (
        lambda root: root | {"tensors": [root["tensors"][i] for i in (1, 0, 2, 3, 4, 5)]},
        "pack",
    ),
    "another pack size": (_put(600, "pack_bytes"), "packs of writer|bytes by the layout|packs of a writer"),
}
COMMITS: dict[str, tuple[dict[str, Any], str]] = {
    "root elsewhere": ({"root": "../../root-golden-1.json"}, "COMMIT, root"),
    "absolute root": ({"root": "/etc/passwd"}, "COMMIT, root"),
    "save with a path": ({"save": "../x", "root": "root-../x.json"}, "COMMIT, save"),
    "length of 2^60": ({"length": 1 << 60}, "COMMIT, length"),
    "negative length": ({"length": -1}, "COMMIT, length"),
    "upper-case hash": ({"sha256": "A" * 64}, "COMMIT, sha256"),
    "newer version": ({"version": 2}, "COMMIT, version.*got 2"),
    "field unknown": ({"extra": 1}, "COMMIT.*extra"),
}
