"""Names and axes: what a tensor of a torch module or of a JAX tree is called in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from portatrain.errors import UserError, choice

TORCH_SLOTS: Mapping[str, str] = {"exp_avg": "m", "exp_avg_sq": "v", "momentum_buffer": "m", "max_exp_avg_sq": "v_max"}
"""torch.optim's names of per-parameter state."""
OPTAX_SLOTS: Mapping[str, str] = {"mu": "m", "nu": "v", "trace": "m"}
"""optax's names of trees that are shaped like the parameters."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A logical tensor, and where it is there.

    name: 'dense/kernel', without role. axes: of the logical tensor, an axis a dimension. torch: the parameter's name;
    '{i}' in it stands for the index of the leading axis, which torch holds as one tensor each. jax: the path in the
    tree of parameters, parts joined by '/'. transposed: torch holds the last two axes the other way round (nn.Linear).
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
        """Whether torch holds one tensor for each index of the leading axis."""
        return self.torch is not None and "{i}" in self.torch


@dataclass(frozen=True, kw_only=True)
class Table:
    """All tensors of a model; what is not listed is an error, when it is saved and when it is restored."""

    rows: tuple[Entry, ...]

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        twice = next((n for n in names if names.count(n) > 1), None)
        if twice is not None:
            raise UserError("table", expected="every name once", got=f"{twice!r} twice", do="Rename one of them.")

    def by_torch(self, name: str) -> tuple[Entry, int | None]:
        """(the entry, which index of its leading axis) of a parameter of a module."""
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
        """The entry of a leaf of a tree of parameters."""
        for row in self.rows:
            if row.jax == path:
                return row
        raise self._unknown("leaf of the parameters", path, (r.jax for r in self.rows))

    def _unknown(self, what: str, name: str, known: Iterable[str | None]) -> UserError:
        return choice(f"table: {what}", name, [n for n in known if n is not None])
