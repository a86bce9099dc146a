"""Look up accelerators by name, and the software stacks that drive them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from portatrain.errors import UserError, choice
from portatrain.plan.clusters.chip import Chip
from portatrain.plan.clusters.chips import amd, google, nvidia, others, rare
from portatrain.system.plugins import Registry


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The software that runs on a chip: the backend that portatrain picks, and the libraries below it."""

    backend: str
    plugin: str
    collectives: str
    reference: str


STACKS: dict[str, Stack] = {
    "jax-tpu": Stack(
        backend="jax",
        plugin="jax[tpu] with libtpu",
        reference="MaxText, AXLearn, Levanter",
        collectives="XLA over ICI; multislice over the data-centre network",
    ),
    "torch-cuda": Stack(
        backend="torch", plugin="CUDA", collectives="NCCL", reference="torchtitan, Megatron-Core, TransformerEngine"
    ),
    "torch-rocm": Stack(backend="torch", plugin="ROCm wheels", collectives="RCCL", reference="Primus"),
    "neuron": Stack(
        backend="torch_xla",
        plugin="torch-neuronx, or TorchNeuron's native device",
        collectives="Neuron runtime and EFA",
        reference="NxD, optimum-neuron",
    ),
    "hpu": Stack(backend="torch", plugin="habana_frameworks", collectives="HCCL", reference="optimum-habana"),
    "cann": Stack(backend="torch", plugin="torch_npu", collectives="HCCL", reference="MindSpeed-LLM"),
    "cerebras": Stack(backend="", plugin="cerebras_pytorch", collectives="none (SwarmX)", reference="modelzoo"),
    "maia": Stack(
        backend="",
        plugin="nothing outside Microsoft (torch reserves the device maia; its SDK is a preview)",
        collectives="Ethernet, with Microsoft's own transport",
        reference="none",
    ),
    "mtia": Stack(
        backend="",
        plugin="torch's own device mtia, of which Meta keeps the implementation",
        collectives="Meta's own",
        reference="none",
    ),
    "musa": Stack(
        backend="", plugin="torch, by the device musa of torch_musa", collectives="MCCL", reference="torch_musa"
    ),
    "maca": Stack(
        backend="torch",
        plugin="MetaX's own build of torch, in which its devices are called cuda",
        collectives="MCCL",
        reference="ms-swift",
    ),
    "dtk": Stack(
        backend="torch",
        plugin="Hygon's own build of torch (DTK, a form of HIP), in which its devices are called cuda",
        collectives="RCCL",
        reference="DCU-Megatron",
    ),
    "mlx": Stack(backend="torch", plugin="torch mps, or mlx", collectives="mlx.distributed", reference="mlx-lm"),
    "cpu": Stack(backend="jax", plugin="none", collectives="gloo", reference="this project"),
}

CHIPS_OF_OTHERS = Registry(kind="chip", group="portatrain.chips", ours={})
"""The entry-point group of chips from other packages: an entry's name is the chip's name, its object a `Chip`."""

CHIPS: dict[str, Chip] = {row.name: row for maker in (google, nvidia, amd, others, rare) for row in maker.CHIPS}
_BY_NAME: dict[str, Chip] = {name: row for row in CHIPS.values() for name in (row.name, *row.aliases)}


def all_chips() -> dict[str, Chip]:
    """Return every chip by name: the rows of the catalog, then those of other packages that import."""
    found = dict(CHIPS)
    for name in CHIPS_OF_OTHERS.names():
        with contextlib.suppress(UserError):  # `find_chip` reports the error
            found.setdefault(name, _of_others(name))
    return found


def stack_of(chip: Chip) -> Stack:
    """Return the software stack of a chip; a chip of another package with its own stack names its backend."""
    own = Stack(backend=chip.backend, plugin=chip.stack, collectives="its own", reference=f"the package of {chip.name}")
    return STACKS.get(chip.stack, own)


def reached_by(chip: Chip) -> str:
    """Return a sentence on the framework that reaches a chip without a backend here or with figures missing; ''
    for all others."""
    stack = stack_of(chip)
    if stack.backend and not chip.unpublished:
        return ""
    here = f"the backend {stack.backend} never ran there" if stack.backend else "portatrain has no backend for it"
    return f"{chip.name} is reached by {stack.plugin}; {here}"


def _of_others(name: str) -> Chip:
    found = CHIPS_OF_OTHERS.load(name)
    if not isinstance(found, Chip) or found.name != name:
        raise UserError(
            f"chip {name}",
            expected=f"a portatrain.plan.clusters.chip.Chip named {name}",
            got=f"{found.name}" if isinstance(found, Chip) else f"a {type(found).__name__}",
            do="Fix or remove the package that registers it under portatrain.chips.",
        )
    return found


def chip_names() -> tuple[str, ...]:
    """Return every name and alias that ``find_chip`` takes."""
    return tuple(dict.fromkeys([*_BY_NAME, *CHIPS_OF_OTHERS.names()]))


def find_chip(name: str) -> Chip:
    """Return the chip of that name or alias.

    Raises:
      UserError: there is no such chip; the message has the nearest names.
    """
    if name in _BY_NAME:
        return _BY_NAME[name]
    if name in CHIPS_OF_OTHERS:
        return _of_others(name)
    raise choice("chip", name, chip_names())
