"""Replace a checkpoint on disk by a changed one, committed and with valid checksums. The tests of mutants use it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_format import LocalStore, Reader, Writer, commit


def rewritten(path: Path, change: Callable[[dict[str, np.ndarray], dict[str, Any]], None]) -> None:
    """Replace the checkpoint in the folder `path`; `change` edits its tensors, by name, and its meta in place."""
    with LocalStore(path) as store:
        reader = Reader(store)
        layout, meta = reader.layout, json.loads(json.dumps(dict(reader.meta)))
        values = {t.name: reader.read(t.name) for t in layout.tensors}
    change(values, meta)
    shutil.rmtree(path)
    with LocalStore(path, create=True) as store:
        for writer in range(layout.writers):
            # Each takes its boxes out of the whole tensors.
            sources = {n: (lambda box, a=a: a[box.slices()]) for n, a in values.items()}
            Writer(store, layout, save="rewritten", writer=writer).write(sources)
        commit(store, layout, save="rewritten", meta=meta)
