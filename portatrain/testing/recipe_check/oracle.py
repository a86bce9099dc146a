"""The checks of a model in the oracle alone: nothing here needs a framework.

Each takes a `Subject` and returns findings; none if all is well.
"""

from __future__ import annotations

import sys
import time
import traceback
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from portatrain.backends.base import Context
from portatrain.backends.reference.guard import GuardedOps
from portatrain.backends.reference.run import Forward, after_step, forward, initial_states
from portatrain.backends.state import initial_box
from portatrain.errors import UserError, users_code
from portatrain.model.layout import COMPUTE, PARAMS, UNSPLIT, unknown_axes
from portatrain.model.module import Constant, Definition, State
from portatrain.model.ops import Loss
from portatrain.optim import declared_slots
from portatrain.recipe import Recipe
from portatrain.testing.guard import check_rows_independent
from portatrain.testing.recipe_check.blame import OPERATIONS, Call, crossing, parting, place_of, recording
from portatrain.testing.recipe_check.report import FORWARD, Finding
from portatrain.testing.recipe_check.small import Batch, Small
from portatrain.testing.recipe_check.watch import Watch, watching

REPEATS = 24
REPEATS_S = 1.5
"""Repetitions of the forward pass, at most so many and for about so long: what acts in one call of ten is met."""
MODES = {True: "training", False: "evaluation"}

Arrays = dict[str, np.ndarray]


@dataclass(kw_only=True)
class Subject:
    """What is checked. initial: the parameters of a fresh run. moved: parameters of which none is at a special value
    such as zero, so that a factor of zero hides nothing; both float64 arrays of float32 values."""

    small: Small
    initial: Arrays
    moved: Arrays
    used: set[str] = field(default_factory=set)
    """The operations that the model called."""
    over_batch: list[str] = field(default_factory=list)
    """Its calls of reductions over the batch, each with its place."""
    predicts: bool = False
    """True if the model has a `predict` that takes the batches of its data."""
    axes: dict[str, str] = field(default_factory=dict)
    """The axes of values that it names, each with the first place."""

    @property
    def recipe(self) -> Recipe:
        return self.small.recipe

    @property
    def definition(self) -> Definition:
        return self.small.definition

    @property
    def batch(self) -> Batch:
        return self.small.batches[0]

    def run(
        self, params: Arrays, *, training: bool, method: str = "__call__", step: int = 1, **options: Any
    ) -> Forward:
        """Run the model on the first batch in the oracle."""
        context = Context(seed=self.recipe.seed, step=step, training=training)
        with np.errstate(all="ignore"):
            return forward(self.definition, params, self.batch, context, method=method, **options)


def subject_of(small: Small) -> Subject:
    rng = np.random.default_rng(1)
    initial, moved = {}, {}
    for name, info in small.definition.params.items():
        origin = (0,) * len(info.shape)
        start = initial_box(info, small.recipe.seed, origin, info.shape).astype(np.float64)
        size = 0.3 * info.init.std if not isinstance(info.init, Constant) else 0.1 * max(1.0, abs(info.init.value))
        initial[name] = start
        moved[name] = (start + size * rng.normal(size=info.shape)).astype(np.float32).astype(np.float64)
    return Subject(small=small, initial=initial, moved=moved)


# ---- the checks


def axes(recipe: Recipe, definition: Definition) -> list[Finding]:
    """Axes that no mapping knows."""
    return [
        Finding(
            check="axes",
            what=f"axis {unknown.axis!r}",
            said=f"expected an axis of a mapping, got one of {', '.join(unknown.tensors[:3])} that is in none: it is "
            "whole on every device",
            do=(f"Did you mean {unknown.nearest}? " if unknown.nearest else "")
            + f"If it is meant to be whole, say so in the recipe: compute={{{unknown.axis!r}: ()}}.",
            numbers=False,
        )
        for unknown in unknown_axes(definition, compute=recipe.compute, params=recipe.params)
    ]


