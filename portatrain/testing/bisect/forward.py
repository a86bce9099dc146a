"""Walk the calls of two sides forward, then backward, to the first operation at which one of them is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from portatrain.backends.reference.differences import directional_derivative
from portatrain.backends.reference.watched import watch_oracle
from portatrain.backends.rounding import bound, positions_in, step_error
from portatrain.backends.watched import Call, Watched
from portatrain.testing.bisect.operations import (
    Error,
    Judge,
    difference,
    index_of,
    largest,
    looks_like,
    place,
    value_at,
)
from portatrain.testing.bisect.report import Fault, Stage
from portatrain.testing.bisect.sides import Running
from portatrain.testing.tolerance import MOVE, tolerance

Pair = tuple[Any, Any]
DEVIATIONS = 8.0
"""Of the error e sqrt(2 k) of a value that passed k operations forward and backward, which is one in the root mean
square: a single element may be off by this many, as in the kernel court (docs/understand/rounding.md)."""
SAME = 1e-9
"""The oracle computed the same thing twice if the results differ by less than this part of their largest element."""
DRAWS = 3
CHOICES = ("sign", "floor")
"""Operations with results that are numbers and jump, as whole numbers and truth values do."""
HELD = ("stop_gradient", *CHOICES)
"""Operations through which no gradient goes."""
MEASURED = 4.0
"""And by this many times what moving every parameter by the error of an operation makes of it, the most of DRAWS: where
terms cancel."""

BETWEEN = "plain arithmetic makes it of results that are right, or an operation that is not judged by itself"


@dataclass(kw_only=True)
class Trace:
    """One microbatch of a step on both sides, with the oracle's calls of each side's own model.

    arrays: the state at which the step begins. `taken`: of each side the results, by numbers of call and result, in
    which it chose otherwise than the oracle.
    """

    step: int
    sides: tuple[Running, Running]
    watched: tuple[Watched, Watched]
    micros: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]
    arrays: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]

    def __post_init__(self) -> None:
        self.taken: tuple[dict[tuple[int, int], np.ndarray], ...] = ({}, {})
        self.oracle = [self._oracle(i, 0) for i in (0, 1)]
        self._plain = tuple(self.oracle)  # without the choices of the sides
        for watched, oracle in zip(self.watched, self.oracle, strict=True):
            for call, true in zip(watched.calls, oracle, strict=False):
                if call.template == true.template:
                    call.template = true.template  # with the functions of the oracle's model
        self._moved: dict[int, list[Sequence[Call]]] = {}
        self._reached: Sequence[Call] | None = None
        self.judges = tuple(
            Judge(context=side.context(micro, self.step), terms=max(positions_in(side.definition, micro), 64))
            for side, micro in zip(self.sides, self.micros, strict=True)
        )

    def _oracle(self, i: int, seed: int, added: Mapping[tuple[int, int], np.ndarray] | None = None) -> Any:
        side, micro = self.sides[i], self.micros[i]
        params = side.parameters(self.arrays[i])
        if seed:
            rng = np.random.default_rng(seed)
            size = self._error(i)
            params = {n: p * (1 + size * rng.standard_normal(p.shape)) for n, p in params.items()}
        context, states = side.context(micro, self.step), side.states(self.arrays[i])
        calls, found = watch_oracle(
            side.definition, params, micro, context, states=states, added=added, taken=self.taken[i]
        )
        return calls if added is None else (calls, found)

    def _error(self, i: int) -> float:
        side = self.sides[i]
        return step_error(side.definition, positions_in(side.definition, self.micros[i]), side.recipe.precision)

    def allowed(self, i: int, size: float, near: float) -> float:
        """Return how far a value of scale `size` may be from the oracle's after it passed through the model, if moving
        the parameters by rounding moves it by `near`."""
        side = self.sides[i]
        positions = positions_in(side.definition, self.micros[i])
        return DEVIATIONS * bound(side.definition, positions, side.recipe.precision, runs=1) * size + MEASURED * near

    def near(self, i: int, k: int, part: str, j: int) -> float:
        """Return how far moving the parameters by rounding moves an array of call `k`."""
        if i not in self._moved:
            self._moved[i] = [self._oracle(i, seed) for seed in range(1, DRAWS + 1)]
        true = getattr(self.oracle[i][k], part)[j]
        found = (difference(getattr(calls[k], part)[j], true) for calls in self._moved[i])
        return max(float(apart.max(initial=0.0)) for apart in found)

    def _passed(self, size: float) -> float:
        """Return the difference of values of scale `size` below which no side can be beyond its own tolerance."""
        return max(tolerance(size, 0.0, judge.precision) for judge in self.judges)

    # ---- forward

    def forward(self) -> Iterator[Fault]:
        """Yield the first fault of the forward pass."""
        a, b = (w.calls for w in self.watched)
        for k in range(max(len(a), len(b))):
            if k >= len(a) or k >= len(b) or a[k].name != b[k].name or a[k].template != b[k].template:
                yield self._other_model(k)
                return
            yield from self._inputs(k)
            yield from self._results(k)
            yield from self._other_numbers(k)
            self._follow(k)

    def _follow(self, k: int) -> None:
        """Let the oracle go on with the choices of each side: where two logits differ by less than rounding, a side may
        choose another expert than the oracle, and both are right."""
        for i in (0, 1):
            call, true = self.watched[i].calls[k], self.oracle[i][k]
            for r, (mine, due) in enumerate(zip(call.results, true.results, strict=True)):
                chooses = due.dtype.kind != "f" or call.name in CHOICES
                if chooses and mine.shape == due.shape and float(difference(mine, due).max(initial=0.0)) > 0:
                    self.taken[i][k, r] = mine
                    self._moved.pop(i, None)
                    self.oracle[i] = [*self.oracle[i][: k + 1], *self._oracle(i, 0)[k + 1 :]]

    def _other_numbers(self, k: int) -> Iterator[Fault]:
        """A call of which the oracle has other values for one recipe than for the other."""
        if self.sides[0].recipe == self.sides[1].recipe:
            return
        calls = tuple(o[k] for o in self._plain)
        for part in ("args", "results"):
            for j, (x, y) in enumerate(zip(*(getattr(c, part) for c in calls), strict=True)):
                same = x.shape == y.shape and float(difference(x, y).max(initial=0.0)) <= SAME * largest(x)
                if same:
                    continue
                index = int(np.argmax(difference(x, y))) if x.shape == y.shape else 0
                mine = tuple(getattr(w.calls[k], part)[j] for w in self.watched)
                tag = calls[0].tags[j] if part == "args" else None
                named = f"parameter {tag[0]} as {calls[0]} gets it" if tag else f"argument {j} of {calls[0]}"
                what = str(calls[0]) if part == "results" else named
                yield self._fault(
                    Stage.MODEL if part == "results" else Stage.INPUT,
                    what,
                    place(index, x.shape),
                    tuple(value_at(m, index) for m in mine),
                    tuple(value_at(o, index) for o in (x, y)),
                    0.0,
                    (),
                    "the oracle has other values too: the recipes differ",
                )
                return

    def _other_model(self, k: int) -> Fault:
        texts: Any = tuple(_written(w.calls[k]) if k < len(w.calls) else "nothing" for w in self.watched)
        call = next(w.calls[k] for w in self.watched if k < len(w.calls))
        hint = f"{self.sides[0].name} calls {texts[0]}, {self.sides[1].name} calls {texts[1]}"
        return Fault(
            step=self.step, stage=Stage.MODEL, what=str(call), values=texts, oracle=None, bound=0.0, wrong=(), hint=hint
        )

    def _inputs(self, k: int) -> Iterator[Fault]:
        """A parameter, a whole number or a value of plain arithmetic that is not what the oracle has there."""
        calls = tuple(w.calls[k] for w in self.watched)
        for j in range(len(calls[0].args)):
            wrong, bounds = [], []
            for i, call in enumerate(calls):
                true = self.oracle[i][k].args[j]
                exact = true.dtype.kind != "f" or self.oracle[i][k].tags[j] is not None
                apart = difference(call.args[j], true) if call.args[j].shape == true.shape else np.array(np.inf)
                limit = 0.0
                if not exact and float(apart.max(initial=0.0)) > 0:
                    limit = self.allowed(i, largest(true), self.near(i, k, "args", j))
                bounds.append(limit)
                if not float(apart.max(initial=0.0)) <= limit:
                    wrong.append(i)
            if wrong:
                yield self._input_fault(k, j, wrong, max(bounds))
                return

    def _input_fault(self, k: int, j: int, wrong: list[int], limit: float) -> Fault:
        calls, i = tuple(w.calls[k] for w in self.watched), wrong[0]
        true = self.oracle[i][k].args[j]
        tag = self.oracle[i][k].tags[j]
        mine = calls[i].args[j]
        index = int(np.argmax(difference(mine, true))) if mine.shape == true.shape else 0
        what = f"parameter {tag[0]} as {calls[i]} gets it" if tag else f"argument {j} of {calls[i]}"
        return self._fault(
            Stage.INPUT,
            what,
            place(index, true.shape),
            tuple(value_at(c.args[j], index) for c in calls),
            tuple(value_at(o[k].args[j], index) for o in self.oracle),
            limit,
            wrong,
            looks_like(mine, true) or ("" if tag or true.dtype.kind != "f" else BETWEEN),
        )

    def _results(self, k: int) -> Iterator[Fault]:
        calls = tuple(w.calls[k] for w in self.watched)
        for x, y in zip(calls[0].results, calls[1].results, strict=True):
            apart = difference(x, y) if x.shape == y.shape else np.array([np.inf])
            if float(apart.max(initial=0.0)) <= (self._passed(largest(y)) if y.dtype.kind == "f" else 0.0):
                continue
            errors = [judge.forward(call) for judge, call in zip(self.judges, calls, strict=True)]
            wrong = [i for i, e in enumerate(errors) if e is not None and e.bad]
            if wrong:
                yield self._call_fault(Stage.FORWARD, calls, wrong, errors)
                return

    def _call_fault(
        self, stage: Stage, calls: tuple[Call, ...], wrong: list[int], errors: Sequence[Error | None]
    ) -> Fault:
        bad = errors[wrong[0]]
        assert bad is not None
        number = int(bad.part.removeprefix("result") or 0)
        at = index_of(bad.element, calls[0].results[number].shape)
        both = [judge.forward(call, (number, at)) for judge, call in zip(self.judges, calls, strict=True)]
        return self._fault(
            stage,
            str(calls[0]),
            bad.element,
            tuple(None if e is None else e.value for e in both),
            tuple(None if e is None else e.oracle for e in both),
            bad.allowed,
            wrong,
            "",
        )

    # ---- backward

    def backward(self) -> Iterator[Fault]:
        """Yield the first fault of the backward pass, which begins at the last call.

        Where one side has no gradient at all, nothing before has asked for one: so the cause is the first such call.
        """
        a, b = (w.calls for w in self.watched)
        for k in range(min(len(a), len(b))):
            yield from self._after(k, missing=True)
        for k in reversed(range(min(len(a), len(b)))):
            yield from self._after(k)
            for j, (x, y) in enumerate(zip(a[k].arg_grads, b[k].arg_grads, strict=True)):
                if x is None or y is None:  # of a constant, or cut off before it: what gave it is judged then
                    continue
                apart = difference(x, y)
                size = max(largest(x), largest(y))
                if float(apart.max(initial=0.0)) <= self._passed(size):
                    continue
                index = int(np.argmax(apart))
                found = [list(judge.backward(c[k], j, index)) for judge, c in zip(self.judges, (a, b), strict=True)]
                wrong = [i for i, errors in enumerate(found) if any(e.bad for e in errors)]
                if wrong:
                    yield self._gradient_fault(k, j, index, found, wrong)
                    return

    def _gradient_fault(self, k: int, j: int, index: int, found: Sequence[Sequence[Error]], wrong: list[int]) -> Fault:
        which = next(n for n, e in enumerate(found[wrong[0]]) if e.bad)
        errors = [side[which] for side in found]
        call, tag = self.watched[0].calls[k], self.oracle[0][k].tags[j]
        of = f"parameter {tag[0]}" if tag else f"argument {j}"
        along = "" if which == 0 else " along a random direction"
        return self._fault(
            Stage.BACKWARD,
            f"the gradient of {of}{along} in {call}",
            errors[0].element,
            tuple(e.value for e in errors),
            tuple(e.oracle for e in errors),
            max(e.allowed for e in errors),
            wrong,
            "it is zero: the use is cut off" if not np.any(self.watched[wrong[0]].calls[k].arg_grads[j]) else "",
        )

    def _after(self, k: int, missing: bool = False) -> Iterator[Fault]:
        """The gradient of a result, which comes from the calls after it and from plain arithmetic. missing: only one
        that a side does not have, else only those that both have."""
        calls = tuple(w.calls[k] for w in self.watched)
        for r, (x, y) in enumerate(zip(calls[0].result_grads, calls[1].result_grads, strict=True)):
            none = (x is None) + (y is None)
            if none != missing or (none and not self._trains(k, r)):
                continue
            x, y = (np.zeros(c.results[r].shape) if g is None else g for g, c in zip((x, y), calls, strict=True))
            size = max(largest(x), largest(y))
            apart = difference(x, y)
            if float(apart.max(initial=0.0)) <= self.allowed(0, size, 0.0) + self.allowed(1, size, 0.0):
                continue
            if all(self._of_its_uses(i, k, r, g) for i, g in enumerate((x, y))):
                continue
            index = int(np.argmax(apart))
            true = [self._slope(i, k, r, index, 0) for i in (0, 1)]
            near = [[abs(self._slope(i, k, r, index, s) - true[i]) for s in range(1, DRAWS + 1)] for i in (0, 1)]
            limits = [self.allowed(i, size, max(near[i])) for i in (0, 1)]
            values = tuple(float(g.flat[index]) for g in (x, y))
            wrong = [i for i in (0, 1) if not abs(values[i] - true[i]) <= limits[i]]
            if wrong:
                what = f"the gradient that arrives at the result of {calls[0]}"
                cut = "" if np.any((x, y)[wrong[0]]) else self._cut(calls[wrong[0]], missing)
                yield self._fault(
                    Stage.BACKWARD, what, place(index, x.shape), values, tuple(true), max(limits), wrong, cut
                )
                return

    def _of_its_uses(self, i: int, k: int, r: int, grad: np.ndarray) -> bool:
        """Return whether the gradient of a result is the sum of those of the calls that take it, which are judged."""
        result = self.oracle[i][k].results[r]
        total = np.zeros(grad.shape)
        for call, oracle in zip(self.watched[i].calls[k + 1 :], self.oracle[i][k + 1 :], strict=False):
            for arg, used in zip(oracle.args, call.arg_grads, strict=True):
                if arg is result and used is not None:
                    total = total + used
        return float(difference(grad, total).max(initial=0.0)) <= tolerance(
            largest(total), 0.0, self.judges[i].precision
        )

    def _cut(self, call: Call, missing: bool) -> str:
        before = missing and all(g is None for g in call.arg_grads)
        return f"it is zero: {'all that the call gets' if before else 'the result'} is cut off"

    def _trains(self, k: int, r: int) -> bool:
        """Return whether a gradient can go on from a result to a parameter that is trained. If none can, torch computes
        no gradient there and jax does, and no step has any use for it."""
        if self._reached is None:
            side, calls = self.sides[0], self.oracle[0]
            rng = np.random.default_rng(0)
            params = dict(side.parameters(self.arrays[0]))
            for name in side.program.trainable:  # by an amount and not a part of it: a factor of LoRA is zero at first
                params[name] = params[name] + MOVE * rng.standard_normal(params[name].shape)
            held = {
                (number, i): result
                for number, call in enumerate(calls)
                for i, result in enumerate(call.results)
                if call.name in HELD or result.dtype.kind != "f"
            }
            self._reached, _ = watch_oracle(
                side.definition,
                params,
                self.micros[0],
                side.context(self.micros[0], self.step),
                states=side.states(self.arrays[0]),
                taken={**held, **self.taken[0]},
            )
        return bool(np.any(self._reached[k].results[r] != self.oracle[0][k].results[r]))

    def _slope(self, i: int, k: int, r: int, index: int, seed: int) -> float:
        """Return the derivative of the oracle's summed loss by one element of a result."""
        shape = self.oracle[i][k].results[r].shape
        unit = np.zeros(shape)
        unit.flat[index] = 1.0

        def loss(moved: np.ndarray) -> float:
            _, found = self._oracle(i, seed, {(k, r): moved - base})
            return float(found.objective)

        base = np.asarray(self.oracle[i][k].results[r], np.float64)
        return directional_derivative(loss, [base], [unit])

    # ---- words

    def _fault(
        self,
        stage: Stage,
        what: str,
        element: str,
        values: Any,
        oracle: Any,
        limit: float,
        wrong: Sequence[int],
        hint: str,
    ) -> Fault:
        return Fault(
            step=self.step,
            stage=stage,
            what=what,
            element=element,
            values=values,
            oracle=oracle,
            bound=limit,
            wrong=[self.sides[i].name for i in wrong],
            hint=hint,
        )


def _written(call: Call) -> str:
    """Return a call with its numbers and words, without its arrays."""
    args, options = call.template
    words = [repr(a) for a in args if isinstance(a, (str, int, float, bool))]
    words += [f"{k}={v!r}" for k, v in options.items() if isinstance(v, (str, int, float, bool, type(None)))]
    return f"ops.{call.name}({', '.join(words)})"
