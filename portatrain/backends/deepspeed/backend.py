"""Run a program on a DeepSpeed engine. Rows, sums and evaluation are those of the torch backend on a mesh.

DeepSpeed averages gradients over processes, but a loss here is a sum, so every process gives it its own loss times the
number of processes. When DeepSpeed steps, it divides gradients by the weight of the global batch times the clipping
factor, which this backend computes. DeepSpeed's own clipping, on by default, adds 1e-6 to the norm and stays off.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoints_format.boxes import flat_range_boxes
from portatrain.backends.base import Arrays, IrregularShards, LocalBox, StepResult
from portatrain.backends.deepspeed.checks import check
from portatrain.backends.deepspeed.engine import (
    Part,
    Root,
    ZeroState,
    boxes_of,
    in_rows,
    outside_of_stacks,
    settings,
    unequal_copies,
    zero_state,
)
from portatrain.backends.deepspeed.optimizer import FlatOptimizer
from portatrain.backends.deepspeed.probe import norms
from portatrain.backends.limits import NONE, Limits, within
from portatrain.backends.program import Program
from portatrain.backends.state import COUNT, StateTensor, initial_box
from portatrain.backends.torch.accumulation import aux_value
from portatrain.backends.torch.devices import peak_bytes
from portatrain.backends.torch.lower import Piece, lower
from portatrain.backends.torch.measured import on_host
from portatrain.backends.torch.mesh_backend import MeshBackend
from portatrain.backends.torch.one_device import Batch, OneDevice, TorchState
from portatrain.backends.torch.optimizer import total_norm
from portatrain.backends.torch.row_ops import RowOps
from portatrain.model.across_samples import Across
from portatrain.model.layout import Mesh
from portatrain.model.measured import split
from portatrain.model.module import TensorInfo
from portatrain.model.ops import Loss

# DeepSpeed calls collectives by names that torch 2.13 has replaced.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)


class ZeroBackend(MeshBackend):
    """See `portatrain.backends.base.Backend`. `stage` is the stage of ZeRO."""

    stage = 0
    watch: Any = None  # DeepSpeed has the gradients
    takes_statistics = False  # `probe` measures them
    probes_activations = True

    def __init__(self, program: Program) -> None:
        check(program, backend=self.name, stage=self.stage)
        super().__init__(program)
        self.ops = functools.partial(RowOps, world=self.world)

    def _device(self) -> torch.device:
        mesh: Mesh = self.program.layout.mesh
        if mesh.devices == 1 and not dist.is_initialized() and "RANK" not in os.environ:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        device = super()._device()
        os.environ.setdefault("DS_ACCELERATOR", device.type)  # else it looks for what the machine lacks
        os.environ.setdefault("LOCAL_RANK", "0")  # which it wants of one process too
        return device

    def _made_runners(self) -> dict[str, Any]:
        self.compiles = False
        return super()._made_runners()

    # ---- states

    def _part(self, info: TensorInfo, laid_out_as: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return OneDevice._part(self, info, laid_out_as)  # modules are made whole, then cut by DeepSpeed

    def _build(
        self, draw: Callable[[StateTensor, tuple[int, ...], tuple[int, ...]], np.ndarray], count: int
    ) -> ZeroState:
        tensors, beside = self._inventory

        def value(role: str, name: str, index: tuple[int, ...]) -> Tensor:
            info = tensors[role, name].info
            inner = info.shape[info.stack_dims :]
            box = draw(tensors[role, name], (*index, *(0 for _ in inner)), (*(1 for _ in index), *inner))
            return torch.from_numpy(np.array(box)).reshape(inner).to(self.device)

        module, pieces = lower(self.definition, value)
        state = self._engine(module, pieces)
        state.client.count = count
        for i, part in state.parts.items():
            p, slots = pieces[i], state.client.slots_of(part.flat)
            for tensor in beside.get(p.name, ()):
                if tensor.slot is not None:
                    self._fill(draw, tensor, p.index, part, part.of(slots[tensor.slot]))
                else:
                    into = state.beside.setdefault(tensor.role, {})[i] = torch.empty(part.n, device=self.device)
                    self._fill(draw, tensor, p.index, part, into)
        return state

    @staticmethod
    def _fill(
        draw: Callable[..., np.ndarray], tensor: StateTensor, index: tuple[int, ...], part: Part, into: Tensor
    ) -> None:
        info, lead, at = tensor.info, (1,) * len(index), 0
        for box in flat_range_boxes(info.shape[info.stack_dims :], part.start, part.start + part.n):
            array = draw(tensor, (*index, *box.offset), (*lead, *box.shape))
            into[at : at + box.size].copy_(torch.from_numpy(np.array(array)).flatten())
            at += box.size

    def init_state(self) -> ZeroState:
        return self._build(lambda tensor, at, shape: initial_box(tensor.info, self.program.seed, at, shape), 0)

    def restore_state(self, read: Callable[[str, str, tuple, tuple], np.ndarray]) -> ZeroState:
        return self._build(
            lambda tensor, at, shape: read(tensor.role, tensor.info.name, at, shape), int(read(COUNT, "", (), ()))
        )

    def _engine(self, module: nn.Module, pieces: list[Piece]) -> ZeroState:
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        if self.device.type == "cpu":
            # Else it compiles collectives of its own for shared memory, with a compiler that may not be there.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        program = self.program
        trained = [p for p in pieces if p.role == "params" and p.name in program.trainable]
        for p in pieces:
            if p.role == "params":
                p.tensor.requires_grad_(p.name in program.trainable)
        kinds = {p.name: (p.name in program.decay, self.definition.params[p.name].lr) for p in trained}
        groups = [
            {"params": [p.tensor for p in trained if kinds[p.name] == kind], "decay": kind[0], "factor": kind[1]}
            for kind in sorted(set(kinds.values()), reverse=True)
        ]
        any_info = next(iter(self.definition.params.values()))
        client = FlatOptimizer(program.optimizer, groups, any_info)
        root = Root(module)
        engine, *_ = deepspeed.initialize(model=root, optimizer=client, config=settings(self.stage))
        if self.stage == 3:
            for param in outside_of_stacks(module):
                deepspeed.zero.register_external_parameter(root, param)
        state = ZeroState(module, pieces, engine, client)
        for i, p in enumerate(pieces):
            if p.role == "params" and p.name in program.trainable:
                state.parts[i] = self._where(state.zero, p.tensor)
        return state

    def _where(self, zero: Any, param: Any) -> Part:
        if self.stage < 3:
            found = getattr(param, "_hp_mapping", None)
            flats = zero.single_partition_of_fp32_groups
            if found is None:
                return Part(flats[0], 0, 0, 0)
            here, mine = found.get_hp_fragment_address(), found.lp_fragment_address
            return Part(flats[found.param_group_index], here.start, mine.start, mine.numel)
        group, at, n = zero.grad_position[param.ds_id]
        start = self.world.rank * param.ds_tensor.ds_numel
        # The last process's part is filled up so that all are alike.
        mine = max(0, min(n, param.ds_numel - start))
        return Part(zero.fp32_partitioned_groups_flat[group], at, start, mine)

    def lower(self) -> nn.Module:
        return self.init_state().module

    # ---- the step

    def _ops(self, batch: Mapping[str, Tensor], step: int, training: bool) -> Any:
        ops = super()._ops(batch, step, training)
        ops.static = dataclasses.replace(ops.static, calls=True)  # DeepSpeed's hooks are around a block's own call
        return ops

    def _forward(
        self, state: TorchState, batch: Any, step: int, training: bool, across: Across | None = None
    ) -> tuple[Loss, Any]:
        ops = self._ops(batch, step, training)
        if across is not None:
            ops.across = across
        with self.ids.model_runs():
            return Loss(*zero_state(state).engine("loss", ops, batch)), ops

    def _accumulate(self, state: TorchState, batch: Mapping[str, np.ndarray], step: int) -> tuple[Any, ...]:
        """Accumulate gradients in DeepSpeed: the gradients of the mean loss times `factor`."""
        held = zero_state(state)
        held.zero.override_loss_scale(1.0)
        held.factor = 1.0
        return OneDevice._accumulate(self, state, batch, step)

    def _begin(self, state: TorchState, *, last: bool) -> None:
        zero_state(state).engine.set_gradient_accumulation_boundary(last)

    def _backward(self, state: TorchState, objective: Tensor) -> None:
        zero_state(state).engine.backward(objective * self.processes, scale_wrt_gas=False)

    def _scale(self, state: TorchState, factor: Tensor) -> None:
        zero_state(state).factor = 1.0 / float(factor)

    def _reduced(
        self, state: TorchState, loss: Any, weight: Any, auxes: dict[str, dict[str, Tensor]]
    ) -> tuple[Any, ...]:
        return self._summed(loss, weight, auxes)

    def _norm(self, state: TorchState) -> Tensor:
        held = zero_state(state)
        mine = [g.float().flatten() for group in held.zero.averaged_gradients.values() for g in group or ()]
        square = total_norm([in_rows(g) for g in mine]).square() if mine else torch.zeros((), device=self.device)
        return self.world.all_reduce(square).sqrt() / held.factor

    def step(
        self,
        state: TorchState,
        batch: Batch,
        *,
        step: int,
        scale: float,
        limits: Limits = NONE,
        statistics: bool = False,
    ) -> tuple[TorchState, StepResult]:
        held = zero_state(state)
        loss, weight, auxes, tallies = self._accumulate(state, batch, step)
        norm = self._norm(state)
        loss_there, norm_there = torch.stack([loss, norm]).tolist()
        good = within(loss_there, norm_there, limits)
        if good:
            limit, length = self._clipping(norm_there)
            held.zero.override_loss_scale(held.factor * (length / limit))
            held.client.begin(held.client.count + 1, scale)
            held.engine.step()
            self._after(state, step, tallies)
        else:
            self._drop(held)
        metrics = {k: aux_value(v) for k, v in auxes.items()}
        return state, StepResult.of(metrics, loss=loss, grad_norm=norm, skipped=int(not good), weight=weight)

    @staticmethod
    def _drop(held: ZeroState) -> None:
        """Make DeepSpeed drop its gradients, in the same way in which it drops gradients that are not finite.

        Stage 3 keeps the buffers and never writes the elements that pad a process's part, so NaN must not stay there.
        """
        buffers = [g for group in held.zero.averaged_gradients.values() for g in group or ()]
        for buffer in buffers:
            buffer.fill_(torch.nan)
        held.engine.step()
        if not held.zero.overflow:
            raise RuntimeError("DeepSpeed took a step with gradients that are not finite")
        for buffer in buffers:
            buffer.zero_()

    def _average(self, state: TorchState, decay: float) -> None:
        for i, average in state.ema.items():
            average.lerp_(zero_state(state).parts[i].values, 1 - decay)

    def gradients(self, state: TorchState, batch: Mapping[str, np.ndarray], *, step: int) -> tuple[float, Arrays]:
        """Return whole gradients, on every process, for checks of small models."""
        from deepspeed.utils import safe_get_full_grad

        held = zero_state(state)
        loss, *_ = self._accumulate(state, batch, step)
        params = self.definition.params
        found = {n: np.zeros(params[n].shape, np.float32) for n in sorted(self.program.trainable)}
        for i in held.parts:
            p = held.pieces[i]
            gradient = safe_get_full_grad(p.tensor)
            if gradient is not None:
                found[p.name][p.index] = (
                    (gradient.float() / held.factor).view(found[p.name][p.index].shape).cpu().numpy()
                )
        self._drop(held)
        return float(loss), found

    # ---- without an update

    def probe(self, state: TorchState, batch: Batch, *, step: int, scale: float, activations: bool = False) -> Arrays:
        held = zero_state(state)
        self.measures = activations
        _loss, _weight, auxes, _tallies = self._accumulate(state, batch, step)
        self.measures = False
        limit, length = self._clipping(float(self._norm(state)))
        found = norms(self, held, clip=limit / length, scale=scale)
        self._drop(held)
        return {**found, **on_host(split(auxes)[0])}

    restore_shared: Any = None  # it reads flat ranges of its own
    unequal_copies = unequal_copies

    def _predicted(self, state: TorchState, ops: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return zero_state(state).engine("predict", ops, batch)

    def _free(self, state: TorchState) -> None:
        """Let the hooks free the parameters that they gathered."""

    # ---- what it holds

    def local_boxes(self, state: TorchState) -> Iterator[LocalBox]:
        """Yield whole parameters in stages 1 and 2, flat ranges of them in stage 3; flat ranges of slots and
        averages."""
        held = zero_state(state)
        for tensor, index, flat, start in self._ranges(held):
            yield from boxes_of(tensor, index, flat, start)
        count = held.client.count
        yield LocalBox(name="", role=COUNT, offset=(), shape=(), fetch=lambda: np.array(count, np.int32))

    def _ranges(
        self, held: ZeroState, *, empty: bool = False
    ) -> Iterator[tuple[StateTensor, tuple[int, ...], Tensor, int]]:
        """Yield (logical tensor, index in its Stacks, this process's elements, the index of the first element in the
        flattened layer) of everything in `held` except the count; with `empty`, also slots and averages of which this
        process holds nothing."""
        tensors, beside = self._inventory
        for i, p in enumerate(held.pieces):
            part = held.parts.get(i)
            if p.role == "state" or self.stage < 3:
                yield tensors[p.role, p.name], p.index, p.tensor.detach().flatten(), 0
            elif part is not None:
                yield tensors[p.role, p.name], p.index, part.values, part.start
            else:  # frozen: DeepSpeed cuts it, and updates nothing
                yield tensors[p.role, p.name], p.index, *self._frozen(p)
            if part is None or not (part.n or empty):
                continue
            slots = held.client.slots_of(part.flat)
            for tensor in beside.get(p.name, ()):
                own = held.beside[tensor.role][i] if tensor.slot is None else part.of(slots[tensor.slot])
                yield tensor, p.index, own, part.start

    def whole_parameter(self, state: TorchState, name: str) -> np.ndarray:
        """Return a parameter whole, on every process; all of them call it together."""
        found = np.zeros(self.definition.params[name].shape, np.float32)
        for box in self.local_boxes(state):
            if (box.role, box.name) == ("params", name):
                at = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
                found[at] = box.fetch().reshape(box.shape)
        if self.stage < 3:
            return found
        # No element is in the flat ranges of two processes.
        return self._total(torch.from_numpy(found).to(self.device)).cpu().numpy()

    def irregular_shards(self, state: TorchState) -> IrregularShards:
        """Return the boxes of all tensors that are flat ranges: slots, averages, and in stage 3 parameters."""
        mine = [
            (box.role, box.name, box.offset, box.shape)
            for box in self.local_boxes(state)
            if (box.role not in ("params", "state", COUNT)) or (box.role == "params" and self.stage == 3)
        ]
        every: list[Any] = [None] * self.processes
        dist.all_gather_object(every, mine)
        found: dict[tuple[str, str], list[tuple[int, tuple[int, ...], tuple[int, ...]]]] = {}
        for process, boxes in enumerate(every):
            for role, name, offset, shape in boxes:
                found.setdefault((role, name), []).append((process, offset, shape))
        return found

    def _frozen(self, p: Any) -> tuple[Tensor, int]:
        """Return (this process's elements, the index of the first) of a parameter that is sharded and never updated."""
        shard = p.tensor.ds_tensor
        start = self.world.rank * shard.ds_numel
        mine = max(0, min(shard.ds_numel, p.tensor.ds_numel - start))
        return shard.detach()[:mine], start

    def describe_memory(self, state: TorchState) -> dict[str, int]:
        """Return the bytes that DeepSpeed holds, with its padding. In stages 1 and 2 its float32 copies of this
        process's parts count as the optimizer's."""
        held = zero_state(state)
        params: list[Any] = [p.tensor for p in held.pieces if p.role == "params"]
        flats = {id(part.flat): part.flat for part in held.parts.values()}
        opt = sum(f.nbytes + sum(t.nbytes for t in held.client.slots_of(f).values()) for f in flats.values())
        here = sum((p if self.stage < 3 else p.ds_tensor).nbytes for p in params)
        beside = {role: sum(t.nbytes for t in by_piece.values()) for role, by_piece in held.beside.items()}
        states = sum(p.tensor.nbytes for p in held.pieces if p.role == "state")
        found = {"params": here, "opt": opt, "ema": 0, **beside, "state": states}
        peak = peak_bytes(self.device)
        return found if peak is None else {**found, "peak": peak}

    def describe_device(self) -> dict[str, Any]:
        import deepspeed

        found = super().describe_device()
        return {**found, "framework": f"{found['framework']}, deepspeed {deepspeed.__version__}, stage {self.stage}"}


class Zero1(ZeroBackend):
    """Run ZeRO stage 1: every process updates one part, and holds the optimizer's slots of that part alone."""

    name, stage = "deepspeed-1", 1


class Zero2(ZeroBackend):
    """Run ZeRO stage 2: each gradient is reduced to the process that updates with it."""

    name, stage = "deepspeed-2", 2


class Zero3(ZeroBackend):
    """Run ZeRO stage 3: parameters are sharded too, and gathered when a module runs."""

    name, stage = "deepspeed-3", 3