def runs(subject: Subject) -> list[Finding]:
    """What the oracle refuses in a forward pass: methods of arrays that frameworks do not share, random numbers of the
    model's own, attributes that are set."""
    found: list[Finding] = []
    for training, mode in MODES.items():
        with watching(subject.definition) as watch:
            value, error = _tried(
                lambda training=training: subject.run(subject.moved, training=training, operations=_noting(subject))
            )
        found += _random(watch, mode) + _assigned(subject.definition, watch, mode)
        if error is not None and not found:
            found.append(explained(FORWARD, error, f"the model in {mode}"))
        if error is None and value is not None and not found:
            found += _not_finite(subject, value, mode)
        if found:
            break
    if not found and hasattr(subject.definition.model, "predict"):
        with watching(subject.definition) as watch:
            _, error = _tried(
                lambda: subject.run(subject.moved, training=False, method="predict", operations=_noting(subject))
            )
        found += _random(watch, "predict") + _assigned(subject.definition, watch, "predict")
        if isinstance(error, UserError) and not found:
            found.append(explained(FORWARD, error, "the model's predict"))
        subject.predicts = error is None  # another error may say that it takes other arguments, such as a cache
    if not found and subject.definition.states:
        with watching(subject.definition) as watch:
            _, error = _tried(lambda: states_after_step(subject, subject.moved))
        found += _random(watch, "after_step") + _assigned(subject.definition, watch, "after_step")
        if error is not None and not found:
            found.append(explained(FORWARD, error, "the model's after_step"))
    return found or _unknown_axes(subject)


def _unknown_axes(subject: Subject) -> list[Finding]:
    """Axes of values, in `ops.shard` and reductions, that no mapping and no tensor has."""
    recipe, definition = subject.recipe, subject.definition
    known = {*COMPUTE, *PARAMS, *UNSPLIT, *(recipe.compute or ()), *(recipe.params or ()), *definition.axes}
    return [
        Finding(
            check=FORWARD,
            what=f"axis {axis!r}",
            said=f"expected an axis of a mapping or of a parameter, got one of a value in {place} that is in none",
            do=f"Correct its name, or say in the recipe that it is whole: compute={{{axis!r}: ()}}.",
        )
        for axis, place in subject.axes.items()
        if axis not in known
    ]


def _tried(call: Any) -> tuple[Any, Exception | None]:
    try:
        return call(), None
    except Exception as error:
        return None, error


def explained(check: str, error: Exception, where: str) -> Finding:
    """Return the finding for an error that running the model ended in, with the place in the user's file."""
    if isinstance(error, UserError):
        return Finding(check=check, what=error.what, said=f"expected {error.expected}, got {error.got}", do=error.do)
    paragraph = users_code.explained(error, where)
    if paragraph is not None:
        return explained(check, paragraph, where)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return Finding(
        check=check,
        what=where,
        said=f"expected a forward pass that ends, got {type(error).__name__}: {error}{place}",
        do="Correct the model's code; if none of it is there, please report this.",
    )


def _random(watch: Watch, mode: str) -> list[Finding]:
    return [
        Finding(
            check=FORWARD,
            what=f"random numbers of {name}",
            said=f"expected none but those of ops in {mode}, got some drawn in {place}",
            do="Use ops.dropout(x, rate, site=self.site) or ops.noise(..., site=self.site): they are the same on every "
            "framework, mesh and attempt.",
        )
        for name, place in dict.fromkeys(watch.drawn)
    ]


def _assigned(definition: Definition, watch: Watch, mode: str) -> list[Finding]:
    found = []
    for cls, name, place in dict.fromkeys(watch.assigned):
        held = [vars(m).get(name) for m in definition.modules.values() if type(m) is cls]
        state = any(isinstance(value, State) for value in held)
        found.append(
            Finding(
                check=FORWARD,
                what=f"{'State' if state else 'attribute'} {cls.__name__}.{name}",
                said=f"expected no attribute to be set when the model runs, got one that is set in {mode} in {place}",
                do=f"Add to a State with ops.tally(self, {name}=...) in the forward pass, and set it with "
                f"ops.update(self, {name}=...) in after_step(self, ops); keep other values in local variables.",
            )
        )
    return found


def _not_finite(subject: Subject, found: Forward, mode: str) -> list[Finding]:
    if not isinstance(found.value, Loss):
        return [
            Finding(
                check=FORWARD,
                what=type(subject.definition.model).__name__,
                said=f"expected a Loss from __call__(ops, batch), got a {type(found.value).__name__}",
                do="Return ops.cross_entropy(...) or ops.loss(...).",
            )
        ]
    values = {"loss": found.objective, "weight of the samples": found.value.weight_B}
    values |= {f"ops.aux({name!r})": aux.value_B for name, aux in found.auxes.items()}
    bad = [name for name, value in values.items() if not np.isfinite(value).all()]
    if not bad and not np.sum(found.value.weight_B) > 0:
        bad = ["sum of the samples' weights, which is not above 0"]
    return [
        Finding(
            check=FORWARD,
            what=f"the {name}",
            said=f"expected finite numbers in {mode}, near the initial parameters and in float64, got others",
            do="Look for a logarithm, a root or a division of zero, and for sizes that grow from layer to layer.",
        )
        for name in bad
    ]


