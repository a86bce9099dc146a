"""Convert tensors to NumPy arrays and back, including bfloat16, which torch does not exchange with NumPy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from checkpoints_format.dtypes import NUMPY
from portatrain.backends.base import LocalBox
from portatrain.model.module import TensorInfo


def to_torch(array: np.ndarray) -> Tensor:
    """Return a copy of `array` on the host."""
    copy = np.array(array)
    if copy.dtype == NUMPY["bfloat16"]:
        return torch.from_numpy(copy.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(copy)


def to_numpy(x: Tensor) -> np.ndarray:
    """Return a tensor of the host as an array that shares its memory."""
    return x.view(torch.int16).numpy().view(NUMPY["bfloat16"]) if x.dtype == torch.bfloat16 else x.numpy()


def box(role: str, info: TensorInfo, index: tuple[int, ...], tensor: Tensor, at: tuple[int, ...]) -> LocalBox:
    """Return the box that this process holds of one layer, `index`, of a logical tensor. `at` is its offset in the
    layer."""
    lead = (1,) * len(index)
    return LocalBox(
        name=info.name,
        role=role,
        offset=(*index, *at),
        shape=(*lead, *tensor.shape),
        fetch=lambda: to_numpy(tensor.detach().cpu()).copy().reshape((*lead, *tensor.shape)),
    )
