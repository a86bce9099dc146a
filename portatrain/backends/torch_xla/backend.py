"""Run a program on torch-xla, with the module, the blocks and the microbatch loop of the torch backend.

This file has the differences on devices that run a step as one graph: the host decides nothing in the middle of a step,
and values that change from step to step enter as tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from portatrain.backends.base import Arrays, Context, LocalBox, StepResult
from portatrain.backends.kernels import Site
from portatrain.backends.limits import NONE, Limits
from portatrain.backends.program import Program
from portatrain.backends.row_padding import pad_rows
from portatrain.backends.state import COUNT, StateTensor, bytes_by_kind, sample_words, slot_tensors
from portatrain.backends.token_ids import PREDICTED, TokenIds
from portatrain.backends.torch.accumulation import aux_value
from portatrain.backends.torch.one_device import Batch, OneDevice, TorchState
from portatrain.backends.torch.ops import Static, run_block
from portatrain.backends.torch.optimizer import xp
from portatrain.backends.torch.standalone_ops import COMPUTE
from portatrain.backends.torch_xla import devices as xla
from portatrain.backends.torch_xla.attention import SITE
from portatrain.backends.torch_xla.devices import Devices
from portatrain.backends.torch_xla.ops import XlaOps
from portatrain.backends.torch_xla.probe import norms
from portatrain.backends.torch_xla.remat import check_policy, rematerialised
from portatrain.errors import UserError
from portatrain.model import dropout_hash, remat
from portatrain.model.across_samples import Across
from portatrain.model.layout import Spec
from portatrain.model.module import TensorInfo
from portatrain.model.state_updates import needs_after_step, run_after_step
from portatrain.optim import clip_scale


@dataclass
class XlaState(TorchState):
    """A state, which `step` changes in place. count_1: (1,) int32, the number of applied steps. It is on the
    devices, because only they know whether a step was skipped."""

    count_1: Tensor


class Numbers(NamedTuple):
    """What changes from step to step, in arrays of one axis, as torch-xla makes constants of the scalars 0 and
    1."""

    ints_3: Tensor
    """The step and the two words of the seed."""
    scale_1: Tensor


class XlaBackend(OneDevice):
    """See `portatrain.backends.base.Backend`."""

    name = "torch-xla"
    takes_limits = takes_statistics = False
    use_compile_cache: Any = None  # torch-xla has a cache of its own (XLA_PERSISTENT_CACHE_PATH)
    start_trace: Any = None  # torch.profiler does not see the operations of XLA's programs
    watch: Any = None  # a step is one program of XLA

    def __init__(self, program: Program) -> None:
        self.program, self.definition = program, program.definition
        self.ids = TokenIds(self.definition)
        self.remat = remat.parse(program.remat)
        self._check(program)
        self.devices = Devices(program.layout)
        self.device, self.compiles = self.devices.device, False
        # On a CPU a running step takes the cores that would prepare the next one.
        self.async_dispatch = not xla.on_cpu()
        self.site = Site.of(program, backend=self.name, device=xla.kind())
        self._after_step = needs_after_step(self.definition)
        self._graphs = 0
        self._runners = {"run_block": run_block, "run_again": rematerialised(self.remat, run_block)}
        self.ops = functools.partial(XlaOps, devices=self.devices)

    def _check(self, program: Program) -> None:
        check_policy(self.remat)
        if program.precision in ("bf16-state", "fp8"):
            raise UserError(
                f"precision {program.precision} on the {self.name} backend",
                expected="fp32 or bf16",
                got=program.precision,
                do="Use bf16, or --backend jax.",
            )
        if program.compile:
            raise UserError(
                f"compile on the {self.name} backend",
                expected="no choice, as XLA compiles the whole step",
                got="compile=True",
                do="Leave compile out.",
            )
        for info in self.definition.tensors.values():
            if len(info.shape) - info.stack_dims > xla.MOST_AXES and program.layout.mesh.devices > 1:
                raise UserError(
                    f"{info.name} on the {self.name} backend",
                    expected=f"at most {xla.MOST_AXES} axes of its own",
                    got=", ".join(info.axes[info.stack_dims :]),
                    do="Join some, use one device, or --backend jax.",
                )
            held = program.layout.tensor_spec(info)[: info.stack_dims]
            if any(program.layout.mesh.over(axes) > 1 for axes in held):
                raise UserError(
                    f"layout of {info.name} on the {self.name} backend",
                    expected="the axis of a Stack not to be cut",
                    got=f"{info.axes[: info.stack_dims]} over {held}",
                    do="It holds one module a layer: map another axis, or use --backend jax.",
                )

    def _ops(self, batch: Mapping[str, Tensor], step: Any, training: bool) -> XlaOps:
        numbers = step if isinstance(step, Numbers) else self._numbers(step)
        xla.use_precision(self.program.precision)
        static = Static(
            training, COMPUTE[self.program.precision], self.remat, self.program.layout, ops=self.ops, site=self.site
        )
        sample = batch.get("sample")
        return self.ops(
            static,
            numbers.ints_3[0],
            numbers.ints_3[1:],
            sample=torch.zeros(1, 2, dtype=torch.int32, device=self.device) if sample is None else sample,
            layer=torch.zeros((), dtype=torch.int32, device=self.device),
            **self._runners,
            kept={},
            given=batch,
            ids=self.ids,
        )

    def _numbers(self, step: int, scale: float = 0.0) -> Numbers:
        ints = np.array([step, *dropout_hash.words(self.program.seed)], np.int32)
        return Numbers(self.devices.put(ints), self.devices.put(np.array([scale], np.float32)))

    def _sync(self) -> None:
        """Run the pending operations."""
        before = xla.compilations()
        xla.sync()
        self._graphs += xla.compilations() - before

    def _read(self, values: Mapping[str, Tensor]) -> Arrays:
        self._sync()
        return {name: self.devices.whole(value) for name, value in values.items()}

    # ---- states

    def _spec(self, info: TensorInfo, laid_out_as: str) -> Spec:
        """Return the sharding of one layer of a logical tensor."""
        return self.program.layout.tensor_spec(info, role=laid_out_as)[info.stack_dims :]

    def _piece(self, array: np.ndarray, tensor: StateTensor) -> Tensor:
        return self.devices.put(array, self._spec(tensor.info, tensor.laid_out_as))

    def _build(self, draw: Callable[..., np.ndarray], count: int) -> XlaState:
        made: TorchState = super()._build(draw, count)
        count_1 = self.devices.put(np.array([count], np.int32))
        return XlaState(made.module, made.pieces, made.optimizer, made.beside, count_1)

    def _put(self, batch: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        self.ids.begin(batch)
        placed = {}
        for key, value in batch.items():
            value = sample_words(value) if key == "sample" else value
            axes = ("batch", *(None for _ in value.shape[1:]))
            placed[key] = self.devices.put(value, self.program.layout.spec(axes))
        return placed

    def _even(self, batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return pad_rows(batch, self.program.layout.mesh.over(self.program.layout.spec(("batch",))[0]))

    # ---- the step

    def _norm(self, state: TorchState) -> Tensor:
        # Rows are summed first: XLA on a CPU adds one element after another.
        squares = [(g * g).sum(-1).sum() if g.ndim else g * g for g in self._grads(state)]
        return torch.stack(squares).sum().sqrt()

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
        assert isinstance(state, XlaState) and limits == NONE and not statistics  # as `takes_limits` and the other say
        numbers: Any = self._numbers(step, scale)
        loss, weight, auxes, tallies = self._accumulate(state, batch, numbers)
        norm = self._norm(state)
        good = torch.isfinite(loss) & torch.isfinite(norm)
        self._update(state, numbers, norm, good)
        self._follow(state, numbers, tallies, good)
        aux = {k: aux_value({n: float(x) if n == "count" else x for n, x in v.items()}) for k, v in auxes.items()}
        found = StepResult.of(aux, loss=loss, grad_norm=norm, skipped=1 - good.to(torch.int32), weight=weight)
        state.optimizer.zero_grad(set_to_none=True)
        self._sync()
        return state, found

    @torch.no_grad()
    def _update(self, state: XlaState, numbers: Numbers, norm: Tensor, good: Tensor) -> None:
        """Update parameters, slots and the count by one step of the rule if `good`."""
        optimizer = state.optimizer
        count_1 = state.count_1 + 1
        factor = self._clip_factor(norm)
        for p in state.pieces:
            if p.tensor not in optimizer.infos:
                continue
            delta, slots = self._delta(state, p.tensor, factor, numbers, count_1)
            infos = slot_tensors(self.program.optimizer, self.definition.params[p.name])
            for slot, value in slots.items():
                self._set(optimizer.state[p.tensor][slot], value, good, self._spec(infos[slot], infos[slot].role))
            spec = self._spec(self.definition.params[p.name], "params")
            self._set(p.tensor, p.tensor + delta, good, spec)
        self._set(state.count_1, count_1, good, ((),))

    def _clip_factor(self, norm: Tensor) -> Tensor | None:
        clip = self.program.clip_norm
        functions: Any = xp  # torch's have more signatures than rules use
        return None if clip is None else clip_scale(functions, norm, clip)

    def _delta(self, state: XlaState, tensor: Tensor, factor: Tensor | None, numbers: Numbers, count_1: Tensor) -> Any:
        """Return (the update of `tensor` for its gradient times `factor`, its new slots)."""
        optimizer = state.optimizer
        info, name = optimizer.infos[tensor]
        grad = tensor.grad if factor is None else tensor.grad * factor  # type: ignore[operator]
        return optimizer.updated(
            optimizer.rule.rule_for(info),
            tensor,
            optimizer.state[tensor],
            xp=xp,
            grad=grad,
            scale=numbers.scale_1[0],
            count=count_1[0].float(),
            decay=name in self.program.decay,
        )

    @torch.no_grad()
    def _follow(self, state: XlaState, numbers: Any, tallies: dict[str, Tensor], good: Tensor) -> None:
        """Update model States and averages if `good`."""
        if self.definition.states and (tallies or self._after_step):
            states = {n: s + tallies[n] if n in tallies else s for n, s in self._states(state).items()}
            states = run_after_step(self.definition, states, self._ops_after(numbers), lambda xs: torch.stack(list(xs)))
            for p in state.pieces:
                if p.role == "state":
                    value = states[p.name][p.index] if p.index else states[p.name]
                    self._set(p.tensor, value, good, self._spec(self.definition.states[p.name], "state"))
        if (decay := self.program.ema_decay) is not None:
            for i, average in state.ema.items():
                p = state.pieces[i]
                value = average + (1 - decay) * (p.tensor - average)
                self._set(average, value, good, self._spec(self.definition.params[p.name], "params"))

    def _set(self, tensor: Tensor, value: Tensor, good: Tensor, spec: Spec) -> None:
        """Set `tensor` to `value` if `good`, and keep its sharding, because with another the next step would compile
        again."""
        tensor.copy_(torch.where(good, value, tensor))
        self.devices.laid(tensor, spec)

    def gradients(self, state: TorchState, batch: Mapping[str, np.ndarray], *, step: int) -> tuple[float, Arrays]:
        numbers: Any = self._numbers(step)
        loss, *_ = self._accumulate(state, batch, numbers)
        self._grads(state)
        self._sync()
        params = self.definition.params
        found = {n: np.zeros(params[n].shape, np.float32) for n in sorted(self.program.trainable)}
        for p in state.pieces:
            if p.role == "params" and p.tensor.grad is not None:
                found[p.name][p.index] = self.devices.whole(p.tensor.grad)
        state.optimizer.zero_grad(set_to_none=True)
        return float(loss), found

    # ---- without an update

    def probe(self, state: TorchState, batch: Mapping[str, np.ndarray], *, step: int, scale: float) -> Arrays:
        assert isinstance(state, XlaState)
        numbers: Any = self._numbers(step, scale)
        self._accumulate(state, batch, numbers)
        self._grads(state)
        factor = self._clip_factor(self._norm(state))
        count_1 = state.count_1 + 1
        found = norms(self, state, lambda tensor: self._delta(state, tensor, factor, numbers, count_1)[0], self._sync)
        state.optimizer.zero_grad(set_to_none=True)
        return found

    @torch.no_grad()
    def eval(self, state: TorchState, batch: Mapping[str, np.ndarray]) -> Arrays:
        rows = next(iter(batch.values())).shape[0]
        numbers: Any = self._numbers(0)
        even = self._even(batch)
        across = Across(rows=None if even is batch else rows)
        loss, ops = self._forward(state, self._put(even), numbers, False, across)
        means = {k: a.value_B / (a.count if a.reduce == "mean" else 1) for k, a in ops.auxes.items()}
        values = {"loss_B": loss.loss_B, "weight_B": loss.weight_B, **means}
        del loss, ops
        return {k: v[:rows] for k, v in self._read(values).items()}

    @torch.no_grad()
    def predict(self, state: TorchState, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        rows, even = next(iter(batch.values())).shape[0], self._even(batch)
        there = self._put(even)
        ops = self._ops(there, 0, False)
        ops.across = Across(rows=None if even is batch else rows)
        with self.ids.model_runs(PREDICTED):
            predicted = self._predicted(state, ops, there)
        return self._read({"": predicted.float()})[""][:rows]

    # ---- what it holds and runs on

    def local_boxes(self, state: TorchState) -> Iterator[LocalBox]:
        """Yield the parts that devices hold, each part once."""
        assert isinstance(state, XlaState)
        for tensor, index, held in self.state_arrays(state):
            copies = _Copies(self.devices, held)
            for offset, shape in copies.parts:
                boxed = (*(1 for _ in index), *shape)
                yield LocalBox(
                    name=tensor.info.name,
                    role=tensor.role,
                    offset=(*index, *offset),
                    shape=boxed,
                    fetch=functools.partial(copies.fetch, offset, boxed),
                )
        count_1 = state.count_1
        yield LocalBox(
            name="",
            role=COUNT,
            offset=(),
            shape=(),
            fetch=lambda: self.devices.whole(count_1).astype(np.int32).reshape(()),
        )

    def describe_memory(self, state: TorchState) -> dict[str, int]:
        return bytes_by_kind(((tensor, held) for tensor, _, held in self.state_arrays(state)), self.devices.bytes_held)

    def describe_device(self) -> dict[str, Any]:
        return xla.describe()

    # ---- operations on their own

    @classmethod
    def _standalone(cls, context: Context) -> Any:
        xla.use_precision(context.precision)
        sample = np.zeros(1, np.int64) if context.sample is None else context.sample
        ints = cls._given(np.array([context.step, *dropout_hash.words(context.seed)], np.int32))
        static = Static(context.training, COMPUTE[context.precision], ops=XlaOps, site=SITE)
        return XlaOps(
            static,
            ints[0],
            ints[1:],
            sample=cls._given(sample_words(sample)),
            layer=torch.zeros((), dtype=torch.int32, device=xla.device()),
            kept={},
        )

    @classmethod
    def _given(cls, array: Any) -> Tensor:
        """Return an argument on the devices."""
        return torch.from_numpy(np.array(array)).to(xla.device())

    @classmethod
    def evaluate(cls, fn: Callable[..., Any], args: tuple[Any, ...], context: Context) -> Any:
        args = tree_map(cls._given, args)
        with torch.no_grad():
            found = fn(cls._standalone(context), *args)
        xla.sync()
        return tree_map(xla.fetched, found)

    @classmethod
    def differentiate(cls, fn: Callable[..., Any], args: tuple[Any, ...], context: Context) -> tuple[Any, tuple]:
        args = tree_map(cls._given, args)
        floating = [t.requires_grad_() for t in tree_leaves(args) if t.is_floating_point()]
        value = fn(cls._standalone(context), *args)
        grads = torch.autograd.grad(value, floating, allow_unused=True)
        xla.sync()
        return xla.fetched(value), tuple(
            np.zeros(t.shape, np.float32) if g is None else xla.fetched(g) for g, t in zip(grads, floating, strict=True)
        )


class _Copies:
    """Copy a tensor's parts to the host all at once, and hand out each copy once."""

    def __init__(self, devices: Devices, tensor: Tensor) -> None:
        self.devices, self.tensor = devices, tensor
        self.parts = list(dict.fromkeys(devices.parts(tensor)))
        self.there: dict[tuple[int, ...], np.ndarray] = {}

    def fetch(self, offset: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        if offset not in self.there:
            parts, arrays = self.devices.parts(self.tensor), self.devices.contents(self.tensor)
            self.there = {part[0]: array for part, array in zip(parts, arrays, strict=True)}
        return self.there.pop(offset).reshape(shape)