def repeats(subject: Subject) -> list[Finding]:
    """The same inputs give the same loss, again and in a model that is built anew."""
    values = {}
    for training, mode in MODES.items():
        first = _losses(subject, subject.definition, training, states=True)
        began_s = time.perf_counter()
        for n in range(1, REPEATS):
            if not np.array_equal(
                again := _losses(subject, subject.definition, training, states=True), first, equal_nan=True
            ):
                what = _parting(subject, training) or f"the forward pass in {mode}"
                return [_unrepeated(what, first, again, f"call {n + 1} with the same inputs")]
            if time.perf_counter() - began_s > REPEATS_S:
                break
        values[training] = first
    anew = subject.recipe.describe()
    for training, mode in MODES.items():
        again = _losses(subject, anew, training, states=True)
        if not np.array_equal(again, values[training], equal_nan=True):
            return [_unrepeated(f"the model's construction ({mode})", values[training], again, "a model built anew")]
    return []


def _parting(subject: Subject, training: bool) -> str | None:
    """Return the first operation whose result differs between two runs of some."""
    context = Context(seed=subject.recipe.seed, step=1, training=training)
    runs: list[list[Call]] = []
    for _ in range(REPEATS):
        calls: list[Call] = []
        with np.errstate(all="ignore"):
            forward(subject.definition, subject.moved, subject.batch, context, operations=recording(calls))
        runs.append(calls)
    found = next(filter(None, (parting(runs[0], other) for other in runs[1:])), None)
    return None if found is None else f"what op {found} is given"


def _losses(
    subject: Subject, definition: Definition, training: bool, params: Arrays | None = None, *, states: bool = False
) -> np.ndarray:
    """Return the losses and weights of all samples and the auxiliary losses; with `states`, everything else too."""
    context = Context(seed=subject.recipe.seed, step=1, training=training)
    with np.errstate(all="ignore"):
        found = forward(definition, subject.moved if params is None else params, subject.batch, context)
    auxes = [found.auxes[name] for name in sorted(found.auxes)]
    values = [found.value.loss_B, found.value.weight_B, *(aux.value_B for aux in auxes if states or aux.loss)]
    if states:
        values += [found.states[name].astype(np.float64).ravel() for name in sorted(found.states)]
    return np.concatenate(values)


def _unrepeated(what: str, first: np.ndarray, again: np.ndarray, which: str) -> Finding:
    worst = int(np.argmax(np.abs(first - again))) if first.shape == again.shape else 0
    return Finding(
        check="the same twice",
        what=what,
        said=f"expected the same numbers, got {first[worst]:.7g} first and {again[worst]:.7g} in {which}",
        do="Take random numbers from ops.dropout or ops.noise, and let nothing depend on the time, on the order of a "
        "set, or on what earlier calls left behind.",
    )


def samples(subject: Subject) -> list[Finding]:
    """A sample's loss does not depend on the other samples of its batch."""
    for training in MODES:
        try:
            with np.errstate(all="ignore"):
                check_rows_independent(
                    subject.definition, subject.batch, params=subject.moved, training=training, rows=4
                )
        except UserError as error:
            return [_crossing(subject, training, error)]
        except Exception as error:
            found = explained("samples alone", error, "the number of samples")
            return [
                replace(
                    found,
                    said=f"expected a model that takes one sample as it takes many; {found.said}",
                    do="Never use the size of the batch: write -1 for it in a reshape.",
                )
            ]
    return []


def _crossing(subject: Subject, training: bool, error: UserError) -> Finding:
    """Return the finding for samples that see each other, with the operation in which they do."""
    rows = {name: array[:4] for name, array in subject.batch.items()}
    call, _ = _tried(lambda: crossing(subject.definition, rows, subject.moved, training))
    found = explained("samples alone", error, "the model")
    if call is None:
        return found
    return replace(
        found,
        what=f"op {call}",
        said=f"expected each sample's result to be its own, got one that depends on the others; {found.what} is "
        f"{found.said.removeprefix('expected ')}",
        do="Compare samples in ops.across_samples alone: elsewhere one letter of an einsum is the batch, and nothing "
        "reduces or moves it, but ops.sum and ops.mean with over=('batch', ...) for ops.tally.",
    )


