"""Call the hooks of a recipe, and say which one failed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from portatrain.errors import UserError, users_code
from portatrain.model.module import Definition
from portatrain.recipe import Recipe
from portatrain.runs.events import Kind

if TYPE_CHECKING:
    from portatrain.training.view import TrainingView


def check_hooks(recipe: Recipe, definition: Definition) -> None:
    """Let every hook refuse a recipe that it does not fit. A hook of a class without `check` refuses none."""
    for hook in recipe.hooks:
        if hasattr(hook, "check"):
            _call(hook, "check", recipe, definition)


class HookCalls:
    """The hooks of a run, called in their order with its view."""

    def __init__(self, view: TrainingView) -> None:
        self._view, self._hooks = view, view.recipe.hooks

    def call(self, method: str, *record: Any) -> None:
        """Call a method of every hook. Raises UserError, with the hook's name, for the first one that raises."""
        for hook in self._hooks:
            _call(hook, method, self._view, *record)

    def end(self, stopped: Callable[[], bool]) -> dict[str, Any]:
        """Call `on_end` of every hook, until `stopped()`; return their entries of the summary.

        The training is done by then, so a hook that raises does not end the run: it leaves an event `hook_failed` and
        a line on standard error.
        """
        entries: dict[str, Any] = {}
        for hook in self._hooks:
            if stopped():
                break
            try:
                found = hook.on_end(self._view)
                if not isinstance(found, Mapping):
                    raise TypeError(f"on_end returned a {type(found).__name__}, not a mapping")
                entries |= found
            except Exception as error:
                why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                why = why[:500] + users_code.where(error)
                name = type(hook).__name__
                self._view.event(Kind.HOOK_FAILED, hook=name, method="on_end", why=why)
                if not self._view.process:
                    print(f"hook {name} failed in on_end: {why}", file=sys.stderr, flush=True)
        return entries


def _call(hook: Any, method: str, *arguments: Any) -> None:
    try:
        getattr(hook, method)(*arguments)
    except Exception as error:
        mistake = _mistake(hook, method, error)
        if mistake is None:
            raise
        raise mistake from error


def _mistake(hook: Any, method: str, error: Exception) -> UserError | None:
    """Return the paragraph for a hook that raised; None if it raised a paragraph itself, or the machine failed."""
    return users_code.explained(error, f"hook {type(hook).__name__}.{method}")
