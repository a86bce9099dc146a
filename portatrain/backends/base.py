"""Define the `Backend` protocol, through which the trainer, the checkpoint and the tests use a framework.

`BACKENDS` finds backends, those of other packages by the entry points `portatrain.backends`. `backend_class` returns
the class of a backend by name.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from portatrain.backends.program import Program
from portatrain.errors import UserError, choice
from portatrain.errors.users_code import line_of_method
from portatrain.model.ops import Loss
from portatrain.system import processes
from portatrain.system.plugins import Registry, lacks

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The results of one step. The values are 0-d arrays of the framework; `float()` waits for the device.

    loss: mean over the weight of the global batch. grad_norm: 2-norm of the gradient of all parameters, before
    clipping. skipped: 1 if the loss or the gradient was not finite and the state is unchanged, else 0. weight: total
    weight of the global batch. aux: the metrics of `ops.aux` by name. layers: those with reduce='layers', each (layers,
    ...). statistics: the norms of the step, named as by `Backend.probe`, if they were asked for.
    """

    loss: Any
    grad_norm: Any
    skipped: Any
    weight: Any
    aux: Mapping[str, Any] = field(default_factory=dict)
    statistics: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, metrics: Mapping[str, Any], **fields: Any) -> StepResult:
        """Return a result whose `metrics` are those of layers and the others."""
        layers = {name: value for name, value in metrics.items() if value.ndim}
        return cls(aux={k: v for k, v in metrics.items() if k not in layers}, layers=layers, **fields)


