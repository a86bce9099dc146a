"""The accelerator catalog: every chip by name, and the software stacks that drive them."""

from __future__ import annotations

from dataclasses import dataclass

from portatrain.errors import choice
from portatrain.plan.clusters.chip import Chip
from portatrain.plan.clusters.chips import amd, google, nvidia, others


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The software that runs on a chip: the backend that portatrain picks, and the parts below it."""

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
    "mlx": Stack(backend="torch", plugin="torch mps, or mlx", collectives="mlx.distributed", reference="mlx-lm"),
    "cpu": Stack(backend="jax", plugin="none", collectives="gloo", reference="this project"),
}

CHIPS: dict[str, Chip] = {row.name: row for row in (*google.CHIPS, *nvidia.CHIPS, *amd.CHIPS, *others.CHIPS)}
_BY_NAME: dict[str, Chip] = {name: row for row in CHIPS.values() for name in (row.name, *row.aliases)}


def chip_names() -> tuple[str, ...]:
    """Return every name and alias that ``find_chip`` takes."""
    return tuple(_BY_NAME)


def find_chip(name: str) -> Chip:
    """Return the chip of that name or alias.

    Raises:
      UserError: there is no such chip; the message has the nearest names.
    """
    try:
        return _BY_NAME[name]
    except KeyError:
        raise choice("chip", name, _BY_NAME) from None
