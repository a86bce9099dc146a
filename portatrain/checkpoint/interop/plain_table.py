"""Map tensors of a torch module or of a JAX tree to their names and axes in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from portatrain.errors import UserError, choice

TORCH_SLOTS: Mapping[str, str] = {"exp_avg": "m", "exp_avg_sq": "v", "momentum_buffer": "m", "max_exp_avg_sq": "v_max"}
"""torch.optim's names of per-parameter state, and ours."""
OPTAX_SLOTS: Mapping[str, str] = {"mu": "m", "nu": "v", "trace": "m"}
"""optax's names of trees with the shape of the parameters, and ours."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Map a logical tensor to its names in torch and JAX.

    name: 'dense/kernel', without role. axes: the axes of the logical tensor, one for each dimension. torch: the name of
    the parameter; '{i}' in it stands for the index of the leading axis, for which torch has one tensor each. jax: the
    path in the tree of parameters, joined by '/'. transposed: torch has the last two axes in the other order
    (nn.Linear).
    """

    name: str
    axes: tuple[str, ...]
    torch: str | None = None
    jax: str | None = None
    transposed: bool = False

    def __post_init__(self) -> None:
        if self.transposed and len(self.axes) < 2:
            raise UserError(
                f"entry {self.name}",
                expected="two axes or more to transpose",
                got=str(self.axes),
                do="Leave transposed out, or name the axes.",
            )

    @property
    def stacked(self) -> bool:
        """Return whether torch has one tensor for each index of the leading axis."""
        return self.torch is not None and "{i}" in self.torch


@dataclass(frozen=True, kw_only=True)
class Table:
    """List all tensors of a model. To save or restore a tensor that is not listed is an error."""

    rows: tuple[Entry, ...]

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        twice = next((n for n in names if names.count(n) > 1), None)
        if twice is not None:
            raise UserError("table", expected="every name once", got=f"{twice!r} twice", do="Rename one of them.")

    def by_torch(self, name: str) -> tuple[Entry, int | None]:
        """Return (the entry, the index of its leading axis) for a parameter of a module."""
        for row in self.rows:
            if row.torch is None:
                continue
            if name == row.torch and not row.stacked:
                return row, None
            if row.stacked:
                before, _, after = row.torch.partition("{i}")
                middle = name[len(before) : len(name) - len(after)]
                if name == f"{before}{middle}{after}" and middle.isdigit():
                    return row, int(middle)
        raise self._unknown("torch parameter", name, (r.torch for r in self.rows))

    def by_jax(self, path: str) -> Entry:
        """Return the entry of a leaf of a tree of parameters."""
        for row in self.rows:
            if row.jax == path:
                return row
        raise self._unknown("leaf of the parameters", path, (r.jax for r in self.rows))

    def _unknown(self, what: str, name: str, known: Iterable[str | None]) -> UserError:
        return choice(f"table: {what}", name, [n for n in known if n is not None])
