"""Go back before a spike: choose the checkpoint, and record the change that leaves the samples of the spike out.

A rewind is a change of the run's recipe after the step of a checkpoint (`runs/changes.py`), so the attempt that follows
restores, checks and records it as any other change. Which samples are left out follows from the step of the spike
alone; a checkpoint further back gives the same curve, with more steps to train again.

The order makes it safe to kill: first the event, which says the newest commit that there will be; then the checkpoints
behind it are removed; the change is last. A run that was killed before the change trains the steps up to the spike
again, and goes back again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from portatrain.backends.base import Backend
from portatrain.checkpoint.locations import Location
from portatrain.data.ranges import in_words, merged
from portatrain.errors import UserError
from portatrain.recipe import Recipe, Spikes
from portatrain.recipe.changing import difference
from portatrain.recipe.retention import Retention
from portatrain.runs import changes
from portatrain.runs.attempt import Attempt, NullAttempt
from portatrain.runs.commits import BEGUN_FROM
from portatrain.runs.events import Kind
from portatrain.runs.run_dir import RunDir
from portatrain.system.text import counted


class Spike(Exception):
    """A step that a recipe with ``action="rewind"`` goes back for. All processes raise it after the same step."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"a spike at step {step} ({what})")
        self.step = step


@dataclass(frozen=True, kw_only=True)
class Rewind:
    """Where a run goes on after a spike.

    Attributes:
        step: the last step before; 0: from the initial weights.
        recipe: the recipe from there on.
    """

    step: int
    recipe: Recipe


def kept(recipe: Recipe, run: RunDir, backend: Backend) -> Retention:
    """Return the rule for keeping the checkpoints of a run, with the one that it can go back to. Process 0 removes the
    others, and reads the record."""
    found = recipe.retention
    return (
        dataclasses.replace(found, floor=changes.last_decided(run.path))
        if found.back and not backend.process
        else found
    )


def without_spike(recipe: Recipe, rule: Spikes, step: int, floor: int) -> tuple[Recipe, int, tuple[int, int]]:
    """Return the recipe that leaves out the samples of a spike at `step`, the first step that they are of, and their
    numbers [first, end). Steps up to `floor` keep theirs."""
    first = max(step - rule.before, floor + 1)
    samples = recipe.numbers_of(first)[0], recipe.numbers_of(step + rule.after)[1]
    words = in_words(merged([*recipe.left_out, samples]))
    return dataclasses.replace(recipe, leave_out=tuple(words)), first, samples


def go_back(
    spike: Spike,
    recipe: Recipe,
    backend: Backend,
    run: RunDir,
    attempt: Attempt | NullAttempt,
    location: Location,
    check_end: Callable[[int], None],
    event: Callable[..., None],
) -> Rewind:
    """Record a rewind; all processes call it. No save is running.

    `check_end`: of the data, as in `Split`. `event`: reports an event of this attempt.

    Raises:
        UserError: there were `max_rewinds` since the checkpoint to go back to; that checkpoint is gone; or the data has
            too few samples without those of the spike.
    """
    rule = recipe.spikes
    assert rule is not None
    # Process 0 reads the record; the largest value is that of all.
    floor = backend.agree(0 if backend.process else changes.last_decided(run.path))
    new, first, samples = without_spike(recipe, rule, spike.step, floor)
    check_end(new.numbers_of(new.steps)[1])
    to = 0
    if not backend.process:
        to = _checkpoint(run, location, floor, first, spike)
        _check_number(run, rule, to, spike)
        change = changes.change(difference(recipe, new, to), new, to, reason=str(spike))
        event(Kind.WENT_BACK, what=str(spike), step=to, spike=spike.step, samples=list(samples))
        for step in location.steps():
            if step > to:
                with attempt.guard():
                    location.remove(step)
        with attempt.guard():
            run.change(dataclasses.replace(change, rewound_from=spike.step))
    return Rewind(step=backend.agree(to), recipe=new)


def _checkpoint(run: RunDir, location: Location, floor: int, first: int, spike: Spike) -> int:
    """Return the step of the newest commit before step `first`, of the steps from `floor` on; 0 if the run has had none
    and can begin again."""
    doubted = run.doubted()
    there = [s for s in location.steps() if floor <= s < first and s not in doubted and location.committed(s)]
    if there:
        return max(there)
    begun_from = run.run_info().get(BEGUN_FROM) is not None
    had = [e["step"] for e in run.events(Kind.COMMITTED) if isinstance(e.get("step"), int) and e["step"] < first]
    if not floor and not begun_from and not had:
        return 0
    raise UserError(
        f"{spike} of run {run.path.name}",
        expected=f"a checkpoint of step {floor} to {first - 1}, to go back to",
        got=f"none that is still there (commits: {', '.join(map(str, location.steps())) or 'none'})",
        do="Restore one from a copy; or go on from the newest one with "
        f"`portatrain resume {run.path.name} --set spikes.action=skip --reason TEXT`.",
    )


def _check_number(run: RunDir, rule: Spikes, to: int, spike: Spike) -> None:
    """Raise UserError if the run has gone back `max_rewinds` times for spikes after step `to`."""
    before = [
        change.rewound_from
        for change in changes.of(run.path)
        if change.rewound_from is not None and change.rewound_from > to
    ]
    if len(before) < rule.max_rewinds:
        return
    where = f"the checkpoint of step {to}" if to else "the initial weights"
    raise UserError(
        f"{spike} of run {run.path.name}",
        expected=f"at most max_rewinds={counted(rule.max_rewinds, 'spikes')} after {where}",
        got=f"one more (before it: those of steps {', '.join(map(str, before))})",
        do="The samples of each are left out, so the cause is probably another one: lower optimizer.lr, lengthen the "
        "warm-up, or widen the band (spikes.loss, spikes.grad_norm), each with "
        f"`portatrain resume {run.path.name} --set FIELD=VALUE --reason TEXT`. `portatrain blame {run.path.name} "
        f"--step {spike.step}` measures the samples.",
    )
