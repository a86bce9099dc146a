"""What the check of a recipe says: findings, one row a check, and the whole report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from portatrain.errors import UserError

Status = Literal["ok", "found", "not run"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something of a recipe that leaves the one trajectory.

    check: the name of the check; '' is the row's. what: the op, parameter, State, rule or axis. said:
    what was expected and found. do: what to do about it. numbers: True if a run's numbers would differ between
    frameworks, meshes or attempts, or if it would learn less than it seems to; False if a run would only be slower or
    larger than it has to be. failed: the check itself failed, which says nothing of the recipe.
    """

    check: str = ""
    what: str
    said: str
    do: str
    numbers: bool = True
    failed: bool = False

    def __str__(self) -> str:
        return f"{self.what}: {self.said}. {self.do}"


class CheckFailed(UserError):
    """A failure of the check itself, such as a process that was killed. It says nothing of the recipe."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One check: its name, its result, and a few words on what was done or why it was not run."""

    name: str
    status: Status
    about: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of a check. sizes: what was checked, in words, if the recipe was made smaller."""

    recipe: str
    sizes: str
    rows: Sequence[Row] = field(default_factory=list)
    findings: Sequence[Finding] = field(default_factory=list)

    @property
    def refusing(self) -> list[Finding]:
        """The findings that change the numbers of a run."""
        return [finding for finding in self.findings if finding.numbers]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "recipe": self.recipe,
            "sizes": self.sizes,
            "checks": [vars(row) for row in self.rows],
            "found": [vars(finding) for finding in self.findings],
        }


FORWARD = "forward pass"
"""The name of the check on which all others build."""
