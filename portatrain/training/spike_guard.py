"""Give every step the limits of the recipe's `spikes`, and keep what they depend on in the checkpoints.

The limits follow from the losses and gradient norms of the recorded steps. A checkpoint has those of the window, as
they were recorded, so an attempt that resumes from it decides as the one before would have, wherever it runs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from portatrain.backends.base import backend_class
from portatrain.backends.limits import NONE, Limits, as_float32
from portatrain.errors import UserError
from portatrain.recipe.spikes import LAG, Seen, Spikes

META = "spikes"


class SpikeGuard:
    """The steps that decide the next limits. Without a rule it gives none.

    Raises:
        UserError: there is a rule, and the backend takes no limits.
    """

    def __init__(self, rule: Spikes | None, backend: str) -> None:
        self._rule = rule
        if rule is not None and not getattr(backend_class(backend), "takes_limits", False):
            raise UserError(
                f"recipe field spikes on the {backend} backend",
                expected="a backend whose steps take limits, such as jax or torch",
                got=backend,
                do="Use another backend, or leave spikes out (--set spikes=none).",
            )
        self._seen: deque[Seen] = deque(maxlen=None if rule is None else rule.window + LAG - 1)

    def limits(self, step: int) -> Limits:
        """Return the limits of `step`, once the steps up to `step` - LAG are added."""
        if self._rule is None:
            return NONE
        return as_float32(self._rule.limits(step, self._seen))

    def arguments(self, step: int) -> dict[str, Any]:
        """Return the keyword arguments of the backend's `step`."""
        return {} if self._rule is None else {"limits": self.limits(step)}

    @property
    def rewinds(self) -> bool:
        """True if the run goes back before a spike."""
        return self._rule is not None and self._rule.action == "rewind"

    def add(self, step: int, loss: float, norm: float, *, skipped: bool) -> Limits | None:
        """Note the result of a step; return its limits if it is a spike."""
        if self._rule is None:
            return None
        if not skipped:
            self._seen.append((step, loss, norm))
            return None
        limits = self.limits(step)
        judged = self.rewinds and any(map(math.isfinite, limits))  # then one that is not finite is beyond, too
        return limits if judged or (math.isfinite(loss) and math.isfinite(norm)) else None

    def meta(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {} if self._rule is None else {META: [list(one) for one in self._seen]}

    def restore(self, meta: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. One without such steps, as of a run without a rule, has an empty window."""
        if self._rule is not None:
            self._seen.extend((int(step), float(loss), float(norm)) for step, loss, norm in meta.get(META) or ())
