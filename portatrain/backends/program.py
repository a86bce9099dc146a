"""Define `Program`, everything that a backend needs to know of a run, and make one from a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from portatrain.errors import UserError, choice
from portatrain.model import remat
from portatrain.model.layout import Layout, Mesh
from portatrain.model.module import Definition
from portatrain.model.precision import PRECISIONS
from portatrain.optim import SGD, Rule, declared_slots
from portatrain.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Program:
    """Everything that a backend needs to know of a run. Length, data and storage of the run are not part of it.

    `decay`, `trainable` and `ema` contain names of parameters (`blocks/attn/wq`). `ema_decay` None: no average is kept.
    `compile` None: the backend decides for its device.
    """

    definition: Definition
    layout: Layout
    optimizer: Rule
    trainable: frozenset[str]
    decay: frozenset[str]
    ema: frozenset[str] = frozenset()
    ema_decay: float | None = None
    clip_norm: float | None = None
    precision: str = "fp32"
    remat: str = "none"
    seed: int = 0
    compile: bool | None = None
    kernels: tuple[tuple[str, str], ...] = ()
    """(operation, kernel) of the kernels named explicitly; `backends/choose_kernel.py` chooses all others."""
    order: Callable[[Sequence[Any]], Sequence[Any]] | None = field(default=None, compare=False, repr=False)
    """The order of a mesh's devices, if the network makes it matter; None: the order in which the framework lists
    them."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise choice("precision", self.precision, PRECISIONS)
        remat.parse(self.remat)


def make_program(recipe: Recipe, *, mesh: str = "") -> Program:
    """Return the program that runs `recipe` on `mesh` ('fsdp=4,tensor=2'; '' is one device).

    Raises UserError if parts of the recipe contradict one another, as rules that match no name or sizes that do not
    divide.
    """
    definition = recipe.describe()
    params = definition.params
    recipe.check_names(params)
    _check_frozen(recipe, definition)
    layout = Layout.of(definition, Mesh.parse(mesh), compute=recipe.compute, params=recipe.params)
    for info in params.values():
        if recipe.trains(info.name):
            declared_slots(recipe.optimizer, info)
    layout.check_batch(recipe.microbatch, recipe.data.tokens_per_sample())
    return Program(
        definition=definition,
        layout=layout,
        optimizer=recipe.optimizer,
        trainable=frozenset(n for n in params if recipe.trains(n)),
        decay=frozenset(n for n, t in params.items() if recipe.decays(t)),
        ema=frozenset(n for n in params if recipe.averages(n)),
        ema_decay=recipe.ema_decay,
        clip_norm=recipe.clip_norm,
        precision=recipe.precision,
        remat=recipe.remat,
        seed=recipe.seed,
    )


def _check_frozen(recipe: Recipe, definition: Definition) -> None:
    """Raise UserError if the recipe trains what a module of the model says is never trained."""
    for module in definition.modules.values():
        for pattern in module.never_trained:
            full = f"{module.path}/{pattern}".lstrip("/")
            trained = [n for n in definition.params if recipe.trains(n) and fnmatchcase(n, full)]
            if trained:
                raise UserError(
                    f"recipe {recipe.name}: frozen",
                    expected=f"{full!r}, which a {type(module).__name__} never trains",
                    got=f"a recipe that trains {len(trained)} of them, such as {trained[0]}",
                    do=f"Write frozen=({full!r},).",
                )


def weights_alone(program: Program) -> Program:
    """Return the program of the same model without optimizer slots and averages, for use without training."""
    return replace(program, optimizer=SGD(lr=1e-30), ema=frozenset(), ema_decay=None, clip_norm=None)


def on_one_device(program: Program) -> Program:
    """Return the program of the same model, without slots and averages, on a mesh of one device."""
    return replace(weights_alone(program), layout=replace(program.layout, mesh=Mesh()), order=None)


def on_the_host(program: Program) -> Program:
    """Return the program of the same model for a processor: with the kernels that it has, and not compiled by torch."""
    return replace(on_one_device(program), kernels=(), compile=False)
