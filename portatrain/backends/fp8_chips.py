"""The devices that multiply matrices of 8-bit floats, for precision fp8. Imports no framework."""

from __future__ import annotations

import re

OCP = "ocp"
"""The formats of `model/fp8.py`."""
FNUZ = "fnuz"
"""AMD's formats of gfx942, whose numbers are half as large."""

CHIPS = "H100, H200, B200, GB200, B300, GB300, L4, L40S (NVIDIA), MI300X, MI325X, MI350X, MI355X (AMD), TPU 7x (Google)"
"""Names of chips with 8-bit matmuls, for messages."""
DEVICES = ("cuda", "gpu", "rocm", "tpu")
"""The kinds of devices, by the names of jax and torch, for which there are kernels of 8-bit operands."""
_AMD_NAMES = (("MI300", "gfx942"), ("MI325", "gfx942"), ("MI350", "gfx950"), ("MI355", "gfx950"))
"""The architectures of GPUs, by a part of the name: all that XLA knows of one that is absent (`plan --compile`)."""


def of_nvidia(capability: str) -> str:
    """Return the formats of a GPU with this compute capability, such as '9.0'; '' if it has no 8-bit matmuls."""
    found = re.match(r"(\d+)(?:\.(\d+))?$", capability)
    return OCP if found and (int(found[1]), int(found[2] or 0)) >= (8, 9) else ""


def of_amd(architecture: str) -> str:
    """Return the formats of a GPU of this architecture, such as 'gfx942:sramecc+:xnack-'; '' if it has none."""
    name = architecture.partition(":")[0]
    return FNUZ if name.startswith("gfx94") else OCP if name in ("gfx950", "gfx1200", "gfx1201") else ""


def of_gpu(capability: str, name: str) -> str:
    """Return the formats of a GPU with this compute capability (NVIDIA) or architecture (AMD), and this name."""
    if capability.startswith("gfx"):
        return of_amd(capability)
    architecture = next((isa for part, isa in _AMD_NAMES if part in name), "")
    return of_amd(architecture) if architecture else of_nvidia(capability)


def of_tpu(kind: str) -> str:
    """Return the formats of a TPU with this `device_kind`, such as 'TPU7x'; '' if it has no matmuls of `E4M3`.

    Generations 5 and 6 take 8-bit operands, of E5M2 and of another format with 4 bits of exponent, at the rate of
    bfloat16 (jax's `TpuInfo.is_matmul_supported` and `fp8_ops_per_second`). libtpu compiles a product of E4M3 for every
    generation, and converts it.
    """
    found = re.match(r"TPU ?v?(\d+)", kind)
    return OCP if found and int(found[1]) >= 7 else ""


def refuses_8_bit(device: str, formats: str) -> str | None:
    """Return why a kernel of 8-bit operands does not cover a device of this kind with these formats, or None."""
    if device not in DEVICES:
        return f"8-bit matmuls are not programmed for {device}"
    return None if formats else "the chip multiplies no 8-bit floats"


def refuses_emulation(device: str, named: bool) -> str | None:
    """Return why the emulation does not cover a device of this kind, or None."""
    return None if device == "cpu" or named else "it multiplies in float32, slowly: off a CPU it must be named"
