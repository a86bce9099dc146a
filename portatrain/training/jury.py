"""Compute the gradients of a step's parts on single devices, and let other devices, or the host, compute them again.

A microbatch is cut into as many parts of equal rows as there are devices. Each device computes the gradient of its own
part, alone, by a program for one device. With `devices` it then computes the part of its neighbour: the same program on
the same kind of device gives the same bits. If a part has two results, every device computes it, and those that differ
from more than half are named. If there is no such majority, as between two devices, the host's processor computes it,
and a device whose result is beyond rounding is named. With `cpu` and `backend` each process instead compares one of its
devices, in turn, with the host's processor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from portatrain.backends import rounding
from portatrain.backends.base import Backend, backend_class, missing
from portatrain.backends.state import COUNT
from portatrain.errors import UserError
from portatrain.recipe import Recipe
from portatrain.training import evidence
from portatrain.training.continuity import MEASURED_DRAWS, MEASURED_FACTOR, Bounds
from portatrain.training.evidence import Evidence

Whole = Mapping[tuple[str, str], np.ndarray]
"""The parameters and States of a model on the host, by (role, name)."""
OTHER = {"jax": "torch", "torch": "jax"}
"""The framework that `by="backend"` asks."""


class Disagreement(Exception):
    """Two computations of one thing differ. devices: the positions of those that are accused; certain: False if the
    fault may be with only one of them."""

    def __init__(self, *, expected: str, what: str, devices: Iterable[int], certain: bool) -> None:
        super().__init__(what)
        self.expected, self.what, self.devices, self.certain = expected, what, set(devices), certain


@dataclass(frozen=True)
class Heard:
    """The parts that this process answers for, for `Jury.compare`, and what they were computed from. count: the number
    of parts that a microbatch was cut into."""

    parts: dict[int, Evidence]
    whole: Whole
    batch: Mapping[str, np.ndarray]
    count: int


class Jury:
    """The devices of a backend, each with a program for it alone.

    Raises:
        UserError: the backend has no such programs, or there is nothing that could compute again.
    """

    def __init__(self, by: str, backend: Backend, recipe: Recipe) -> None:
        self._by, self._backend, self._recipe = by, backend, recipe
        self.definition, self.devices = backend.program.definition, backend.program.layout.mesh.devices
        made: Any = backend_class(backend.name)
        if not hasattr(made, "alone"):
            raise _refused(f"on the {backend.name} backend", "jax or torch", backend.name, "Use one of them")
        if by == "devices" and self.devices == 1:
            raise _refused(
                "by=devices", "a mesh of two or more devices", "one device", "Set referee.by=cpu or referee.by=backend"
            )
        asked = OTHER[backend.name] if by == "backend" else backend.name
        if by == "backend" and (gone := missing(asked)):
            raise _refused("by=backend", f"{asked} to be installed too", f"no {', '.join(gone)}", "Set referee.by=cpu")
        self._made, self._asked = made, asked
        self._alone: dict[int, Any] = {}
        self._host: Any = None
        self._checks = 0

    def hear(self, state: Any, batch: Mapping[str, np.ndarray], step: int) -> Heard:
        """Compute the parts of the batch of `step` and compare them. All processes call it together.

        Raises Disagreement, the same on all processes.
        """
        whole = whole_tensors(self._backend, state)
        if not self._alone:
            self._alone = dict(self._made.alone(self._backend))
        count = evidence.parts_for(next(iter(batch.values())).shape[1], self.devices)
        again = self._by == "devices" and count > 1
        parts: dict[int, Evidence] = {}
        votes: dict[int, list[int]] = {}
        for position, one in self._alone.items():
            placed, own = self._placed(one, whole), position % count
            mine = self._compute(one, placed, batch, own, count, step)
            if position < count:
                parts[own] = mine
            votes[position] = [mine.digest]
            if again:
                votes[position].append(self._compute(one, placed, batch, (own + 1) % count, count, step).digest)
        heard = Heard(parts, whole, batch, count)
        if self._by == "devices":
            self._vote(heard, votes, 1 + again, step)
        else:
            self._ask_the_host(heard, step)
        self._checks += 1
        return heard

    # ---- another device

    def _vote(self, heard: Heard, votes: Mapping[int, list[int]], each: int, step: int) -> None:
        words = evidence.from_all(self._backend, votes, (self.devices, each))
        cast: dict[int, list[evidence.Vote]] = {part: [] for part in range(heard.count)}
        for position, row in enumerate(words.tolist()):
            for turn, digest in enumerate(row):
                cast[(position + turn) % heard.count].append((position, digest))
        disputed = [part for part, found in cast.items() if len({digest for _, digest in found}) > 1]
        if not disputed:
            return
        devices, certain = self._line_up(heard, {part: cast[part] for part in disputed}, step)
        raise Disagreement(
            expected="the same bits from two devices for one part of the batch",
            what=f"other bits in {len(disputed)} of {heard.count} parts",
            devices=devices,
            certain=certain,
        )

    def _line_up(self, heard: Heard, cast: dict[int, list[evidence.Vote]], step: int) -> tuple[set[int], bool]:
        """Let every device compute the disputed parts; return (the accused devices, whether they are certain)."""
        kept: dict[tuple[int, int], Evidence] = {}
        votes: dict[int, list[int]] = {}
        for position, one in self._alone.items():
            placed = self._placed(one, heard.whole)
            for part in cast:
                kept[position, part] = self._compute(one, placed, heard.batch, part, heard.count, step)
            votes[position] = [kept[position, part].digest for part in cast]
        words = evidence.from_all(self._backend, votes, (self.devices, len(cast)))
        named: set[int] = set()
        open_parts = []
        for column, (part, first) in enumerate(cast.items()):
            found, sure = evidence.accused([*first, *((p, int(d)) for p, d in enumerate(words[:, column]))])
            if sure:
                named |= found
            else:
                open_parts.append((part, found))
        if named or not open_parts:
            return named, True
        wrong = np.zeros(self.devices, np.uint64)
        for part, _ in open_parts:
            truth = self._of_host(heard, part, step)
            bound = self._bound(heard, part, truth, step)
            for position in self._alone:
                wrong[position] += int(not evidence.distance(kept[position, part].grads, truth.grads) <= bound)
        flagged = set(np.flatnonzero(evidence.added_up(self._backend, wrong)).tolist())
        accused = set().union(*(found for _, found in open_parts))
        return (flagged, True) if flagged and flagged < accused else (accused, False)

    # ---- the host's processor

    def _ask_the_host(self, heard: Heard, step: int) -> None:
        mine, wrong = sorted(heard.parts), np.zeros(self.devices, np.uint64)
        if mine:
            part = mine[self._checks % len(mine)]
            told, own = self._of_host(heard, part, step), heard.parts[part]
            apart = max(evidence.distance(own.grads, told.grads), evidence.relative(own.loss, told.loss))
            if not apart <= self._bounds().grad:
                wrong[part] = int(not apart <= self._bound(heard, part, told, step))
        if flagged := set(np.flatnonzero(evidence.added_up(self._backend, wrong)).tolist()):
            raise Disagreement(
                expected=f"the gradient that {self._asked} on the host's processor gives, within rounding",
                what="another gradient of a part of the batch on a device than on its host's processor",
                devices=flagged,
                certain=False,
            )

    def _of_host(self, heard: Heard, part: int, step: int) -> Evidence:
        if self._host is None:
            made: Any = backend_class(self._asked)
            self._host = made.on_host(self._backend.program)
        return self._compute(self._host, self._placed(self._host, heard.whole), heard.batch, part, heard.count, step)

    # ---- the step itself

    def compare(self, heard: Heard, found: tuple[float, float], step: int) -> None:
        """Compare (loss, norm of the gradient) of a step with those of its parts. All processes call it together.

        Raises Disagreement, the same on all processes.
        """
        backend = self._backend
        if backend.agree(int(any(one.compares_samples for one in self._alone.values()))):
            return
        known = evidence.whole_batch(backend, list(heard.parts.values()))
        apart = [evidence.relative(a, b) for a, b in zip(found, known, strict=True)]
        limits = [self._bounds().loss, self._bounds().grad]
        if backend.agree(int(_beyond(apart, limits))):
            one = next(iter(self._alone.values()))
            for seed in range(MEASURED_DRAWS):
                moved = evidence.whole_batch(backend, self._moved(one, heard, heard.parts, seed, step))
                for i, (a, b) in enumerate(zip(moved, known, strict=True)):
                    limits[i] = max(limits[i], MEASURED_FACTOR * evidence.relative(a, b))
        odd = evidence.from_all(backend, {backend.process: int(_beyond(apart, limits))}, (backend.processes,))
        if odd.any():
            raise Disagreement(
                expected=f"loss {known[0]:.9g} and gradient norm {known[1]:.9g} within rounding, as its parts have",
                what="another loss or gradient norm of the step, although its parts agree",
                devices=[p for p, owner in enumerate(evidence.owners(backend, self.devices)) if odd[owner]],
                certain=bool(odd.sum() == 1 and backend.processes == self.devices > 1),
            )

    # ---- computing

    def _compute(
        self, one: Any, placed: Any, batch: Mapping[str, np.ndarray], part: int, count: int, step: int
    ) -> Evidence:
        loss, weight, grads = one.weighed_gradients(placed, evidence.part_of(batch, part, count), step=step)
        return Evidence(loss=loss, weight=weight, grads=grads)

    def _placed(self, one: Any, whole: Whole) -> Any:
        """Return a state of the backend `one` with the tensors of `whole`."""

        def read(role: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
            if role == COUNT:
                return np.array(0, np.int32)
            return whole[role, name][tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]

        return one.restore_state(read)

    def _bounds(self) -> Bounds:
        return Bounds.of(self.definition, self._recipe.precision, self._positions)

    @property
    def _positions(self) -> int:
        tokens = self._recipe.data.tokens_per_sample() or 1
        return self._recipe.batch * tokens

    def _moved(self, one: Any, heard: Heard, parts: Iterable[int], seed: int, step: int) -> list[Evidence]:
        """Return the evidence of the backend `one` on `parts`, with parameters moved by rounding."""
        error = rounding.step_error(self.definition, self._positions, self._recipe.precision)
        change = rounding.moving(self.definition.params, error, seed)
        moved = {(role, name): change(role, name, (0,) * x.ndim, x) for (role, name), x in heard.whole.items()}
        placed = self._placed(one, moved)
        return [self._compute(one, placed, heard.batch, part, heard.count, step) for part in parts]

    def _bound(self, heard: Heard, part: int, truth: Evidence, step: int) -> float:
        """Return how far rounding may move a gradient: derived, or measured on the host if it amplifies more."""
        moved = [self._moved(self._host, heard, [part], seed, step)[0] for seed in range(MEASURED_DRAWS)]
        largest = max(evidence.distance(one.grads, truth.grads) for one in moved)
        return max(self._bounds().grad, MEASURED_FACTOR * largest)


def _beyond(apart: Iterable[float], limits: Iterable[float]) -> bool:
    return any(not a <= limit for a, limit in zip(apart, limits, strict=True))


def whole_tensors(backend: Backend, state: Any) -> dict[tuple[str, str], np.ndarray]:
    """Return the parameters and States of a model, whole, on every process; all of them call it together."""
    tensors = backend.program.definition.tensors
    found: dict[tuple[str, str], np.ndarray] = {}
    covered = {key: np.zeros(info.shape, bool) for key, info in tensors.items()}
    for box in backend.local_boxes(state):
        key = box.role, box.name
        at = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
        if key in tensors and not covered[key][at].all():
            values = box.fetch()
            whole = found.setdefault(key, np.zeros(tensors[key].shape, values.dtype))
            whole[at], covered[key][at] = values.reshape(box.shape), True
    for role, name in tensors:
        if backend.agree(int(not covered[role, name].all())):
            gather: Any = backend.whole_parameter  # type: ignore[attr-defined]
            whole = gather(state, name) if role == "params" else gather(state, name, role)
            found[role, name] = whole.astype(found[role, name].dtype) if (role, name) in found else whole
    return found


def _refused(what: str, expected: str, got: str, do: str) -> UserError:
    return UserError(f"recipe field referee {what}", expected=expected, got=got, do=f"{do}, or leave referee out.")
