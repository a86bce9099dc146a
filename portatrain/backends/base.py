"""What a backend is: a Protocol of few verbs. The trainer, the checkpoint and the tests see nothing else.

A backend is found by the entry-point group `portatrain.backends`; `open_backend` makes one by name.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from portatrain.backends.program import Program
from portatrain.errors import UserError, choice
from portatrain.model.ops import Loss
from portatrain.system import processes

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step gives back. The arrays are the framework's own 0-d ones: read them with `float()` when needed,
    so that a device need not be waited for.

    loss: mean over the global batch's weight. grad_norm: of the gradient before clipping, over all parameters.
    skipped: 1 where loss or gradient was not finite and nothing was changed, else 0. weight: the global batch's.
    """

    loss: Any
    grad_norm: Any
    skipped: Any
    weight: Any
    aux: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LocalBox:
    """A part of a logical tensor that this process holds: what a checkpoint writes and reads.

    role: 'params', 'state', 'ema', 'opt/m', ... ; `fetch` copies it to the host.
    """

    name: str
    role: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Context:
    """The circumstances of a bare call of operations, for `Backend.evaluate`."""

    seed: int = 0
    step: int = 1
    sample: np.ndarray | None = None
    """(B,) int64 sample indices n; needed by dropout."""
    training: bool = False
    precision: str = "fp32"


def check_loss(value: Any, model: object) -> Loss:
    """Return `value`, which `model` returned from its call, if it is a `Loss`; else raise UserError."""
    if not isinstance(value, Loss):
        raise UserError(
            type(model).__name__,
            expected="a model that returns ops.cross_entropy(...) or ops.loss()",
            got=type(value).__name__,
            do="Return a portatrain.model.ops.Loss from __call__(ops, batch).",
        )
    return value


IrregularShards = Mapping[tuple[str, str], Sequence[tuple[int, tuple[int, ...], tuple[int, ...]]]]
"""By role and name: (process, offset, shape) of boxes that cover the tensor, without overlap."""


