"""The recipes of a run, in order: the one that it began with and those that it was changed to on purpose.

run.json has the recipe that the run began with; of a fork also `parent`: the run, the step and the recipe that it left.
changes.json has every change since: the step after which it counts, the fields with both values, the reason, and the
recipe from then on. A checkpoint that was saved before a change is resumed under the recipe after it; the record says
that this is no mistake.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

from portatrain.checkpoint.interop.trusted_code import is_trusted
from portatrain.errors import UserError
from portatrain.recipe.changing import Difference, difference, merged
from portatrain.recipe.recipe import Recipe
from portatrain.recipe.same import changed_fields
from portatrain.runs import rows as typed
from portatrain.system import json_files

NAME = "changes.json"
PARENT, GIVEN, SOURCE = "parent", "given", "source"
"""Fields of a fork's run.json: its parent, the recipe that its command words give, and these words."""

SAVED, SURGERY = "saved", "surgery"
"""Fields of `PARENT`: the recipe that the fork's checkpoint was saved under, if it is not that of the parent; what a
surgery did to it, which that checkpoint's meta has too."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One change of a run: a line of changes.json, or the fork that a run began with."""

    step: int
    """The last step before it."""
    fields: Mapping[str, Sequence[Any]]
    """Dotted field -> [value before, value after]."""
    decides: bool
    """True if it changes the trajectory."""
    reason: str
    recipe: Mapping[str, Any]
    """The recipe from then on, as JSON."""
    recipe_sha256: str = ""
    overrides: Sequence[str] = ()
    """The words of --set."""
    unix_s: float = 0.0
    before: Mapping[str, Any] = field(default_factory=dict)
    """The recipe before it, as JSON."""
    rewound_from: int | None = None
    """The step of the spike for which the run went back to `step`; None for any other change."""

    @property
    def leaves_out(self) -> bool:
        """True if it changes nothing but the samples that later steps leave out."""
        return {name.split(".")[0] for name in self.fields} == {"leave_out"}


