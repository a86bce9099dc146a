"""Embedding, linear map, dropout, patches.

B batch, E embed, P patches; images are (B, rows, columns, channels).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from portatrain.errors import UserError
from portatrain.model.module import Init, Module, Param
from portatrain.model.ops import Array, Ops


class Embedding(Module):
    """A table of `vocab` rows. Tied output: pass `embedding.table` to `ops.cross_entropy`."""

    def __init__(self, *, vocab: int, embed: int, init: str | float | Init | None = None) -> None:
        self.table = Param(vocab=vocab, embed=embed, fan_in_axes=0, init=init)

    def __call__(self, ops: Ops, ids: Array) -> Array:
        """Integers (...) in [0, vocab) -> (..., embed)."""
        return ops.embed(self.table, ids)


class Linear(Module):
    """y = x W + bias, over named axes: `Linear({"heads": 8, "head_dim": 64}, {"embed": 512})` contracts the last
    two axes of x. The bias starts at zero."""

    def __init__(
        self,
        inputs: Mapping[str, int],
        outputs: Mapping[str, int],
        *,
        bias: bool = True,
        init: str | float | Init | None = None,
    ) -> None:
        if not inputs or not outputs or set(inputs) & set(outputs):
            raise UserError(
                "Linear",
                expected="input axes and output axes, all of different names",
                got=f"inputs {dict(inputs)}, outputs {dict(outputs)}",
                do="Give the second use of an axis a name of its own: Linear({'embed': 64}, {'embed_out': 64}).",
            )
        self.weight = Param(**inputs, **outputs, fan_in_axes=len(inputs), init=init)
        self.bias: Any = Param(**outputs, fan_in_axes=0, init="zeros") if bias else None
        self.n_in, self.n_out = len(inputs), len(outputs)

    def __call__(self, ops: Ops, x: Array) -> Array:
        """(..., *inputs) -> (..., *outputs)."""
        letters = "abcdefghijklmnopqrstuvwxyz"
        lead = letters[: x.ndim - self.n_in]
        contracted = letters[len(lead) : x.ndim]
        out = letters[x.ndim : x.ndim + self.n_out]
        y = ops.einsum(f"{lead}{contracted},{contracted}{out}->{lead}{out}", x, self.weight)
        return y if self.bias is None else ops.bias(y, self.bias)


class Dropout(Module):
    """x / (1 - rate) where kept, 0 elsewhere, while training; the same elements on any mesh and framework.

    A Dropout draws by its path, step, layer and sample: use one of these for each place, never one twice.
    """

    def __init__(self, rate: float) -> None:
        if not 0 <= rate < 1:
            raise UserError("Dropout", expected="a rate in [0, 1)", got=repr(rate), do="Use 0 for no dropout.")
        self.rate = rate

    def __call__(self, ops: Ops, x: Array) -> Array:
        """(B, ...) -> (B, ...)."""
        return ops.dropout(x, self.rate, site=self.site)


class PatchEmbedding(Module):
    """Cuts images into square patches and maps each to `embed` features (Dosovitskiy et al. 2021, eq. 1)."""

    def __init__(self, *, rows: int, columns: int, channels: int, patch: int, embed: int, bias: bool = True) -> None:
        if rows % patch or columns % patch:
            raise UserError(
                "PatchEmbedding",
                expected=f"rows and columns that patch={patch} divides",
                got=f"rows={rows}, columns={columns}",
                do="Choose another patch size, or pad the images.",
            )
        self.kernel = Param(patch_rows=patch, patch_columns=patch, channels=channels, embed=embed, fan_in_axes=3)
        self.bias: Any = Param(embed=embed, fan_in_axes=0, init="zeros") if bias else None
        self.rows, self.columns, self.patch, self.features = rows, columns, patch, embed
        self.patches = (rows // patch) * (columns // patch)

    def __call__(self, ops: Ops, image: Array) -> Array:
        """(B, rows, columns, channels) -> (B, P, E), patches row by row."""
        p, channels = self.patch, image.shape[-1]
        cut = image.reshape(-1, self.rows // p, p, self.columns // p, p, channels)
        x_BRCE = ops.einsum("brxcyk,xyke->brce", cut, self.kernel)
        x_BPE = x_BRCE.reshape(-1, self.patches, self.features)
        return x_BPE if self.bias is None else ops.bias(x_BPE, self.bias)
