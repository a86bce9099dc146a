"""The torch backend's verbs, on one device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import torch
from portatrain import hashing
from portatrain.after_step import needs_after_step, run_after_step
from portatrain.backends.base import Arrays, Context, LocalBox, Program, StepResult
from portatrain.backends.torch.devices import device_name, pick_device
from portatrain.backends.torch.losses import chunk_loss
from portatrain.backends.torch.lower import Piece, lower
from portatrain.backends.torch.ops import Static, TorchOps, run_block
from portatrain.backends.torch.optimizer import RuleOptimizer
from portatrain.errors import UserError
from portatrain.module import TensorInfo
from portatrain.ops import Aux, Loss
from portatrain.state import COUNT, initial_box, sample_words, slot_tensors
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class TorchState:
    """Changed in place by `step`. ema: by position in `pieces`."""

    module: nn.Module
    pieces: list[Piece]
    optimizer: RuleOptimizer
    ema: dict[int, Tensor]


class TorchBackend:
    """See `portatrain.backends.base.Backend`."""

    name = "torch"

    def __init__(self, program: Program) -> None:
        if program.layout.mesh.devices > 1:
            raise UserError(
                f"mesh {program.layout.mesh}", expected="a mesh of one device on the torch backend", got="a larger one",
                do="Use --backend jax for this mesh.",
            )  # fmt: skip
        self.program, self.definition = program, program.definition
        self.device = pick_device()
        self.compiles = program.compile if program.compile is not None else self.device.type == "cuda"
        self._after_step = needs_after_step(self.definition)
        self._graphs = 0
        self._run_block: Callable[..., Any] = run_block
        self._chunk: Callable[..., Any] = chunk_loss
        if self.compiles:
            self._run_block = torch.compile(run_block, fullgraph=True, dynamic=False, backend=self._counted)
            self._chunk = torch.compile(chunk_loss, fullgraph=True, dynamic=False, backend=self._counted)
        if self.device.type == "cuda" and program.precision == "fp32":
            torch.backends.cuda.matmul.allow_tf32 = False

    def _counted(self, graph: Any, inputs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        self._graphs += 1
        return compile_fx(graph, inputs)

    def _ops(self, batch: Mapping[str, Tensor], step: int, training: bool) -> TorchOps:
        static = Static(training, COMPUTE[self.program.precision], self.program.remat, self.program.layout)
        sample = batch.get("sample")
        return TorchOps(
            static, *_words(self.program.seed, step, self.device),
            sample=torch.zeros(1, 2, dtype=torch.int32, device=self.device) if sample is None else sample,
            layer=torch.zeros((), dtype=torch.int32, device=self.device),
            run_block=self._run_block, chunk=self._chunk, masks={},
        )  # fmt: skip

    # ---- states

    def _build(self, draw: Callable[[TensorInfo, str, tuple[int, ...], tuple[int, ...]], np.ndarray], count: int) -> Any:
        """A state whose every piece comes from draw(logical tensor, role, offset, shape)."""

        def piece(info: TensorInfo, role: str, index: tuple[int, ...]) -> Tensor:
            inner = info.shape[len(index) :]
            offset = (*index, *(0 for _ in inner))
            array = draw(info, role, offset, (*(1 for _ in index), *inner)).reshape(inner)
            return torch.from_numpy(np.array(array)).to(self.device)

        infos = self.definition.tensors
        module, pieces = lower(self.definition, lambda role, name, index: piece(infos[role, name], role, index))
        for p in pieces:
            if p.role == "params":
                p.tensor.requires_grad_(p.name in self.program.trainable)
        trained = [p for p in pieces if p.role == "params" and p.name in self.program.trainable]
        optimizer = RuleOptimizer(self.program.optimizer, trained, self.definition.params, self.program.decay)
        if count:
            optimizer.set_count(count)
        for p in trained:
            for slot, info in slot_tensors(self.program.optimizer, self.definition.params[p.name]).items():
                optimizer.state[p.tensor][optimizer.slot(p.tensor, slot)].copy_(piece(info, info.role, p.index))
        ema = {
            i: piece(infos["params", p.name], "ema", p.index)
            for i, p in enumerate(pieces)
            if p.role == "params" and p.name in self.program.ema
        }
        return TorchState(module, pieces, optimizer, ema)

    def init_state(self) -> TorchState:
        return self._build(lambda info, role, offset, shape: initial_box(info, self.program.seed, offset, shape), 0)

    def restore_state(self, read: Callable[[str, str, tuple, tuple], np.ndarray]) -> TorchState:
        return self._build(
            lambda info, role, offset, shape: read(role, info.name, offset, shape), int(read(COUNT, "", (), ()))
        )

    def lower(self) -> nn.Module:
        return self.init_state().module

    # ---- the step

    def _forward(self, state: TorchState, batch: Mapping[str, Tensor], step: int, training: bool) -> tuple[Loss, TorchOps]:
        ops = self._ops(batch, step, training)
        loss = state.module(ops, batch)
        if not isinstance(loss, Loss):
            raise UserError(
                type(self.definition.model).__name__, expected="a model that returns ops.cross_entropy(...) or ops.loss(...)",
                got=type(loss).__name__, do="Return a portatrain.ops.Loss from __call__(ops, batch).",
            )  # fmt: skip
        return loss, ops

    def _accumulate(self, state: TorchState, batch: Mapping[str, np.ndarray], step: int) -> tuple[Any, ...]:
        """Leaves the gradients of the mean loss in `.grad`; (loss, weight, aux sums, tallies)."""
        state.optimizer.zero_grad(set_to_none=True)
        n = next(iter(batch.values())).shape[0]
        total = weight = torch.zeros((), device=self.device)
        auxes: dict[str, dict[str, Tensor]] = {}
        tallies: dict[str, Tensor] = {}
        for i in range(n):
            loss, ops = self._forward(state, self._put({k: v[i] for k, v in batch.items()}), step, True)
            objective = loss.sum
            for aux in ops.auxes.values():
                if aux.loss:
                    objective = objective + aux.loss * (aux.value_B * loss.weight_B).sum()
            total, weight = total + objective.detach(), weight + loss.weight_B.sum()
            # With one microbatch the weight is known before the backward pass, which then scales for free.
            (objective / weight if n == 1 else objective).backward()
            with torch.no_grad():
                for key, found in ops.auxes.items():
                    auxes[key] = _join_aux(auxes.get(key), found)
            for key, value in ops.tallies.items():
                tallies[key] = tallies[key] + value if key in tallies else value
        if n > 1:
            torch._foreach_mul_(self._grads(state), 1.0 / weight)
        return total / weight, weight, auxes, tallies

    def _grads(self, state: TorchState) -> list[Tensor]:
        grads = []
        for p in state.optimizer.param_groups[0]["params"]:
            if p.grad is None:  # the loss does not depend on it
                p.grad = torch.zeros_like(p)
            grads.append(p.grad)
        return grads

    def step(self, state: TorchState, batch: Mapping[str, np.ndarray], *, step: int, scale: float) -> tuple[TorchState, StepResult]:
        loss, weight, auxes, tallies = self._accumulate(state, batch, step)
        grads = self._grads(state)
        norm = torch.nn.utils.get_total_norm(grads)
        clip = self.program.clip_norm
        # One wait for the device a step: a step that is not finite must change nothing.
        good, factor = torch.stack([
            torch.isfinite(loss) & torch.isfinite(norm),
            clip / torch.clamp_min(norm, clip) if clip is not None else torch.ones_like(norm),
        ]).tolist()  # fmt: skip
        if good:
            if factor != 1.0:
                torch._foreach_mul_(grads, factor)
            state.optimizer.step(scale=scale)
            self._after(state, step, tallies)
        return state, StepResult(
            loss=loss, grad_norm=norm, skipped=int(not good), weight=weight,
            aux={k: _aux_value(v) for k, v in auxes.items()},
        )  # fmt: skip

    @torch.no_grad()
    def _after(self, state: TorchState, step: int, tallies: dict[str, Tensor]) -> None:
        """Model States and averages, once an applied step."""
        if self.definition.states and (tallies or self._after_step):
            states = self._states(state)
            states = {n: s + tallies[n] if n in tallies else s for n, s in states.items()}
            states = run_after_step(self.definition, states, self._ops({}, step, True), torch.stack)
            for p in state.pieces:
                if p.role == "state":
                    p.tensor.copy_(states[p.name][p.index] if p.index else states[p.name])
        decay = self.program.ema_decay
        if decay is not None:
            for i, average in state.ema.items():
                average.lerp_(state.pieces[i].tensor, 1 - decay)

    def _states(self, state: TorchState) -> dict[str, Tensor]:
        """The model's States as logical tensors."""
        parts: dict[str, list[Tensor]] = {}
        for p in state.pieces:
            if p.role == "state":
                parts.setdefault(p.name, []).append(p.tensor)
        infos = self.definition.states
        return {n: torch.stack(ts).reshape(infos[n].shape) if infos[n].stack_dims else ts[0] for n, ts in parts.items()}

    def gradients(self, state: TorchState, batch: Mapping[str, np.ndarray], *, step: int) -> tuple[float, Arrays]:
        loss, *_ = self._accumulate(state, batch, step)
        self._grads(state)
        found = {n: np.zeros(self.definition.params[n].shape, np.float32) for n in sorted(self.program.trainable)}
        for p in state.pieces:
            if p.role == "params" and p.tensor.grad is not None:
                found[p.name][p.index] = p.tensor.grad.cpu().numpy()
        state.optimizer.zero_grad(set_to_none=True)
        return float(loss), found

    # ---- without an update

    @torch.no_grad()
    def eval(self, state: TorchState, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        loss, ops = self._forward(state, self._put(batch), 0, False)
        means = {k: a.value_B / (a.count if a.reduce == "mean" else 1) for k, a in ops.auxes.items()}
        return {k: v.cpu().numpy() for k, v in {"loss_B": loss.loss_B, "weight_B": loss.weight_B, **means}.items()}

    @torch.no_grad()
    def predict(self, state: TorchState, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        there = self._put(batch)
        return state.module.predict(self._ops(there, 0, False), there).float().cpu().numpy()

    def _put(self, batch: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        return {
            k: torch.from_numpy(sample_words(v) if k == "sample" else np.ascontiguousarray(v)).to(self.device)
            for k, v in batch.items()
        }

    # ---- what it holds and runs on

    def local_boxes(self, state: TorchState) -> Iterator[LocalBox]:
        for i, p in enumerate(state.pieces):
            yield _box(p.name, p.role, p.index, p.tensor)
            if i in state.ema:
                yield _box(p.name, "ema", p.index, state.ema[i])
            if p.role == "params" and p.tensor in state.optimizer.infos:
                for slot in slot_tensors(self.program.optimizer, self.definition.params[p.name]):
                    held = state.optimizer.state[p.tensor][state.optimizer.slot(p.tensor, slot)]
                    yield _box(p.name, f"opt/{slot}", p.index, held)
        count = state.optimizer.count
        yield LocalBox(name="", role=COUNT, offset=(), shape=(), fetch=lambda: np.array(count, np.int32))

    def describe_memory(self, state: TorchState) -> dict[str, int]:
        def held(tensors: Any) -> int:
            return sum(t.nbytes for t in tensors)

        found = {role: held(p.tensor for p in state.pieces if p.role == role) for role in ("params", "state")}
        found["ema"] = held(state.ema.values())
        found["opt"] = held(t for slots in state.optimizer.state.values() for t in slots.values())
        peak = {"peak": torch.cuda.max_memory_allocated(self.device)} if self.device.type == "cuda" else {}
        return {**found, **peak}

    def graphs(self) -> int:
        return self._graphs

    def describe_device(self) -> dict[str, Any]:
        return {"device": device_name(self.device), "devices": 1, "framework": f"torch {torch.__version__}"}

    # ---- bare operations

    @classmethod
    def _bare(cls, context: Context) -> TorchOps:
        sample = np.zeros(1, np.int64) if context.sample is None else context.sample
        return TorchOps(
            Static(context.training, COMPUTE[context.precision]),
            *_words(context.seed, context.step, torch.device("cpu")),
            sample=torch.from_numpy(sample_words(sample)), layer=torch.zeros((), dtype=torch.int32), masks={},
        )  # fmt: skip

    @classmethod
    def evaluate(cls, fn: Callable[..., Any], args: tuple[Any, ...], context: Context) -> Any:
        args = tree_map(lambda a: torch.from_numpy(np.array(a)), args)
        with torch.no_grad():
            return tree_map(lambda t: t.numpy(), fn(cls._bare(context), *args))

    @classmethod
    def differentiate(cls, fn: Callable[..., Any], args: tuple[Any, ...], context: Context) -> tuple[Any, tuple]:
        args = tree_map(lambda a: torch.from_numpy(np.array(a)), args)
        floating = [t.requires_grad_() for t in tree_leaves(args) if t.is_floating_point()]
        value = fn(cls._bare(context), *args)
        grads = torch.autograd.grad(value, floating, allow_unused=True)
        return value.detach().numpy(), tuple(
            np.zeros(t.shape, np.float32) if g is None else g.numpy() for g, t in zip(grads, floating, strict=True)
        )


def _words(seed: int, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return (
        torch.tensor(step, dtype=torch.int32, device=device),
        torch.tensor(hashing.words(seed), dtype=torch.int32, device=device),
    )


def _box(name: str, role: str, index: tuple[int, ...], tensor: Tensor) -> LocalBox:
    lead = (1,) * len(index)
    return LocalBox(
        name=name, role=role, offset=(*index, *(0,) * tensor.ndim), shape=(*lead, *tensor.shape),
        fetch=lambda: tensor.detach().cpu().numpy().copy().reshape(*lead, *tensor.shape),
    )  # fmt: skip


def _join_aux(so_far: dict[str, Tensor] | None, aux: Aux) -> dict[str, Tensor]:
    """Sums over samples and microbatches, or the maximum."""
    if aux.reduce == "max":
        high = aux.value_B.max()
        return {"max": high if so_far is None else torch.maximum(so_far["max"], high)}
    found = {"sum": aux.value_B.sum(), "count": torch.tensor(float(aux.count * math.prod(aux.value_B.shape)))}
    if aux.reduce == "sum":
        found.pop("count")
    return found if so_far is None else {k: v + so_far[k] for k, v in found.items()}


def _aux_value(part: dict[str, Tensor]) -> Tensor:
    return part["max"] if "max" in part else part["sum"] / part.get("count", torch.tensor(1.0))