def parent_of(info: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what run.json says of the run from which this one was forked; None if it is no fork."""
    found = info.get(PARENT)
    return found if isinstance(found, Mapping) else None


def of(folder: Path) -> list[Change]:
    """Return the changes of the run in `folder`, in order; a fork is the first one. UserError for a damaged record."""
    info = typed.run_info(folder / "run.json")
    found, now = [], info["recipe"]
    if (parent := parent_of(info)) is not None:
        row = {
            "fields": parent.get("fields"),
            "reason": parent.get("reason", ""),
            "recipe": now,
            "recipe_sha256": info.get("recipe_sha256", ""),
        }
        fork = {"step": parent.get("step"), "decides": True, "before": parent.get(SAVED) or parent.get("recipe"), **row}
        found.append(_checked(folder / "run.json", fork))
    for row in _rows(folder / NAME):
        found.append(_checked(folder / NAME, {**row, "before": now} if isinstance(row, dict) else row))
        now = found[-1].recipe
    return found


def _rows(path: Path) -> list[Any]:
    """Return the rows of changes.json, none if it is missing; UserError if it holds no list of them."""
    rows = json_files.read_object(path).get("changes") if path.exists() else []
    if not isinstance(rows, list):
        raise typed.damaged(path, "'changes' is no list")
    return rows


def _checked(path: Path, row: object) -> Change:
    try:
        if not isinstance(row, dict):
            raise ValueError("a change is no object")
        typed.whole(row, "step", required=True)
        for name in ("recipe", "fields", "before"):
            if not isinstance(row.get(name), Mapping):
                raise ValueError(f"{name!r} of a change is no object")
        if any(not isinstance(pair, list) or len(pair) != 2 for pair in row["fields"].values()):
            raise ValueError("a field of a change has no two values")
        if not isinstance(row.get("reason", ""), str) or not isinstance(row.get("overrides", []), list):
            raise ValueError("'reason' of a change is no text, or 'overrides' no list")
        if not isinstance(row.get("recipe_sha256", ""), str):
            raise ValueError("'recipe_sha256' of a change is no text")
        row["unix_s"] = typed.bounded(row.get("unix_s", 0.0), "unix_s", typed.LATEST_S)
        typed.whole(row["recipe"], "steps")
        if row.get("rewound_from") is not None:
            typed.whole(row, "rewound_from")
        return Change(**{f.name: row[f.name] for f in fields_of(Change) if f.name in row})
    except (ValueError, TypeError) as error:
        raise typed.damaged(path, error) from error


def current(folder: Path) -> Mapping[str, Any]:
    """Return the JSON of the recipe that the run in `folder` has now."""
    changes = of(folder)
    return changes[-1].recipe if changes else typed.run_info(folder / "run.json")["recipe"]


def from_step(folder: Path, step: int) -> Mapping[str, Any]:
    """Return the JSON of the recipe that the run in `folder` has from `step` + 1 on."""
    found = typed.run_info(folder / "run.json")["recipe"]
    for change in of(folder):
        if change.step <= step:
            found = change.recipe
    return found


def saved_under(folder: Path, step: int, meta: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the JSON of the recipe, of those in the record, that the checkpoint of `step` with this `meta` was saved
    under: until the first save of a fork it is one from before the fork. Without any, that from `step` + 1 on."""
    now, stored = from_step(folder, step), meta.get("recipe")
    known = [now, *(one.before for one in reversed(of(folder)) if one.step == step)]
    if not isinstance(stored, Mapping):
        return now
    return next((recipe for recipe in known if not _differ(stored, recipe)), now)


def last_decided(folder: Path) -> int:
    """Return the step of the last change of the trajectory; 0 if there was none.

    A change that only leaves samples out does not count, unless the run began with it: the steps before it are those of
    a run that left them out from its first step.
    """
    forked = parent_of(typed.run_info(folder / "run.json")) is not None
    found = of(folder)
    decided = (one.step for i, one in enumerate(found) if one.decides and (not one.leaves_out or (forked and not i)))
    return max(decided, default=0)


def settled(folder: Path, asked: Recipe) -> Recipe:
    """Return the recipe that a command asks for: that of the run now, with what the words of the command give otherwise
    than the words that began the run. A run that does not exist yet has the recipe `asked`."""
    if not (folder / "run.json").exists():
        return asked
    info, now = typed.run_info(folder / "run.json"), current(folder)
    given = info.get(GIVEN) or info["recipe"]
    if given == now or not changed_fields(now, asked):
        return asked
    if not changed_fields(given, asked):
        return Recipe.from_json(now)
    before = [given, *(one.before for one in of(folder))]
    return Recipe.from_json(merged([_plain(one) for one in before], _plain(asked.to_json()), _plain(now)))


def _plain(recipe: Mapping[str, Any]) -> Any:
    """Return the JSON of a recipe as this release writes it; as it stands if it names a class that is not here."""
    try:
        return Recipe.from_json(recipe).to_json()
    except UserError:
        return recipe


def wanted(folder: Path, where: str, recipe: Recipe, committed: Callable[[], int | None]) -> Change | None:
    """Return the change that an attempt at `recipe` makes to the run in `folder`; None if it makes none. `committed`
    returns the step of its newest commit.

    Raises:
        UserError: it would change the trajectory or the corpus, which no attempt may do by itself.
    """
    now = current(folder)
    changed = changed_fields(now, recipe)
    if not changed:
        return None
    name, step = folder.name, committed() or 0
    try:
        old = Recipe.from_json(now)
    except (UserError, ImportError, AttributeError):
        old = None  # a class that is not here: another recipe
    found = None if old is None else difference(old, recipe, step, since=last_decided(folder))
    if found is None or found.decides:
        why = f"; {found.unproved}" if found is not None and found.unproved else ""
        raise UserError(
            f"run directory {where}",
            expected="the recipe of the run, or fields that leave its past as it was",
            got=f"another one (differs in {', '.join(list(changed)[:6])}{' ...' if len(changed) > 6 else ''}{why})",
            do="Use the same recipe and --set values, or another run name for a new run. To change this run from its "
            f"newest checkpoint on: portatrain resume {name} --set FIELD=VALUE --reason TEXT; to leave it as it is "
            f"and go on beside it: portatrain fork {name} --at STEP --set FIELD=VALUE --run NEW.",
        )
    return replace(change(found, recipe, step, reason=""), before=now)


def change(found: Difference, recipe: Recipe, step: int, *, reason: str, overrides: Sequence[str] = ()) -> Change:
    """Return the change to `recipe` after `step`, for the record."""
    return Change(
        step=step,
        fields=found.as_json(),
        decides=found.decides,
        reason=reason,
        recipe=recipe.to_json(),
        recipe_sha256=recipe.sha256,
        overrides=list(overrides),
        unix_s=time.time(),
    )


def rows_with(folder: Path, change: Change) -> dict[str, Any]:
    """Return the content of changes.json with one more change."""
    there = _rows(folder / NAME)
    row = {name: value for name, value in asdict(change).items() if name != "before"}
    if change.rewound_from is None:
        del row["rewound_from"]
    return {"changes": [*there, row]}


def family(folder: Path, siblings: Mapping[str, Path]) -> list[tuple[int, str, int | None]]:
    """Return the tree of forks around the run in `folder`: (depth, name, step of its parent at which it began).

    `siblings`: the runs beside it, by name. Parents that are gone are named all the same. [] if there are no forks.
    """
    parents: dict[str, tuple[str, int]] = {}
    for name, path in {**siblings, folder.name: folder}.items():
        with contextlib.suppress(UserError, OSError):
            if (found := parent_of(typed.run_info(path / "run.json"))) is not None:
                parents[name] = str(found.get("run")), int(found.get("step") or 0)
    root, seen = folder.name, {folder.name}
    while root in parents and parents[root][0] not in seen:
        root = parents[root][0]
        seen.add(root)

    def below(name: str, depth: int, over: frozenset[str]) -> list[tuple[int, str, int | None]]:
        step = parents[name][1] if name in parents and depth else None
        rows: list[tuple[int, str, int | None]] = [(depth, name, step)]
        mine = sorted((at, child) for child, (parent, at) in parents.items() if parent == name and child not in over)
        for _, child in mine:
            rows += below(child, depth + 1, over | {child})
        return rows

    rows = below(root, 0, frozenset({root}))
    return rows if len(rows) > 1 else []


@dataclass(frozen=True, kw_only=True)
class Pending:
    """The changes between the recipe of a checkpoint and the recipe of the run: the checkpoint was saved before them.

    Attributes:
        step: the step of the checkpoint.
        before: the recipe that it was saved under.
        fields: dotted field -> [value before, value after], of all these changes together.
        decides: True if one of them changes the trajectory, which it does from this checkpoint on.
        reason: the reasons that were given.
    """

    step: int
    before: Recipe
    fields: Mapping[str, Sequence[Any]]
    decides: bool
    reason: str


def pending(folder: Path, meta: Mapping[str, Any], recipe: Recipe, *, asked: Change | None = None) -> Pending | None:
    """Return the recorded changes that lie between a checkpoint with this `meta` and `recipe`; None if there are none.
    `asked`: a change that is about to be recorded (`wanted`).

    Raises:
        UserError: a change of the trajectory belongs to a later checkpoint, which is gone or damaged.
    """
    stored, step = meta.get("recipe"), int(meta.get("step", 0))
    if not isinstance(stored, Mapping) or not (folder / "run.json").exists():
        return None
    fields = {
        k: v for k, v in changed_fields(stored, recipe, trusted=is_trusted).items() if k.split(".")[0] != "origin"
    }
    if isinstance(operated := meta.get(SURGERY), Mapping):
        # Its tensors are those after the surgery, its probe is the one before it.
        there = operated.get("fields")
        fields |= {**(there if isinstance(there, Mapping) else {}), SURGERY: (None, operated.get("name"))}
    if not fields:
        return None
    changes = [*of(folder), *([] if asked is None else [asked])]
    at = next((i for i in reversed(range(len(changes))) if not _differ(stored, changes[i].before)), None)
    if at is None:
        return None
    since = changes[at:]
    # One that only leaves later samples out can be met before its step, too.
    late = next((c for c in since if c.decides and c.step != step and not (c.leaves_out and c.step > step)), None)
    if late is not None:
        raise UserError(
            f"run directory {folder.name}",
            expected=f"the checkpoint of step {late.step}, from which on the run was changed "
            f"({', '.join(list(late.fields)[:4])})",
            got=f"that of step {step} as the newest one that can be used",
            do=f"Restore that checkpoint from a copy, or go on from this one beside the run: portatrain fork "
            f"{folder.name} --at {step} --run NEW, with the changes as --set.",
        )
    return Pending(
        step=step,
        before=Recipe.from_json(changes[at].before),
        fields={name: list(pair) for name, pair in fields.items()},
        decides=SURGERY in fields or any(one.decides for one in since),
        reason="; ".join(one.reason for one in since if one.reason),
    )


def _differ(stored: Mapping[str, Any], recorded: Mapping[str, Any]) -> bool:
    """Return True if the recipe in a checkpoint's meta is not the one of the record. It imports nothing that only the
    checkpoint names."""
    if stored == recorded:
        return False
    try:
        return bool(changed_fields(stored, Recipe.from_json(recorded), trusted=is_trusted))
    except (UserError, ImportError, AttributeError):
        return True
