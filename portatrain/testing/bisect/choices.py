"""The choices of a step that rounding may decide: of two experts with nearly equal scores, either is right.

A program that is compiled in another way may choose otherwise than the same operations one by one, and so have another
gradient and another load of the experts. A choice of `ops.top_k` is open if the score of what was chosen is above that
of what was not by less than `MEASURED` times what moving every parameter by rounding makes of that difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from portatrain.backends.reference.watched import watch_oracle
from portatrain.backends.rounding import positions_in, step_error
from portatrain.backends.watched import Call
from portatrain.testing.bisect.sides import Running

DRAWS = 3
MEASURED = 4.0
"""As in `forward.py`."""
MOST = 64
"""Open choices of a step that are tried one by one. A step with more is not judged by what depends on them."""
SUBSETS = 16

Taken = Mapping[tuple[int, int], np.ndarray]
"""Results in the place of the oracle's, as `watch_oracle` takes them."""


@dataclass(frozen=True, kw_only=True)
class Open:
    """In microbatch `micro`, call `call` may have `other` in the place of its index at `at`."""

    micro: int
    call: int
    at: tuple[int, ...]
    other: int


@dataclass(kw_only=True)
class Choices:
    """The choices of a side in a step.

    arrays: the state at which the step begins. batch: microbatches. taken: for each of them what the side chose
    otherwise than the oracle, if that is known.
    """

    side: Running
    arrays: Mapping[str, np.ndarray]
    batch: Mapping[str, np.ndarray]
    step: int
    taken: Sequence[Taken] = ()

    def __post_init__(self) -> None:
        self._indices: list[dict[tuple[int, int], np.ndarray]] = []

    def open(self) -> list[Open]:
        """Return the choices that rounding may decide otherwise."""
        found: list[Open] = []
        self._indices.clear()
        for m in range(next(iter(self.batch.values())).shape[0]):
            calls = self._calls(m, 0, self.base(m))
            made = {(k, 1): c.results[1] for k, c in enumerate(calls) if c.name == "top_k"}
            self._indices.append(made)
            # What is chosen is held, since another choice in one layer moves all scores of the next.
            moved = [self._calls(m, seed, made) for seed in range(1, DRAWS + 1)] if made else []
            for k, _ in made:
                found += self._pairs(m, k, calls[k], [one[k].args[0] for one in moved])
        return found

    def base(self, m: int) -> Taken:
        return self.taken[m] if m < len(self.taken) else {}

    def with_others(self, chosen: Sequence[Open]) -> list[Taken]:
        """Return, for each microbatch, results with these choices made otherwise. Those of later layers follow."""
        made: list[dict[tuple[int, int], np.ndarray]] = [dict(self.base(m)) for m in range(len(self._indices))]
        for one in chosen:
            place = (one.call, 1)
            new = made[one.micro].get(place, self._indices[one.micro][place]).copy()
            new[one.at] = one.other
            made[one.micro][place] = new
        return list(made)

    def several(self, found: Sequence[Open]) -> Iterator[list[Taken]]:
        """Yield results with each open choice made otherwise, with all of them, and with halves drawn at random."""
        rng = np.random.default_rng(0)
        for one in found:
            yield self.with_others([one])
        if len(found) > 1:
            yield self.with_others(found)
            for _ in range(SUBSETS):
                yield self.with_others([one for one in found if rng.random() < 0.5])

    # ---- inside

    def _calls(self, m: int, seed: int, taken: Taken) -> Sequence[Call]:
        side, micro = self.side, {k: v[m] for k, v in self.batch.items()}
        params = side.parameters(self.arrays)
        if seed:
            rng = np.random.default_rng(seed)
            size = step_error(side.definition, positions_in(side.definition, micro), side.recipe.precision)
            params = {n: p * (1 + size * rng.standard_normal(p.shape)) for n, p in params.items()}
        context, states = side.context(micro, self.step), side.states(self.arrays)
        return watch_oracle(side.definition, params, micro, context, states=states, taken=taken)[0]

    def _pairs(self, m: int, k: int, call: Call, moved: Sequence[np.ndarray]) -> Iterator[Open]:
        scores, indices = np.asarray(call.args[0], np.float64), call.results[1]
        for row in np.ndindex(indices.shape[:-1]):
            mine = indices[row]
            others = np.setdiff1d(np.arange(scores.shape[-1]), mine)
            apart = _above(scores[row], mine, others)
            near = np.max([np.abs(_above(x[row], mine, others) - apart) for x in moved], axis=0)
            for c, o in np.argwhere(apart <= MEASURED * near):
                yield Open(micro=m, call=k, at=(*row, int(c)), other=int(others[o]))


def _above(scores: np.ndarray, mine: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return by how much each chosen score is above each other one, (chosen, others)."""
    made: np.ndarray = scores[mine][:, None] - scores[others][None, :]
    return made
