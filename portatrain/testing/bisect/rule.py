"""Judge what a step makes of its gradients: clipping, the optimizer's rule, averages and States.

The oracle takes the side's own gradients. Those in a compiled step may differ from them by rounding, so every element
of a result lies between what the rule makes of the gradient minus and plus that bound, with the bound of the rule's own
rounding (`backends/reference/optim_bounds.py`) on either side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from portatrain.backends.base import Arrays
from portatrain.backends.reference import optim, optim_bounds
from portatrain.backends.reference.run import after_step
from portatrain.backends.reference.watched import watch_oracle
from portatrain.backends.rounding import bound, positions_in
from portatrain.backends.state import COUNT
from portatrain.errors import UserError
from portatrain.optim import Rule
from portatrain.testing.bisect.choices import MOST, Choices
from portatrain.testing.bisect.operations import difference, largest, place
from portatrain.testing.bisect.report import Stage
from portatrain.testing.bisect.sides import Running

U = 2.0**-24
FAR = 10**9
"""A step at which corrections for the first steps are 1."""


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """A tensor of the new state that is not the oracle's."""

    stage: Stage
    what: str
    name: str
    element: str
    index: int
    value: float
    oracle: float
    bound: float
    hint: str


@dataclass(kw_only=True)
class Update:
    """One step of a side: the state before it, its gradients, the state after it. batch: microbatches. taken: for each
    of them the results in which the side chose otherwise than the oracle, as in `watch_oracle`."""

    side: Running
    step: int
    before: Mapping[str, np.ndarray]
    gradients: Arrays
    after: Mapping[str, np.ndarray]
    batch: Mapping[str, np.ndarray]
    taken: Sequence[Mapping[tuple[int, int], np.ndarray]] = ()
    unjudged: bool = False
    """Set by `wrong` if rounding may decide so many choices that States are not judged."""

    def wrong(self) -> Iterator[Wrong]:
        """Yield what is wrong, the first cause first."""
        yield from self.rule()
        yield from self._others()
        yield from self._averages()
        yield from self._states()

    def rule(self) -> Iterator[Wrong]:
        """Yield what is wrong in the parameters and slots."""
        if self.side.recipe.precision != "bf16-state":  # which rounds by random numbers
            yield from self._count()
            yield from self._rule()

    def _count(self) -> Iterator[Wrong]:
        got, due = int(self.after[COUNT]), int(self.before[COUNT]) + 1
        if got != due:
            yield self._found(Stage.AFTER, "the count of applied steps", COUNT, np.array(got), np.array(due), 0.0)

    # ---- the rule

    def _factor(self) -> float:
        clip = self.side.program.clip_norm
        norm = optim.global_norm({n: g.astype(np.float64) for n, g in self.gradients.items()})
        return 1.0 if clip is None or norm <= clip else clip / norm

    def _rule(self) -> Iterator[Wrong]:
        factor = self._factor()
        bad = []
        for name in self.gradients:
            try:
                found = self._of_parameter(name, factor)
            except TypeError:  # a rule that the oracle has no equations for
                return
            if found is not None:
                bad.append((name, found))
        if not bad:
            return
        name, (slot, got, due, limit) = bad[0]
        kind = type(self.side.recipe.optimizer).__name__
        what = f"{f'slot {slot}' if slot else 'the update'} of parameter {name} by rule {kind}"
        stage, hint = self._explained([n for n, _ in bad], factor)
        if len(bad) > 1:
            what += f" (and of {len(bad) - 1} more of {len(self.gradients)} parameters)"
        full = f"opt/{slot}/{name}" if slot else f"params/{name}"
        yield self._found(stage, what, full, got, due, limit, hint)

    def _of_parameter(
        self, name: str, factor: float, rule: Rule | None = None, decay: bool | None = None, count: int = 0
    ) -> tuple[str, np.ndarray, np.ndarray, np.ndarray] | None:
        """Return (slot, values, the oracle's, the bounds) of the first slot of a parameter that is wrong, '' for the
        parameter itself; None if all is well."""
        side = self.side
        info = side.definition.params[name]
        slots = self._slots(self.before, name)
        gradient = self.gradients[name].astype(np.float64)
        positions = positions_in(side.definition, self.batch, microbatches=True)
        apart = bound(side.definition, positions, side.recipe.precision) * largest(gradient)
        start: dict[str, Any] = {
            "param": np.asarray(self.before[f"params/{name}"], np.float64),
            "slots": slots,
            "scale": side.recipe.lr_scale(self.step),
            "count": count or int(self.before[COUNT]) + 1,
            "decay": name in side.program.decay if decay is None else decay,
        }
        rule = rule or side.recipe.optimizer
        due = optim.step(rule, info, grad=factor * gradient, **start)
        own = optim_bounds.allowed(rule, info, grad=factor * gradient, **start)
        near = [optim.step(rule, info, grad=factor * (gradient + sign * apart), **start) for sign in (-1.0, 1.0)]
        for slot in (*slots, ""):
            true = due[1][slot] if slot else due[0]
            got = self.after[f"opt/{slot}/{name}" if slot else f"params/{name}"]
            limit = (own[1][slot] if slot else own[0]) + np.max(
                [np.abs((n[1][slot] if slot else n[0]) - true) for n in near], axis=0
            )
            limit = np.broadcast_to(limit, true.shape) + 2 * U * np.abs(true)
            if not (difference(got, true) <= limit).all():
                return slot, np.asarray(got), true, limit
        return None

    def _slots(self, arrays: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
        made = optim.init(self.side.recipe.optimizer, self.side.definition.params[name])
        return {slot: np.asarray(arrays[f"opt/{slot}/{name}"], np.float64) for slot in made}

    def _explained(self, names: list[str], factor: float) -> tuple[Stage, str]:
        """Return what one change of the rule explains all of `names`: another decay, clipping, count or field. Several
        may, as in the first step, where each of some of them scales the whole update."""

        def fits(factor: float, rule: Rule | None = None, decay: bool | None = None, count: int = 0) -> bool:
            return all(self._of_parameter(n, factor, rule, decay, count) is None for n in names)

        decay = self.side.program.decay
        if all(n not in decay for n in names) and fits(factor, decay=True):
            return Stage.RULE, "weight decay is applied, and the recipe's patterns leave it out"
        if all(n in decay for n in names) and fits(factor, decay=False):
            return Stage.RULE, "weight decay is left out, and the recipe's patterns ask for it"
        used = self._used_factor(names)
        if used is not None and fits(used):
            return Stage.CLIPPING, f"the gradients were multiplied by {used:.6g}, and clipping asks for {factor:.6g}"
        found = []
        rule, inner, path = self._acting(names)
        for field, value in (*self._switches(inner), *self._numbers(names, factor, inner)):
            other = dataclasses.replace(inner, **{field: value})
            whole: Any = {path: other}
            if fits(factor, dataclasses.replace(rule, **whole) if path else other):
                name, was = f"{path}.{field}" if path else field, getattr(inner, field)
                found.append(f"as with {name}={_word(value)}, and the recipe has {name}={_word(was)}")
        true = int(self.before[COUNT]) + 1
        counts = {true - 1: f"as in step {true - 1}", true + 1: f"as in step {true + 1}"}
        for count, words in {**counts, FAR: "without the corrections of the first steps"}.items():
            if count > 0 and fits(factor, count=count):
                found.append(words)
        return Stage.RULE, ", or ".join(found)

    def _acting(self, names: list[str]) -> tuple[Rule, Rule, str]:
        """Return the recipe's rule, the one that updates `names`, and the field of the first that has the second; ''
        if they are one."""
        rule = self.side.recipe.optimizer
        acting = {rule.rule_for(self.side.definition.params[n]) for n in names}
        for field in dataclasses.fields(rule):
            if acting == {getattr(rule, field.name)}:
                return rule, getattr(rule, field.name), field.name
        return rule, rule, ""

    def _switches(self, rule: Rule) -> Iterator[tuple[str, bool]]:
        for field in dataclasses.fields(rule):
            if isinstance(value := getattr(rule, field.name), bool):
                try:
                    dataclasses.replace(rule, **{field.name: not value})
                except UserError:  # with the other fields
                    continue
                yield field.name, not value

    def _used_factor(self, names: list[str]) -> float | None:
        """Return the factor of the gradients that a mean of them shows; None if the rule keeps none."""
        b1 = getattr(self.side.recipe.optimizer, "b1", None)
        if b1 is None or type(self.side.recipe.optimizer).__name__ != "AdamW":
            return None
        top = below = 0.0
        for name in names:
            old, new = (np.asarray(a[f"opt/m/{name}"], np.float64) for a in (self.before, self.after))
            g = (1 - b1) * self.gradients[name].astype(np.float64)
            top, below = top + float(((new - b1 * old) * g).sum()), below + float((g * g).sum())
        return top / below if below else None

    def _numbers(self, names: list[str], factor: float, rule: Rule) -> Iterator[tuple[str, float]]:
        """Yield (field, value) of the rule that acts: what the slots say of a decay rate, or the updates of the
        learning rate."""
        if type(rule).__name__ == "AdamW":
            for field, slot, power in (("b1", "m", 1), ("b2", "v", 2)):
                top = below = 0.0
                for name in names:
                    old, new = (np.asarray(a[f"opt/{slot}/{name}"], np.float64) for a in (self.before, self.after))
                    x = (factor * self.gradients[name].astype(np.float64)) ** power
                    top, below = top + float(((new - x) * (old - x)).sum()), below + float(((old - x) ** 2).sum())
                # As it is written: 0.95, and not what rounding makes of it.
                if below and 0 < (value := round(top / below, 4)) < 1:
                    yield field, value
        sums = np.zeros(4)
        scale = self.side.recipe.lr_scale(self.step)
        for name in names:
            before, after = (np.asarray(a[f"params/{name}"], np.float64) for a in (self.before, self.after))
            due, plain = (
                optim.step(
                    rule,
                    self.side.definition.params[name],
                    param=before,
                    grad=factor * self.gradients[name].astype(np.float64),
                    slots=self._slots(self.before, name),
                    scale=scale,
                    count=int(self.before[COUNT]) + 1,
                    decay=decays,
                )[0]
                for decays in (name in self.side.program.decay, False)
            )
            sums[:2] += ((after - before) * (due - before)).sum(), ((due - before) ** 2).sum()
            if name in self.side.program.decay:
                shrunk = -rule.lr * scale * before
                sums[2:] += ((after - plain) * shrunk).sum(), (shrunk**2).sum()
        if sums[1] and sums[0] > 0:
            yield "lr", float(f"{rule.lr * sums[0] / sums[1]:.5g}")
        if sums[3] and sums[2] > 0:
            yield "weight_decay", float(f"{sums[2] / sums[3]:.3g}")

    # ---- beside the rule

    def _others(self) -> Iterator[Wrong]:
        """A parameter that is not trained has moved."""
        for name in sorted(self.side.definition.params.keys() - self.gradients.keys()):
            got, due = (np.asarray(a[f"params/{name}"]) for a in (self.after, self.before))
            if not (difference(got, due) <= 0).all():
                what = f"parameter {name}, which is not trained,"
                yield self._found(Stage.RULE, what, f"params/{name}", got, due.astype(np.float64), 0.0, "it has moved")
                return

    def _averages(self) -> Iterator[Wrong]:
        decay = self.side.program.ema_decay
        if decay is None:
            return
        for name in sorted(self.side.program.ema):
            old, new = (np.asarray(a[f"ema/{name}"], np.float64) for a in (self.before, self.after))
            param = np.asarray(self.after[f"params/{name}"], np.float64)
            due = old + (1 - decay) * (param - old)
            # Four roundings: of the factor, the difference, the product and the sum.
            limit = 4 * U * np.maximum(np.abs(old), np.abs(param))
            if not (difference(new, due) <= limit).all():
                yield self._found(Stage.AFTER, f"the average of parameter {name}", f"ema/{name}", new, due, limit)
                return

    def _states(self) -> Iterator[Wrong]:
        side, definition = self.side, self.side.definition
        if not definition.states:
            return
        positions = positions_in(definition, self.batch, microbatches=True)
        error = bound(definition, positions, side.recipe.precision, runs=1)
        due = self._states_after(self.taken)
        limits = {n: error * largest(d) if d.dtype.kind == "f" else 0.0 for n, d in due.items()}
        wrong = [n for n in due if not (self._off(n, due[n]) <= limits[n]).all()]
        if not wrong:
            return
        # Other choices give other loads, and rounding may decide them.
        choices = Choices(side=side, arrays=self.before, batch=self.batch, step=self.step, taken=self.taken)
        found = choices.open()
        if len(found) > MOST:
            self.unjudged = True
            return
        others = [due, *(self._states_after(taken) for taken in choices.several(found))]
        for name in wrong:
            low, high = (pick([other[name] for other in others], axis=0) for pick in (np.min, np.max))
            got = np.asarray(self.after[f"state/{name}"])
            limit = limits[name] + np.maximum(due[name] - low, high - due[name])
            if not (self._off(name, due[name]) <= limit).all():
                yield self._found(Stage.AFTER, f"State {name}", f"state/{name}", got, np.asarray(due[name]), limit)
                return

    def _off(self, name: str, due: np.ndarray) -> np.ndarray:
        return difference(np.asarray(self.after[f"state/{name}"]), due)

    def _states_after(self, taken: Sequence[Mapping[tuple[int, int], np.ndarray]]) -> dict[str, np.ndarray]:
        """Return the States after the step, in the oracle, with these results in the place of its own."""
        side, states = self.side, self.side.states(self.before)
        for i in range(next(iter(self.batch.values())).shape[0]):
            micro = {k: v[i] for k, v in self.batch.items()}
            given = side.definition, side.parameters(self.before), micro, side.context(micro, self.step)
            with np.errstate(all="ignore"):
                _, found = watch_oracle(*given, states=states, taken=taken[i] if i < len(taken) else None)
            states = found.states
        return after_step(side.definition, states)

    def _found(
        self, stage: Stage, what: str, name: str, got: np.ndarray, due: np.ndarray, limit: Any, hint: str = ""
    ) -> Wrong:
        limits = np.broadcast_to(np.asarray(limit, np.float64), due.shape)
        beyond = difference(got, due) / np.maximum(limits, 1e-300)
        index = int(np.argmax(beyond)) if due.ndim else 0
        return Wrong(
            stage=stage,
            what=what,
            name=name,
            element=place(index, due.shape),
            index=index,
            value=float(np.asarray(got).flat[index]),
            oracle=float(due.flat[index]),
            bound=float(limits.flat[index]),
            hint=hint,
        )


def _word(value: Any) -> str:
    return str(value) if isinstance(value, bool) else f"{value:.4g}"