class Backend(Protocol):
    """A way to carry a `Program` out on devices.

    Batches are NumPy: every array has leading axes (accumulation, microbatch) in `step` and (samples,) in `evaluate`;
    'sample' holds the (.., ) int64 indices n. States are opaque and belong to the backend; `step` consumes the one
    it is given.

    Optional: `restore_shared(read, shares)` gives the state of `restore_state`, where of the tensors in `shares`
    (checkpoint/shared_reads.py) each process reads its part of a box (`Share.part`) and receives the rest from the
    processes that hold copies.
    """

    name: str
    program: Program
    async_dispatch: bool
    """Whether `step` returns before the step is done."""
    process: int
    """This process's number among those that carry the program out together; 0 writes what a run leaves."""
    processes: int
    """How many there are. All of them call every verb together, with the same arguments. Each holds an equal run of
    the mesh's positions, row-major, unless an attribute `owners` lists the process of every position."""

    def __init__(self, program: Program) -> None: ...

    def lower(self) -> Any:
        """The model as the framework's own module, with this program's initial parameters."""
        ...

    def init_state(self) -> Any:
        """Parameters from `rng.truncated_normal`, optimizer slots at zero, model States, averages, counts."""
        ...

    def restore_state(self, read: Callable[[str, str, tuple[int, ...], tuple[int, ...]], np.ndarray]) -> Any:
        """A state whose every box comes from `read(role, name, offset, shape)`."""
        ...

    def step(self, state: Any, batch: Mapping[str, np.ndarray], *, step: int, scale: float) -> tuple[Any, StepResult]:
        """One optimizer step: `step` counts from 1, `scale` is the schedule's multiplier."""
        ...

    def probe(self, state: Any, batch: Mapping[str, np.ndarray], *, step: int, scale: float) -> Arrays:
        """What `step` would do, with nothing changed, for the continuity check. By 'ROLE/NAME' the 2-norm of every
        tensor of the state; as 'grad/NAME' that of the gradient before clipping, as 'update/NAME' of what would be
        added to the parameter. Each array has the axes of the tensor's Stacks: a value a layer, () without one.
        A backend that cannot has `probe = None`."""
        ...

    def eval(self, state: Any, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Without dropout or update: 'loss_B' and 'weight_B', and the per-sample value of every aux by its name."""
        ...

    def predict(self, state: Any, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """The model's `predict(ops, batch)`, on the host."""
        ...

    def gradients(self, state: Any, batch: Mapping[str, np.ndarray], *, step: int) -> tuple[float, Arrays]:
        """(loss, gradients by parameter name) of one global batch as `step` sees them before clipping; nothing
        changes. For checks."""
        ...

    def local_boxes(self, state: Any) -> Iterator[LocalBox]:
        """Every box of every tensor that this process holds, with nothing left out."""
        ...

    def irregular_shards(self, state: Any) -> IrregularShards:
        """Which process has which boxes of the tensors that do not lie as the layout says; all processes call it."""
        ...

    def describe_memory(self, state: Any) -> dict[str, int]:
        """Bytes on this process's devices by role: params, opt, state, ema, and 'peak' where the device tells."""
        ...

    def graphs(self) -> int:
        """How many graphs have been compiled for this program so far."""
        ...

    def agree(self, value: int) -> int:
        """The largest `value` of all processes, once all have come here."""
        ...

    def describe_device(self) -> dict[str, Any]:
        """What it runs on: 'device' (a name), 'devices' (a count), 'framework' (name and version)."""
        ...

    @classmethod
    def evaluate(cls, fn: Callable[..., Any], args: tuple[Any, ...], context: Context) -> Any:
        """`fn(ops, *args)` with the arrays of `args` as the framework's own, results as NumPy. For checks."""
        ...

    @classmethod
    def differentiate(cls, fn: Callable[..., Any], args: tuple[Any, ...], context: Context) -> tuple[Any, tuple]:
        """(value, gradients with respect to every floating array of `args`) of a scalar `fn(ops, *args)`."""
        ...


GROUP = "portatrain.backends"
"""The entry-point group that a lab's own backends register in."""

_ZERO = "portatrain.backends.deepspeed:Zero"
_OURS = {
    "jax": ("portatrain.backends.jax:JaxBackend", "jax", ("jax", "flax", "optax")),
    "torch": ("portatrain.backends.torch:TorchBackend", "torch", ("torch",)),
    **{f"deepspeed-{n}": (f"{_ZERO}{n}", "deepspeed", ("torch", "deepspeed")) for n in (1, 2, 3)},
    "torch-xla": ("portatrain.backends.torch_xla:XlaBackend", "torch-xla", ("torch", "torch_xla")),
}
"""Our backends: where each is, the extra that installs what it needs, and what that is."""


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    ours = {n: importlib.metadata.EntryPoint(n, where, GROUP) for n, (where, *_) in _OURS.items()}
    return {e.name: e for e in importlib.metadata.entry_points(group=GROUP)} | ours


def missing(name: str) -> tuple[str, ...]:
    """The frameworks that backend `name` needs and that are not installed."""
    needs = _OURS[name][2] if name in _OURS else ()
    return tuple(m for m in needs if importlib.util.find_spec(m) is None)


def check_backend(name: str) -> str:
    """`name`, if there is such a backend and its frameworks are installed; else UserError. Imports no framework."""
    known = _entry_points()
    if name not in known:
        raise choice("backend", name, known)
    if gone := missing(name):
        raise UserError(
            f"backend {name}",
            expected=f"{', '.join(_OURS[name][2])} to be installed",
            got=f"no {', '.join(gone)}",
            do=f"Install it with: pip install 'portatrain[{_OURS[name][1]}]'",
        )
    return name


def default_backend() -> str:
    """jax where it is installed, else torch; UserError with the install command where neither is."""
    for name in ("jax", "torch"):
        if name in _entry_points() and not missing(name):
            return name
    raise UserError(
        "backend",
        expected="jax or torch to be installed",
        got="neither",
        do="Install one: pip install 'portatrain[jax]'",
    )


def backend_class(name: str) -> type[Backend]:
    """The class of backend `name`, its framework imported. UserError where it does not import, or is none."""
    check_backend(name)
    point = _entry_points()[name]
    try:
        found = point.load()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"backend {name}",
            expected=f"{point.value} to import",
            got=f"{type(error).__name__}: {error}",
            do="Mend or remove the package that registers it under portatrain.backends.",
        ) from error
    lacks = [verb for verb in vars(Backend) if not verb.startswith("_") and not hasattr(found, verb)]
    if lacks:
        raise UserError(
            f"backend {name}",
            expected="a class with the verbs of portatrain.backends.base.Backend",
            got=f"one without {', '.join(lacks)}",
            do="Add them; `python -m portatrain.testing` checks what they do.",
        )
    return found


_PROCESS_PER_DEVICE = ("torch", "deepspeed-1", "deepspeed-2", "deepspeed-3")


def process_per_device(name: str | None) -> bool:
    """Return whether every device of backend `name` has a process of its own; else every host has one.

    A backend of another package says so by its class's attribute `process_per_device`.
    """
    if name is None or name in _OURS or name not in _entry_points():
        return name in _PROCESS_PER_DEVICE
    return bool(getattr(backend_class(name), "process_per_device", False))


def simulate_devices(name: str, devices: int) -> None:
    """Have backend `name` see `devices` devices, over all processes, on a machine that has a CPU only. To be called
    before its framework is imported; does nothing for one, or where the process has been told how many there are.

    A backend of another package may have a static method `simulate_devices(devices)`, which is called before it is
    made."""
    if name not in _OURS:
        own = getattr(backend_class(name), "simulate_devices", None)
        if own is not None:
            own(devices)
    if name == "torch-xla":
        os.environ.setdefault("CPU_NUM_DEVICES", str(devices))
    if name != "jax":
        return
    mine = devices_a_process(devices, processes.world_size() or 1)
    flags = os.environ.get("XLA_FLAGS", "")
    if mine > 1 and "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={mine}".strip()


def devices_a_process(devices: int, among: int) -> int:
    """How many of a mesh's `devices` each of `among` processes has; UserError where they do not divide."""
    if devices % among:
        raise UserError(
            f"{among} processes",
            expected=f"a number that divides the mesh's {devices} devices",
            got=str(among),
            do=f"Every process holds as many: use {math.gcd(devices, among)} processes, or another mesh.",
        )
    return devices // among
