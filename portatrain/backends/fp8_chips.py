"""The devices that multiply matrices of 8-bit floats, for precision fp8. Imports no framework."""

from __future__ import annotations

import re

from portatrain.errors import UserError

EMULATED = "emulated"
"""No 8-bit matmuls: operands are rounded, and multiplied in float32. On a CPU only."""
OCP = "ocp"
"""The formats of `model/fp8.py`."""
FNUZ = "fnuz"
"""AMD's formats of gfx942, whose numbers are half as large."""

CHIPS = "H100, H200, B200, GB200, B300, GB300, L4, L40S (NVIDIA), MI300X, MI325X, MI350X, MI355X (AMD), TPU 7x (Google)"
"""Names of chips with 8-bit matmuls, for messages."""


def of_nvidia(capability: str) -> str | None:
    """Return the formats of a GPU with this compute capability, such as '9.0'; None if it has no 8-bit matmuls."""
    major, _, minor = capability.partition(".")
    return OCP if (int(major), int(minor or 0)) >= (8, 9) else None


def of_amd(architecture: str) -> str | None:
    """Return the formats of a GPU of this architecture, such as 'gfx942:sramecc+:xnack-'; None if it has none."""
    name = architecture.partition(":")[0]
    return FNUZ if name.startswith("gfx94") else OCP if name in ("gfx950", "gfx1200", "gfx1201") else None


def of_tpu(kind: str) -> str | None:
    """Return the formats of a TPU with this `device_kind`, such as 'TPU7x'; None if it has no 8-bit matmuls."""
    found = re.match(r"TPU ?v?(\d+)", kind)
    return OCP if found and int(found[1]) >= 7 else None


def checked(formats: str | None, device: str) -> str:
    """Return `formats`; if they are None, refuse precision fp8 on `device`."""
    if formats is None:
        raise UserError(
            f"precision fp8 on {device}",
            expected=f"a chip with 8-bit matmuls ({CHIPS}), or a CPU, which emulates them",
            got=device,
            do="Use --set precision=bf16, or another chip.",
        )
    return formats
