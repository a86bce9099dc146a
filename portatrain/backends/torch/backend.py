"""Choose how the torch backend runs a program: on one device, or as one process of a mesh."""

from __future__ import annotations

from typing import Any

from portatrain.backends.program import Program
from portatrain.backends.torch.mesh_backend import MeshBackend
from portatrain.backends.torch.one_device import OneDevice


class TorchBackend(OneDevice):
    """See `backends.base.Backend`. On a mesh of several devices `TorchBackend(program)` is a `MeshBackend`."""

    def __new__(cls, program: Program) -> Any:
        if cls is TorchBackend and program.layout.mesh.devices > 1:
            return MeshBackend(program)
        return super().__new__(cls)
