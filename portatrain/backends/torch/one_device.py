"""Run the torch backend on one device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from portatrain.backends.base import Arrays, IrregularShards, LocalBox, StepResult, check_loss
from portatrain.backends.choose_kernel import check_fp8
from portatrain.backends.kernels import FLEX_DEVICES, Site
from portatrain.backends.limits import NONE, Limits, within
from portatrain.backends.program import Program
from portatrain.backends.state import COUNT, StateTensor, beside_params, initial_box, inventory, sample_words
from portatrain.backends.token_ids import PREDICTED, TokenIds
from portatrain.backends.torch import attention, experts, fp8
from portatrain.backends.torch.about import About
from portatrain.backends.torch.accumulation import Accumulates, aux_value
from portatrain.backends.torch.decoding import TorchCached
from portatrain.backends.torch.devices import check_device, pick_device, row_of
from portatrain.backends.torch.host import box, to_torch
from portatrain.backends.torch.losses import chunk_loss, token_losses
from portatrain.backends.torch.lower import Piece, lower
from portatrain.backends.torch.measured import on_host
from portatrain.backends.torch.ops import Static, TorchOps, run_block, run_block_handing
from portatrain.backends.torch.optimizer import RuleOptimizer, total_norm
from portatrain.backends.torch.probe import norms
from portatrain.backends.torch.remat import check_policy, rematerialised
from portatrain.backends.torch.standalone_ops import COMPUTE, StandaloneOps, words
from portatrain.backends.torch.watched import Watches
from portatrain.errors import UserError
from portatrain.model import remat
from portatrain.model.across_samples import Across
from portatrain.model.measured import split
from portatrain.model.module import TensorInfo
from portatrain.model.ops import Loss
from portatrain.model.state_updates import needs_after_step, run_after_step


@dataclass
class TorchState:
    """A state, which `step` changes in place. beside: tensors kept beside the parameters by neither module nor
    optimizer, by role and by position in `pieces`."""

    module: nn.Module
    pieces: list[Piece]
    optimizer: RuleOptimizer
    beside: dict[str, dict[int, Tensor]]

    @property
    def ema(self) -> dict[int, Tensor]:
        """Return the averages, by position in `pieces`."""
        return self.beside.setdefault("ema", {})


Batch = Mapping[str, np.ndarray]


class OneDevice(About, Accumulates, StandaloneOps, Watches):
    """See `portatrain.backends.base.Backend`."""

    name = "torch"
    async_dispatch = False  # a step ends in one wait for the device: is it finite?
    takes_limits = takes_statistics = True
    ops: Any = TorchOps
    measures = False
    """Whether the step that runs records activations."""
    process, processes = 0, 1

    def __init__(self, program: Program) -> None:
        self.program, self.definition = program, program.definition
        self.ids = TokenIds(self.definition)
        self.device = self._device()
        row = row_of(self.device)
        check_device(row, program.precision)
        if program.precision == "bf16-state" and not hasattr(Tensor, "grad_dtype"):
            raise UserError(
                "precision bf16-state on the torch backend",
                expected="torch 2.10 or newer, which sums gradients of bfloat16 tensors in float32",
                got=f"torch {torch.__version__}",
                do="Use bf16, or a newer torch.",
            )
        self.compiles = program.compile if program.compile is not None else row.compiles
        formats = fp8.formats_of(self.device, row.name)
        self.site = Site.of(program, backend="torch", device=self.device.type, formats=formats)
        if program.precision == "fp8":
            check_fp8(self.site, fp8.name_of(self.device, row.name))
        for kinds in (attention, experts, fp8):
            kinds.load_kernels()
        self._after_step = needs_after_step(self.definition)
        self._graphs = 0
        self.remat = remat.parse(program.remat)
        check_policy(self.remat)
        self._runners = self._made_runners()
        if self.device.type == "cuda" and program.precision == "fp32":
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False  # convolutions, which use TF32 unless told

    def _device(self) -> torch.device:
        return pick_device()

    def _made_runners(self) -> dict[str, Any]:
        """Return the functions that run blocks and losses: `TorchOps.run_block`, `run_again` and `losses`."""
        if not self.compiles:
            return {
                "run_block": run_block,
                "run_again": rematerialised(self.remat, run_block),
                "losses": (token_losses, chunk_loss),
            }
        compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False, backend=self._counted)
        hands = self.site.device in FLEX_DEVICES
        run = run_block_handing if hands else run_block
        block = compiled(run)
        # A block that is recomputed whole is compiled as it is; with a policy that chooses inside it, policy and block
        # are.
        again = (
            rematerialised(self.remat, block)
            if self.remat.name == "block"
            else compiled(rematerialised(self.remat, run))
        )
        losses = (compiled(token_losses), compiled(chunk_loss))
        return {"run_block": block, "run_again": again, "losses": losses, "hands": hands}

    def _counted(self, graph: Any, inputs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        self._graphs += 1
        return compile_fx(graph, inputs)

    def _ops(self, batch: Mapping[str, Tensor], step: int, training: bool) -> TorchOps:
        static = Static(
            training,
            COMPUTE[self.program.precision],
            self.remat,
            self.program.layout,
            ops=self.ops,
            site=self.site,
            measures=training and self.measures,
        )
        sample = batch.get("sample")
        return self.ops(
            static,
            *words(self.program.seed, step, self.device),
            sample=torch.zeros(1, 2, dtype=torch.int32, device=self.device) if sample is None else sample,
            layer=torch.zeros((), dtype=torch.int32, device=self.device),
            **self._runners,
            kept={},
            given=batch,
            ids=self.ids,
        )

    # ---- states

    @functools.cached_property
    def _inventory(self) -> tuple[dict[tuple[str, str], StateTensor], dict[str, list[StateTensor]]]:
        """Return (all tensors of a state by key, the tensors kept beside each parameter)."""
        return {t.key: t for t in inventory(self.program)}, beside_params(self.program)

    def _build(self, draw: Callable[[StateTensor, tuple[int, ...], tuple[int, ...]], np.ndarray], count: int) -> Any:
        """Return a state. draw(logical tensor, offset, shape) gives the values of every piece."""

        def piece(tensor: StateTensor, index: tuple[int, ...]) -> Tensor:
            at, inner = self._part(tensor.info, tensor.laid_out_as)
            array = draw(tensor, (*index, *at), (*(1 for _ in index), *inner)).reshape(inner)
            return self._piece(array, tensor)

        tensors, beside = self._inventory
        state = self._lowered(lambda role, name, index: piece(tensors[role, name], index))
        optimizer = state.optimizer
        if count:
            optimizer.set_count(count)
        for i, p in enumerate(state.pieces):
            for tensor in beside.get(p.name, ()) if p.role == "params" else ():
                if tensor.slot is None:
                    state.beside.setdefault(tensor.role, {})[i] = piece(tensor, p.index)
                else:
                    optimizer.state[p.tensor][optimizer.slot(p.tensor, tensor.slot)] = piece(tensor, p.index)
        return state

    def state_arrays(self, state: TorchState) -> Iterator[tuple[StateTensor, tuple[int, ...], Tensor]]:
        """Yield (logical tensor, index in its Stacks, this process's part) of everything in `state` except the
        count."""
        tensors, beside = self._inventory
        for i, p in enumerate(state.pieces):
            yield tensors[p.role, p.name], p.index, p.tensor
            for tensor in beside.get(p.name, ()) if p.role == "params" else ():
                if tensor.slot is None:
                    yield tensor, p.index, state.beside[tensor.role][i]
                else:
                    slots = state.optimizer.state[p.tensor]
                    yield tensor, p.index, slots[state.optimizer.slot(p.tensor, tensor.slot)]

    def _piece(self, array: np.ndarray, tensor: StateTensor) -> Tensor:
        """Return a tensor on the device with this process's part of one layer of a logical tensor."""
        return to_torch(array).to(self.device)

    def _part(self, info: TensorInfo, laid_out_as: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return (offset, shape) of this process's part of one layer of a logical tensor."""
        inner = info.shape[info.stack_dims :]
        return (0,) * len(inner), inner

    def _lowered(self, value: Callable[[str, str, tuple[int, ...]], Tensor]) -> TorchState:
        """Return the module with the parts `value(role, name, index)`, and an optimizer with slots of zero."""
        module, pieces = lower(self.definition, value)
        for p in pieces:
            if p.role == "params":
                p.tensor.requires_grad_(p.name in self.program.trainable)
                if p.tensor.dtype != torch.float32:
                    p.tensor.grad_dtype = torch.float32  # microbatches are summed in it
        trained = [p for p in pieces if p.role == "params" and p.name in self.program.trainable]
        program = self.program
        optimizer = RuleOptimizer(program.optimizer, trained, self.definition.params, program.decay, program.seed)
        return TorchState(module, pieces, optimizer, {})

    def init_state(self) -> TorchState:
        return self._build(lambda tensor, at, shape: initial_box(tensor.info, self.program.seed, at, shape), 0)

    def restore_state(self, read: Callable[[str, str, tuple, tuple], np.ndarray]) -> TorchState:
        return self._build(
            lambda tensor, at, shape: read(tensor.role, tensor.info.name, at, shape), int(read(COUNT, "", (), ()))
        )

    def lower(self) -> nn.Module:
        return self.init_state().module

    # ---- the step

    def _forward(
        self, state: TorchState, batch: Mapping[str, Tensor], step: int, training: bool, across: Across | None = None
    ) -> tuple[Loss, TorchOps]:
        ops = self._ops(batch, step, training)
        if across is not None:
            ops.across = across
        with self.ids.model_runs():
            return check_loss(state.module(ops, batch), self.definition.model), ops

    def _norm(self, state: TorchState) -> Tensor:
        return total_norm(self._grads(state))

    def _grads(self, state: TorchState) -> list[Tensor]:
        grads = []
        for p in state.optimizer.param_groups[0]["params"]:
            if p.grad is None:  # the loss does not depend on it
                p.grad = torch.zeros_like(p, dtype=torch.float32)
            grads.append(p.grad)
        return grads

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
        self.measures = statistics
        loss, weight, auxes, tallies = self._accumulate(state, batch, step)
        self.measures = False
        activations, auxes = split(auxes)
        grads = self._grads(state)
        norm = self._norm(state)
        # The host waits once a step for the device, because a step that is not within the limits must change nothing.
        loss_there, norm_there = torch.stack([loss, norm]).tolist()
        good = within(loss_there, norm_there, limits)
        limit, length = self._clipping(norm_there)
        found = self._norms(state, limit / length, scale, ("params",)) if statistics else {}
        if good:
            if limit < length:
                # A quotient of float32 numbers rounded from float64 is the correctly rounded float32 one.
                torch._foreach_mul_(grads, limit / length)
            state.optimizer.step(scale=scale)
            self._after(state, step, tallies)
        metrics = {k: aux_value(v) for k, v in auxes.items()}
        numbers: Any = {"loss": loss, "grad_norm": norm, "skipped": int(not good), "weight": weight}
        return state, StepResult.of(metrics, **numbers, statistics={**found, **on_host(activations)})

    def _clipping(self, norm: float) -> tuple[float, float]:
        """Return the factor of the gradients, of which `norm` is the norm, as (numerator, denominator)."""
        clip = self.program.clip_norm
        return (clip, norm) if clip is not None and norm > clip else (1.0, 1.0)

    @torch.no_grad()
    def _after(self, state: TorchState, step: int, tallies: dict[str, Tensor]) -> None:
        """Update model States and averages, after every applied step."""
        if self.definition.states and (tallies or self._after_step):
            states = self._states(state)
            states = {n: s + tallies[n] if n in tallies else s for n, s in states.items()}
            states = run_after_step(self.definition, states, self._ops_after(step), lambda xs: torch.stack(list(xs)))
            for p in state.pieces:
                if p.role == "state":
                    p.tensor.copy_(states[p.name][p.index] if p.index else states[p.name])
        decay = self.program.ema_decay
        if decay is not None:
            self._average(state, decay)

    def _average(self, state: TorchState, decay: float) -> None:
        for i, average in state.ema.items():
            average.lerp_(state.pieces[i].tensor.float(), 1 - decay)

    def _ops_after(self, step: int) -> TorchOps:
        return self._ops({}, step, True)

    def _states(self, state: TorchState) -> dict[str, Tensor]:
        """Return the model's States as logical tensors."""
        parts: dict[str, list[Tensor]] = {}
        for p in state.pieces:
            if p.role == "state":
                parts.setdefault(p.name, []).append(p.tensor)
        infos = self.definition.states
        return {n: torch.stack(ts).reshape(infos[n].shape) if infos[n].stack_dims else ts[0] for n, ts in parts.items()}

    def gradients(self, state: TorchState, batch: Mapping[str, np.ndarray], *, step: int) -> tuple[float, Arrays]:
        loss, _, grads = self.weighed_gradients(state, batch, step=step)
        return loss, grads

    def weighed_gradients(
        self, state: TorchState, batch: Mapping[str, np.ndarray], *, step: int
    ) -> tuple[float, float, Arrays]:
        loss, weight, *_ = self._accumulate(state, batch, step)
        self._grads(state)
        found = {n: np.zeros(self.definition.params[n].shape, np.float32) for n in sorted(self.program.trainable)}
        for p in state.pieces:
            if p.role == "params" and p.tensor.grad is not None:
                found[p.name][p.index] = p.tensor.grad.cpu().numpy()
        state.optimizer.zero_grad(set_to_none=True)
        return float(loss), float(weight), found

    # ---- without an update

    def probe(self, state: TorchState, batch: Mapping[str, np.ndarray], *, step: int, scale: float) -> Arrays:
        self._accumulate(state, batch, step)
        self._grads(state)
        limit, length = self._clipping(float(self._norm(state)))
        return self._norms(state, limit / length, scale)

    def _norms(self, state: TorchState, clip: float, scale: float, roles: Sequence[str] | None = None) -> Arrays:
        more: Any = {"counts": self._counts, "total": self._total, "roles": roles}
        return norms(self, state, clip=clip, scale=scale, **more)

    def _counts(self, info: TensorInfo, role: str) -> bool:
        """Return whether this process's part of a tensor is, of equal copies, the one that counts."""
        return True

    def _total(self, x: Tensor) -> Tensor:
        """Return the sum over all processes."""
        return x

    @torch.no_grad()
    def eval(self, state: TorchState, batch: Mapping[str, np.ndarray]) -> Arrays:
        rows, even = next(iter(batch.values())).shape[0], self._even(batch)
        across = Across(rows=None if even is batch else rows)
        loss, ops = self._forward(state, self._put(even), 0, False, across)
        means = {k: a.value_B / (a.count if a.reduce == "mean" else 1) for k, a in ops.auxes.items()}
        values = {"loss_B": loss.loss_B, "weight_B": loss.weight_B, **means}
        found = {k: self._fetch(v)[:rows] for k, v in values.items()}
        self._free(state)
        return found

    @torch.no_grad()
    def predict(self, state: TorchState, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        rows, even = next(iter(batch.values())).shape[0], self._even(batch)
        there = self._put(even)
        ops = self._ops(there, 0, False)
        ops.across = Across(rows=None if even is batch else rows)
        with self.ids.model_runs(PREDICTED):
            predicted = self._predicted(state, ops, there)
        found = self._fetch(predicted.float())[:rows]
        self._free(state)
        return found

    def _predicted(self, state: TorchState, ops: TorchOps, batch: Mapping[str, Tensor]) -> Tensor:
        predict: Any = state.module.predict
        return predict(ops, batch)

    def cached(self, state: TorchState) -> TorchCached | None:
        return TorchCached(self, state) if self.ops is TorchOps else None

    def _even(self, batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Return a batch of as many rows as the devices need; rows that are no samples follow the others."""
        return batch

    def _fetch(self, x_B: Tensor) -> np.ndarray:
        """Return values by sample, on the host."""
        return x_B.cpu().numpy()

    def _put(self, batch: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """Check the ids of a global batch; return this process's rows on the device."""
        self.ids.begin(batch)
        return self._placed(batch)

    def _placed(self, batch: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        return {
            k: torch.from_numpy(sample_words(v) if k == "sample" else np.ascontiguousarray(v)).to(self.device)
            for k, v in batch.items()
        }

    # ---- what it holds and runs on

    def local_boxes(self, state: TorchState) -> Iterator[LocalBox]:
        for tensor, index, held in self.state_arrays(state):
            yield box(tensor.role, tensor.info, index, held, self._part(tensor.info, tensor.laid_out_as)[0])
        count = state.optimizer.count
        yield LocalBox(name="", role=COUNT, offset=(), shape=(), fetch=lambda: np.array(count, np.int32))

    def irregular_shards(self, state: Any) -> IrregularShards:
        return {}
