"""The continuity check: a resumed run must be the run that was saved.

Every checkpoint has a record in its meta, and a resume computes the record again and compares. The exact part must be
equal: the step, the steps that the optimizer applied, the data's fingerprint, next sample and the hash of the next
batch, the seed and the next random word, the learning rate of the next step. The probe must be equal within rounding.
It computes the next step without applying it: the losses of the next samples without dropout, and the norms, layer by
layer, of every tensor of the state and of the step's gradients and updates. If a checkpoint has no probe, the steps
that the lost attempt logged after it are compared instead (`Replay`); if there are none, the verdict is 'unproven'.
Every bit of the state must also be the one that was saved (`checkpoint/fingerprints.py`). Without fingerprints, as in a
checkpoint of an older release, the other parts alone decide.

The bounds are derived from lengths, depth and precision of the model (`backends/rounding.py`). A model that amplifies
rounding more, such as one with norms over few elements, is measured on arrival: if only figures that pass through the
model are beyond their bounds, its parameters are moved by as much as rounding moves results, and the probe says what
becomes of that. `python benchmarks/continuity.py` makes hundreds of correct moves, and prints the differences, the
bounds, and the smallest effect that the check detects without fingerprints (docs/measured/moves.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from portatrain.backends import rounding
from portatrain.backends.base import Backend
from portatrain.backends.state import COUNT
from portatrain.checkpoint.begun import IMPORTED
from portatrain.data import Split, batch_hash
from portatrain.errors import UserError
from portatrain.model.module import Definition
from portatrain.model.rng import words
from portatrain.recipe import Recipe
from portatrain.system import json_files

PROBE_SAMPLES = 64
REPLAY_STEPS = 5
"""The largest number of steps of a lost attempt that are compared; rounding grows from step to step."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The largest relative differences that pass the check.

    loss: a sample's loss, relative to that loss or to the mean of all, if that is larger. mean: the mean of those
    differences (the paired test). state: the norm of a tensor of the state, in a layer. grad, update: the norms of the
    next step's gradients and updates; a norm below a thousandth of the largest one of its kind is compared relative to
    that thousandth. replay: the loss of a repeated step.
    """

    loss: float
    mean: float
    state: float
    grad: float
    update: float
    replay: float

    @classmethod
    def of(cls, definition: Definition, precision: str, positions: int) -> Bounds:
        """Return the bounds for a model whose steps have `positions` tokens (or samples), from `backends.rounding`.

        A loss passes all operations of the forward pass, a gradient those of both passes. `mean` is the mean of
        PROBE_SAMPLES independent errors, and `replay` gathers the errors of REPLAY_STEPS steps.
        """
        error = rounding.step_error(definition, positions, precision)
        forward = error * math.sqrt(rounding.operations(definition))
        both = math.sqrt(2) * forward
        return cls(
            loss=2 * forward,
            mean=forward / math.sqrt(PROBE_SAMPLES),
            state=STATE_BOUND,
            grad=4 * both,
            update=2 * both,
            replay=2 * both * math.sqrt(REPLAY_STEPS),
        )

    def raised(self, moved: Sequence[Mapping[str, tuple[float, str]]]) -> Bounds:
        """Return these bounds, raised to MEASURED_FACTOR times the largest of the differences (`compare`) in `moved`,
        between the probe and probes of the same state with its parameters moved by rounding."""
        largest = {k: max((found[k][0] for found in moved if k in found), default=0.0) for k in RAISED}
        return replace(self, **{k: max(getattr(self, k), MEASURED_FACTOR * v) for k, v in largest.items()})


STATE_BOUND = 2e-6
"""32 u: norms are summed in float64 where there is one, and in float32 in short sums elsewhere (TPUs)."""
RAISED = ("loss", "mean", "grad", "update")
"""The figures whose bounds a measurement can raise: those that pass through the model."""
MEASURED_FACTOR = 4.0
MEASURED_DRAWS = 3


def record(
    backend: Backend,
    state: Any,
    recipe: Recipe,
    train: Split,
    step: int,
    *,
    validation: Split | None = None,
    virtual_step: bool = True,
) -> dict[str, Any]:
    """Return the record of the state after `step` steps, as JSON for a checkpoint's meta. Changes nothing.

    With `virtual_step` False, the record has no probe, which costs 64 samples forward and a step. After the last step
    of a run, the probe has only losses, because there is no next step.
    """
    start, upcoming = recipe.samples_after(step), min(step + 1, recipe.steps)
    ahead = train.batch(start, recipe.batch_at(step + 1))
    found: dict[str, Any] = {
        "step": step,
        "applied": next(int(b.fetch()) for b in backend.local_boxes(state) if b.role == COUNT),
        "data": {"next_sample": start, "next_batch": batch_hash(ahead), **fingerprints_of(train, validation)},
        "rng": {
            "algorithm": "philox4x64-10",
            "seed": str(recipe.seed),
            "word": str(words(recipe.seed, "step", step, 1)[0]),
        },
        "schedule": {"learning_rate": recipe.optimizer.lr * recipe.lr_scale(upcoming)},
    }
    if virtual_step:
        found["probe"] = {
            "losses": _losses(backend, state, recipe, train, start),
            "norms": _norms(backend, state, recipe, ahead, upcoming) if step < recipe.steps else {},
        }
    return found


def fingerprints_of(train: Split, validation: Split | None) -> dict[str, str | None]:
    """Return the fingerprints of the data as they are in a record's 'data'."""
    return {"fingerprint": train.fingerprint, "validation": None if validation is None else validation.fingerprint}


