"""torch-xla's device is used before torch computes a gradient on the CPU: in one process the other order leaves
autograd without a queue for XLA's device (torch-xla 2.9)."""

from __future__ import annotations

from portatrain.backends.base import missing


def pytest_sessionstart() -> None:
    if not missing("torch-xla"):
        import torch

        from portatrain.backends.torch_xla.devices import device, sync

        torch.zeros((), device=device())
        sync()
