"""Pieces of shards on the local disk, under a budget of bytes; all processes of a host may share the folder.

Each piece is a file, written under another name and renamed. When a process has added SWEEP_PART of the budget, it
deletes the oldest pieces until KEEP of the budget is left. So up to 16 processes stay within the budget.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from pathlib import Path

SWEEP_PART = 1 / 64
KEEP = 3 / 4


class Cache:
    """Pieces by name, such as 'train-00003.tokens/17', in `folder`, at most `budget_bytes` of them."""

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        self._folder, self._budget = folder, budget_bytes
        self._added = budget_bytes  # what earlier processes left counts, too
        self._lock = threading.Lock()

    def get(self, name: str) -> bytes | None:
        """Return a piece, or None if it is not here."""
        try:
            return (self._folder / name).read_bytes()
        except OSError:
            return None

    def put(self, name: str, data: bytes) -> None:
        """Keep a piece. A disk that fails or is full only means that nothing is kept."""
        if len(data) > self._budget * SWEEP_PART:
            return
        path = self._folder / name
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with contextlib.suppress(OSError):
            with self._lock:
                self._added += len(data)
                full = self._added > self._budget * SWEEP_PART
                if full:
                    self._added = len(data)
            if full:
                self._sweep()
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(data)
                os.replace(temporary, path)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise

    def drop(self, name: str) -> None:
        """Forget a piece."""
        with contextlib.suppress(OSError):
            (self._folder / name).unlink()

    def _sweep(self) -> None:
        found = []
        for folder, _, names in os.walk(self._folder):
            for name in names:
                with contextlib.suppress(OSError):
                    about = os.stat(os.path.join(folder, name))
                    found.append((about.st_mtime, about.st_size, os.path.join(folder, name)))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._budget * KEEP:
                return
            with contextlib.suppress(OSError):
                os.unlink(path)
            total -= size
