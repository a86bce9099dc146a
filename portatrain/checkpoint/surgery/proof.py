"""Measure what a surgery does to the function of a model: its outputs before and after, in NumPy float64 (the oracle).

Outputs are logits if the model has a method `predict`, else the losses of samples. If the two models have logits of
other numbers of ids, those of the ids of both are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from portatrain.backends import reference
from portatrain.checkpoint.surgery.operate import Operated
from portatrain.errors import UserError
from portatrain.model.module import Definition

BOUND = 1e-12
"""The largest difference of outputs, over the largest of them, of a surgery that keeps the function: float64 has
u = 1.1e-16, and outputs pass some thousand roundings."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The outputs of a model on a batch, before and after a surgery.

    Attributes:
        claims: whether the surgery claims that the function stays; `why`: if not, why it changes.
        outputs: 'logits', or 'losses of samples'.
        difference: the largest difference of an output; `mean`: the mean one. In units of the outputs.
        stored: the largest difference with the new tensors as the checkpoint keeps them, rounded to their dtypes.
        scale: the largest output before, in absolute value.
        loss: the mean loss before and after, in nats.
        samples, positions: the size of the batch: its samples, and all its positions.
        ids: how many logits of a position were compared, if the new model has more of them; else None.
    """

    claims: bool
    why: str
    outputs: str
    difference: float
    mean: float
    stored: float
    scale: float
    loss: tuple[float, float]
    samples: int
    positions: int
    ids: int | None = None

    @property
    def holds(self) -> bool:
        """True unless the surgery claims what the measurement contradicts."""
        return not self.claims or self.difference <= BOUND * self.scale

    def as_json(self) -> dict[str, Any]:
        """Return it for the record."""
        return {
            "function": "kept" if self.claims else "changed",
            **({} if self.claims else {"why": self.why}),
            "outputs": self.outputs,
            "largest_difference": self.difference,
            "mean_difference": self.mean,
            "largest_difference_stored": self.stored,
            "largest_output": self.scale,
            "bound": BOUND * self.scale if self.claims else None,
            "loss": list(self.loss),
            "samples": self.samples,
            "positions": self.positions,
            **({} if self.ids is None else {"ids": self.ids}),
        }

    def check(self, name: str, fields: Mapping[str, Any]) -> None:
        """Raise UserError unless it holds. `fields`: what else the recipe changes, for the message."""
        if self.holds:
            return
        raise UserError(
            f"surgery {name}",
            expected=f"{self.outputs} that stay within {BOUND * self.scale:.2g}, as it says that the function stays",
            got=f"a difference of {self.difference:.3g} on {self.samples} samples; the recipe differs in "
            f"{', '.join(sorted(fields))}",
            do="One of these fields, or its default in a new class, changes what the model computes (an eps, a window, "
            "a scale): give it the old value. Nothing was written.",
        )


def prove(operated: Operated, before: Definition, after: Definition, rows: Mapping[str, np.ndarray]) -> Proof:
    """Return the outputs on `rows`, before and after a surgery, compared. `before`, `after`: the models, in fp32."""
    was, loss_was = _outputs(before, operated.old(), operated.old("state"), rows)
    now, loss_now = _outputs(after, operated.new(), operated.new("state"), rows)
    kept, _ = _outputs(after, operated.new(rounded=True), operated.new("state", rounded=True), rows)
    both = min(was.shape[-1], now.shape[-1])
    other = was.shape != now.shape
    was, now, kept = (array[..., :both] for array in (was, now, kept))
    apart = np.abs(now - was)
    return Proof(
        claims=not operated.surgery.changes,
        why=operated.surgery.changes,
        outputs="logits" if _predicts(before) else "losses of samples",
        difference=float(apart.max()),
        mean=float(apart.mean()),
        stored=float(np.abs(kept - was).max()),
        scale=float(np.abs(was).max()),
        loss=(loss_was, loss_now),
        samples=len(next(iter(rows.values()))),
        positions=int(np.prod(was.shape[:-1])) if _predicts(before) else was.size,
        ids=both if other else None,
    )


def _predicts(model: Definition) -> bool:
    return callable(getattr(model.model, "predict", None))


def _outputs(
    model: Definition, params: dict[str, np.ndarray], states: dict[str, np.ndarray], rows: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, float]:
    """Return the outputs of a model and its mean loss. `reference.forward` converts all to float64."""
    states = {**reference.initial_states(model), **states}
    loss = reference.forward(model, params, rows, states=states).value
    mean = float(loss.sum) / float(np.sum(loss.weight_B))
    if not _predicts(model):
        return np.asarray(loss.loss_B), mean
    out = reference.forward(model, params, rows, states=states, method="predict").value
    return np.asarray(out), mean
