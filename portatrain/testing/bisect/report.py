"""What a replay says: the first fault of a step, and the report of all steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from portatrain.system import json_files


class Stage(StrEnum):
    """The part of a step in which two sides part, in the order in which it is computed."""

    STATE = "restored state"
    MODEL = "model"
    INPUT = "input of an operation"
    FORWARD = "forward"
    BACKWARD = "backward"
    GRADIENT = "sum of gradients"
    CLIPPING = "clipping"
    RULE = "rule"
    AFTER = "after the update"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """The first place of a step at which a side is not what the oracle computes from the same numbers.

    Attributes:
        what: the operation, parameter, slot or State, in words.
        element: the element with the largest difference; '' if the values are of the whole.
        values: of both sides there.
        oracle: what the float64 oracle has there, for each side from that side's own inputs; None if nothing decides.
        bound: the largest difference from the oracle that rounding explains.
        wrong: the names of the sides that are beyond it. Empty: the two sides compute different models.
        hint: what the values look like, if that is known.
    """

    step: int
    stage: Stage
    what: str
    element: str = ""
    values: tuple[Any, Any]
    oracle: tuple[Any, Any] | None
    bound: float
    wrong: Sequence[str]
    hint: str = ""

    def sentence(self, names: Sequence[str]) -> str:
        """Return what is wrong and where, in one sentence; `names` are those of the two sides."""
        where = f"{self.what}{f', element {self.element}' if self.element else ''}"
        if not self.wrong:
            return f"no defect: the two sides compute different things, first in {where}{self._hint}"
        who = " and ".join(self.wrong)
        return f"a defect, not rounding: {who} {'is' if len(self.wrong) == 1 else 'are'} wrong in {where}{self._hint}"

    @property
    def _hint(self) -> str:
        return f" ({self.hint})" if self.hint else ""

    def lines(self, names: Sequence[str]) -> list[str]:
        """Return the fault as lines of text."""
        found = [f"step {self.step}, {self.stage}: {self.what}"]
        for i, name in enumerate(names):
            oracle = "" if self.oracle is None else f", float64 oracle {_shown(self.oracle[i])}"
            found.append(f"  {name}: {_shown(self.values[i])}{f' at {self.element}' if self.element else ''}{oracle}")
        if self.oracle is not None:
            found.append(f"  rounding explains a difference of {self.bound:.2g}")
        return [*found, f"  {self.sentence(names)}"]


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """A step that was replayed: the losses of both sides, and of the tensor with the gradient that is nearest to the
    bound of rounding, or farthest beyond it: the difference and that bound, both relative to its largest element."""

    step: int
    losses: tuple[float, float]
    difference: float
    tensor: str
    bound: float


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The result of a replay. sizes: how the recipe was made smaller, in words. notes: what was not judged, and why.
    elsewhere: of a run whose record the replay does not give again, in a sentence; '' if there is none."""

    names: tuple[str, str]
    sizes: str = ""
    rows: Sequence[StepRow] = ()
    fault: Fault | None = None
    notes: Sequence[str] = field(default_factory=list)
    elsewhere: str = ""

    @property
    def good(self) -> bool:
        """True if all differences are rounding."""
        return self.fault is None and not self.elsewhere

    @property
    def sentence(self) -> str:
        """Return the verdict in one sentence."""
        if self.fault is not None:
            return self.fault.sentence(self.names)
        if self.elsewhere:
            return self.elsewhere
        if not self.rows:
            return "no step was replayed"
        within = all(row.difference <= row.bound for row in self.rows)
        gradients = (
            "the gradients of both sides agree within the bound of rounding"
            if within
            else "every operation that was compared is what the oracle computes from the same numbers"
        )
        steps = "1 replayed step" if len(self.rows) == 1 else f"{len(self.rows)} replayed steps"
        return f"rounding: in {steps} {gradients}, and every update is that of the rule"

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        fault: Mapping[str, Any] | None = None
        if self.fault is not None:
            fault = {**vars(self.fault), "stage": str(self.fault.stage), "wrong": list(self.fault.wrong)}
        return json_files.strict(
            {
                "sides": list(self.names),
                "sizes": self.sizes,
                "steps": [vars(row) for row in self.rows],
                "fault": fault,
                "notes": list(self.notes),
                "sentence": self.sentence,
            }
        )


def _shown(value: Any) -> str:
    return f"{value:.8g}" if isinstance(value, float) else str(value)
