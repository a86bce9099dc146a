"""A model of two matrices with a referee, and bits of it that are flipped on one device: for tests and counts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np

from portatrain.backends.base import Backend, backend_class
from portatrain.data import DataSpec
from portatrain.model.module import Module, Param
from portatrain.optim import SGD
from portatrain.optim.schedules import Constant
from portatrain.recipe import Recipe, Referee

WIDE, HIDDEN, BATCH = 8, 16, 8
UINT = {2: np.uint16, 4: np.uint32}


@dataclass(frozen=True, kw_only=True)
class Points(DataSpec):
    version: str = "1"

    def __len__(self) -> int:
        return 64

    def sample(self, index: int) -> dict[str, Any]:
        x_E = np.random.default_rng(index).normal(0, 1, WIDE).astype(np.float32)
        return {"x": x_E, "y": np.float32(np.sin(x_E.sum()))}


class Net(Module):
    def __init__(self) -> None:
        self.up = Param(embed=WIDE, mlp=HIDDEN)
        self.down = Param(mlp=HIDDEN, fan_in_axes=1)

    def __call__(self, ops: Any, batch: Any) -> Any:
        h_BM = ops.tanh(ops.einsum("be,em->bm", batch["x"], self.up))
        error_B = ops.einsum("bm,m->b", h_BM, self.down) - batch["y"]
        return ops.loss(error_B * error_B, batch["mask"])


@dataclass(frozen=True, kw_only=True)
class Config:
    def build(self) -> Module:
        return Net()


def recipe(by: str = "devices", every: int = 2, **more: Any) -> Recipe:
    base: dict[str, Any] = {
        "name": "refereed",
        "model": Config(),
        "data": Points(),
        "optimizer": SGD(lr=0.05, momentum=0.9),
        "schedule": Constant(),
        "steps": 6,
        "batch": BATCH,
        "checkpoint_every": 1,
        "checkpoint_every_s": None,
        "referee": Referee(every=every, by=by),  # type: ignore[arg-type]
    }
    return Recipe(**{**base, **more})


def flipped(array: np.ndarray, at: int, bit: int) -> np.ndarray:
    """Return a copy with bit number `bit` (0 is the lowest) of element number `at` flipped."""
    found = np.array(array)
    words = found.reshape(-1).view(UINT[found.dtype.itemsize])
    words[at % words.size] ^= words.dtype.type(1 << bit)
    return found


def flipped_at_rest(backend: Any, state: Any, device: int, at: int, bit: int, name: str = "down") -> Any:
    """Return `state` with a flipped bit in the copy of a parameter that `device` of the jax `backend` holds."""
    import jax

    array, flat, parts = state["params"][name], list(backend.devices.devices.flat), []
    for shard in array.addressable_shards:
        values = np.array(shard.data)
        wrong = flipped(values, at, bit) if flat.index(shard.device) == device else values
        parts.append(jax.device_put(wrong, shard.device))
    put = jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts).copy()
    return {**state, "params": {**state["params"], name: put}}


@contextmanager
def flips(
    backend: str, site: str, device: int, *, at: int = 3, bit: int = 25, name: str = "up", since: int = 0
) -> Iterator[None]:
    """Flip a bit of `site` in all that `device` computes alone from step `since` on: 'weights', 'activations',
    'backward' (the gradients of activations) or 'gradients'."""
    made = backend_class(backend)
    was = made.alone  # type: ignore[attr-defined]

    def alone(run: Backend) -> dict[int, Any]:
        found = was(run)
        if device in found:
            plant(found[device], site, lambda step: (at, bit) if step >= since else None, name)
        return found

    with mock.patch.object(made, "alone", alone if backend == "jax" else staticmethod(alone)):
        yield


def plant(one: Any, site: str, where: Callable[[int], tuple[int, int] | None], name: str = "up") -> None:
    """Make the backend `one` flip a bit of `site` when it computes gradients. `where` returns (number of the element,
    bit) for a step, or None to flip nothing."""
    compute, restore, kept = one.weighed_gradients, one.restore_state, {}

    def restored(read: Callable[..., np.ndarray]) -> Any:
        kept["read"] = read
        return restore(read)

    def computed(state: Any, batch: Any, *, step: int) -> Any:
        place = where(step)
        if place is None:
            return compute(state, batch, step=step)
        if site == "weights":

            def wrong(role: str, given: str, offset: Any, shape: Any) -> np.ndarray:
                array = kept["read"](role, given, offset, shape)
                return flipped(array, *place) if (role, given) == ("params", name) else array

            return compute(restore(wrong), batch, step=step)
        if site == "gradients":
            loss, weight, grads = compute(state, batch, step=step)
            return loss, weight, {**grads, name: flipped(grads[name], *place)}
        current.append(place)
        try:
            return compute(state, batch, step=step)
        finally:
            current.clear()

    current: list[tuple[int, int]] = []
    one.weighed_gradients, one.restore_state = computed, restored
    if site in ("activations", "backward"):
        made = type(one)._ops

        def ops(*given: Any, **more: Any) -> Any:
            found = made(one, *given, **more)
            tanh, carry = type(found).tanh, _carry_jax if one.name == "jax" else _carry_torch
            # The forward pass flips bits of activations, the backward pass those of their gradients.
            places = (lambda: current), (lambda: [])
            forward, backward = places if site == "activations" else reversed(places)
            object.__setattr__(found, "tanh", lambda x: carry(tanh(found, x), forward, backward))
            return found

        one._ops = ops


Places = Callable[[], list[tuple[int, int]]]


def _carry_jax(x: Any, forward: Places, backward: Places) -> Any:
    """Return `x` with the bits flipped that `forward` returns when this runs, and its gradient with those of
    `backward`."""
    import jax

    def through(places: Places, x: Any) -> Any:
        told = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(
            lambda a: functools.reduce(lambda b, w: flipped(b, *w), places(), np.array(a)), told, x
        )

    carried = jax.custom_vjp(lambda x: through(forward, x))
    carried.defvjp(lambda x: (through(forward, x), None), lambda _, g: (through(backward, g),))
    return carried(x)


def _carry_torch(x: Any, forward: Places, backward: Places) -> Any:
    """As `_carry_jax`."""
    import torch

    def through(places: Places, x: Any) -> Any:
        words = x.detach().clone().contiguous().reshape(-1).view({2: torch.int16, 4: torch.int32}[x.element_size()])
        for at, bit in places():
            words[at % words.numel()] ^= _signed(bit, 8 * x.element_size())
        return words.view(x.dtype).reshape(x.shape)

    class Carried(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return through(forward, x)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return through(backward, grad)

    return Carried.apply(x)


def _signed(bit: int, width: int) -> int:
    return (1 << bit) - (1 << width if bit == width - 1 else 0)
