"""Draw the next token from logits: a function of logits, seed, text and position alone, in float64 on the host.

Backends whose logits agree draw the same token, whatever the batch that a text was in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from portatrain.errors import UserError
from portatrain.model.rng import words


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How tokens are drawn.

    Attributes:
        temperature: the divisor of the logits; 0 takes the likeliest token, the first of equal ones.
        top_p: draw from the smallest set of likeliest tokens of which the probabilities reach top_p (Holtzman et al.
            2020, section 3.1). 1 draws from all.
        seed: seed of the draws.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(
                "temperature", expected="0 or more", got=repr(self.temperature), do="0 takes the likeliest token."
            )
        if not 0 < self.top_p <= 1:
            raise UserError("top_p", expected="above 0, at most 1", got=repr(self.top_p), do="1 draws from all tokens.")

    def token(self, logits_V: np.ndarray, *, text: int, position: int) -> int:
        """Return the token of text number `text` at `position`, the number of tokens before it.

        Raises UserError for logits that are not finite.
        """
        if np.isnan(logits_V).any() or (top := logits_V.max()) == np.inf or top == -np.inf:
            raise UserError(
                f"the model's predictions for token {position} of text {text}",
                expected="finite numbers",
                got="NaN or infinity",
                do="Use a checkpoint from before the run diverged: --step N.",
            )
        if self.temperature == 0:
            return int(logits_V.argmax())
        weights_V = np.exp((logits_V.astype(np.float64) - np.float64(top)) / self.temperature)
        if self.top_p < 1:
            order = np.argsort(-weights_V, kind="stable")
            reached = np.cumsum(weights_V[order])
            kept = 1 + int(np.searchsorted(reached, self.top_p * reached[-1]))
            weights_V[order[kept:]] = 0.0
        # The order of the ids, and not that of the weights, in which rounding could exchange two that are nearly equal.
        reached = np.cumsum(weights_V)
        random = float(words(self.seed, f"sample/{text}", position, 1)[0] >> np.uint64(11)) * 2.0**-53
        found = int(np.searchsorted(reached, random * reached[-1], side="right"))
        return min(found, int(np.flatnonzero(weights_V)[-1]))