NEWER = "data.validation"
"""A field of the exact part that earlier releases did not write; a checkpoint without it is not compared in it."""

EXACT = ("step", "applied", "data", "rng", "schedule")


def rounding_may_explain(found: Mapping[str, Any]) -> bool:
    """Return True if a verdict is 'broken' only in figures that depend on how well the model is conditioned."""
    changed = found["tensors"] not in ("equal", "not compared")
    return bool(found["failed"]) and not changed and not found["differs"] and set(found["failed"]) <= set(RAISED)


def _losses(backend: Backend, state: Any, recipe: Recipe, train: Split, start: int) -> list[float]:
    losses: list[float] = []
    for at in range(start, start + PROBE_SAMPLES, recipe.batch):
        found = backend.eval(state, train.batch(at, recipe.batch))
        losses += (found["loss_B"] / np.maximum(found["weight_B"], 1)).astype(np.float64).tolist()
    return losses[:PROBE_SAMPLES]


def _norms(backend: Backend, state: Any, recipe: Recipe, ahead: Mapping[str, np.ndarray], step: int) -> dict[str, Any]:
    """Return the norms by name, as a list if there are layers; {} for a backend that cannot probe a step."""
    probe = getattr(backend, "probe", None)
    if probe is None:
        return {}
    found = probe(state, recipe.microbatches(ahead), step=step, scale=recipe.lr_scale(step))
    return {name: norm.tolist() for name, norm in sorted(found.items())}


def verdict(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    bounds: Bounds,
    changed: Sequence[str] | None = None,
    fields: Sequence[str] = (),
) -> dict[str, Any]:
    """Compare two records; return the verdict with its numbers.

    `changed`: the tensors of which a bit differs from its fingerprint; None if no fingerprints were compared.
    `fields`: the fields of the recipe that differ, as 'recipe.NAME'.

    The verdict is 'continuous' or 'broken', 'unproven' if the checkpoint has no probe, or 'imported' if the checkpoint
    was converted from another format and no run preceded it.

    `before` is a checkpoint's meta, `now` a `record` with a probe. 'failed' lists every figure beyond its bound.
    """
    bits: dict[str, Any] = {"tensors": "not compared" if changed is None else "equal"}
    if changed:
        bits = {"tensors": list(changed)}
    if IMPORTED in before:
        said = "broken" if changed or fields else "imported"
        return {"verdict": said, "differs": list(fields), "failed": [], "from": before[IMPORTED], **bits}
    differs = [*exact_differences(before, now), *fields]
    was = before.get("probe")
    if was is None:
        return {"verdict": "broken" if differs or changed else "unproven", "differs": differs, "failed": [], **bits}
    found = compare(was, now["probe"])
    failed = [k for k, (value, _) in found.items() if not value <= getattr(bounds, k)]
    return {
        "verdict": "broken" if differs or failed or changed else "continuous",
        "differs": differs,
        "failed": failed,
        **bits,
        "samples": len(was["losses"]),
        **{f"{k}_difference": value for k, (value, _) in found.items()},
        **{f"{k}_bound": getattr(bounds, k) for k in found},
        "worst": {k: where for k, (_, where) in found.items()},
    }


