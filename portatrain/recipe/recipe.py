"""`Recipe`: everything that decides what a run computes, as one frozen dataclass.

Backend, mesh and devices are not
part of a recipe: they may change between the attempts of a run, and the loss curve stays the same.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol, runtime_checkable

from portatrain import config
from portatrain.data.ranges import Ranges, number_at, ranges
from portatrain.data.spec import DataSpec
from portatrain.errors import UserError, no_match
from portatrain.errors.users_code import line_of
from portatrain.model.fp8 import quantise
from portatrain.model.lora import LoRA, adapt, is_factor
from portatrain.model.module import Definition, describe
from portatrain.model.precision import stored
from portatrain.model.widths import MuP, with_widths
from portatrain.optim import Info, Rule, decays_by_default
from portatrain.optim.schedules import Schedule
from portatrain.recipe.building import built, built_at_base, lr_factor
from portatrain.recipe.origin import Origin
from portatrain.recipe.referee import Referee
from portatrain.recipe.retention import Retention
from portatrain.recipe.spikes import Spikes

MeshAxes = Mapping[str, str | tuple[str, ...]]
"""Logical axis -> the mesh axes that shard it, major first; () leaves it whole on every device."""


@runtime_checkable
class ModelSpec(Protocol):
    """The sizes of a model: a frozen dataclass with a method that builds it."""

    def build(self) -> Any:
        """Return the model, a ``portatrain.model.module.Module``."""
        ...


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a run computes. Two runs of equal recipes follow the same loss curve.

    Raises:
        UserError: a field has the wrong type or is out of range, or two sizes do not fit together.
    """

    name: str
    """Name of the recipe and default name of its runs: 1 to 63 lower-case letters, digits, ``-`` and ``_``."""
    model: ModelSpec
    """The sizes of the model; a frozen dataclass with a method ``build``."""
    data: DataSpec
    """The source of the data and how it is cut into samples."""
    optimizer: Rule
    """The update rule, with its learning rate."""
    parametrization: MuP | None = config.added_later(None)  # noqa: RUF009
    """How initial values, learning rates and multipliers follow the width of the model, such as MuP. None: the standard
    parametrization; the learning rate is that of ``optimizer`` for all parameters."""
    schedule: Schedule
    """The multiplier of the learning rate at each step."""

    steps: int
    """Number of optimizer steps in the run, at least 1."""
    batch: int
    """Samples per step, over all devices together."""
    accumulation: int = 1
    """Microbatches per step; must divide ``batch``. 1: the whole batch at once."""
    batch_start: int | None = None
    """Samples of the first step if the batch grows: a multiple of the microbatch size, which does not change. None: the
    batch does not grow."""
    batch_ramp: int = 0
    """Number of steps in which the batch grows evenly from ``batch_start`` to ``batch``, one microbatch at a time. 0:
    it does not grow."""
    seed: int = 0
    """Seed of the initial weights, the order of samples and dropout, from 0 to 2**63 - 1."""
    init: str | None = config.added_later(None)
    """A folder of transformers (config.json and .safetensors) with the weights that the run begins with, instead of
    random ones: fine-tuning. ``model`` must be the model of its config.json."""
    leave_out: tuple[str, ...] = config.added_later(())
    """Samples that are not trained on; those that follow move up. 51 is sample 51; 51:54 are samples 51, 52 and 53. ():
    none."""

    precision: Literal["fp32", "bf16", "bf16-state", "fp8"] = "fp32"
    """The dtypes. fp32: float32 throughout. bf16: computation in bfloat16; parameters and optimizer state in float32.
    bf16-state: these are kept in bfloat16 too, with stochastic rounding. fp8: as bf16, with matmuls computed from 8-bit
    operands. See ``portatrain.model.precision``."""
    fp8_matmuls: tuple[str, ...] | None = config.added_later(None)
    """Name patterns of the weights whose matmuls precision fp8 computes from 8-bit operands. None: all that
    ``portatrain.model.fp8.can_quantise`` takes. No effect with other precisions."""
    fp8_scaling: Literal["row", "tensor"] = config.added_later("row")
    """What shares a scale in the matmuls of precision fp8. row: each row and column that a product contracts. tensor:
    all values of a weight in a layer, and of an activation or a gradient in a sample."""
    remat: str = "none"
    """The remat policy: which activations the backward pass recomputes instead of keeping. none: it keeps all. See
    ``portatrain.model.remat``."""
    clip_norm: float | None = 1.0
    """Maximum global 2-norm of the gradient; a larger gradient is scaled down to it. None: no clipping."""
    max_skips: int = 10
    """Maximum number of steps that an attempt may skip because the loss or the gradient is not finite, or is a spike;
    one more ends it with an error."""
    spikes: Spikes | None = config.added_later(None)  # noqa: RUF009
    """The rule for steps with a loss or a gradient norm far above those before it: their update is skipped, or the run
    goes back and leaves their samples out. None: only steps that are not finite are skipped."""

    referee: Referee | None = config.added_later(None)  # noqa: RUF009
    """How often a step is computed a second time, on another device, to find devices that compute wrong numbers. None:
    never."""

    # The next fields select parameters by shell patterns (`*`, `?`, `[...]`) over names such as blocks/attn/wq.
    trainable: tuple[str, ...] | None = None
    """Name patterns of the parameters to train. None: all parameters or, with ``lora``, only the LoRA factors."""
    frozen: tuple[str, ...] = ()
    """Name patterns of the parameters to exclude from ``trainable``; they have no optimizer state. (): none."""
    lora: LoRA | None = None
    """LoRA settings: low-rank factors are added to the weights that it targets. None: no LoRA."""
    decay: tuple[str, ...] | None = None
    """Name patterns of the parameters to apply weight decay to. None: matrices and embeddings
    (``portatrain.optim.decays_by_default``)."""
    no_decay: tuple[str, ...] = ()
    """Name patterns of the parameters to exclude from weight decay. (): none."""
    ema_decay: float | None = None
    """Decay per step of an exponential moving average of the parameters, between 0 and 1. None: no average."""
    ema: tuple[str, ...] = ("*",)
    """Name patterns of the trainable parameters to average. ("*",): all of them. No effect without ``ema_decay``."""

    compute: MeshAxes | None = None
    """Logical axis -> mesh axes for activations; these entries replace the defaults (``model.layout.COMPUTE``). None:
    the defaults."""
    params: MeshAxes | None = None
    """Logical axis -> mesh axes for parameters; these entries replace the defaults (``model.layout.PARAMS``). None: the
    defaults."""

    eval_every: int | None = None
    """Steps between evaluations. None: one evaluation, at the end of the run."""
    eval_batches: int = 16
    """Maximum number of validation batches per evaluation; fewer if the split has fewer."""
    eval_final_batches: int | Literal["all"] | None = config.added_later(None)
    """Maximum number of validation batches of the evaluation after the last step; all: the whole split. None:
    ``eval_batches``."""

    checkpoint_every: int | None = None
    """Steps between checkpoints. None: no rule by steps. A run always saves when it stops or ends."""
    checkpoint_every_s: float | None = config.added_later(600.0)
    """Seconds of training between checkpoints, besides ``checkpoint_every``; longer if saving would take more than 2 %
    of the time. None: no rule by time."""
    checkpoint_keep: int = 2
    """Number of newest committed checkpoints to keep, at least 1."""
    checkpoint_keep_every: int | None = None
    """Also keep each checkpoint whose step is a multiple of this number. None: no others."""
    checkpoint_keep_best: str | None = None
    """Also keep the best checkpoint by an evaluation metric, such as min:loss or max:accuracy. None: no others."""
    checkpoint_busy: Literal["wait", "skip"] = "wait"
    """Action if a checkpoint is due while the previous one is still being written: wait for it, or skip the new one.
    The last checkpoint of an attempt always waits."""

    probe_every: int = 1
    """Every n-th checkpoint stores the probe for the continuity check (1: all do), and so does the last one of a run
    that is asked to stop."""

    statistics_every: int | None = config.added_later(None)
    """Steps between records of statistics by layer: norms of every parameter, gradient and update; activations, dead
    units and largest attention logits. None: none are recorded."""

    hooks: tuple[Any, ...] = ()
    """Hooks to call from the training loop (``portatrain.training.hooks``). (): none."""

    origin: Origin | None = config.added_later(None)  # noqa: RUF009
    """Where a run that was changed or forked counts samples from. portatrain sets it. None: from its first step."""

    def __post_init__(self) -> None:
        config.check_types(self)
        for name in ("model", "data", "optimizer", "schedule"):
            if not config.is_config(getattr(self, name)):
                self._refuse(name, "a frozen dataclass", "Decorate its class with @dataclass(frozen=True).")
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", self.name):
            self._refuse("name", "1 to 63 lower-case letters, digits, '-' or '_'", "Use a name such as tiny-lm.")
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
        for name in (
            "eval_every",
            "eval_final_batches",
            "checkpoint_every",
            "checkpoint_keep_every",
            "statistics_every",
        ):
            if getattr(self, name) not in (None, "all"):
                least[name] = 1
        for name, bound in least.items():
            if getattr(self, name) < bound:
                self._refuse(name, f"an integer of at least {bound}", "Use a larger number.")
        if self.seed >= 2**63:
            self._refuse("seed", "an integer below 2**63", "Use a smaller number.")
        if self.clip_norm is not None and self.clip_norm <= 0:
            self._refuse("clip_norm", "a positive number or none", "Use none to switch clipping off.")
        if self.checkpoint_every_s is not None and self.checkpoint_every_s <= 0:
            self._refuse("checkpoint_every_s", "a positive number of seconds, or none", "A usual one is 600.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            self._refuse("ema_decay", "a number between 0 and 1, or none", "A usual value is 0.999.")
        if self.batch % self.accumulation:
            below = self.batch // self.accumulation * self.accumulation
            sizes = [str(size) for size in (below, below + self.accumulation) if size]
            raise UserError(
                f"recipe {self.name}: batch",
                expected=f"a multiple of accumulation={self.accumulation}",
                got=str(self.batch),
                do=f"Use the nearest valid size: batch={' or batch='.join(sizes)}.",
            )
        self.left_out  # noqa: B018  # raises
        for name in ("lora", "init"):
            if self.parametrization is not None and getattr(self, name) is not None:
                self._refuse(
                    name,
                    "none, with a parametrization, which decides initial values and multipliers",
                    f"Set {name}=none, or parametrization=none: the weights that a run begins with bring their own.",
                )
        self._check_ramp()
        self.schedule.check(self.steps)
        self.retention  # noqa: B018  # raises

    def _check_ramp(self) -> None:
        start, micro = self.batch_start, self.microbatch
        if start is None:
            if self.batch_ramp:
                self._refuse(
                    "batch_ramp", "0, since batch_start is none", "Set batch_start to the batch size of the first step."
                )
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
                "Use a longer ramp, or a larger batch_start.",
            )

    def _refuse(self, field: str, expected: str, do: str) -> None:
        raise UserError(f"recipe {self.name!r}: {field}", expected=expected, got=repr(getattr(self, field)), do=do)

    def flops_per_sample(self) -> float | None:
        """Return the model FLOPs of a sample, forward and backward; None if the model does not say.

        A model says so by a method ``flops_per_sample(tokens)``, or ``flops_per_sample()`` if its samples have a fixed
        size.
        """
        counted = getattr(self.model, "flops_per_sample", None)
        if counted is None:
            return None
        if not inspect.signature(counted).parameters:
            return float(counted())
        tokens = self.data.tokens_per_sample()
        return None if tokens is None else float(counted(tokens))

    def lr_scale(self, step: int) -> float:
        """Return the schedule's multiplier of the learning rate at ``step``, counted from 1.

        Raises:
            UserError: the schedule returns anything but a finite number.
        """
        scale = self.schedule(step, self.steps)
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            kind = type(self.schedule)
            raise UserError(
                f"schedule {kind.__qualname__}{line_of(kind)}",
                expected=f"a finite number for step {step} of {self.steps}",
                got=repr(scale),
                do="Return the multiplier of the learning rate as a Python number.",
            )
        return float(scale)

    @property
    def microbatch(self) -> int:
        """The number of samples in a microbatch."""
        return self.batch // self.accumulation

    def batch_at(self, step: int) -> int:
        """Return the number of samples in ``step``, counted from 1."""
        if self.batch_start is None or step > self.batch_ramp:
            return self.batch
        stages = (self.batch - self.batch_start) // self.microbatch
        return self.batch_start + (step - 1) * stages // self.batch_ramp * self.microbatch

    def microbatches(self, rows: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arrays of one step, (samples, ...), as (microbatches, samples per microbatch, ...)."""
        return {k: v.reshape(-1, self.microbatch, *v.shape[1:]) for k, v in rows.items()}

    def samples_after(self, step: int) -> int:
        """Return the number of samples in steps 1 to ``step``: the place of the first sample of the next step."""
        begun = self.origin
        return self._samples(step) if begun is None else begun.samples + self._samples(step) - self._samples(begun.step)

    def numbers_of(self, step: int) -> tuple[int, int]:
        """Return (number of the first sample of ``step``, 1 + that of its last one); ``leave_out`` may lie between."""
        first, end = self.samples_after(step - 1), self.samples_after(step)
        return number_at(first, self.left_out), 1 + number_at(end - 1, self.left_out)

    @property
    def left_out(self) -> Ranges:
        """The numbers in ``leave_out``."""
        return ranges(self.leave_out, f"recipe {self.name}: leave_out")

    def tokens_after(self, step: int, per_sample: int) -> int:
        """Return the number of tokens in steps 1 to ``step``, with ``per_sample`` in each sample since the origin."""
        begun = self.origin
        samples = self.samples_after(step)
        return samples * per_sample if begun is None else begun.tokens + (samples - begun.samples) * per_sample

    def _samples(self, step: int) -> int:
        """Return the samples of steps 1 to ``step`` if all of them were of this recipe."""
        if self.batch_start is None:
            return step * self.batch
        stages = (self.batch - self.batch_start) // self.microbatch
        # Stage j begins after ceil(j * ramp / stages) steps, and each step before it has one microbatch less.
        begins = [-(-j * self.batch_ramp // stages) for j in range(stages + 1)] if stages else [0]
        lacking = sum(min(step, end) for end in begins[1:]) * self.microbatch
        return step * self.batch - lacking

    @property
    def retention(self) -> Retention:
        """The rule for keeping checkpoints."""
        back = self.spikes.before if self.spikes is not None and self.spikes.action == "rewind" else 0
        last, every, best = self.checkpoint_keep, self.checkpoint_keep_every, self.checkpoint_keep_best
        return Retention(last=last, every=every, best=best, back=back)

    def describe(self) -> Definition:
        """Build the model, with its LoRA factors if any, and return its tensors in the dtypes of ``precision``."""
        model, widths = built(self.model, self.name), None
        if self.parametrization is not None:
            widths = self.parametrization.apply(model, built_at_base(self.parametrization, self.model, self.name))
        model = model if self.lora is None else adapt(model, self.lora)
        if self.precision == "fp8":
            found = quantise(model, self.fp8_matmuls, self.fp8_scaling)
        else:
            found = stored(describe(model), self.precision)
        return found if widths is None else with_widths(found, widths, functools.partial(lr_factor, self.optimizer))

    def trains(self, name: str) -> bool:
        """Return True if the recipe trains the parameter ``name``."""
        if self.trainable is None:
            named = self.lora is None or is_factor(name)
        else:
            named = _matches(name, self.trainable)
        return named and not _matches(name, self.frozen)

    def decays(self, info: Info) -> bool:
        """Return True if weight decay applies to the parameter that ``info`` describes."""
        if _matches(info.name, self.no_decay):
            return False
        return decays_by_default(info) if self.decay is None else _matches(info.name, self.decay)

    def averages(self, name: str) -> bool:
        """Return True if the run keeps a moving average of the parameter ``name``."""
        return self.ema_decay is not None and self.trains(name) and _matches(name, self.ema)

    def check_names(self, names: Iterable[str]) -> None:
        """Check the name patterns against the names of the model's parameters.

        Raises:
            UserError: a pattern matches no parameter, or no parameter is trained.
        """
        known = list(names)
        for field in ("trainable", "frozen", "decay", "no_decay", "ema"):
            for pattern in getattr(self, field) or ():
                if not any(fnmatchcase(name, pattern) for name in known):
                    raise no_match(f"recipe {self.name}: {field}", pattern, known)
        if not any(self.trains(name) for name in known):
            self._refuse("trainable", "at least one parameter to train", f"Choose among {', '.join(known)}.")

    @property
    def sha256(self) -> str:
        """The SHA-256 of the recipe's JSON, in hex."""
        return config.sha256(self)

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as nested plain data, from which ``Recipe.from_json`` makes an equal recipe."""
        return config.to_json(self)

    @staticmethod
    def from_json(data: Mapping[str, Any], *, trusted: Callable[[str], bool] = lambda module: True) -> Recipe:
        """Return the recipe that ``to_json`` wrote.

        If a recipe file defines classes of its own, load it with ``load_recipe`` first. ``trusted``: the modules that
        may be imported, as in `config.from_json`; all of them for the record of a run.

        Raises:
            UserError: a class that cannot be imported, an unknown or missing field, or the JSON of another class.
        """
        loaded = config.from_json(dict(data), trusted=trusted)
        if not isinstance(loaded, Recipe):
            raise UserError(
                "recipe", expected="the JSON of a Recipe", got=type(loaded).__name__, do="Pass the result of to_json."
            )
        return loaded


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
