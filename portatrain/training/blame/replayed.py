"""Replay a run up to the state before a step, from the nearest commit before it, or from the initial weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from portatrain.backends import rounding
from portatrain.backends.base import Backend, backend_class, default_backend, missing
from portatrain.backends.program import make_program
from portatrain.checkpoint.carry import carry
from portatrain.checkpoint.errors import explained
from portatrain.checkpoint.interop.hub_start import first_state
from portatrain.checkpoint.locations import location_of
from portatrain.checkpoint.newest import Reader
from portatrain.checkpoint.restore import restored
from portatrain.data import OpenData
from portatrain.errors import UserError
from portatrain.model.layout import Mesh
from portatrain.recipe import Recipe
from portatrain.recipe.changing import difference
from portatrain.runs import changes, rows
from portatrain.runs.run_dir import RunDir, code_sha256
from portatrain.system import json_files
from portatrain.training.continuity import Bounds
from portatrain.training.open_data import data_of

Tell = Callable[[str], None]
STAND_INS = {"deepspeed-1": "torch", "deepspeed-2": "torch", "deepspeed-3": "torch", "torch-xla": "torch"}
"""Backends that need several processes or a chip -> the one that runs the same module here."""


@dataclass(kw_only=True)
class Replay:
    """A run at the state after `step` steps. start: the step of the commit that it began at; 0: the initial weights."""

    run: RunDir
    recipe: Recipe
    backend: Backend
    data: OpenData
    state: Any
    step: int
    start: int
    curve: Mapping[int, Mapping[str, Any]]
    notes: list[str]
    _bound: float

    def advance(self) -> None:
        """Take the next step, as the run did: one that it skipped changes nothing."""
        step, recipe = self.step + 1, self.recipe
        if not self.curve[step].get("skipped"):
            first, count = recipe.samples_after(step - 1), recipe.batch_at(step)
            batch = recipe.microbatches(self.data.train.batch(first, count))
            self.state, result = self.backend.step(self.state, batch, step=step, scale=recipe.lr_scale(step))
            self.compare(step, float(result.loss))
        self.step = step

    def compare(self, step: int, loss: float) -> None:
        """Note it if the loss of a step is not the one that the run recorded."""
        was = json_files.number(self.curve[step].get("loss"))
        same = was is None or was == loss or (math.isnan(was) and math.isnan(loss))
        if not same and not abs(was - loss) <= self._bound * max(abs(was), 1e-30):
            self.notes.append(
                f"step {step}: the run recorded the loss {was:.8g}, and the replay has {loss:.8g}, which rounding does "
                "not explain: the machine, the packages or the code of that attempt, or the data, were other ones "
                "(portatrain bisect)"
            )


def replay_to(run: RunDir, first: int, last: int, *, most: int, tell: Tell = lambda line: None) -> Replay:
    """Return a run before step `first`, from which steps up to `last` can be replayed.

    Raises:
        UserError: a step that the run has not trained; no commit at most `most` steps before; a change of the run
            between the commit and the last step, whose own checkpoint is gone.
    """
    curve = {int(row["step"]): row for row in run.curve()}
    _check_steps(run, curve, first, last)
    start = _start(run, first, most)
    recipe = Recipe.from_json(changes.from_step(run.path, start))
    for step in range(start + 1, last):
        later = Recipe.from_json(changes.from_step(run.path, step))
        if later == recipe:
            continue
        found = difference(recipe, later, start)
        if set(found.fields) == {"leave_out"}:  # the steps before it are those of a run that left them out, too
            recipe = later
        elif found.decides:
            raise UserError(
                f"run {run.path.name}, steps {first} to {last}",
                expected=f"a commit of step {step}, after which the run was changed, or steps on one side of it",
                got=f"step {start} as the nearest commit before step {first}",
                do=f"Give steps up to {step}, or begin after it, if its checkpoint is still there.",
            )
    notes: list[str] = []
    name = _backend(run, curve[first], notes)
    if run.run_info().get("code_sha256") != code_sha256(recipe):
        notes.append("the run began with other code than is here; the replay runs the code here")
    tell("opening the data")
    definition = recipe.describe()
    data = data_of(recipe, definition, run.data())
    backend = backend_class(name)(make_program(recipe))
    positions = rounding.positions_in(definition, data.train.batch(0, 1)) * recipe.batch
    bound = Bounds.of(definition, recipe.precision, positions).replay
    tell(f"reading the checkpoint of step {start}" if start else "making the initial weights")
    state = _state(run, backend, recipe, start) if start else first_state(backend, recipe)
    made = Replay(
        run=run,
        recipe=recipe,
        backend=backend,
        data=data,
        state=state,
        step=start,
        start=start,
        curve=curve,
        notes=notes,
        _bound=bound,
    )
    while made.step < first - 1:
        tell(f"replaying step {made.step + 1} of {first - 1}")
        made.advance()
    return made


def commits(run: RunDir) -> list[int]:
    """Return the steps of the committed checkpoints of a run, in order."""
    with explained():
        location = location_of(run.checkpoints())
        return sorted(step for step in location.steps() if location.committed(step))


def _check_steps(run: RunDir, curve: Mapping[int, Any], first: int, last: int) -> None:
    absent = [step for step in (first, last) if step not in curve]
    if not absent:
        return
    parent, there = changes.parent_of(run.run_info()), "no step yet"
    if curve:
        there = f"steps {min(curve)} to {max(curve)}"
    do = "Choose one of these."
    if parent is not None and curve and absent[0] < min(curve):
        do = f"The steps before are those of its parent: portatrain blame {parent.get('run')}."
    elif run.owner() is not None:
        do = "It is being trained: choose one of these, or wait."
    raise UserError(
        f"step {absent[0]} of run {run.path.name}", expected="a step that the run has trained", got=there, do=do
    )


def _start(run: RunDir, first: int, most: int) -> int:
    there = commits(run)
    start = max((step for step in there if step < first), default=0)
    begun = int((changes.parent_of(run.run_info()) or {}).get("step") or 0)
    if first - start > most or start < begun:
        near = f"step {start}" if start else "step 0, the initial weights"
        more = "Restore that of a step before from a copy." if start < begun else ""
        raise UserError(
            f"the replay of step {first}",
            expected=f"a commit at most {most} steps before it",
            got=f"{near} as the nearest (commits: {', '.join(map(str, there)) or 'none'}): those between are gone or "
            "were not saved",
            do=more
            or f"--replay {first - start} replays all steps from there. Next time keep more: checkpoint_every, "
            "and checkpoint_keep_every=1 for those that stay.",
        )
    return start


def _backend(run: RunDir, row: Mapping[str, Any], notes: list[str]) -> str:
    """Return the backend of the attempt that trained a step, or the one that stands in for it here."""
    about = rows.attempt_info(run.path / "attempts" / str(row["attempt"]) / "attempt.json")
    given = str(about.get("backend") or "")
    name = STAND_INS.get(given, given)
    if not name or missing(name):
        name = default_backend()
    if name != given:
        notes.append(f"the run was trained on {given or 'a backend that it does not name'}; it is replayed on {name}")
    mesh = str(about.get("mesh") or "1")
    if mesh != "1" and Mesh.parse(mesh).devices > 1:
        notes.append(f"it is replayed on one device and not on {mesh}, which differs by rounding")
    return name


def _state(run: RunDir, backend: Backend, recipe: Recipe, start: int) -> Any:
    """Return the state of the commit of `start`, as an attempt that goes on from there has it."""
    with explained(), contextlib.closing(location_of(run.checkpoints()).open(start)) as store:
        reader = Reader(store)
        saved = Recipe.from_json(changes.saved_under(run.path, start, reader.meta))
        carried = carry(reader, backend.program, saved) if saved != recipe else None
        return restored(backend, reader, carried=carried)
