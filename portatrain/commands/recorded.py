"""What a run's record says of the words that trained it, and whether a changed recipe can go on from its state."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portatrain.recipe import Recipe
from portatrain.runs import changes, jobs, rows
from portatrain.runs.run_dir import RunDir
from portatrain.system.urls import is_remote

if TYPE_CHECKING:
    from portatrain.checkpoint.locations import Location


def recipe_file(job: jobs.Job) -> str:
    """Return the path of the job's recipe on this machine."""
    if not is_remote(job.recipe):
        return job.recipe
    from portatrain.runs.remote_run_dir import localized

    return localized([job.recipe], job.code)[0]


def recorded_jobs(run: RunDir) -> list[jobs.Job]:
    """Return the jobs of a run. One that has only been trained in the foreground has a job of its last attempt's words,
    and a fork that has not been trained one of its parent's; [] if nothing recorded any words."""
    if there := jobs.of(run.where):
        return there
    recorded = [run.path / "attempts" / str(n) / "attempt.json" for n in reversed(run.attempt_numbers())]
    found = [(path, rows.attempt_info(path).get(changes.SOURCE)) for path in recorded]
    for path, source in [*found, (run.path / "run.json", run.run_info().get(changes.SOURCE))]:
        if isinstance(source, dict) and source:
            given = {"run_dir": run.where, "cluster": "local", "engine": "local", "detached": False}
            return [jobs.of_row(path, {**source, **given})]
    return []


def goes_on(source: Location, step: int, recipe: Recipe, old: Recipe) -> dict[str, Any]:
    """Return what becomes of the tensors of a checkpoint of `old` under `recipe`, as JSON. Reads only its root.

    Raises:
        UserError: the recipe contradicts itself, or cannot go on from this state.
    """
    from checkpoints_format import Reader
    from portatrain.backends.program import make_program
    from portatrain.checkpoint.carry import carry
    from portatrain.checkpoint.errors import explained
    from portatrain.checkpoint.format_layout import check_step

    program = make_program(recipe)
    with explained(), contextlib.closing(source.open(step)) as store:
        reader = Reader(store)
        check_step(reader, step, store.describe("COMMIT"))
        return {**carry(reader, program, old).as_json(), "probe": reader.meta.get("probe") is not None}


def saved_under(run: RunDir, source: Location, step: int) -> Recipe:
    """Return the recipe that a checkpoint of `run` was saved under, from the record of the run."""
    from checkpoints_format import Reader
    from portatrain.checkpoint.errors import explained

    with explained(), contextlib.closing(source.open(step)) as store:
        return Recipe.from_json(changes.saved_under(run.path, step, Reader(store).meta))


def check_data(recipe: Recipe, folder: Path) -> None:
    """Raise UserError unless `recipe` can train on the corpus that is packed in `folder`; nothing without one."""
    if folder.is_dir():
        from portatrain.training.open_data import data_of

        data_of(recipe, recipe.describe(), folder)
