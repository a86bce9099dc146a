"""Show how tensors are cut into tiles, what a reader on another mesh over-reads, and what small tiles cost.

    python -m benchmarks.checkpoint_tiles [--rounds 5] [--mib 128]

The first table is arithmetic and the same everywhere: for each shape its tile, and for splits of each axis into
k equal parts (those k that divide) the bytes read over the bytes wanted, worst over the parts. Batch axes are cut
to 1, so any split of them is exact; they are left out. The second table is measured, on a RAM disk where there is
one, and names its machine: cutting with checksums, saving and restoring beside a plain write and read of the same
bytes in the same round, as medians of ratios with their range.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from checkpoints_format import LocalStore, Reader, SaveLayout, Tensor, Want, Writer, commit, tile_shape
from checkpoints_format.dtypes import NUMPY, item_bytes

# Name, shape without batch axes, dtype: the matrices of models in use, and small ones.
SHAPES: list[tuple[str, tuple[int, ...], str]] = [
    ("Llama-3-8B wq", (4096, 32, 128), "float32"),
    ("Llama-3-8B wk", (4096, 8, 128), "float32"),
    ("Llama-3-8B w_up", (4096, 14336), "float32"),
    ("Llama-3-8B w_up", (4096, 14336), "bfloat16"),
    ("Llama-3-8B embed", (128256, 4096), "float32"),
    ("Llama-3-405B wq", (16384, 128, 128), "float32"),
    ("Llama-3-405B w_down", (53248, 16384), "float32"),
    ("DeepSeek-V3 expert", (7168, 2048), "bfloat16"),
    ("GPT-2 embed", (50257, 768), "float32"),
    ("1B wq", (2048, 32, 64), "float32"),
    ("1B wo", (2048, 2048), "bfloat16"),
    ("norm", (16384,), "float32"),
    ("ViT-S mlp", (384, 1536), "float32"),
    ("tiny", (256, 256), "float32"),
]
MEASURED = [SHAPES[i] for i in (0, 2, 3, 6, 9, 10, 13)]


def over_read(size: int, tile: int, ways: Iterable[int]) -> float:
    """Return the worst bytes read over bytes wanted along one axis, over all parts of all splits that divide it."""
    worst = 1.0
    for k in ways:
        if size % k == 0:
            part = size // k
            for i in range(k):
                first, last = i * part // tile, -(-(i + 1) * part // tile)
                worst = max(worst, (min(last * tile, size) - first * tile) / part)
    return worst


def over_read_table() -> list[str]:
    """Return the first table, one line a shape."""
    lines = [f"{'tensor':20} {'dtype':9} {'shape':>18} {'tile':>16} {'bytes':>8}  1-8 ways    9-32 ways (per axis)"]
    for name, shape, dtype in SHAPES:
        tile = tile_shape(shape, item_bytes(dtype))
        few, many = (
            [over_read(n, t, ways) for n, t in zip(shape, tile, strict=True)] for ways in (range(1, 9), range(9, 33))
        )
        lines.append(
            f"{name:20} {dtype:9} {'x'.join(map(str, shape)):>18} {'x'.join(map(str, tile)):>16} "
            f"{math.prod(tile) * item_bytes(dtype):8d}  {max(few):<10.3f}  {' '.join(f'{x:.3f}' for x in many)}"
        )
    return lines


def _timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _plain_write(path: Path, data: np.ndarray) -> None:
    view = data.reshape(-1).view(np.uint8).data
    fd = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    for at in range(0, len(view), 8 << 20):
        os.pwrite(fd, view[at : at + (8 << 20)], at)
    os.fsync(fd)
    os.close(fd)


def _plain_read(path: Path, out: np.ndarray) -> None:
    view = out.reshape(-1).view(np.uint8).data
    fd = os.open(path, os.O_RDONLY)
    for at in range(0, len(view), 8 << 20):
        os.preadv(fd, [view[at : at + (8 << 20)]], at)
    os.close(fd)


class _NoDisk(LocalStore):
    """Accept every byte and write none, so that only cutting and checking costs time."""

    def _write(self, fd: int, chunk: memoryview) -> None:
        pass


def measure(shape: tuple[int, ...], dtype: str, *, mib: int, rounds: int, folder: Path) -> dict[str, list[float]]:
    """Return, per round, cutting in GB/s, and save and restore over a plain write and read of the same bytes."""
    layers = max(1, (mib << 20) // (math.prod(shape) * item_bytes(dtype)))
    tensor = Tensor(name="w", dtype=dtype, shape=(layers, *shape), batch=1)
    layout = SaveLayout(tensors=(tensor,))
    array = (
        np.frombuffer(np.random.default_rng(0).bytes(tensor.nbytes), np.uint8).view(NUMPY[dtype]).reshape(tensor.shape)
    )
    out = np.ones_like(array)
    found: dict[str, list[float]] = {"cut": [], "save": [], "restore": []}

    def save(kind: type[LocalStore]) -> None:
        with kind(folder / "checkpoint", create=True) as store:
            Writer(store, layout, save="b").write({"w": array})
            if kind is LocalStore:
                commit(store, layout, save="b")

    def restore() -> None:
        with LocalStore(folder / "checkpoint") as store:
            Reader(store).read_many([Want("w", out=out)])

    for _ in range(rounds + 1):
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        cut = _timed(lambda: save(_NoDisk))
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        (folder / "plain").unlink(missing_ok=True)
        write = _timed(lambda: _plain_write(folder / "plain", array))
        saved = _timed(lambda: save(LocalStore))
        read = _timed(lambda: _plain_read(folder / "plain", out))
        restored = _timed(restore)
        for key, value in (("cut", array.nbytes / cut / 1e9), ("save", saved / write), ("restore", restored / read)):
            found[key].append(value)
    if out.tobytes() != array.tobytes():
        raise SystemExit(f"{shape} {dtype}: what came back is not what was saved")
    return {key: values[1:] for key, values in found.items()}  # the first round warms up


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=128, help="size of each tensor that is measured")
    parser.add_argument("--folder", type=Path, help="where to write; default a RAM disk, else the temporary folder")
    options = parser.parse_args()
    print("\n".join(over_read_table()))
    place = options.folder or (Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None)
    print(
        f"\n{os.cpu_count()}-core {platform.machine()}, {options.mib} MiB a tensor, {options.rounds} rounds: "
        "median (smallest to largest)"
    )
    print(f"{'tensor':20} {'dtype':9} {'tile bytes':>10}  cut + crc GB/s       save / write         restore / read")
    with tempfile.TemporaryDirectory(dir=place) as name:
        for title, shape, dtype in MEASURED:
            result = measure(shape, dtype, mib=options.mib, rounds=options.rounds, folder=Path(name))
            cells = [f"{statistics.median(v):5.2f} ({min(v):.2f} to {max(v):.2f})" for v in result.values()]
            tile = math.prod(tile_shape(shape, item_bytes(dtype))) * item_bytes(dtype)
            print(f"{title:20} {dtype:9} {tile:10d}  {'  '.join(f'{cell:20}' for cell in cells)}", flush=True)


if __name__ == "__main__":
    main()
