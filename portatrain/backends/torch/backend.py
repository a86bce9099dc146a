"""Choose how the torch backend runs a program: on one device, or as one process of a mesh."""

from __future__ import annotations

from typing import Any

import torch

from portatrain.backends.program import Program, on_one_device, on_the_host
from portatrain.backends.torch.mesh_backend import MeshBackend
from portatrain.backends.torch.one_device import OneDevice


class TorchBackend(OneDevice):
    """See `backends.base.Backend`. On a mesh of several devices `TorchBackend(program)` is a `MeshBackend`."""

    def __new__(cls, program: Program) -> Any:
        if cls is TorchBackend and program.layout.mesh.devices > 1:
            return MeshBackend(program)
        return super().__new__(cls)

    @staticmethod
    def alone(backend: OneDevice) -> dict[int, OneDevice]:
        """Return a backend that runs the model of `backend` on this process's device alone, by its position."""
        return {backend.process: OneDevice(on_one_device(backend.program))}

    @staticmethod
    def on_host(program: Program) -> OneDevice:
        """Return a backend that runs the model of `program` on this host's processor."""
        return _OnHost(on_the_host(program))


class _OnHost(OneDevice):
    def _device(self) -> torch.device:
        return torch.device("cpu")
