"""A recipe: everything that decides what a run computes, as one frozen dataclass.

A recipe is a Python file with a function ``recipe()`` that returns a ``Recipe``. Backend, mesh and devices
are no part of it: they may change while a run goes on, and the curve stays the same.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol, runtime_checkable

from portatrain import config
from portatrain.data.spec import DataSpec
from portatrain.errors import UserError, choice
from portatrain.model.lora import LoRA, adapt, is_factor
from portatrain.model.module import Definition, Module, describe
from portatrain.model.precision import stored
from portatrain.optim import Info, Rule, decays_by_default
from portatrain.optim.schedules import Schedule
from portatrain.recipe import overrides
from portatrain.recipe.retention import Retention

MeshAxes = Mapping[str, str | tuple[str, ...]]
"""Logical axis -> the mesh axes that it is cut over, major first; (): whole on every device."""


@runtime_checkable
class ModelSpec(Protocol):
    """The sizes of a model, as a frozen dataclass that can make it."""

    def build(self) -> Any:
        """The model: a ``portatrain.model.module.Module``."""
        ...


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run computes. Any two runs of equal recipes follow the same loss curve.

    Raises:
        UserError: a field of the wrong type or out of range, or sizes that do not go together.
    """

    name: str
    """Small letters, digits, ``-`` and ``_``; the default name of a run."""
    model: ModelSpec
    data: DataSpec
    """A source, and how it is cut into samples."""
    optimizer: Rule
    """The update rule, with its learning rate."""
    schedule: Schedule
    """What the learning rate is multiplied by, over the steps."""

    steps: int
    batch: int
    """Samples a step, over all devices together."""
    accumulation: int = 1
    """Microbatches a step; ``batch`` is a multiple of it."""
    batch_start: int | None = None
    """Samples of the first step, where the batch grows: a multiple of the microbatch, whose size stays. None: it does
    not grow."""
    batch_ramp: int = 0
    """Steps in which it grows, by a microbatch at a time and evenly; each after them takes ``batch``."""
    seed: int = 0

    precision: Literal["fp32", "bf16", "bf16-state"] = "fp32"
    """Of the computation. Parameters and optimizer state are fp32, with bf16-state bf16 too (``precision.py``)."""
    remat: str = "none"
    """What the backward pass computes again instead of keeping: the name of a policy."""
    clip_norm: float | None = 1.0
    """Global gradient norm above which the gradient is scaled down to it; None: never."""
    max_skips: int = 10
    """Steps that may be skipped because loss or gradient is not finite, before the run ends."""

    # Rules by name: shell patterns (`*`, `?`, `[...]`) over whole parameter names such as blocks/attn/wq.
    trainable: tuple[str, ...] | None = None
    """What is trained; None: everything or, with ``lora``, its factors."""
    frozen: tuple[str, ...] = ()
    """What is not trained although ``trainable`` names it; it has no optimizer state."""
    lora: LoRA | None = None
    """Low-rank factors beside the weights that it targets; None: there are none."""
    decay: tuple[str, ...] | None = None
    """What weight decay applies to; None: matrices and embeddings (``optim.decays_by_default``)."""
    no_decay: tuple[str, ...] = ()
    """What it leaves alone although it would apply."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the parameters; None: there is none."""
    ema: tuple[str, ...] = ("*",)
    """Which trainable parameters are averaged."""

    compute: MeshAxes | None = None
    """Entries that replace those of the default mapping of activations to mesh axes."""
    params: MeshAxes | None = None
    """Entries that replace those of the default mapping of parameters to mesh axes."""

    eval_every: int | None = None
    """Steps between evaluations; None: one at the end."""
    eval_batches: int = 16
    """Validation batches of an evaluation (fewer where the split has fewer)."""
    eval_final_batches: int | Literal["all"] | None = config.added_later(None)
    """Those of the evaluation after the last step; None: `eval_batches`, "all": the whole validation split."""

    checkpoint_every: int | None = None
    """Steps between checkpoints; None: no rule by steps. There is always one where the run stops or ends."""
    checkpoint_every_s: float | None = config.added_later(600.0)
    """Seconds of training between saves besides, more of them if saves would take over 2 % of the time; None: never."""
    checkpoint_keep: int = 2
    """How many committed checkpoints are kept: the newest ones."""
    checkpoint_keep_every: int | None = None
    """Those whose step is a multiple of it are kept too."""
    checkpoint_keep_best: str | None = None
    """And the best by an evaluation's metric: min:loss, max:accuracy."""
    checkpoint_busy: Literal["wait", "skip"] = "wait"
    """What a save does while the one before it is being written. The last one of an attempt always waits."""

    probe_every: int = 1
    """Every how many checkpoints carry the continuity check's virtual step; that of a stopping run always does."""

    hooks: tuple[Any, ...] = ()
    """What a researcher adds to the training loop; see ``portatrain.training.trainer``."""

    def __post_init__(self) -> None:
        config.check_types(self)
        for name in ("model", "data", "optimizer", "schedule"):
            if not config.is_config(getattr(self, name)):
                self._refuse(name, "a frozen dataclass", "Decorate its class with @dataclass(frozen=True).")
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", self.name):
            self._refuse("name", "1 to 63 small letters, digits, '-' or '_'", "Use a name such as tiny-lm.")
        least = {
            "steps": 1,
            "batch": 1,
            "accumulation": 1,
            "seed": 0,
            "max_skips": 0,
            "eval_batches": 1,
            "checkpoint_keep": 1,
            "probe_every": 1,
        }
        for name in ("eval_every", "eval_final_batches", "checkpoint_every", "checkpoint_keep_every"):
            if getattr(self, name) not in (None, "all"):
                least[name] = 1
        for name, bound in least.items():
            if getattr(self, name) < bound:
                self._refuse(name, f"an integer of at least {bound}", "Choose a larger one.")
        if self.seed >= 2**63:
            self._refuse("seed", "an integer below 2**63", "Choose a smaller one.")
        if self.clip_norm is not None and self.clip_norm <= 0:
            self._refuse("clip_norm", "a positive number or none", "Use none to switch clipping off.")
        if self.checkpoint_every_s is not None and self.checkpoint_every_s <= 0:
            self._refuse("checkpoint_every_s", "a positive number of seconds, or none", "A usual one is 600.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            self._refuse("ema_decay", "a number between 0 and 1, or none", "A usual one is 0.999.")
        if self.batch % self.accumulation:
            below = self.batch // self.accumulation * self.accumulation
            sizes = [str(size) for size in (below, below + self.accumulation) if size]
            raise UserError(
                f"recipe {self.name}: batch",
                expected=f"a multiple of accumulation={self.accumulation}",
                got=str(self.batch),
                do=f"The nearest sizes that work: batch={' or batch='.join(sizes)}.",
            )
        self._check_ramp()
        self.schedule.check(self.steps)
        self.retention  # noqa: B018  # raises

    def _check_ramp(self) -> None:
        start, micro = self.batch_start, self.microbatch
        if start is None:
            if self.batch_ramp:
                self._refuse("batch_ramp", "0 where batch_start is none", "Set batch_start to the first batch.")
            return
        if not 0 < start <= self.batch or start % micro:
            finer = self.batch // math.gcd(max(start, 1), self.batch)
            self._refuse(
                "batch_start",
                f"a multiple of the microbatch, {self.batch} / {self.accumulation} = {micro}, up to {self.batch}",
                f"Use batch_start={micro}" + (f", or accumulation={finer}." if 0 < start < self.batch else "."),
            )
        stages = (self.batch - start) // micro
        if self.batch_ramp < stages:
            self._refuse(
                "batch_ramp",
                f"at least {stages} steps, one for every microbatch between {start} and {self.batch}",
                "Lengthen it, or start from a larger batch.",
            )

    def _refuse(self, field: str, expected: str, do: str) -> None:
        raise UserError(f"recipe {self.name!r}: {field}", expected=expected, got=repr(getattr(self, field)), do=do)

    @property
    def microbatch(self) -> int:
        """Samples of a microbatch."""
        return self.batch // self.accumulation

    def batch_at(self, step: int) -> int:
        """Samples of a step, counted from 1."""
        if self.batch_start is None or step > self.batch_ramp:
            return self.batch
        stages = (self.batch - self.batch_start) // self.microbatch
        return self.batch_start + (step - 1) * stages // self.batch_ramp * self.microbatch

    def microbatches(self, rows: Mapping[str, Any]) -> dict[str, Any]:
        """Arrays of a step's samples with leading axes (microbatches, microbatch)."""
        return {k: v.reshape(-1, self.microbatch, *v.shape[1:]) for k, v in rows.items()}

    def samples_after(self, step: int) -> int:
        """Samples that the steps 1 to ``step`` take: where the next one begins in the sequence of samples."""
        if self.batch_start is None:
            return step * self.batch
        stages = (self.batch - self.batch_start) // self.microbatch
        # Stage j begins after ceil(j * ramp / stages) steps; what every later step lacks of the full batch.
        begins = [-(-j * self.batch_ramp // stages) for j in range(stages + 1)] if stages else [0]
        lacking = sum(min(step, end) for end in begins[1:]) * self.microbatch
        return step * self.batch - lacking

    @property
    def retention(self) -> Retention:
        """Which checkpoints stay."""
        return Retention(last=self.checkpoint_keep, every=self.checkpoint_keep_every, best=self.checkpoint_keep_best)

    def describe(self) -> Definition:
        """The model, built, with what the recipe adds to it."""
        model = self.model.build()
        if not isinstance(model, Module):
            raise UserError(
                f"recipe {self.name}: model",
                expected=f"a portatrain.Module from {type(self.model).__name__}.build()",
                got=repr(model),
                do="Return the model at the end of build().",
            )
        return stored(describe(model if self.lora is None else adapt(model, self.lora)), self.precision)

    def trains(self, name: str) -> bool:
        """Whether the parameter ``name`` is trained."""
        if self.trainable is None:
            named = self.lora is None or is_factor(name)
        else:
            named = _matches(name, self.trainable)
        return named and not _matches(name, self.frozen)

    def decays(self, info: Info) -> bool:
        """Whether weight decay applies to the parameter that ``info`` describes."""
        if _matches(info.name, self.no_decay):
            return False
        return decays_by_default(info) if self.decay is None else _matches(info.name, self.decay)

    def averages(self, name: str) -> bool:
        """Whether a moving average of the parameter ``name`` is kept."""
        return self.ema_decay is not None and self.trains(name) and _matches(name, self.ema)

    def check_names(self, names: Iterable[str]) -> None:
        """Raise UserError for a rule that selects none of the model's parameters, or if nothing trains."""
        known = list(names)
        for field in ("trainable", "frozen", "decay", "no_decay", "ema"):
            for pattern in getattr(self, field) or ():
                if not any(fnmatchcase(name, pattern) for name in known):
                    raise choice(f"recipe {self.name}: pattern {pattern!r} of {field}", pattern, known)
        if not any(self.trains(name) for name in known):
            self._refuse("trainable", "at least one parameter to train", f"The model has: {', '.join(known)}.")

    @property
    def sha256(self) -> str:
        """SHA-256, in hex, of the resolved recipe."""
        return config.sha256(self)

    def to_json(self) -> dict[str, Any]:
        """The resolved recipe as nested plain data; ``Recipe.from_json`` gives an equal recipe back."""
        return config.to_json(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Recipe:
        """The recipe that ``to_json`` wrote. One from a file of its own needs ``load_recipe`` first."""
        loaded = config.from_json(dict(data))
        if not isinstance(loaded, Recipe):
            raise UserError(
                "recipe", expected="the JSON of a Recipe", got=type(loaded).__name__, do="Pass what to_json returned."
            )
        return loaded


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def apply_overrides(recipe: Recipe, assignments: Iterable[str]) -> Recipe:
    """Return `recipe` with overrides such as `model.layers=8`, `optimizer=Lion`, `data=TextFiles`, `steps=20`.

    A class is looked for beside the one that the field holds, and in the files that recipes were loaded from.
    """
    return overrides.override(recipe, assignments, modules=tuple(_LOADED))


_LOADED: dict[str, None] = {}
"""The modules that recipes of this process were loaded from, in order: overrides may name their classes."""

# --- finding and loading -----------------------------------------------------------------------


def shipped_recipes() -> dict[str, str]:
    """The recipes that come with portatrain: name -> module, found without importing any."""
    spec = importlib.util.find_spec("recipes")
    found = {}
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.py")):
            if re.search(r"^def recipe\(", path.read_text(encoding="utf-8"), re.MULTILINE):
                found[path.stem.replace("_", "-")] = f"recipes.{path.stem}"
    return found


def load_recipe(name_or_path: str, *, cwd: Path | None = None) -> Recipe:
    """The recipe of a file (``my/recipe.py``, relative to ``cwd``) or of a shipped one (``tiny-lm``).

    Raises:
        UserError: there is no such file or name, the file does not import or defines no ``recipe()``,
            that function raises, or it returns something else than a Recipe.
    """
    shipped = shipped_recipes()
    if name_or_path.endswith(".py") or "/" in name_or_path:
        path = ((cwd or Path.cwd()) / name_or_path).resolve()
        if not path.is_file():
            raise UserError(
                f"recipe {name_or_path!r}",
                expected="a Python file, or the name of a shipped recipe",
                got="a folder" if path.is_dir() else "no such file",
                do=f"Shipped recipes: {', '.join(shipped)}.",
            )
        module = _import_file(path, shipped, what=f"recipe file {name_or_path}")
    elif name_or_path in shipped:
        module = _run(f"recipe {name_or_path}", lambda: importlib.import_module(shipped[name_or_path]))
    else:
        raise choice(f"recipe {name_or_path!r} (a file ends in .py)", name_or_path, shipped)

    what = f"recipe file {module.__file__}"
    function = getattr(module, "recipe", None)
    if not callable(function):
        raise UserError(
            what,
            expected="a function recipe() that returns a Recipe",
            got="none of that name",
            do="Add one, as the shipped files in recipes/ have.",
        )
    made = _run(what, function)
    _LOADED[module.__name__] = None
    if not isinstance(made, Recipe):
        raise UserError(
            what,
            expected="recipe() to return a portatrain.Recipe",
            got=f"a {type(made).__name__}",
            do="End the function with: return Recipe(...).",
        )
    return made


def _import_file(path: Path, shipped: Mapping[str, str], *, what: str) -> ModuleType:
    """Import ``path`` as a module. Files beside it can be imported by it, as in a script."""
    for module_name in shipped.values():
        spec = importlib.util.find_spec(module_name)
        if spec and spec.origin and Path(spec.origin).resolve() == path:
            return _run(what, partial(importlib.import_module, module_name))
    # Named after the file, so that JSON and worker processes name its classes the same way everywhere; with a
    # prefix, so that my_recipes/json.py does not become `json`.
    module_name = f"recipe_file_{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}"
    previous = sys.modules.get(module_name)
    source = _run(what, path.read_bytes)
    if previous is not None and (previous.__file__, getattr(previous, "__source__", None)) == (str(path), source):
        return previous  # as with any import: its classes are the same ones the second time
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    module = ModuleType(module_name)
    module.__dict__.update(__file__=str(path), __source__=source)
    sys.modules[module_name] = module  # dataclasses look their module up while it is being run
    try:
        # Not through an import loader: that would leave a __pycache__ beside the user's file.
        _run(what, lambda: exec(compile(source, str(path), "exec"), module.__dict__))
    except UserError:
        sys.modules.pop(module_name)
        if previous is not None:
            sys.modules[module_name] = previous
        raise
    return module


def _run(what: str, function: Any) -> Any:
    """Call code that the user wrote; what it raises becomes one paragraph with its place in the file."""
    try:
        return function()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
        place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if len(frames) > 1 else ""
        if isinstance(error, SyntaxError):
            place = f" ({error.filename}, line {error.lineno})"
        raise UserError(
            what,
            expected="a file that runs and whose recipe() returns a Recipe",
            got=f"{type(error).__name__}: {error}{place}",
            do="Mend the file and try again.",
        ) from error
