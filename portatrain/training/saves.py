"""Save the state of one attempt, with its record for the continuity check; decide when a save by time is due."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from portatrain.backends.base import Backend
from portatrain.checkpoint.saver import Checkpoints
from portatrain.data import OpenData
from portatrain.recipe import Recipe
from portatrain.runs.events import Kind
from portatrain.training import continuity
from portatrain.training.save_timer import SaveTimer


class Saves:
    """The saves of one attempt. `saved`: the step whose state is saved or is being saved; -1 if there is none."""

    def __init__(
        self, checkpoints: Checkpoints, recipe: Recipe, backend: Backend, data: OpenData, event: Callable[..., None]
    ) -> None:
        self.checkpoints, self.saved = checkpoints, -1
        self._recipe, self._backend, self._data, self._event = recipe, backend, data, event
        self._begun, self.timer = 0, SaveTimer(recipe.checkpoint_every_s)

    def due(self, step: int) -> bool:
        """Return whether it is time to save the state after `step`."""
        return step > max(0, self.saved) and self.timer.due

    def record(self, state: Any, step: int, *, virtual_step: bool = True) -> dict[str, Any]:
        """Return the record of `state` after `step` steps, for the continuity check."""
        return continuity.record(
            self._backend,
            state,
            self._recipe,
            self._data.train,
            step,
            validation=self._data.validation,
            virtual_step=virtual_step,
        )

    def save(
        self, state: Any, step: int, more: Mapping[str, Any], *, last: bool = False, by_time: bool = False
    ) -> bool:
        """Begin to save `state` after `step`, with `more` in its record, unless it is saved; return whether it began.

        With `by_time` nothing is saved while another save is being written.
        """
        if self.saved == step:
            return False
        with self.timer.saving():
            return self._save(state, step, more, last=last, by_time=by_time)

    def _save(self, state: Any, step: int, more: Mapping[str, Any], *, last: bool, by_time: bool) -> bool:
        recipe = self._recipe
        self._begun += 1
        probes = last or (self._begun - 1) % recipe.probe_every == 0
        found = self.record(state, step, virtual_step=probes)
        found |= {"recipe_sha256": recipe.sha256, "recipe": recipe.to_json(), **more}
        skips = by_time or (recipe.checkpoint_busy == "skip" and not last)
        if self.checkpoints.save(step, self._backend, state, found, skip_if_busy=skips):
            self.saved = step
            self._event(Kind.SAVING, step=step)
            return True
        self._event(Kind.SAVE_SKIPPED, step=step, why="the previous save is still being written")
        return False

    def tell_commits(self) -> None:
        """Record the commits since the last call."""
        for step in self.checkpoints.newly_committed():
            self._event(Kind.COMMITTED, step=step)
