"""Measure how fast initial weights are drawn: million values a second, best of five, by shape of the box.

Run: python benchmarks/init_speed.py [--threads N]
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from portatrain.model.rng import Permutation, truncated_normal

CASES = [
    # what, logical shape, offset, box
    ("whole tensor", (4096, 4096), (0, 0), (4096, 4096)),
    ("rows", (65536, 4096), (60000, 0), (4096, 4096)),
    ("half of the columns", (8192, 4096), (0, 2048), (8192, 2048)),
    ("1 column of 8", (1 << 20, 8), (0, 3), (1 << 20, 1)),
    ("1 column of 4096", (1 << 18, 4096), (0, 5), (1 << 18, 1)),
    ("8 columns of 4096", (1 << 18, 4096), (0, 5), (1 << 18, 8)),
    ("128 columns of 4096", (1 << 15, 4096), (0, 512), (1 << 15, 128)),
    ("512 columns of 4096", (1 << 13, 4096), (0, 512), (1 << 13, 512)),
    ("4 heads of 32, stacked", (32, 4096, 32, 128), (0, 0, 8, 0), (32, 256, 4, 128)),
    ("corner of 2^60 values", (1 << 30, 1 << 30), ((1 << 30) - 2048,) * 2, (2048, 2048)),
]


def seconds(run: Callable[[], object], rounds: int = 5) -> float:
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    print(f"NumPy {np.__version__}, {platform.machine()}, threads={threads}")
    print(f"{'box':26}{'values':>12}{'M values/s':>12}")
    for what, shape, offset, box in CASES:
        spent = seconds(partial(truncated_normal, 0, "bench", shape, std=0.02, offset=offset, box=box, threads=threads))
        size = int(np.prod(box))
        print(f"{what:26}{size:>12,}{size / spent / 1e6:>12.1f}")
    index = np.arange(1 << 18)
    spent = seconds(lambda: Permutation(10**15, 0, "bench")(index))
    print(f"{'permutation of 10^15':26}{len(index):>12,}{len(index) / spent / 1e6:>12.1f}")


if __name__ == "__main__":
    main()
