"""What is planted: a kernel that is wrong on purpose, and the array in which the court must find it."""

from __future__ import annotations

from dataclasses import dataclass

from portatrain.backends.kernels import Kernel


@dataclass(frozen=True, kw_only=True)
class Planted:
    kernel: Kernel
    backend: str
    operand: str
