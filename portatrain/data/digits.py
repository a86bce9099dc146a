"""The handwritten digits of scikit-learn (UCI, "Optical recognition of handwritten digits", 1998)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from portatrain.data import pack as packs
from portatrain.data.corpus import SPLITS, identity
from portatrain.data.spec import Digits
from portatrain.data.split import Batch, Order, Split, samples
from portatrain.errors import UserError
from portatrain.model import rng


class Images(Split):
    """Images and labels.

    The arrays of a batch: ``image`` (B, 8, 8, 1) float32 in [0, 1]; ``label`` (B,) int32; ``mask`` (B,) float32, 1 for
    an image and 0 for padding; ``sample`` (B,) int64.
    """

    def __init__(self, pack: packs.Pack, name: str, seed: int, *, permuted: bool) -> None:
        self.name, self.fingerprint = name, pack.fingerprints[name]
        self._labels = pack.arrays[f"{name}-labels"]
        self.windows = len(self._labels)
        self._pixels = pack.arrays[f"{name}-pixels"].reshape(self.windows, 8, 8, 1)
        self._order = Order(self.windows, seed, f"data/{name}", permuted=permuted)

    def batch(self, start: int, count: int) -> Batch:
        sample = samples(start, count)
        at = self._order(sample)
        return {
            "image": self._pixels[at].astype(np.float32) / np.float32(16),
            "label": self._labels[at].astype(np.int32),
            "mask": np.ones(count, np.float32),
            "sample": sample,
        }

    def window_of(self, sample: int) -> int:
        """Return which image of the split the sample of that number is."""
        return int(self._order(np.array([sample]))[0])

    def blank(self, count: int) -> Batch:
        return blank(count)


def blank(count: int) -> Batch:
    """Return ``count`` padding rows, as `Split.blank` does."""
    return {
        "image": np.zeros((count, 8, 8, 1), np.float32),
        "label": np.zeros(count, np.int32),
        "mask": np.zeros(count, np.float32),
        "sample": np.full(count, -1, np.int64),
    }


def open_digits(spec: Digits, seed: int, pack_dir: Path | None) -> dict[str, Split]:
    """Return the splits of the digits, by name. Raises UserError if scikit-learn is not installed."""
    pack = packs.make(identity(spec), SPLITS, lambda writer: _produce(spec, writer), pack_dir)
    return {
        name: Images(pack, name, seed, permuted=name == "train")
        for name in SPLITS
        if len(pack.arrays[f"{name}-labels"])
    }


def held_out(images: int, spec: Digits) -> np.ndarray:
    """Return (images,) bool, True for the images of the validation split."""
    drawn = rng.words(0, "data/split/digits", 0, images) >> np.uint64(11)
    return drawn.astype(np.float64) * 2.0**-53 < spec.validation


def _produce(spec: Digits, writer: packs.Writer) -> packs.Meta:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            "data source digits",
            expected="the package scikit-learn, which has the images",
            got="none",
            do="Run: pip install 'portatrain[data]'",
        ) from error
    pixels, labels = load_digits(return_X_y=True)  # (1797, 64) float64 of whole numbers 0..16
    held = held_out(len(labels), spec)
    for name, mine in zip(SPLITS, (~held, held), strict=True):
        if not mine.any() and (name == "train" or spec.validation):
            raise UserError(
                "Digits validation",
                expected="a fraction that leaves images in both splits",
                got=f"{spec.validation}, which leaves none in {name}",
                do="Set it to about 0.2.",
            )
        for array, values in (("pixels", pixels[mine].ravel()), ("labels", labels[mine])):
            writer.whole(f"{name}-{array}", values.astype(np.uint8))
    return {"meaning": {"classes": 10}}
