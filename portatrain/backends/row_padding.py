"""Pad batches so that the devices of a mesh divide their rows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def pad_rows(batch: Mapping[str, np.ndarray], multiple: int) -> Mapping[str, np.ndarray]:
    """Return `batch` with its last row repeated until `multiple` divides the number of rows."""
    more = -next(iter(batch.values())).shape[0] % multiple
    return {k: np.concatenate([v, np.repeat(v[-1:], more, axis=0)]) for k, v in batch.items()} if more else batch
