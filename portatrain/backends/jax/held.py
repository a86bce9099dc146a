"""Say what a JAX backend holds and on which devices, and make backends that use one device of it alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from portatrain.backends.base import IrregularShards, LocalBox
from portatrain.backends.program import Program, on_one_device, on_the_host
from portatrain.backends.state import COUNT


class Held:
    """Copy parts of a state to the host. For a backend that has devices and arrays of its state."""

    program: Program
    devices: Any
    process: int
    processes: int
    state_arrays: Callable[[Any], Iterator[Any]]
    _replicated: Any

    def local_boxes(self, state: Any) -> Iterator[LocalBox]:
        places = {device: position for position, device in enumerate(self.devices.devices.flat)}
        for tensor, array in self.state_arrays(state):
            for shard in array.addressable_shards:
                bounds = [s.indices(n) for s, n in zip(shard.index, array.shape, strict=True)]
                yield LocalBox(
                    name=tensor.info.name,
                    role=tensor.role,
                    offset=tuple(b[0] for b in bounds),
                    shape=shard.data.shape,
                    fetch=functools.partial(np.array, shard.data),
                    position=places[shard.device],
                )
        count = state["opt"].count
        yield LocalBox(name="", role=COUNT, offset=(), shape=(), fetch=lambda: np.array(count))

    def whole_parameter(self, state: Any, name: str, role: str = "params") -> np.ndarray:
        """Return a parameter, or with `role` 'state' a State of the model, whole, on every process; all of them call it
        together."""
        array = state[role][name]
        if self.processes > 1:  # a process can read only its own shards
            array = jax.jit(as_it_is, out_shardings=self._replicated)(array)
        return np.array(array)

    def irregular_shards(self, state: Any) -> IrregularShards:
        return {}

    def alone(self) -> dict[int, Any]:
        """Return, for each device of this process by its position, a backend that runs the model on it alone."""
        made: Any = type(self)
        program = on_one_device(self.program)
        flat = enumerate(self.devices.devices.flat)
        return {i: made(program, devices=[d]) for i, d in flat if d.process_index == self.process}

    @classmethod
    def on_host(cls, program: Program) -> Any:
        """Return a backend that runs the model of `program` on this host's processor."""
        made: Any = cls
        return made(on_the_host(program), devices=jax.local_devices(backend="cpu")[:1])


def as_it_is(x: Any) -> Any:
    """Return a jitted function that changes a sharding. Tensors of one shape share a program through it."""
    return x
