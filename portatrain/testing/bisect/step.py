"""Take a step on two sides from one state, and find the first place at which one of them is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from portatrain.backends.base import Arrays
from portatrain.backends.rounding import bound, positions_in
from portatrain.backends.watched import Watched
from portatrain.testing.bisect.choices import MOST, Choices
from portatrain.testing.bisect.forward import DEVIATIONS, DRAWS, MEASURED, Trace
from portatrain.testing.bisect.operations import difference, largest, looks_like, place
from portatrain.testing.bisect.report import Fault, Replay, Stage, StepRow
from portatrain.testing.bisect.rule import Update, Wrong
from portatrain.testing.bisect.served import other_packages, running
from portatrain.testing.bisect.sides import Running, Side, check_shapes

Rows = Mapping[str, np.ndarray]
Progress = Callable[[str], None]
TOO_OPEN = f"rounding may decide more than {MOST} choices of experts otherwise: what they move is not judged"
LEAST = 1e-6
"""Elements below this part of the largest element of all gradients are rounding, as in `recipe_check/compare.py`."""


def replay(
    sides: tuple[Side, Side],
    batches: Sequence[tuple[Rows, Rows]],
    *,
    first: int = 1,
    start: tuple[Arrays, Arrays] | None = None,
    sizes: str = "",
    notes: Sequence[str] = (),
    progress: Progress = lambda text: None,
) -> Replay:
    """Take steps `first`, `first` + 1, ... on both sides, each from the state of the first side; end at a fault.

    Args:
        batches: for each step the samples of both sides, arrays (samples, ...) with 'sample'.
        start: the states before the first step, whole tensors by full name; None: those of fresh runs.
        progress: called with a line of text before what takes seconds.
    """
    names = (sides[0].name, sides[1].name)
    progress(f"making {names[0]} and {names[1]}")
    with ExitStack() as stack:
        made = [_opened(stack, side) for side in sides]
        return _replayed((made[0], made[1]), batches, first, start, sizes, list(notes), progress)


def _opened(stack: ExitStack, side: Side) -> Running:
    made = running(side)
    stack.callback(made.close)
    return made


def _replayed(
    both: tuple[Running, Running],
    batches: Sequence[tuple[Rows, Rows]],
    first: int,
    start: tuple[Arrays, Arrays] | None,
    sizes: str,
    said: list[str],
    progress: Progress,
) -> Replay:
    names = (both[0].name, both[1].name)
    check_shapes(*both)
    said += other_packages(*both)
    rows: list[StepRow] = []
    given = start or (both[0].first_state(), both[1].first_state())
    for step, pair in enumerate(batches, start=first):
        one = _Step(both, given, pair, step, progress)
        fault = one.fault()
        rows += one.rows
        said += [note for note in dict.fromkeys(one.notes) if note not in said]
        if fault is not None:
            return Replay(names=names, sizes=sizes, rows=rows, fault=fault, notes=said)
        given = (one.after[0], {**one.after[0]})
    return Replay(names=names, sizes=sizes, rows=rows, notes=said)


class _Step:
    def __init__(
        self,
        sides: tuple[Running, Running],
        arrays: tuple[Arrays, Arrays],
        rows: tuple[Rows, Rows],
        step: int,
        progress: Progress,
    ) -> None:
        self.sides, self.arrays, self.step, self.progress = sides, arrays, step, progress
        self.batches = tuple(side.recipe.microbatches(dict(r)) for side, r in zip(sides, rows, strict=True))
        self.rows: list[StepRow] = []
        self.notes: list[str] = []
        self.after: list[Arrays] = []
        self._unseen: set[str] = set()
        self._taken: tuple[list[Any], ...] = ([], [])
        self._terms: tuple[dict[str, float], ...] = ({}, {})

    def fault(self) -> Fault | None:
        """Return the first fault of the step, or None; then `after` has the state after it on both sides."""
        self.progress(f"step {self.step}: gradients")
        states = [side.state(a) for side, a in zip(self.sides, self.arrays, strict=True)]
        if (found := self._restored(states)) is not None:
            return found
        measured = [
            side.gradients(state, batch, self.step)
            for side, state, batch in zip(self.sides, states, self.batches, strict=True)
        ]
        self.losses = (float(measured[0][0]), float(measured[1][0]))
        self.gradients = tuple(g for _, g in measured)
        if (found := self._trained()) is not None:
            return found
        if not self._same_gradients() and (found := self._traced(states)) is not None:
            return found
        self.progress(f"step {self.step}: the update")
        for side, state, batch in zip(self.sides, states, self.batches, strict=True):
            after = side.stepped(state, batch, self.step, side.recipe.lr_scale(self.step))
            self.after.append(side.whole(after))
        return self._updated()

    def _restored(self, states: Sequence[Any]) -> Fault | None:
        held = [side.whole(state) for side, state in zip(self.sides, states, strict=True)]
        for name in held[0]:
            if name not in held[1]:
                continue
            true = [np.asarray(a[name]) if name in a else h[name] for a, h in zip(self.arrays, held, strict=True)]
            wrong = [i for i in (0, 1) if not np.array_equal(held[i][name], true[i].astype(held[i][name].dtype), True)]
            if wrong:
                mine, due = held[wrong[0]][name], true[wrong[0]]
                index = int(np.argmax(difference(mine, due)))
                return Fault(
                    step=self.step,
                    stage=Stage.STATE,
                    what=f"{name} before the step",
                    element=place(index, due.shape),
                    values=(float(held[0][name].flat[index]), float(held[1][name].flat[index])),
                    oracle=(float(true[0].flat[index]), float(true[1].flat[index])),
                    bound=0.0,
                    wrong=[self.sides[i].name for i in wrong],
                    hint=looks_like(mine, due),
                )
        return None

    # ---- gradients

    def _trained(self) -> Fault | None:
        """A parameter that a side trains and its recipe does not, or the other way round."""
        due = [side.program.trainable for side in self.sides]
        wrong = {n for g, names in zip(self.gradients, due, strict=True) for n in g.keys() ^ names}
        differ = wrong or (due[0] ^ due[1])
        if not differ:
            return None
        name = min(differ)
        values = [name in g for g in self.gradients]
        true = [name in names for names in due]
        word = {True: "a gradient", False: "no gradient"}
        return Fault(
            step=self.step,
            stage=Stage.GRADIENT,
            what=f"parameter {name}, which is {'' if true[0] else 'not '}trained by the recipe",
            values=(word[values[0]], word[values[1]]),
            oracle=(word[true[0]], word[true[1]]),
            bound=0.0,
            wrong=[side.name for side, got, t in zip(self.sides, values, true, strict=True) if got != t],
            hint=f"and {len(differ) - 1} more" if len(differ) > 1 else "",
        )

    def _bound(self, i: int, runs: int) -> float:
        side = self.sides[i]
        positions = positions_in(side.definition, self.batches[i], microbatches=True)
        return bound(side.definition, positions, side.recipe.precision, runs=runs)

    def _same_gradients(self) -> bool:
        """Note the largest difference of the gradients; return whether loss and gradients are within the bound."""
        a, b = self.gradients
        most = max(self._bound(i, 2) for i in (0, 1))
        floor = LEAST * max((largest(g) for g in a.values()), default=0.0)
        good = a.keys() == b.keys()
        found = [(0.0, 0.0, most, "")]  # (difference over its bound, difference, bound, name)
        for name in a.keys() & b.keys():
            size, apart = max(largest(a[name]), 1e-300), float(difference(a[name], b[name]).max(initial=0.0))
            allowed = most * size + floor
            found.append((apart / max(allowed, 1e-300), apart / size, allowed / size, name))
            good = good and apart <= allowed
        _, apart, allowed, name = max(found)
        row = StepRow(step=self.step, losses=self.losses, difference=apart, tensor=name, bound=allowed)
        self.rows.append(row)
        return good and abs(self.losses[0] - self.losses[1]) <= most * abs(self.losses[0])

    def _traced(self, states: Sequence[Any]) -> Fault | None:
        self.progress(f"step {self.step}: the gradients differ by more than rounding; operation by operation")
        watched = [
            side.watch(state, batch, self.step)
            for side, state, batch in zip(self.sides, states, self.batches, strict=True)
        ]
        if watched[0] is None or watched[1] is None:
            names = [side.name for side, w in zip(self.sides, watched, strict=True) if w is None]
            self.notes.append(f"{' and '.join(names)} cannot show single operations")
            return self._totals(None)
        if len(watched[0]) == len(watched[1]):
            for m, pair in enumerate(zip(*watched, strict=True)):
                micros = tuple({k: v[m] for k, v in batch.items()} for batch in self.batches)
                trace = Trace(step=self.step, sides=self.sides, watched=pair, micros=micros, arrays=self.arrays)  # type: ignore[arg-type]
                if (found := next(trace.forward(), None)) is not None:
                    return found
                for i in (0, 1):
                    self._taken[i].append(trace.taken[i])
                self.progress(f"step {self.step}: every result agrees with the oracle; backward")
                if (found := next(trace.backward(), None) or self._uses(trace)) is not None:
                    return found
        else:
            self.notes.append("the sides have other numbers of microbatches, so operations are not compared")
        return self._totals(watched)

    def _uses(self, trace: Trace) -> Fault | None:
        """A parameter with a gradient that is not the sum of those of its uses."""
        sums: list[dict[str, np.ndarray]] = []
        for watched, calls, side in zip(trace.watched, trace.oracle, self.sides, strict=True):
            found = {n: np.zeros(side.definition.params[n].shape) for n in watched.grads}
            terms = self._terms[len(sums)]
            for call, oracle in zip(watched.calls, calls, strict=True):
                most = max((largest(g) for g in (*call.arg_grads, *call.result_grads) if g is not None), default=0.0)
                for tag, grad in zip(oracle.tags, call.arg_grads, strict=True):
                    if tag is not None and grad is not None and tag[0] in found:
                        found[tag[0]][tag[1]] += grad
                        terms[tag[0]] = max(terms.get(tag[0], 0.0), most)
            sums.append(found)
        for name in sums[0]:
            pairs = [(w.grads[name], s[name]) for w, s in zip(trace.watched, sums, strict=True)]
            wrong = [
                i
                for i, (got, due) in enumerate(pairs)
                if difference(got, due).max() > self._bound(i, 1) * max(largest(due), self._terms[i].get(name, 0.0))
            ]
            if len(wrong) == 2:  # there are uses that are no recorded calls
                self._unseen.add(name)
            if len(wrong) == 1:
                uses = sum(tag is not None and tag[0] == name for call in trace.oracle[0] for tag in call.tags)
                hint = f"it is not the sum over the {uses} uses of the parameter in the model"
                return self._gradient_fault(name, [p[0] for p in pairs], [p[1] for p in pairs], wrong, hint)
        return None

    def _totals(self, watched: Sequence[Any] | None) -> Fault | None:
        """A gradient of the step that is not the sum of those of its microbatches, or not the oracle's."""
        for name in self.gradients[0]:
            a, b = (g[name] for g in self.gradients)
            apart = difference(a, b)
            size = max(largest(a), *(self._term(i, name, w) for i, w in enumerate(watched or (None, None))))
            if float(apart.max(initial=0.0)) <= max(self._bound(i, 2) for i in (0, 1)) * size:
                continue
            judged = watched is not None and name not in self._unseen
            if judged and all(self._is_sum(i, name, watched[i]) for i in (0, 1)):  # type: ignore[index]
                continue  # of gradients that have been judged, use by use
            index = int(np.argmax(apart))
            true = [self._true(i, name, index, 0) for i in (0, 1)]
            near = [max(abs(self._true(i, name, index, s) - true[i]) for s in range(1, DRAWS + 1)) for i in (0, 1)]
            limits = [DEVIATIONS * self._bound(i, 1) * size + MEASURED * near[i] for i in (0, 1)]
            values = (float(a.flat[index]), float(b.flat[index]))
            wrong = [i for i in (0, 1) if not abs(values[i] - true[i]) <= limits[i]]
            for i in wrong:
                limits[i] += self._by_choice(i, name, index, true[i])
            wrong = [i for i in wrong if not abs(values[i] - true[i]) <= limits[i]]
            if not wrong:
                continue
            hint = "" if watched is None or watched[wrong[0]] is None else self._how(wrong[0], name, watched[wrong[0]])
            return Fault(
                step=self.step,
                stage=Stage.GRADIENT,
                what=f"the gradient of parameter {name}, summed over microbatches and devices",
                element=place(index, a.shape),
                values=values,
                oracle=(true[0], true[1]),
                bound=max(limits),
                wrong=[self.sides[i].name for i in wrong],
                hint=hint,
            )
        return None

    def _is_sum(self, i: int, name: str, micros: Sequence[Watched]) -> bool:
        due = np.sum([m.grads[name].astype(np.float64) for m in micros], axis=0) / sum(m.weight for m in micros)
        size = max(largest(due), self._term(i, name, micros))
        return float(difference(self.gradients[i][name], due).max(initial=0.0)) <= self._bound(i, 2) * size

    def _term(self, i: int, name: str, micros: Sequence[Watched] | None) -> float:
        """Return the largest term of a gradient: a sum that cancels is as far off as its terms. Of keys with a bias the
        gradient is zero, and rounding is what is left."""
        return 0.0 if micros is None else self._terms[i].get(name, 0.0) / sum(m.weight for m in micros)

    def _how(self, i: int, name: str, micros: Sequence[Watched]) -> str:
        """Return how the gradients of microbatches give what the step has; each of them is what the oracle has."""
        got = self.gradients[i][name].astype(np.float64)
        weight = sum(m.weight for m in micros)
        each = np.stack([m.grads[name].astype(np.float64) for m in micros])

        def is_it(due: np.ndarray) -> bool:
            return float(difference(got, due).max()) <= self._bound(i, 2) * largest(due)

        due = each.sum(axis=0) / weight
        if is_it(due):
            return ""
        if is_it(np.mean([g / m.weight for g, m in zip(each, micros, strict=True)], axis=0)):
            return "it is the mean of the means of the microbatches, which have unequal weights"
        for k, g in enumerate(each if len(each) > 1 else ()):
            if is_it(g / weight) or is_it(g / micros[k].weight):
                return f"it is that of microbatch {k} alone"
        factor = float((got * due).sum() / max(float((due * due).sum()), 1e-300))
        if is_it(factor * due):
            return f"it is {factor:.6g} times the right one"
        return "each operation is right, and their sum is not: look at the compiled program, the mesh or accumulation"

    def _by_choice(self, i: int, name: str, index: int, true: float) -> float:
        """Return how far the choices that rounding may decide otherwise move an element of the gradient of the step,
        which a compiled program makes anew."""
        choices = Choices(
            side=self.sides[i], arrays=self.arrays[i], batch=self.batches[i], step=self.step, taken=self._taken[i]
        )
        found = choices.open()
        if len(found) > MOST:
            self.notes.append(TOO_OPEN)
            return float("inf")
        return sum(abs(self._true(i, name, index, 0, choices.with_others([one])) - true) for one in found)

    def _true(self, i: int, name: str, index: int, seed: int, taken: Sequence[Any] | None = None) -> float:
        """Return one element of the gradient in float64; with a seed at parameters that are moved by rounding; with
        `taken` for other choices than those of the side."""
        taken = self._taken[i] if taken is None else taken
        given = self.arrays[i], self.batches[i], self.step
        return self.sides[i].true_gradient(*given, name, index, seed=seed, taken=taken)

    def _gradient_fault(
        self, name: str, got: Sequence[np.ndarray], due: Sequence[np.ndarray], wrong: list[int], hint: str
    ) -> Fault:
        index = int(np.argmax(difference(got[wrong[0]], due[wrong[0]])))
        return Fault(
            step=self.step,
            stage=Stage.GRADIENT,
            what=f"the gradient of parameter {name}",
            element=place(index, due[0].shape),
            values=(float(got[0].flat[index]), float(got[1].flat[index])),
            oracle=(float(due[0].flat[index]), float(due[1].flat[index])),
            bound=max(self._bound(i, 1) * largest(due[i]) for i in (0, 1)),
            wrong=[self.sides[i].name for i in wrong],
            hint=hint,
        )

    # ---- the update

    def _updated(self) -> Fault | None:
        found: list[Wrong | None] = []
        for i, side in enumerate(self.sides):
            update = Update(
                side=side,
                step=self.step,
                before=self.arrays[i],
                gradients=self.gradients[i],
                after=self.after[i],
                batch=self.batches[i],
                taken=self._taken[i],
            )
            found.append(next(update.wrong(), None))
            self.notes += [TOO_OPEN] * update.unjudged
        wrong = [i for i in (0, 1) if found[i] is not None]
        if not wrong:
            return self._other_rule()
        bad = found[wrong[0]]
        assert bad is not None
        return self._update_fault(bad, (bad.oracle, bad.oracle), [self.sides[i].name for i in wrong])

    def _other_rule(self) -> Fault | None:
        """What the second side makes of its gradients, by the recipe of the first."""
        if self.sides[0].recipe == self.sides[1].recipe:
            return None
        update = Update(
            side=self.sides[0],
            step=self.step,
            before=self.arrays[1],
            gradients=self.gradients[1],
            after=self.after[1],
            batch=self.batches[0],
        )
        bad = next(update.rule(), None)
        return None if bad is None else self._update_fault(bad, None, ())

    def _update_fault(self, bad: Wrong, oracle: Any, wrong: Sequence[str]) -> Fault:
        values: Any = tuple(float(np.asarray(a.get(bad.name, np.nan)).flat[bad.index]) for a in self.after)
        return Fault(
            step=self.step,
            stage=bad.stage,
            what=bad.what,
            element=bad.element,
            values=values,
            oracle=oracle,
            bound=bad.bound,
            wrong=wrong,
            hint=bad.hint,
        )
