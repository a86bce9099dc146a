"""The referee: compute a step a second time, and find the device that computes wrong numbers (docs/run/referee.md).

A check of step n has three parts. Before the step, devices compute the gradients of parts of its batch, each alone, and
another device, or the host's processor, computes them again (`jury.py`). After the step, its loss and the norm of its
gradient, which are sums over all devices, must be those of the parts within rounding. And the copies of every tensor of
the state must be equal on all devices that hold one, bit by bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from portatrain.backends.base import Backend, StepResult
from portatrain.backends.state import inventory
from portatrain.checkpoint.fingerprints import box_sum
from portatrain.checkpoint.saver import Checkpoints
from portatrain.errors import MachineError
from portatrain.recipe import Recipe
from portatrain.runs import trust
from portatrain.runs.commits import BEGUN_FROM
from portatrain.runs.events import Kind
from portatrain.runs.run_dir import RunDir
from portatrain.system.watchdog import host_name
from portatrain.training import evidence
from portatrain.training.jury import Disagreement, Jury

HOST_BYTES = 64


class StepReferee:
    """Takes the steps of an attempt, and checks those that the recipe's `referee` names. Without a rule it only takes
    them. agreed: the newest step at which all agreed.

    Raises:
        UserError: there is a rule that cannot be followed on this backend or mesh.
    """

    def __init__(self, recipe: Recipe, backend: Backend, event: Callable[..., None]) -> None:
        self._recipe, self._backend, self._event = recipe, backend, event
        self._rule = recipe.referee
        self._jury = None if self._rule is None else Jury(self._rule.by, backend, recipe)
        self.agreed, self._suspicious = 0, False
        self._checkpoints: Checkpoints | None = None

    def begin(self, run: RunDir, checkpoints: Checkpoints, step: int) -> None:
        """Begin after `step`. The last agreement up to there, in the record of `run`, is the last one."""
        if self._rule is None:
            return
        known = 0
        if not self._backend.process:
            known = max((s for s in agreements(run) if s <= step), default=0)
        self.agreed = self._backend.agree(known)
        self._checkpoints = checkpoints
        checkpoints.protected = self.agreed

    def saw(self, result: StepResult) -> None:
        """Note the result of a step that is done. The step after one that was skipped is checked: it was odd."""
        self._suspicious = self._suspicious or (self._rule is not None and bool(int(result.skipped)))

    def due(self, step: int) -> bool:
        """Return whether `step` is checked."""
        rule = self._rule
        return rule is not None and (self._suspicious or step % rule.every == 0 or step == self._recipe.steps)

    def step(
        self, state: Any, batch: Mapping[str, np.ndarray], *, step: int, scale: float, more: Mapping[str, Any]
    ) -> tuple[Any, StepResult]:
        """Take a step, as `Backend.step` with the further arguments `more`. Raises MachineError if a check fails."""
        if not self.due(step):
            return self._backend.step(state, batch, step=step, scale=scale, **more)
        assert self._jury is not None and self._rule is not None
        self._suspicious, began_s = False, time.perf_counter()
        try:
            parts = self._jury.hear(state, batch, step)
            heard_s = time.perf_counter()
            state, result = self._backend.step(state, batch, step=step, scale=scale, **more)
            found = float(result.loss), float(result.grad_norm)
            stepped_s = time.perf_counter()
            self._jury.compare(parts, found, step)
            if unequal := unequal_copies(self._backend, state):
                raise unequal
        except Disagreement as wrong:
            # Devices with unequal parameters compute unequal gradients, and the copies say where.
            raise self._ended(step, unequal_copies(self._backend, state) or wrong) from None
        self.agreed = step
        if self._checkpoints is not None:
            self._checkpoints.protected = step
        checked_s = heard_s - began_s + time.perf_counter() - stepped_s
        self._event(Kind.AGREED, step=step, by=self._rule.by, parts=parts.count, seconds=round(checked_s, 3))
        return state, result

    def _ended(self, step: int, found: Disagreement) -> MachineError:
        """Record a disagreement; return the error that ends the attempt."""
        backend, devices = self._backend, self._backend.program.layout.mesh.devices
        name = np.frombuffer(host_name().encode()[:HOST_BYTES].ljust(HOST_BYTES), np.uint64)
        words = evidence.from_all(backend, {backend.process: name}, (backend.processes, name.size))
        hosts = [row.tobytes().decode(errors="replace").strip() for row in words]
        owners = evidence.owners(backend, devices)
        named = [{"device": p, "process": owners[p], "host": hosts[owners[p]]} for p in sorted(found.devices)]
        accused = {"devices": named, "certain": found.certain}
        self._event(Kind.DISAGREED, step=step, agreed=self.agreed, what=found.what, **accused)
        return MachineError(
            f"step {step} of {self._recipe.name}",
            expected=found.expected,
            got=f"{found.what}: {trust.named(accused)}",
            do="Take the device out of use, and test its machine. The next attempt goes on from the last commit up to "
            f"step {self.agreed}, the last agreement; later commits are kept, and are not trusted.",
        )


def unequal_copies(backend: Backend, state: Any) -> Disagreement | None:
    """Compare the copies of every tensor of `state` on the devices that hold the same box; None if they are equal."""
    program = backend.program
    layout, mesh, tensors = program.layout, program.layout.mesh, inventory(program)
    if mesh.devices == 1:
        return None
    numbers = {tensor.key: number for number, tensor in enumerate(tensors)}
    mine: dict[int, np.ndarray] = {}
    for box in backend.local_boxes(state):
        number = numbers.get((box.role, box.name))
        if number is not None:
            at = backend.process if box.position is None else box.position
            row = mine.setdefault(at, np.zeros(len(tensors), np.uint64))
            row[number] += np.uint64(box_sum(box.fetch(), box.offset))
    words = evidence.from_all(backend, mine, (mesh.devices, len(tensors)))
    devices: set[int] = set()
    names, certain = [], True
    for number, tensor in enumerate(tensors):
        groups: dict[tuple[int, ...], list[evidence.Vote]] = {}
        for position in range(mesh.devices):
            offset, _ = layout.box(tensor.info, mesh.coordinates(position), role=tensor.laid_out_as)
            groups.setdefault(offset, []).append((position, int(words[position, number])))
        for votes in groups.values():
            found, sure = evidence.accused(votes) if len(votes) > 1 else (set(), True)
            if found:
                names.append("/".join(tensor.key))
                devices, certain = devices | found, certain and sure
    if not devices:
        return None
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return Disagreement(
        expected="equal copies of every tensor on the devices that hold one",
        what=f"other bits in a copy of {names[0]}{more}",
        devices=devices,
        certain=certain,
    )


def agreements(run: RunDir) -> list[int]:
    """Return the steps at which all agreed, and the step that the run begins from, in order, by its record."""
    begun = run.run_info().get(BEGUN_FROM) if (run.path / "run.json").exists() else None
    first = begun.get("step") if isinstance(begun, dict) else None
    return [first or 0, *(event["step"] for event in run.events(Kind.AGREED))]
