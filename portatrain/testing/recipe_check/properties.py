"""What a model and its rule have to be in the oracle: repeatable, sample by sample, with every parameter in use.

Each check takes a `Subject` and returns findings; none if all is well.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from portatrain.backends.base import Context
from portatrain.backends.reference.run import forward
from portatrain.errors import UserError
from portatrain.optim import declared_slots
from portatrain.testing.guard import CLOSE, check_rows_independent
from portatrain.testing.recipe_check.blame import Call, crossing, parting, recording
from portatrain.testing.recipe_check.oracle import random_numbers
from portatrain.testing.recipe_check.report import Finding
from portatrain.testing.recipe_check.subject import MODES, Arrays, Subject, explained, first_states, losses, tried
from portatrain.testing.recipe_check.watch import watched

REPEATS = 24
REPEATS_S = 1.5
"""Repetitions of the forward pass, at most so many and for about so long: what acts in one call of ten is met."""


def repeats(subject: Subject) -> list[Finding]:
    """The same inputs give the same loss, again and in a model that is built anew."""
    values = {}
    for training, mode in MODES.items():
        first = losses(subject, subject.definition, training, states=True)
        began_s = time.perf_counter()
        for n in range(1, REPEATS):
            if not np.array_equal(
                again := losses(subject, subject.definition, training, states=True), first, equal_nan=True
            ):
                what = _parting(subject, training) or f"the forward pass in {mode}"
                return [_unrepeated(what, first, again, f"call {n + 1} with the same inputs")]
            if time.perf_counter() - began_s > REPEATS_S:
                break
        values[training] = first
    anew = subject.recipe.describe()
    for training, mode in MODES.items():
        again = losses(subject, anew, training, states=True)
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


def _unrepeated(what: str, first: np.ndarray, again: np.ndarray, which: str) -> Finding:
    worst = int(np.argmax(np.abs(first - again))) if first.shape == again.shape else 0
    return Finding(
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
            found = explained(error, "the number of samples")
            if found.failed:
                return [found]
            return [
                replace(
                    found,
                    said=f"expected a model that takes one sample as it takes many; {found.said}",
                    do="Never use the size of the batch: write -1 for it in a reshape.",
                )
            ]
    halved = subject.over_batch or subject.definition.states
    if halved and "across_samples" not in subject.used:  # which is whole over all microbatches
        return [found for training, mode in MODES.items() for found in _halves(subject, training, mode)][:1]
    return []


def _halves(subject: Subject, training: bool, mode: str) -> list[Finding]:
    """Two halves of the batch have the losses that they have together: reductions over the batch enter no loss. What
    they add to States is together what the whole batch adds."""
    context = Context(seed=subject.recipe.seed, step=1, training=training)
    half = len(subject.batch["sample"]) // 2
    losses, added = [], []
    first = first_states(subject)
    for rows in (slice(None), slice(half), slice(half, None)):
        batch = {name: array[rows] for name, array in subject.batch.items()}
        with np.errstate(all="ignore"):
            found = forward(subject.definition, subject.moved, batch, context)
        auxes = [aux.value_B for _, aux in sorted(found.auxes.items()) if aux.loss]
        losses.append(np.stack([found.value.loss_B, found.value.weight_B, *auxes]))
        added.append({name: value.astype(np.float64) - first[name] for name, value in found.states.items()})
    together, apart = losses[0], np.concatenate(losses[1:], axis=1)
    if np.abs(together - apart).max() <= CLOSE * max(1.0, float(np.abs(together).max())):
        return [_not_added_up(name, mode) for name in first if _differs(added[0], added[1:], name)]
    worst = int(np.argmax(np.abs(together - apart).max(0)))
    return [
        Finding(
            what=", ".join(dict.fromkeys(subject.over_batch)),
            said=f"expected reductions over the batch to enter no sample's loss, got {together[0, worst]:.7g} in a "
            f"whole batch and {apart[0, worst]:.7g} in half of it, in {mode}",
            do="Such a reduction covers one microbatch: give it to ops.tally, and let the loss use the State; compare "
            "samples in ops.across_samples.",
        )
    ]


def _differs(whole: Arrays, halves: list[Arrays], name: str) -> bool:
    apart = np.abs(whole[name] - sum(half[name] for half in halves)).max(initial=0.0)
    return bool(apart > CLOSE * max(1.0, float(np.abs(whole[name]).max(initial=0.0))))


def _not_added_up(name: str, mode: str) -> Finding:
    return Finding(
        what=f"State {name}",
        said=f"expected two halves of a batch to add what the whole batch adds, got another sum, in {mode}",
        do="ops.tally adds up over microbatches: give it sums over samples, not means, and divide in after_step.",
    )


def _crossing(subject: Subject, training: bool, error: UserError) -> Finding:
    """Return the finding for samples that see each other, with the operation in which they do."""
    rows = {name: array[:4] for name, array in subject.batch.items()}
    call, _ = tried(lambda: crossing(subject.definition, rows, subject.moved, training))
    found = explained(error, "the model")
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
    base = losses(subject, subject.definition, True, subject.moved)
    for name, info in subject.definition.params.items():
        if not subject.recipe.trains(name):
            continue
        value = subject.moved[name]
        size = max(float(np.abs(value).max()), 0.1)
        there = ({**subject.moved, name: value + size * rng.normal(size=value.shape)} for _ in range(3))
        if all(np.array_equal(losses(subject, subject.definition, True, params), base) for params in there):
            found.append(unreached(name, info.shape, "the loss does not change when all its values do"))
    return found


def unreached(name: str, shape: tuple[int, ...], why: str) -> Finding:
    return Finding(
        check="parameters reached",
        what=f"parameter {name}",
        said=f"expected a trained parameter, {shape}, to enter the loss, got one that does not: {why}",
        do=f"Use it in __call__, remove it, or exclude it from training: frozen=({name!r},).",
    )


def rule(subject: Subject) -> list[Finding]:
    """The optimizer's rule gives finite updates, the same twice, in NumPy."""
    recipe, what = subject.recipe, f"rule {type(subject.recipe.optimizer).__name__}"
    watch, (twice, error) = watched(
        lambda: tried(lambda: [_updates(subject) for _ in range(2)]), subject.definition, recipe.optimizer
    )
    do = "A rule computes with xp and its arguments alone."
    if found := random_numbers(watch, f"the update of {what}"):
        return [replace(finding, what=what, do=do) for finding in found]
    if error is not None:
        finding = explained(error, what)
        return [replace(finding, what=what, said=f"{finding.what}: {finding.said}")]
    for name, one in twice[0].items():
        again = twice[1][name]
        if not np.isfinite(one).all():
            said = f"expected a finite update of {name} from a finite gradient, got others"
        elif not np.array_equal(one, again):
            said = f"expected the same update of {name} from the same gradient, got others"
        else:
            continue
        return [Finding(what=what, said=said, do=do)]
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