def reached(subject: Subject) -> list[Finding]:
    """Every parameter that is trained changes the loss, at least in its last bits: a bias that a softmax takes away
    again is the model's own affair."""
    rng = np.random.default_rng(2)
    found = []
    base = _losses(subject, subject.definition, True, subject.moved)
    for name, info in subject.definition.params.items():
        if not subject.recipe.trains(name):
            continue
        value = subject.moved[name]
        size = max(float(np.abs(value).max()), 0.1)
        there = ({**subject.moved, name: value + size * rng.normal(size=value.shape)} for _ in range(3))
        if all(np.array_equal(_losses(subject, subject.definition, True, params), base) for params in there):
            found.append(unreached(name, info.shape, "the loss does not change when all its values do"))
    return found


def unreached(name: str, shape: tuple[int, ...], why: str) -> Finding:
    return Finding(
        check="parameters reached",
        what=f"parameter {name}",
        said=f"expected a trained parameter, {shape}, to enter the loss, got one that does not: {why}",
        do=f"Use it in __call__, remove it, or exclude it from training: frozen=({name!r},).",
    )


def _noting(subject: Subject) -> type[GuardedOps]:
    """Return the guarded operations; each notes in `subject` that the model calls it."""

    def noting(name: str) -> Any:
        method = getattr(GuardedOps, name)

        def call(self: Any, *args: Any, **options: Any) -> Any:
            if not self._inside:
                subject.used.add(name)
                named = args[1:] if name == "shard" else args[1] if name in ("sum", "mean") and args[1:] else ()
                for axis in filter(None, named):
                    subject.axes.setdefault(axis, place_of(sys._getframe(1)))
                if "batch" in options.get("over", ()):
                    subject.over_batch.append(f"ops.{name} in {place_of(sys._getframe(1))}")
            return method(self, *args, **options)

        return call

    return type("Noting", (GuardedOps,), {name: noting(name) for name in OPERATIONS})


def rule(subject: Subject) -> list[Finding]:
    """The optimizer's rule gives finite updates, the same twice, in NumPy."""
    recipe, what = subject.recipe, f"rule {type(subject.recipe.optimizer).__name__}"
    with watching(subject.definition, recipe.optimizer) as watch:
        twice, error = _tried(lambda: [_updates(subject) for _ in range(2)])
    check, do = "optimizer rule", "A rule computes with xp and its arguments alone."
    if found := _random(watch, f"the update of {what}"):
        return [replace(finding, check=check, what=what, do=do) for finding in found]
    if error is not None:
        finding = explained(check, error, what)
        return [replace(finding, what=what, said=f"{finding.what}: {finding.said}")]
    for name, one in twice[0].items():
        again = twice[1][name]
        if not np.isfinite(one).all():
            said = f"expected a finite update of {name} from a finite gradient, got others"
        elif not np.array_equal(one, again):
            said = f"expected the same update of {name} from the same gradient, got others"
        else:
            continue
        return [Finding(check=check, what=what, said=said, do=do)]
    return []


def _updates(subject: Subject) -> Arrays:
    """Return the update of every trained parameter from a drawn gradient, at the first step, in float64."""
    rng = np.random.default_rng(4)
    recipe, made = subject.recipe, {}
    for name, info in subject.definition.params.items():
        if not recipe.trains(name):
            continue
        with np.errstate(all="ignore"):
            update, _ = recipe.optimizer.update(
                np,
                info=info,
                grad=rng.normal(size=info.shape),
                param=subject.moved[name],
                slots={slot: np.zeros(what.shape) for slot, what in declared_slots(recipe.optimizer, info).items()},
                scale=np.float64(1.0),
                count=np.int32(1),
                decay=recipe.decays(info),
            )
        made[name] = np.asarray(update)
    return made


# ---- what the frameworks are compared with


def objective(subject: Subject, params: Arrays) -> float:
    """Return the mean loss of the first batch, with its auxiliary losses, in training."""
    found = subject.run(params, training=True)
    assert found.objective is not None
    return float(found.objective) / float(np.sum(found.value.weight_B))


def states_after_step(subject: Subject, params: Arrays) -> Arrays:
    """Return the States after the first step."""
    if not subject.definition.states:
        return {}
    return after_step(subject.definition, subject.run(params, training=True).states)


def first_states(subject: Subject) -> Arrays:
    return initial_states(subject.definition)