def exact_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the fields of the exact part, dotted, in which two records differ."""
    a, b = _flat(json_files.strict(before)), _flat(json_files.strict(now))  # so that NaN equals NaN
    names = {k for k in a.keys() | b.keys() if k.split(".")[0] in EXACT and (k != NEWER or k in a)}
    return sorted(k for k in names if a.get(k) != b.get(k))


def compare(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
    """Return, by the names of `Bounds`, the largest relative difference of two probes and the name of its tensor."""
    a, b = as_numbers(was["losses"]), as_numbers(now["losses"])
    if a.shape != b.shape:
        return {"loss": (float("inf"), "their number")}
    sizes = np.abs(a[np.isfinite(a)])
    relative = _difference(a, b, np.maximum(np.abs(a), max(float(sizes.mean()) if sizes.size else 0.0, 1e-3)))
    found = {
        "loss": (_finite(np.abs(relative).max()), f"sample {int(np.abs(relative).argmax())}"),
        "mean": (_finite(abs(relative.mean())), "all samples"),
    }
    kinds = {k: k.split("/")[0] if k.startswith(("grad/", "update/")) else "state" for k in was["norms"]}
    if not was["norms"] or not now["norms"]:
        return found
    for kind in ("state", "grad", "update"):
        names = [k for k in kinds if kinds[k] == kind]
        least = 0.0
        if kind != "state":
            norms = [np.abs(as_numbers(was["norms"][k])) for k in names]
            least = 1e-3 * max((float(np.max(n[np.isfinite(n)], initial=0.0)) for n in norms), default=0.0)
        worst = (0.0, "")
        for name in names:
            difference = _relative(was["norms"][name], now["norms"].get(name), least)
            if not difference <= worst[0]:
                worst = (difference, name)
        found[kind] = worst
    return found


def _relative(a: Any, b: Any, least: float) -> float:
    x, y = as_numbers(a), as_numbers([] if b is None else b)
    if x.shape != y.shape:
        return float("inf")
    return _finite(np.max(np.abs(_difference(x, y, np.maximum(np.abs(x), max(least, 1e-30)))), initial=0.0))


def as_numbers(value: Any) -> np.ndarray:
    """Convert numbers, or lists of them, from the form that `json_files.strict` writes, to float64."""
    if isinstance(value, list):
        return np.array([as_numbers(item) for item in value], np.float64)
    return np.asarray(json_files.number(value) if isinstance(value, str) or value is None else value, np.float64)


def _difference(a: np.ndarray, b: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return (b - a) / scale; 0 if both are NaN or the same infinity, infinity if only one of them is finite."""
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    both = np.isfinite(a) & np.isfinite(b)
    with np.errstate(invalid="ignore"):
        return np.where(same, 0.0, np.where(both, (b - a) / scale, np.inf))


def _finite(x: Any) -> float:
    return float(x) if np.isfinite(x) else float("inf")


@dataclass
class Replay:
    """Compares the steps that a lost attempt logged after the checkpoint with the same steps, trained again."""

    rows: Mapping[int, float]
    """Step -> loss, from the lost attempt."""
    bound: float
    worst: float = 0.0
    compared: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, curve: Iterable[Mapping[str, Any]], step: int, bound: float) -> Replay | None:
        """Return a replay for the rows of metrics.jsonl; None if there are no rows after `step`."""
        rows = {
            int(r["step"]): json_files.number(r.get("loss")) for r in curve if step < r["step"] <= step + REPLAY_STEPS
        }
        return cls(rows, bound) if rows else None

    def add(self, step: int, loss: float) -> dict[str, Any] | None:
        """Compare a step; return the verdict after the last step, or at the first one beyond its bound."""
        if step in self.rows:
            was = self.rows[step]
            self.worst = max(self.worst, _relative(was, loss, 1e-3))
            self.compared.append(step)
        if self.worst <= self.bound and step < max(self.rows):
            return None
        return {
            "verdict": "continuous" if self.worst <= self.bound else "broken",
            "differs": [],
            "failed": [] if self.worst <= self.bound else ["replay"],
            "steps": list(self.compared),
            "replay_difference": self.worst,
            "replay_bound": self.bound,
        }


def _cause(step: int, found: Mapping[str, Any]) -> str:
    if list(found["differs"]) == ["data.next_batch"] and found.get("tensors") == "equal":
        return (
            f"The state is, to the bit, but the data source gives other samples of step {step + 1}: a file that it "
            "reads has changed, or its code gives others at every call. Restore the file."
        )
    return "Look for a changed model, corpus or seed."


def refusal(step: int, found: Mapping[str, Any]) -> UserError:
    """Return the error for a broken verdict, with the numbers."""
    got = [f"{name} different" for name in found["differs"]]
    if isinstance(names := found.get("tensors"), list):
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        got.append(f"bits different in {', '.join(names[:6])}{more}")
    for name in found["failed"]:
        where = found.get("worst", {}).get(name, "")
        got.append(
            f"{_WORDS[name]}{f' ({where})' if where else ''} off by {found[f'{name}_difference']:.3g}, bound "
            f"{found[f'{name}_bound']:.2g}"
        )
    return UserError(
        f"continuity check at step {step}",
        expected="counts, data, random words, learning rate and every bit of the state equal, and the next step's "
        "losses, gradients and updates within rounding",
        got="; ".join(got),
        do=f"This is not the run that was saved. {_cause(step, found)} To continue anyway, give "
        "--accept-drift REASON, which is recorded.",
    )


_WORDS = {
    "loss": "a sample's loss",
    "mean": "the mean loss of the samples",
    "state": "the norm of a tensor",
    "grad": "a gradient's norm",
    "update": "an update's norm",
    "replay": "the loss of a step trained again",
}


def _flat(found: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in found.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
