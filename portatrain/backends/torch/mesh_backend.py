"""Run the torch backend on a mesh of many processes, one a device. `one_device` has the step. This file changes how a
state is made, which rows a process takes, and which sums go over all processes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from portatrain.backends.base import Arrays, LocalBox
from portatrain.backends.program import Program
from portatrain.backends.row_padding import pad_rows
from portatrain.backends.torch.host import to_torch
from portatrain.backends.torch.mesh import World, check_processes, join
from portatrain.backends.torch.mesh_ops import MeshOps
from portatrain.backends.torch.mesh_values import plain
from portatrain.backends.torch.mesh_watched import MeshWatches
from portatrain.backends.torch.one_device import OneDevice, TorchState
from portatrain.backends.torch.ops import TorchOps
from portatrain.backends.torch.parallel import Sharded, check_layout, shard_module
from portatrain.backends.torch.row_ops import RowOps
from portatrain.backends.torch.sharded_optimizer import ShardedOptimizer
from portatrain.backends.torch.standalone_ops import COMPUTE
from portatrain.errors import UserError
from portatrain.model.layout import BATCH_MESH_AXES
from portatrain.model.module import TensorInfo

__all__ = ["MeshBackend", "check_processes"]


class MeshBackend(MeshWatches, OneDevice):
    """See `portatrain.backends.base.Backend`. All processes call every method together, with the same global batch."""

    def __init__(self, program: Program) -> None:
        check_layout(program.layout, program.definition.params)
        super().__init__(program)
        self.world = World(program.layout, self.device)
        self.process, self.processes = self.world.rank, program.layout.mesh.devices
        values = self.world.values is not None
        eager = values or program.layout.mesh.expert > 1
        if eager and program.compile:
            raise UserError(
                f"compile on mesh {program.layout.mesh}",
                expected="a mesh without expert, context or tensor axes",
                got="compile=True",
                do="Leave compile out: blocks run eagerly on such a mesh.",
            )
        if eager:
            self.compiles = False
            self._runners = self._made_runners()
        self.ops = functools.partial(MeshOps if values else RowOps, world=self.world)

    def _device(self) -> torch.device:
        return join(self.program.layout.mesh)

    # ---- states

    def _part(self, info: TensorInfo, laid_out_as: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if laid_out_as == "state":  # small, and whole on every process
            return super()._part(info, laid_out_as)
        offset, shape = self.world.layout.box(info, self.world.at, role=laid_out_as)
        return offset[info.stack_dims :], shape[info.stack_dims :]

    def restore_shared(
        self, read: Callable[[str, str, tuple, tuple], np.ndarray], shares: Mapping[Any, Any]
    ) -> TorchState:
        mesh, at = self.program.layout.mesh, self.world.at

        def whole(role: str, name: str, offset: tuple, shape: tuple) -> np.ndarray:
            share = shares.get((role, name))
            if share is None:
                return read(role, name, offset, shape)
            mine = np.ascontiguousarray(read(role, name, *share.part(mesh, at, offset, shape)))
            words = mine.reshape(*mine.shape, 1).view(np.uint8)  # which every transport carries
            joined = self.world.gather(to_torch(words).to(self.device), share.axes, share.dim)
            return joined.cpu().numpy().view(mine.dtype).reshape(shape)

        return self.restore_state(whole)

    def _lowered(self, value: Callable[[str, str, tuple[int, ...]], Tensor]) -> MeshState:
        program = self.program
        sharded = shard_module(program, self.world, value, COMPUTE[program.precision])
        trained = [p for p in sharded.pieces if p.role == "params" and p.name in program.trainable]
        optimizer = ShardedOptimizer(
            program.optimizer, trained, self.definition.params, program.decay, self.world, program.seed
        )
        return MeshState(sharded.module, sharded.pieces, optimizer, {}, sharded)

    # ---- the step

    def rows_here(self, samples: int) -> np.ndarray:
        mine = np.zeros(samples, bool)
        mine[self.world.my_rows(samples)] = True
        return mine

    def _placed(self, batch: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        mine = {k: v[self.world.my_rows(v.shape[0])] for k, v in batch.items()}
        return self._values(super()._placed(mine))

    def _values(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.world.values is None:
            return batch
        # Sample indices feed dropout's hash, which acts on local parts.
        return {k: v if k == "sample" else MeshOps.placed(self.world, v) for k, v in batch.items()}

    def _begin(self, state: TorchState, *, last: bool) -> None:
        _sharded(state).sync(last=last)

    def _backward(self, state: TorchState, objective: Tensor) -> None:
        super()._backward(state, objective)
        _sharded(state).fold()

    def _accumulate(self, state: TorchState, batch: Mapping[str, np.ndarray], step: int) -> tuple[Any, ...]:
        _sharded(state).zero_grad()
        return super()._accumulate(state, batch, step)

    def _over_rows(self, x: Tensor) -> Tensor:
        return self.world.all_reduce(plain(x).detach().clone(), BATCH_MESH_AXES)

    def _reduced(
        self, state: TorchState, loss: Any, weight: Any, auxes: dict[str, dict[str, Tensor]]
    ) -> tuple[Any, ...]:
        _sharded(state).collect()
        return self._summed(loss, weight, auxes)

    def _summed(self, loss: Any, weight: Any, auxes: dict[str, dict[str, Tensor]]) -> tuple[Any, ...]:
        """Turn sums over this process's rows into sums over the batch."""
        parts = [plain(loss), plain(weight)]
        places = [(name, kind) for name in sorted(auxes) for kind in sorted(auxes[name]) if kind != "max"]
        parts += [plain(auxes[name][kind]).to(self.device) for name, kind in places]
        sums = self.world.all_reduce(torch.cat([x.reshape(-1) for x in parts]), BATCH_MESH_AXES)
        cut = sums.split([x.numel() for x in parts])
        loss, weight, *rest = (x.reshape(like.shape) for x, like in zip(cut, parts, strict=True))
        found: dict[str, dict[str, Tensor]] = {name: {} for name in auxes}
        for (name, kind), value in zip(places, rest, strict=True):
            found[name][kind] = value
        highs = [name for name in sorted(auxes) if "max" in auxes[name]]
        if highs:
            tops = [plain(auxes[name]["max"]) for name in highs]
            top = torch.cat([x.reshape(-1) for x in tops])
            cut = self.world.all_reduce(top, BATCH_MESH_AXES, dist.ReduceOp.MAX).split([x.numel() for x in tops])
            for name, value, like in zip(highs, cut, tops, strict=True):
                found[name]["max"] = value.reshape(like.shape)
        return loss, weight, found

    def _ops_after(self, step: int) -> TorchOps:
        ops = super()._ops_after(step)
        return ops.parts if isinstance(ops, MeshOps) else ops  # States are whole on every process

    def _norm(self, state: TorchState) -> Tensor:
        return _sharded(state).norm()

    def gradients(self, state: TorchState, batch: Mapping[str, np.ndarray], *, step: int) -> tuple[float, Arrays]:
        """Return whole gradients, on every process, for checks of small models."""
        loss, *_ = self._accumulate(state, batch, step)
        found = self._whole_gradients(state)
        _sharded(state).zero_grad()
        return float(loss), found

    def _whole_gradients(self, state: TorchState) -> Arrays:
        """Return the summed gradients, whole, on every process."""
        params = self.definition.params
        found = {n: np.zeros(params[n].shape, np.float32) for n in sorted(self.program.trainable)}
        for p in state.pieces:
            if p.role == "params" and p.tensor.grad is not None:
                spec = self.world.layout.tensor_spec(params[p.name])[len(p.index) :]
                found[p.name][p.index] = self.world.gather_tensor(p.tensor.grad, spec).cpu().numpy()
        return found

    # ---- without an update

    def whole_parameter(self, state: TorchState, name: str) -> np.ndarray:
        """Return a parameter whole, on every process."""
        info = self.definition.params[name]
        found = np.zeros(info.shape, np.float32)
        for p in state.pieces:
            if (p.role, p.name) == ("params", name):
                spec = self.world.layout.tensor_spec(info)[len(p.index) :]
                found[p.index] = self.world.gather_tensor(p.tensor.detach(), spec).float().cpu().numpy()
        return found

    def _counts(self, info: TensorInfo, role: str) -> bool:
        if role == "state":
            return self.world.rank == 0
        cut = {a for dim in self.world.layout.tensor_spec(info, role=role) for a in dim}
        return self.world.first([a for a in self.world.mesh.sizes if a not in cut])

    def _total(self, x: Tensor) -> Tensor:
        return self.world.all_reduce(x)

    def _even(self, batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return pad_rows(batch, self.world.row_blocks)

    def _free(self, state: TorchState) -> None:
        """Free the parameters that FSDP2's root keeps gathered for a backward pass, as none follows."""
        if isinstance(state.module, FSDPModule):
            state.module.reshard()

    def _fetch(self, x_B: Tensor) -> np.ndarray:
        return self.world.gather(plain(x_B), BATCH_MESH_AXES, 0).cpu().numpy()

    # ---- what it holds and runs on

    def agree(self, value: int) -> int:
        """Return the largest `value` of all processes. Waits for all of them."""
        mine = torch.tensor(value)
        dist.all_reduce(mine, op=dist.ReduceOp.MAX)
        return int(mine)

    def add_up(self, words: np.ndarray) -> np.ndarray:
        """Return the sums of `words`, uint64, over all processes, modulo 2^64."""
        mine = torch.from_numpy(words.view(np.int64).copy())
        dist.all_reduce(mine)
        return mine.numpy().view(np.uint64)

    def local_boxes(self, state: TorchState) -> Iterator[LocalBox]:
        """Yield every box that this process holds. Several processes yield the same box if the layout does not cut
        it."""
        return super().local_boxes(state)

    def describe_device(self) -> dict[str, Any]:
        return {**super().describe_device(), "devices": self.program.layout.mesh.devices}


class MeshState(TorchState):
    """Extend `TorchState` with the means to reduce gradients. Its pieces hold this process's parts."""

    def __init__(
        self, module: Any, pieces: Any, optimizer: Any, beside: dict[str, dict[int, Tensor]], sharded: Sharded
    ) -> None:
        super().__init__(module, pieces, optimizer, beside)
        self.sharded = sharded


def _sharded(state: TorchState) -> Sharded:
    assert isinstance(state, MeshState)
    return state.sharded