@dataclass(frozen=True, kw_only=True)
class LocalBox:
    """A box of a logical tensor that this process holds. Checkpoints write and read such boxes.

    role: 'params', 'state', 'ema', 'opt/m', ... ; `fetch` copies the box to the host.
    """

    name: str
    role: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]
    position: int | None = None
    """The position in the mesh of the device that holds it; None: that of the process."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """Give `Backend.evaluate` the seed, the step and the mode for operations that run without a model."""

    seed: int = 0
    step: int = 1
    sample: np.ndarray | None = None
    """(B,) int64 sample indices n; needed by dropout."""
    training: bool = False
    precision: str = "fp32"


def check_loss(value: Any, model: object) -> Loss:
    """Return `value`, which `model` returned from its call, if it is a `Loss`; else raise UserError."""
    if not isinstance(value, Loss):
        shape = getattr(value, "shape", None)
        raise UserError(
            f"{type(model).__name__}.__call__{line_of_method(model, '__call__')}",
            expected="a model that returns ops.cross_entropy(...) or ops.loss(...)",
            got=f"a {type(value).__name__}" if shape is None else f"an array of shape {tuple(shape)}",
            do="Return a portatrain.model.ops.Loss from __call__(ops, batch).",
        )
    return value


IrregularShards = Mapping[tuple[str, str], Sequence[tuple[int, tuple[int, ...], tuple[int, ...]]]]
"""(process, offset, shape) of boxes that cover a tensor without overlap, by (role, name) of the tensor."""


class Backend(Protocol):
    """Run a `Program` on devices.

    Batches are NumPy. Every array has leading axes (accumulation, microbatch) in `step` and (samples,) in `evaluate`;
    'sample' holds the (...,) int64 sample indices. A state is opaque and belongs to the backend. `step` consumes the
    state that it is given.

    Optional method: `restore_shared(read, shares)` returns the same state as `restore_state`. For the tensors in
    `shares` (checkpoint/shared_reads.py) each process reads only its part of a box (`Share.part`) and receives the
    other parts from the processes that hold copies.

    Optional method: `add_up(words)` returns the sums of `words`, (n,) uint64, over all processes, modulo 2^64. Without
    it a run in several processes does not compare fingerprints of its tensors (checkpoint/fingerprints.py).

    Optional method: `unequal_copies(state)` returns (role, name) of the tensors of which this process holds a further
    copy, beside those of `local_boxes`, that differs in a bit. Their fingerprints count as different.

    Optional method: `rows_here(samples)` returns which rows of a microbatch of that many samples this process uses,
    (samples,) bool, or None for all. Without it each process reads every sample from a packed store.

    Optional attribute: `takes_limits`, True if `step` has the keyword argument `limits` (`backends/limits.py`): a step
    beyond them changes nothing and is skipped. Without it a recipe with `spikes` is refused.

    Optional attribute: `takes_statistics`, True if `step` has the keyword argument `statistics`: with True the result
    has the norms that `probe` gives of parameters, gradients and updates, and what `model/measured.py` records of
    activations. Without it a recipe with `statistics_every` probes before these steps, which costs a step each; with
    the optional attribute `probes_activations`, `probe` has the keyword argument `activations`, and gives these too.

    Optional method: `start_trace()` starts a trace of this process and returns it (`backends/profile.py`). Without it
    `--profile` is refused.

    Optional method: `cached(state)` returns the model with a cache of keys and values (`backends/decoding.py`), or None
    if this mesh has none. Without it a text is continued by running the model on all of it for every token.

    Optional method: `watch(state, batch, step=...)` runs the forward and backward pass of a step and returns what every
    operation took and gave, with gradients (`backends/watched`), for each microbatch. Without it `portatrain bisect`
    compares gradients and updates, and names no operation.

    Optional methods, without which a recipe with a `referee` is refused: the class's `alone(backend)` returns backends
    that run the model of `backend`, without slots and averages, on each device of this process alone, by position in
    the mesh; `on_host(program)` returns one that runs it on the host's processor. They, and `backend` itself, have
    `weighed_gradients(state, batch, step=...)`: (loss, weight of the batch, gradients), as `gradients`; and
    `compares_samples`, True once the model has compared samples with each other, so that the gradients of parts of a
    batch do not add up to that of the whole.

    Optional methods: `use_compile_cache(folder)` makes the framework keep compiled programs below `folder`; it returns
    the folder that is used, None if nothing is compiled, or raises OSError if it cannot be written to. `compiled()`
    returns what the process has compiled so far (`backends/compiling.py`).
    """

    name: str
    program: Program
    async_dispatch: bool
    """True if `step` returns before the devices have finished it."""
    process: int
    """The rank of this process. Process 0 writes the files of a run."""
    processes: int
    """The number of processes. All processes call every method together, with the same arguments. Each process holds
    an equal, consecutive run of mesh positions, row-major, unless an attribute `owners` lists the process of every
    position."""

    def __init__(self, program: Program) -> None: ...

    def lower(self) -> Any:
        """Return the model as a module of the framework, with this program's initial parameters."""
        ...

    def init_state(self) -> Any:
        """Return the initial state: parameters from `rng.truncated_normal`, slots at zero, model States, averages,
        count."""
        ...

    def restore_state(self, read: Callable[[str, str, tuple[int, ...], tuple[int, ...]], np.ndarray]) -> Any:
        """Return a state. `read(role, name, offset, shape)` gives the values of each of its boxes."""
        ...

    def step(self, state: Any, batch: Mapping[str, np.ndarray], *, step: int, scale: float) -> tuple[Any, StepResult]:
        """Apply one optimizer step. `step` counts from 1; `scale` is the multiplier of the schedule."""
        ...

    def probe(self, state: Any, batch: Mapping[str, np.ndarray], *, step: int, scale: float) -> Arrays:
        """Return the norms that `step` would produce, without changing the state. The continuity check uses them.

        'ROLE/NAME' is the 2-norm of a tensor of the state, 'grad/NAME' of a gradient before clipping, and 'update/NAME'
        of the update of a parameter. Each array has the axes of the tensor's Stacks: one value a layer, or () without
        Stacks. A backend without a probe sets `probe = None`.
        """
        ...

    def eval(self, state: Any, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return 'loss_B', 'weight_B' and every aux by name, each (B,), without dropout and without an update."""
        ...

    def predict(self, state: Any, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the result of the model's `predict(ops, batch)`, on the host."""
        ...

    def gradients(self, state: Any, batch: Mapping[str, np.ndarray], *, step: int) -> tuple[float, Arrays]:
        """Return (loss, gradients by parameter name) of one global batch, before clipping, for checks. The state does
        not change."""
        ...

    def local_boxes(self, state: Any) -> Iterator[LocalBox]:
        """Yield every box that this process holds, of every tensor of the state."""
        ...

    def irregular_shards(self, state: Any) -> IrregularShards:
        """Return the boxes of each process, for tensors that do not follow the layout. All processes call it
        together."""
        ...

    def describe_memory(self, state: Any) -> dict[str, int]:
        """Return the bytes on this process's devices by role: params, opt, state, ema; 'peak' if the device reports
        it."""
        ...

    def graphs(self) -> int:
        """Return the number of graphs compiled for this program so far."""
        ...

    def agree(self, value: int) -> int:
        """Return the largest `value` over all processes. Waits until all processes have called it."""
        ...

    def describe_device(self) -> dict[str, Any]:
        """Return 'device' (its name), 'devices' (their number) and 'framework' (name and version)."""
        ...

    @classmethod
    def evaluate(cls, fn: Callable[..., Any], args: tuple[Any, ...], context: Context) -> Any:
        """Return the result of `fn(ops, *args)` as NumPy, for checks. `args` become arrays of the framework."""
        ...

    @classmethod
    def differentiate(cls, fn: Callable[..., Any], args: tuple[Any, ...], context: Context) -> tuple[Any, tuple]:
        """Return (value, gradients for every floating array of `args`) of a scalar `fn(ops, *args)`, for checks."""
        ...


_ZERO = "portatrain.backends.deepspeed:Zero"
_OURS = {
    "jax": ("portatrain.backends.jax:JaxBackend", "jax", ("jax", "flax", "optax")),
    "torch": ("portatrain.backends.torch:TorchBackend", "torch", ("torch",)),
    **{f"deepspeed-{n}": (f"{_ZERO}{n}", "deepspeed", ("torch", "deepspeed")) for n in (1, 2, 3)},
    "torch-xla": ("portatrain.backends.torch_xla:XlaBackend", "torch-xla", ("torch", "torch_xla")),
}
"""The built-in backends: their object, the extra that installs their packages, and those packages."""

BACKENDS = Registry(
    kind="backend", group="portatrain.backends", ours={name: where for name, (where, *_) in _OURS.items()}
)
"""Every backend by name."""


def missing(name: str) -> tuple[str, ...]:
    """Return the frameworks that backend `name` needs and that are not installed."""
    needs = _OURS[name][2] if name in _OURS else ()
    return tuple(m for m in needs if importlib.util.find_spec(m) is None)


def check_backend(name: str) -> str:
    """Return `name` if the backend exists and its frameworks are installed; else raise UserError. Imports no
    framework."""
    if name not in BACKENDS:
        raise choice("backend", name, BACKENDS.names())
    if gone := missing(name):
        raise UserError(
            f"backend {name}",
            expected=f"{', '.join(_OURS[name][2])} to be installed",
            got=f"no {', '.join(gone)}",
            do=f"Install it with: pip install 'portatrain[{_OURS[name][1]}]'",
        )
    return name


def default_backend() -> str:
    """Return 'jax' if it is installed, else 'torch'; raise UserError, with the install command, if neither is."""
    for name in ("jax", "torch"):
        if name in BACKENDS and not missing(name):
            return name
    raise UserError(
        "backend",
        expected="jax or torch to be installed",
        got="neither",
        do="Install one: pip install 'portatrain[jax]'",
    )


def backend_class(name: str) -> type[Backend]:
    """Return the class of backend `name` and import its framework. Raises UserError if the import fails or if the
    class is no backend."""
    check_backend(name)
    try:
        found = BACKENDS.load(name)
    except (ImportError, AttributeError) as error:  # of a framework whose installation is broken
        raise UserError(
            f"backend {name}",
            expected=f"{_OURS[name][0]} to be importable",
            got=f"{type(error).__name__}: {error}",
            do=f"Install its packages anew: pip install --force-reinstall 'portatrain[{_OURS[name][1]}]'",
        ) from error
    if absent := lacks(found, Backend):
        raise UserError(
            f"backend {name}",
            expected="a class with the verbs of portatrain.backends.base.Backend",
            got=f"a class without {', '.join(absent)}",
            do="Add them; `python -m portatrain.testing` tests them.",
        )
    return found


_PROCESS_PER_DEVICE = ("torch", "deepspeed-1", "deepspeed-2", "deepspeed-3")


def process_per_device(name: str | None) -> bool:
    """Return whether every device of backend `name` has a process of its own; else every host has one.

    A backend of another package declares this by the class attribute `process_per_device`.
    """
    if name is None or name in _OURS or name not in BACKENDS:
        return name in _PROCESS_PER_DEVICE
    return bool(getattr(backend_class(name), "process_per_device", False))


def simulate_devices(name: str, devices: int) -> None:
    """Make backend `name` see `devices` devices, over all processes, on a machine that has only a CPU.

    Call this before the framework is imported. It does nothing for one device, or if the environment already sets the
    number of devices. A backend of another package may have a static method `simulate_devices(devices)`, which is
    called before an instance is made.
    """
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
    """Return the number of devices of each of `among` processes; raise UserError if they do not divide `devices`."""
    if devices % among:
        raise UserError(
            f"{among} processes",
            expected=f"a number that divides the mesh's {devices} devices",
            got=str(among),
            do=f"Every process holds as many: use {math.gcd(devices, among)} processes, or another mesh.",
        )
    return devices // among
