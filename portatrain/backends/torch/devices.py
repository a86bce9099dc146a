"""List every kind of device that torch can compute on, one row each, with its name, its test and its abilities.

The rows test what torch itself reports: in a ROCm build `torch.version.hip` is set, and its device type is 'cuda'.
Rows of devices that none of our tests has run on say so in `ran`.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from portatrain.errors import UserError
from portatrain.system import environment


@dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of device.

    type: torch's name. collectives: the library for collectives, by the name that torch.distributed uses; None: one
    process only. present: returns whether torch (its argument) sees one. plugin: the package that adds the device to
    torch, imported if installed. precisions: the supported values of `Program.precision`. attention: the kernels of
    scaled_dot_product_attention on it. compiles: blocks are compiled unless a program says otherwise. float64: it has
    this dtype. environment: variables that help, each with its reason; the user sets them, portatrain never does. ran:
    the tests that have run on it.
    """

    name: str
    type: str
    collectives: str | None
    present: Callable[[Any], bool]
    plugin: str | None = None
    precisions: tuple[str, ...] = ("fp32", "bf16", "bf16-state", "fp8")
    attention: tuple[str, ...] = ("math",)
    compiles: bool = False
    float64: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)
    ran: str = "never: this row is by its maker's documentation"


def _there(name: str) -> Callable[[Any], bool]:
    """Return a function that returns whether `torch.NAME.is_available()`."""

    def present(torch: Any) -> bool:
        module = getattr(torch, name, None)
        return module is not None and bool(module.is_available())

    return present


def _hip(torch: Any) -> bool:
    return getattr(torch.version, "hip", None) is not None


_ALLOCATOR = "expandable segments lose less memory to gaps between tensors of many sizes"

DEVICES = {
    d.name: d
    for d in (
        Device(
            name="cuda",
            type="cuda",
            collectives="nccl",
            present=lambda t: _there("cuda")(t) and not _hip(t),
            attention=("flash", "cudnn", "efficient", "math"),
            compiles=True,
            environment={"PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True": _ALLOCATOR},
        ),
        Device(
            name="rocm",
            type="cuda",
            collectives="nccl",
            present=lambda t: _there("cuda")(t) and _hip(t),
            attention=("flash", "efficient", "math"),
            compiles=True,
            environment={
                "ROCR_VISIBLE_DEVICES=0,1": "the GPUs that a process may see, below HIP and torch",
                "TORCH_BLAS_PREFER_HIPBLASLT=1": "matmuls by hipBLASLt",
                "HSA_NO_SCRATCH_RECLAIM=1": "scratch memory stays with its queue instead of being asked for again",
                "HSA_FORCE_FINE_GRAIN_PCIE=1": "peer-to-peer copies of RCCL between GPUs on PCIe",
            },
        ),
        Device(
            name="xpu",
            type="xpu",
            collectives="xccl",
            present=_there("xpu"),
            attention=("flash", "math"),
            compiles=True,
        ),
        Device(
            name="hpu",
            type="hpu",
            collectives="hccl",
            present=_there("hpu"),
            plugin="habana_frameworks.torch",
            float64=False,
            environment={"PT_HPU_LAZY_MODE=0": "eager mode, which torch.compile and DTensor need"},
        ),
        Device(
            name="npu",
            type="npu",
            collectives="hccl",
            present=_there("npu"),
            plugin="torch_npu",
            float64=False,
            environment={"HCCL_BUFFSIZE=200": "MiB of each of a group's two buffers; many groups want smaller ones"},
        ),
        Device(
            name="mps",
            type="mps",
            collectives=None,
            float64=False,
            present=lambda t: bool(getattr(getattr(t.backends, "mps", None), "is_available", bool)()),
        ),
        Device(
            name="cpu",
            type="cpu",
            collectives="gloo",
            present=lambda t: True,
            attention=("flash", "math"),
            environment={"OMP_NUM_THREADS=1": "where several processes share the cores"},
            ran="every test of this project",
        ),
    )
}
"""All kinds of devices, in the order in which they are looked for."""


def detect(torch: Any = torch) -> Device:
    """Return the first row of `DEVICES` that `torch` sees: an accelerator if there is one, else the CPU."""
    for row in DEVICES.values():
        if row.plugin is not None and _installed(row.plugin):
            importlib.import_module(row.plugin)
        if row.present(torch):
            return row
    raise AssertionError("there is always a CPU")


def _installed(plugin: str) -> bool:
    try:
        return importlib.util.find_spec(plugin) is not None
    except ModuleNotFoundError:  # the package above it is not there
        return False


def row_of(device: torch.device) -> Device:
    """Return the row of a device of this machine."""
    found = detect()
    return found if found.type == device.type else DEVICES[device.type]


def pick_device() -> torch.device:
    """Return the device of a program in one process: the current accelerator if there is one, else the CPU."""
    row = detect()
    if row.type == "cpu":
        return torch.device("cpu")
    return torch.device(row.type, getattr(torch, row.type).current_device() if row.name != "mps" else 0)


def check_device(row: Device, precision: str) -> None:
    """Raise UserError unless a program of this precision runs on the device."""
    if precision not in row.precisions:
        raise UserError(
            f"precision {precision} on {row.name}",
            expected=f"one of {', '.join(row.precisions)}",
            got=precision,
            do="Choose one of those, or another device.",
        )


def local_device(row: Device, what: str) -> torch.device:
    """Return this process's device on its machine, by LOCAL_RANK, and make it the current device. Raises UserError if
    there are too few devices, or if the kind has no collectives."""
    local = environment.LOCAL_RANK.get()
    if row.type == "cpu":
        return torch.device("cpu")
    if row.collectives is None:
        raise UserError(
            what,
            expected="a kind of device with collectives between processes",
            got=row.name,
            do="Use one process and a mesh of one device, or another machine.",
        )
    module = getattr(torch, row.type)
    if local >= module.device_count():
        raise UserError(
            what,
            expected="a device for every process of this machine",
            got=f"{module.device_count()} {row.name} device(s) for process {local}",
            do="Start fewer processes on it.",
        )
    module.set_device(local)
    return torch.device(row.type, local)


def process_group_backend(row: Device) -> str:
    """Return the backend for `init_process_group`: gloo for tensors on the host, the device's own library for
    others."""
    return "gloo" if row.type == "cpu" else f"cpu:gloo,{row.type}:{row.collectives}"


def peak_bytes(device: torch.device) -> int | None:
    """Return the largest number of bytes allocated on a device; None if the device does not report it."""
    tell = getattr(getattr(torch, device.type, None), "max_memory_allocated", None)
    return None if device.type == "cpu" or tell is None else int(tell(device))


def device_name(device: torch.device) -> str:
    tell = getattr(getattr(torch, device.type, None), "get_device_name", None)
    return f"{device.type} ({platform.machine()})" if device.type == "cpu" or tell is None else str(tell(device))
