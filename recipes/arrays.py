"""Samples from a .npz file of NumPy, such as images with labels, for models that read no texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from portatrain.data import DataSpec
from portatrain.errors import UserError
from portatrain.system.paths import expand

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class NpzFile(DataSpec):
    """The arrays of a .npz file: each has one row a sample, and a batch has their names as its keys."""

    path: str
    version: str = "1"
    """Change it when the file changes: a run does not go on with other samples."""
    validation: float = 0.1
    """Fraction of the samples to hold out for validation, selected by a hash of the sample's number."""

    @cached_property
    def arrays(self) -> Mapping[str, np.ndarray]:
        """The arrays by name."""
        import numpy as np

        what, do = f"NpzFile path {self.path}", 'Write one with np.savez("images.npz", image=images, label=labels).'
        try:
            with np.load(expand(self.path)) as opened:
                found = {name: opened[name] for name in opened.files}
        except (OSError, ValueError, TypeError, AttributeError, EOFError) as error:
            raise UserError(what, expected="a .npz file of numbers", got=str(error), do=do) from error
        rows = {name: array.shape[:1] for name, array in found.items()}
        if len(set(rows.values())) != 1 or () in rows.values():
            got = ", ".join(f"{name} {array.shape}" for name, array in found.items()) or "no array"
            raise UserError(what, expected="arrays with one row a sample each", got=got, do=do)
        return found

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def sample(self, index: int) -> Mapping[str, Any]:
        """Return row ``index`` of every array."""
        return {name: array[index] for name, array in self.arrays.items()}
