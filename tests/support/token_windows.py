"""Windows over a few documents of bytes."""

from __future__ import annotations

import numpy as np

from portatrain.data.corpus import Stream
from portatrain.data.text_batches import Windows


def stream(documents: list[bytes], bos: int = 0) -> Stream:
    opened = [bytes([bos]) + d for d in documents]
    return Stream(
        tokens=np.frombuffer(b"".join(opened), np.uint8),
        starts=np.cumsum([0, *map(len, opened[:-1])]),
        vocab=256,
        bos=bos,
        bytes=sum(map(len, documents)),
        fingerprint="test",
    )


def windows(documents: list[bytes], seq_len: int, *, permuted: bool = False, seed: int = 0) -> Windows:
    name = "train" if permuted else "validation"
    return Windows(stream(documents), name=name, seq_len=seq_len, seed=seed, permuted=permuted, order=f"data/{name}")
