"""Embedding, linear map, dropout and patch embedding.

Shape letters: B batch, E embed, P patches. Images are (B, rows, columns, channels).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from portatrain.errors import UserError
from portatrain.model.module import Init, Module, Param
from portatrain.model.ops import Array, Ops


class Embedding(Module):
    """An embedding table, (vocab, embed). To tie the output, pass `embedding.table` to `ops.cross_entropy`."""

    def __init__(self, *, vocab: int, embed: int, init: str | float | Init | None = None) -> None:
        self.table = Param(vocab=vocab, embed=embed, fan_in_axes=0, init=init)

    def __call__(self, ops: Ops, ids: Array) -> Array:
        """Return the rows of `ids`, (...) integers in [0, vocab), as (..., embed) in the compute dtype."""
        return ops.embed(self.table, ids)


class Linear(Module):
    """A linear map over named axes, y = x W + bias: `Linear({"heads": 8, "head_dim": 64}, {"embed": 512})`.

    Args:
        inputs: the last axes of x, which are contracted, with their sizes.
        outputs: the axes that replace them, with their sizes; no name may be in both.
        bias: add a bias of the output axes, which starts at zero.
        init: the initial values of W, as in `Param`.

    Raises:
        UserError: no input or no output axis, or an axis in both.
    """

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
                expected="input axes and output axes, all with different names",
                got=f"inputs {dict(inputs)}, outputs {dict(outputs)}",
                do="Rename the second use of an axis: Linear({'embed': 64}, {'embed_out': 64}).",
            )
        self.weight = Param(**inputs, **outputs, fan_in_axes=len(inputs), init=init)
        self.bias: Any = Param(**outputs, fan_in_axes=0, init="zeros") if bias else None
        self.n_in, self.n_out = len(inputs), len(outputs)

    def __call__(self, ops: Ops, x: Array) -> Array:
        """Map (..., *inputs) to (..., *outputs), in the compute dtype."""
        letters = "abcdefghijklmnopqrstuvwxyz"
        lead = letters[: x.ndim - self.n_in]
        contracted = letters[len(lead) : x.ndim]
        out = letters[x.ndim : x.ndim + self.n_out]
        y = ops.einsum(f"{lead}{contracted},{contracted}{out}->{lead}{out}", x, self.weight)
        return y if self.bias is None else ops.bias(y, self.bias)


class Dropout(Module):
    """Dropout: x / (1 - rate) at kept elements and 0 at the others, while training; otherwise x.

    The kept elements depend on the module's path, the step, the layer and the sample, and not on mesh or framework. Use
    a separate Dropout for each place in a model: one that is called twice drops the same elements twice.

    Raises:
        UserError: rate is not in [0, 1).
    """

    def __init__(self, rate: float) -> None:
        if not 0 <= rate < 1:
            raise UserError("Dropout", expected="a rate in [0, 1)", got=repr(rate), do="Use 0 for no dropout.")
        self.rate = rate

    def __call__(self, ops: Ops, x: Array) -> Array:
        """Return (B, ...) for x (B, ...), in the dtype of x."""
        return ops.dropout(x, self.rate, site=self.site)


class PatchEmbedding(Module):
    """Cut images into square patches and map each patch to `embed` features (Dosovitskiy et al. 2021, eq. 1).

    Args:
        rows, columns, channels: the size of an image.
        patch: rows and columns of a patch; must divide those of the image.
        embed: features per patch.
        bias: add a bias, which starts at zero.

    Raises:
        UserError: `patch` does not divide rows and columns.
    """

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
        """Map images (B, rows, columns, channels) to patches in row-major order, (B, P, E), in the compute dtype."""

        p, channels = self.patch, image.shape[-1]
        cut = image.reshape(-1, self.rows // p, p, self.columns // p, p, channels)
        x_BRCE = ops.einsum("brxcyk,xyke->brce", cut, self.kernel)
        x_BPE = x_BRCE.reshape(-1, self.patches, self.features)
        return x_BPE if self.bias is None else ops.bias(x_BPE, self.bias)
