"""Run all checks of a recipe: first in the oracle, then on the backends, on meshes last."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from portatrain.backends.base import backend_class, missing, process_per_device, simulate_devices
from portatrain.backends.program import make_program
from portatrain.errors import UserError
from portatrain.model.layout import is_uneven
from portatrain.recipe import Recipe
from portatrain.testing.recipe_check import oracle, properties
from portatrain.testing.recipe_check import subject as subjects
from portatrain.testing.recipe_check.compare import Sensitivity, differences, same_state, sensitivity, unreached
from portatrain.testing.recipe_check.future import future
from portatrain.testing.recipe_check.measured import Measured, measure, saved_and_restored
from portatrain.testing.recipe_check.processes import DEVICES, on_meshes
from portatrain.testing.recipe_check.report import FORWARD, Finding, Report, Row
from portatrain.testing.recipe_check.small import Small, batches_of, candidates, too_large
from portatrain.testing.recipe_check.special import special
from portatrain.testing.recipe_check.subject import Subject, subject_of

BACKENDS = ("jax", "torch")
MESHES = ("fsdp=2", "tensor=2")
ORACLE_LOSS = 1e-5
"""Relative difference of a backend's loss, in fp32, from the oracle's."""
ON_CPU = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
"""The environment in which frameworks take no accelerator: the check compares fp32 to its last bits."""

QUICK = ("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true")
"""Flags with which XLA compiles in a third of the time: the programs run a few times only."""

Progress = Callable[[Row], None]


def on_cpu() -> None:
    """Keep frameworks that are imported later on the CPU, with the simulated devices that the meshes need."""
    for name, value in ON_CPU.items():
        os.environ[name] = value
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = " ".join([flags, *(f for f in QUICK if f.partition("=")[0] not in flags)]).strip()
    simulate_devices("jax", DEVICES)


def check_recipe(
    recipe: Recipe,
    *,
    source: str | None = None,
    backends: Sequence[str] = BACKENDS,
    meshes: Sequence[str] = MESHES,
    progress: Progress = lambda row: None,
) -> Report:
    """Check `recipe` at small size and return what was found.

    Args:
        source: the recipe's file or name, for backends with a process a device: their processes load it again. None:
            these meshes are not run.
        backends: those to compare; one that is not installed is not run.
        meshes: those to compare with one device, each of two devices.
        progress: called with every row when its check has ended.
    """
    return _Check(recipe, source, backends, meshes, progress).run()


def samples_alone(recipe: Recipe) -> list[Finding]:
    """Return what is found in the oracle alone of samples that influence each other, at small size: seconds at most.

    Nothing is found where this cannot be told: a model that the oracle does not run says so in the whole check.
    """
    check = _Check(recipe, None, (), (), lambda row: None)
    subject, found = check._smallest()
    return [] if subject is None or found else [f for f in properties.samples(subject) if f.numbers and not f.failed]


class _Skip(Exception):
    """A check that cannot be run here, with the reason."""


class _Check:
    def __init__(
        self, recipe: Recipe, source: str | None, backends: Sequence[str], meshes: Sequence[str], progress: Progress
    ) -> None:
        self.given, self.source, self.backends, self.meshes, self.progress = recipe, source, backends, meshes, progress
        self.rows: list[Row] = []
        self.findings: list[Finding] = []
        self.sizes = ""
        self.made: dict[str, Any] = {}
        """Backends on one device, by name."""
        self.measured: dict[str, Measured] = {}
        self.near: Sensitivity

    def run(self) -> Report:
        subject = self._subject()
        if subject is not None:
            self._row("the next token unseen", lambda: future(subject))
            self._row("parameters reached", lambda: properties.reached(subject))
            self._row("optimizer rule", lambda: properties.rule(subject))
            self._frameworks(subject)
        return Report(recipe=self.given.name, sizes=self.sizes, rows=self.rows, findings=self.findings)

    def _row(self, name: str, call: Callable[..., list[Finding]], *args: Any, about: str = "") -> bool:
        """Run one check, `call(*args)`, and add its row; return whether nothing was found."""
        began_s = time.perf_counter()
        status: Any = "ok"
        try:
            found = call(*args)
        except _Skip as skip:
            status, about, found = "not run", str(skip), []
        except Exception as error:
            found = [subjects.explained(error, name)]
        if found:
            status, about = "found", "; ".join(finding.what for finding in found)
        self.findings += [finding if finding.check else replace(finding, check=name) for finding in found]
        row = Row(name=name, status=status, about=about, seconds=round(time.perf_counter() - began_s, 2))
        self.rows.append(row)
        self.progress(row)
        return not found and status == "ok"

    # ---- in the oracle

    def _subject(self) -> Subject | None:
        """Check the definition and the forward pass; return what to go on with, or None if that makes no sense."""
        definition = None

        def described() -> list[Finding]:
            nonlocal definition
            definition = self.given.describe()
            return oracle.axes(self.given, definition)

        self._row("axes", described)
        if definition is None:
            return None
        subject: Subject | None = None

        def runs() -> list[Finding]:
            nonlocal subject
            subject, found = self._smallest()
            return found

        goes_on = self._row(FORWARD, runs)
        if not goes_on or subject is None:
            return None
        there = subject
        return (
            there
            if self._row("the same twice", lambda: properties.repeats(there))
            and self._row("samples alone", lambda: properties.samples(there))
            else None
        )

    def _smallest(self) -> tuple[Subject | None, list[Finding]]:
        """Return the recipe at the smallest size at which its model runs, or what is found at all sizes."""
        first: list[Finding] = []
        large: UserError | None = None
        for recipe, sizes in candidates(self.given):
            try:
                definition = make_program(recipe).definition
                if (error := too_large(recipe, definition)) is not None:
                    large = large or error
                    continue
                small = Small(recipe=recipe, definition=definition, batches=batches_of(recipe, definition), sizes=sizes)
            except UserError as error:
                first = first or [subjects.explained(error, FORWARD)]
                continue
            subject = subject_of(small)
            found = oracle.runs(subject)
            self.sizes = self.sizes or sizes
            if not found:
                self.sizes = sizes
                return subject, []
            first = first or found
        if not first and large is not None:
            return None, [replace(subjects.explained(large, FORWARD), numbers=False)]
        return None, first

    # ---- on the backends

    def _frameworks(self, subject: Subject) -> None:
        with ThreadPoolExecutor(max_workers=1) as pool:  # meshes of processes run beside all that follows
            started = {name: self._started(subject, name, pool) for name in self.backends}
            self._on_backends(subject, started)

    def _on_backends(self, subject: Subject, started: Mapping[str, Any]) -> None:
        for name in self.backends:
            if gone := missing(name):
                self._row(f"{name}, one device", _skip, f"{', '.join(gone)} is not installed")
                continue
            self._row(
                f"operations at special points, {name}",
                lambda name: special(backend_class(name), name, subject.used),
                name,
                about=f"{len(subject.used)} operations",
            )
            self._row(f"{name}, one device", self._one_device, subject, name)
        if not self.measured:
            return
        first, *others = self.measured
        for other in others:
            self._row(f"{other} beside {first}", self._beside, subject, first, other)
        for name in list(self.measured):
            self._row(f"{name}, accumulation 2", self._accumulated, subject, name)
        for one in self.measured:
            for two in self.measured:
                word = f"{one}, save and restore" if one == two else f"saved by {one}, restored by {two}"
                self._row(word, self._restored, subject, one, two)
        for name in self.measured:
            self._on_meshes(subject, name, started.get(name))

    def _program(self, subject: Subject, mesh: str = "") -> Any:
        return make_program(subject.recipe, mesh=mesh)

    def _points(self, subject: Subject) -> dict[str, Any]:
        return {"initial": subject.initial, "moved": subject.moved}

    def _measure(self, subject: Subject, backend: Any, **options: Any) -> Measured:
        return measure(backend, subject.small.batches, self._points(subject), subjects.first_states(subject), **options)

    def _one_device(self, subject: Subject, name: str) -> list[Finding]:
        backend = self.made[name] = backend_class(name)(self._program(subject))
        found = self._measure(subject, backend, predicts=subject.predicts)
        if not self.measured:
            self.near = self._sensitivity(subject, backend, found)
        self.measured[name] = found
        for point, params in self._points(subject).items():
            true = subjects.objective(subject, params)
            if not abs(found.loss[point] - true) <= ORACLE_LOSS * abs(true) + 8 * self.near.loss[point]:
                return [
                    Finding(
                        what="the loss",
                        said=f"expected the oracle's {true:.8g}, got {found.loss[point]:.8g} on {name}",
                        do="An operation is not the same in float32, or the model computes with Python numbers that "
                        "differ from call to call.",
                    )
                ]
        for point, gradients in found.gradients.items():
            bad = [n for n, gradient in gradients.items() if not np.isfinite(gradient).all()]
            if bad:
                where = "of a fresh run" if point == "initial" else "moved off their start"
                return [
                    Finding(
                        what=f"the gradient of {', '.join(bad[:3])}",
                        said=f"expected finite numbers at parameters {where}, got others on {name}",
                        do="A root, a division or a logarithm has no derivative at zero: add a small number first, or "
                        "choose another path with ops.where before it.",
                    )
                ]
        there = subjects.states_after_step(subject, subject.moved)
        for state, value in there.items():
            mine = found.after[f"state/{state}"].astype(np.float64)
            if not np.abs(mine - value).max(initial=0.0) <= ORACLE_LOSS * max(np.abs(value).max(initial=0.0), 1e-30):
                return [
                    Finding(
                        what=f"State {state}",
                        said=f"expected the oracle's values after a step on {name}, got others",
                        do="Change it with ops.tally in the forward pass and ops.update in after_step alone.",
                    )
                ]
        return [
            properties.unreached(
                n, subject.definition.params[n].shape, f"its gradient is zero in every element on {name}"
            )
            for n in unreached(found)
            if not any(finding.what == f"parameter {n}" for finding in self.findings)
        ]

    def _sensitivity(self, subject: Subject, backend: Any, found: Measured) -> Sensitivity:
        """Return how far the numbers move when every parameter moves by its last bit."""
        rng = np.random.default_rng(3)
        near = {
            point: {n: v * (1 + 2.0**-23 * rng.choice((-1.0, 1.0), v.shape)) for n, v in params.items()}
            for point, params in self._points(subject).items()
        }
        again = measure(backend, subject.small.batches, near, subjects.first_states(subject), steps=0)
        return sensitivity(found, again)

    def _compared(self, subject: Subject, one: Measured, other: Measured, names: tuple[str, str]) -> Any:
        return differences(
            one, other, self.near, names=names, rule=type(subject.recipe.optimizer).__name__, start=subject.moved
        )

    def _beside(self, subject: Subject, first: str, other: str) -> list[Finding]:
        return self._compared(subject, self.measured[first], self.measured[other], (first, other))

    def _accumulated(self, subject: Subject, name: str) -> list[Finding]:
        # Without States a step has nothing that the gradients do not have.
        steps = 2 if subject.definition.states else 0
        halves = self._measure(subject, self.made[name], accumulation=2, steps=steps)
        one = self.measured[name]
        return self._compared(subject, one, halves, ("one microbatch", "two microbatches"))

    def _restored(self, subject: Subject, one: str, two: str) -> list[Finding]:
        # What a model keeps outside its state is lost with the modules, so these are new ones, once for each backend.
        fresh = backend_class(two)(self._program(subject)) if one == two else self.made[two]
        found = saved_and_restored(
            self.made[one], fresh, subject.small.batches, subject.moved, subjects.first_states(subject)
        )
        differ = list(same_state(found.saved, found.restored, (one, two)))
        allowed = (1e-5 if one == two else 1e-4) * abs(found.loss) + 8 * max(self.near.loss.values())
        if not differ and not abs(found.loss - found.loss_after) <= allowed:
            differ = [
                Finding(
                    what="the loss of the step after a restore",
                    said=f"expected {found.loss:.8g}, as without the restore, got {found.loss_after:.8g}",
                    do="The model keeps something that is no Param and no State, such as a counter: declare a State.",
                )
            ]
        return differ

    # ---- on meshes

    def _started(self, subject: Subject, name: str, pool: Executor) -> Future[dict[str, Measured | UserError]] | None:
        """Start the processes of a backend with a process a device; None if it has none, or none can be started."""
        if missing(name) or not process_per_device(name):
            return None
        fit = [mesh for mesh in self.meshes if self._unfit(subject, name, mesh) is None]
        if not fit:
            return None
        return pool.submit(
            on_meshes,
            name,
            subject.recipe,
            str(self.source),
            fit,
            subject.small.batches,
            self._points(subject),
            subjects.first_states(subject),
        )

    def _on_meshes(self, subject: Subject, name: str, started: Future[dict[str, Measured | UserError]] | None) -> None:
        fit = [mesh for mesh in self.meshes if self._unfit(subject, name, mesh) is None]
        for mesh in self.meshes:

            def compared(mesh: str = mesh) -> list[Finding]:
                if (reason := self._unfit(subject, name, mesh)) is not None:
                    raise _Skip(reason)
                if started is None:
                    # A compiled step costs as much as all else here. One mesh is enough for the rule.
                    steps = 2 if mesh == fit[0] or subject.definition.states else 0
                    value = self._measure(subject, backend_class(name)(self._program(subject, mesh)), steps=steps)
                else:
                    there = started.result()[mesh]
                    if isinstance(there, UserError):
                        if is_uneven(there):
                            raise _Skip(str(there))  # a value inside the model, which only its forward pass shows
                        raise there
                    value = there
                return self._compared(subject, self.measured[name], value, ("one device", mesh))

            self._row(f"{name} on {mesh}", compared)

    def _unfit(self, subject: Subject, name: str, mesh: str) -> str | None:
        """Return why `name` cannot run `mesh` here, or None."""
        try:
            layout = self._program(subject, mesh).layout
        except UserError as error:
            return str(error)
        axis = mesh.partition("=")[0]
        split = {a for t in subject.definition.params.values() for dim in layout.tensor_spec(t) for a in dim}
        if axis == "tensor" and axis not in split:
            return "no axis of the model is split over tensor"
        if process_per_device(name) and self.source is None:
            return "its processes cannot load the recipe"
        if name == "jax" and _devices() < DEVICES:
            return f"jax was started with {_devices()} device in this process"
        return None


def _devices() -> int:
    """Return the number of devices that jax sees, which has been imported."""
    return len(sys.modules["jax"].devices())


def _skip(reason: str) -> list[Finding]:
    raise _Skip(reason)
