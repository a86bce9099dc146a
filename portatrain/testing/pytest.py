"""A pytest fixture that puts a trainer's own save and restore through the audit.

In a test, or in a `conftest.py`, of the trainer's repository::

    from portatrain.testing.pytest import continuity

    def test_resume(continuity):
        continuity(
            make=lambda: MyTrainer(),
            step=lambda t: t.train_step(),
            parts=lambda t: {"model": t.model, "optimizer": t.optimizer, "schedule": t.scheduler, "step": t.step},
            save=lambda t, folder: t.save(folder / "checkpoint"),
            restore=lambda t, folder: t.load(folder / "checkpoint"),
        )

Like `portatrain.testing.audit` it needs nothing of portatrain's trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from portatrain.testing import audit


class Continuity:
    """Call it with a trainer's parts; the test fails, with the verdict, unless a restored trainer goes on as before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(
        self,
        *,
        make: Callable[[], Any],
        step: Callable[[Any], Any],
        parts: Callable[[Any], Mapping[str, Any]],
        save: Callable[[Any, Path], Any],
        restore: Callable[[Any, Path], Any],
        steps: int = 2,
        then: int = 2,
        folder: Path | None = None,
        allow: Collection[str] = (),
        precision: str = "float32",
    ) -> audit.Verdict:
        """Train, save, restore into a fresh trainer, compare, train both on, compare again; return the first verdict.

        Args:
            make: make a fresh trainer, as a new process would.
            step: take one training step.
            parts: the arguments of `audit.record`, as a mapping: `model`, `optimizer`, and what else there is.
            save, restore: the trainer's own; `restore` may return another trainer.
            steps: the steps before the save.
            then: the steps of both trainers after the restore; 0 if a step is not the same twice on this machine.
            folder: where to save; a folder of this test by default. In a group of processes, one that all share.
            allow, precision: as for `audit.check`.

        Fails if the save changes the trainer, if the restored trainer differs, if the next steps differ, and if a fresh
        trainer passes too, since such a test could not fail.
        """
        folder = folder or self.folder
        rules: dict[str, Any] = {"allow": allow, "precision": precision}
        one = make()
        for _ in range(steps):
            step(one)
        before = audit.record(**parts(one))
        save(one, folder)
        _require(audit.check(before, **parts(one), **rules), "The save changed the trainer that was saved")
        two = make()
        if audit.check(before, **parts(two), **rules):
            pytest.fail(
                "A fresh trainer passes the audit before anything is restored, so this test cannot fail. Take more "
                "steps before the save, or name more parts (model, optimizer, schedule, step).",
                pytrace=False,
            )
        other = restore(two, folder)
        two = two if other is None or isinstance(other, (bool, int, float, str, dict)) else other
        verdict = audit.check(before, **parts(two), **rules)
        _require(verdict, "The restored trainer is not the one that was saved")
        for number in range(1, then + 1):
            step(one)
            step(two)
            later = audit.compare(audit.record(**parts(one)), audit.record(**parts(two), brief=True), **rules)
            what = f"The restored trainer had the saved state, and step {number} after it is another one"
            _require(later, f"{what} (data, random numbers, or state that the audit was not given)")
        return verdict


def _require(verdict: audit.Verdict, what: str) -> None:
    if not verdict:
        pytest.fail(f"{what}.\n{verdict}", pytrace=False)


@pytest.fixture
def continuity(tmp_path: Path) -> Iterator[Continuity]:
    """Put a trainer's own save and restore through the audit: see `Continuity`."""
    yield Continuity(tmp_path)
