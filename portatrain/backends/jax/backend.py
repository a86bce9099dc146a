"""Run a program in JAX: one compiled step, to which the state is donated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from portatrain.backends.base import Arrays, StepResult, check_loss
from portatrain.backends.choose_kernel import check_fp8
from portatrain.backends.jax import fp8
from portatrain.backends.jax.about import About
from portatrain.backends.jax.accumulation import Accumulation, aux_part, aux_value, summed
from portatrain.backends.jax.decoding import JaxCached
from portatrain.backends.jax.flags import compiler_options
from portatrain.backends.jax.held import Held, as_it_is
from portatrain.backends.jax.lower import lower
from portatrain.backends.jax.mesh import device_mesh, join
from portatrain.backends.jax.ops import JaxOps, partition_spec
from portatrain.backends.jax.optimizer import RuleState, kept, transformation, xp
from portatrain.backends.jax.probe import norms
from portatrain.backends.jax.standalone_ops import COMPUTE, StandaloneOps
from portatrain.backends.jax.watched import Watches
from portatrain.backends.kernels import Site
from portatrain.backends.limits import Limits, within_on_device
from portatrain.backends.program import Program
from portatrain.backends.row_padding import pad_rows
from portatrain.backends.state import COUNT, StateTensor, initial_box, inventory, sample_words
from portatrain.backends.token_ids import PREDICTED, TokenIds
from portatrain.model import dropout_hash, remat
from portatrain.model.across_samples import Across
from portatrain.model.layout import Layout
from portatrain.model.measured import split
from portatrain.model.module import TensorInfo
from portatrain.model.state_updates import run_after_step
from portatrain.optim import clip_scale, global_norm

State = dict[str, Any]
"""The state: {'params', 'state', 'ema': {name: array}, 'opt': RuleState}."""


class JaxBackend(About, Held, StandaloneOps, Watches):
    """See `portatrain.backends.base.Backend`. `devices`: the devices of the mesh, row-major, if their order matters.
    They may be descriptions of absent devices, to compile for them (`abstract_step`)."""

    name = "jax"
    compares_samples = False

    def __init__(self, program: Program, devices: Sequence[Any] | None = None) -> None:
        self.program, self.definition, self.layout = program, program.definition, program.layout
        self.ids = TokenIds(self.definition)
        if devices is None:
            join()
        self.devices = device_mesh(self.layout.mesh, devices, program.order)
        self.process, self.processes = jax.process_index(), jax.process_count()
        self.owners = [getattr(device, "process_index", 0) for device in self.devices.devices.flat]
        self.tx = transformation(program.optimizer, self.definition.params, program.decay, program.seed)
        # The structure of the native module without arrays, enough to rebuild it inside a trace.
        with jax.ensure_compile_time_eval():
            self.graph, skeleton, self.paths = self._split(lambda role, name: jnp.zeros(()))
        self.flat_paths = [path for path, _ in skeleton]
        # A state leaves a step with the sharding that it came with; otherwise the next step would compile again.
        shardings = self._assemble(self._sharding, None)
        first = self.devices.devices.flat[0]
        self._platform = platform = first.platform
        self.site = Site.of(program, backend="jax", device=platform, formats=fp8.formats_of(first))
        if program.precision == "fp8":
            check_fp8(self.site, first.device_kind)
        # On a CPU a running step takes the cores that would prepare the next one; small steps run in the calling
        # thread.
        self.async_dispatch = platform != "cpu"
        options = compiler_options(platform)
        # A process can read only its own shards, so arrays that the host reads are replicated on all processes.
        read: Any = self._replicated if self.processes > 1 else None
        jit = functools.partial(jax.jit, compiler_options=options)
        self._steps = jit(self._step, donate_argnums=0, out_shardings=(shardings, read))
        self._measured = jit(
            functools.partial(self._step, measured=True), donate_argnums=0, out_shardings=(shardings, read)
        )
        self._evals = jit(self._eval, out_shardings=read, static_argnums=3)
        self._predicts = jit(self._predict, out_shardings=read, static_argnums=3)
        self._gradients_of = jit(self._accumulate, out_shardings=read)
        self._probes = jit(self._probe, out_shardings=self._replicated)

    # ---- modules

    def _split(self, array: Callable[[str, str], Any]) -> tuple[Any, list, dict]:
        module, paths = lower(self.definition, array)
        graph, state = nnx.split(module)
        return graph, list(nnx.to_flat_state(state)), paths

    def lower(self) -> nnx.Module:
        made = self.init_state()
        return lower(self.definition, lambda role, name: made[role][name])[0]

    def _module(self, params: Mapping[str, Any], states: Mapping[str, Any]) -> Any:
        given = {"params": params, "state": states}
        kinds = {"params": nnx.Param, "state": nnx.Variable}
        flat = []
        for path in self.flat_paths:
            role, name = self.paths[path]
            info = self.definition.tensors[role, name]
            flat.append((path, kinds[role](given[role][name], axes=info.axes[info.stack_dims :])))
        return nnx.merge(self.graph, nnx.from_flat_state(flat))

    def _ops(
        self,
        batch: Mapping[str, Any],
        step: Any,
        training: bool,
        across: Across | None = None,
        layout: Layout | None = None,
        measured: bool = False,
    ) -> JaxOps:
        sample = batch.get("sample")
        return JaxOps(
            step=jnp.asarray(step, jnp.int32),
            seed_2=jnp.asarray(dropout_hash.words(self.program.seed), jnp.int32),
            sample=sample if sample is not None else jnp.zeros((1, 2), jnp.int32),
            layer=jnp.zeros((), jnp.int32),
            training=training,
            compute=COMPUTE[self.program.precision],
            remat=remat.parse(self.program.remat),
            layout=layout or self.layout,
            devices=self.devices if self.layout.mesh.devices > 1 else None,
            site=self.site,
            given=batch,
            ids=self.ids,
            across=across or Across(),
            measured=measured,
        )

    # ---- states

    def _sharding(self, tensor: StateTensor, share: Any = None) -> NamedSharding:
        """Return the sharding of `tensor`. With a `share` each copy holds a part."""
        spec = list(self.layout.tensor_spec(tensor.info, role=tensor.laid_out_as))
        if share is not None:
            spec[share.dim] = (*spec[share.dim], *share.axes)
        return NamedSharding(self.devices, partition_spec(tuple(spec)))

    def _place(self, tensor: TensorInfo, draw: Callable[[tuple, tuple], np.ndarray], lies: NamedSharding) -> Any:
        """Return a global array with sharding `lies`. `draw(offset, shape)` gives each local shard."""

        def shard(index: Any) -> np.ndarray:
            bounds = [s.indices(n) for s, n in zip(index, tensor.shape, strict=True)]
            return draw(tuple(b[0] for b in bounds), tuple(b[1] - b[0] for b in bounds))

        placed = jax.make_array_from_callback(tensor.shape, lies, shard)
        # On a CPU the array may share NumPy's memory, and JAX cannot donate a shared buffer.
        return placed.copy() if placed.size else placed

    @functools.cached_property
    def _inventory(self) -> tuple[StateTensor, ...]:
        return inventory(self.program)

    def _assemble(self, make: Callable[[StateTensor], Any], count: int | None) -> State:
        """Return a state with arrays from make(logical tensor); count None: the sharding of the count takes its
        place."""
        state: State = {"params": {}, "state": {}, "ema": {}}
        slots: dict[str, dict[str, Any]] = {}
        for tensor in self._inventory:
            into = state.setdefault(tensor.role, {}) if tensor.slot is None else slots.setdefault(tensor.slot, {})
            into[tensor.info.name] = make(tensor)
        return {**state, "opt": RuleState(self._replicated if count is None else self._whole(np.int32(count)), slots)}

    def state_arrays(self, state: State) -> Iterator[tuple[StateTensor, Any]]:
        """Yield every tensor of `state` with its array, in the order of the checkpoint."""
        for tensor in self._inventory:
            held = state[tensor.role] if tensor.slot is None else state["opt"].slots[tensor.slot]
            yield tensor, held[tensor.info.name]

    def _whole(self, value: np.int32) -> Any:
        return jax.make_array_from_callback((), self._replicated, lambda _: np.asarray(value)).copy()

    @property
    def _replicated(self) -> NamedSharding:
        return NamedSharding(self.devices, PartitionSpec())

    def init_state(self) -> State:
        def make(tensor: StateTensor) -> Any:
            draw = functools.partial(initial_box, tensor.info, self.program.seed)
            return self._place(tensor.info, draw, self._sharding(tensor))

        return self._assemble(make, 0)

    def restore_state(self, read: Callable[[str, str, tuple, tuple], np.ndarray]) -> State:
        return self.restore_shared(read, {})

    def restore_shared(self, read: Callable[[str, str, tuple, tuple], np.ndarray], shares: Mapping[Any, Any]) -> State:
        def make(tensor: StateTensor) -> Any:
            share, lies = shares.get(tensor.key), self._sharding(tensor)
            parts = self._sharding(tensor, share)
            placed = self._place(tensor.info, lambda at, shape: read(tensor.role, tensor.info.name, at, shape), parts)
            return placed if share is None else jax.jit(as_it_is, out_shardings=lies)(placed)

        return self._assemble(make, int(read(COUNT, "", (), ())))

    # ---- the step

    def _loss(
        self,
        trained: Any,
        frozen: Any,
        states: Any,
        batch: Any,
        step: Any,
        across: Across,
        layout: Layout,
        measured: bool,
    ) -> Any:
        ops = self._ops(batch, step, training=True, across=across, layout=layout, measured=measured)
        with self.ids.model_runs():
            loss = check_loss(self._module({**frozen, **trained}, states)(ops, batch), self.definition.model)
        self.compares_samples = self.compares_samples or across.calls > 0
        total = summed(loss, ops.auxes)
        auxes = {k: aux_part(a) for k, a in ops.auxes.items()}
        return total, (total, jnp.sum(loss.weight_B), auxes, ops.tallies)

    def _accumulate(self, state: State, batch: Mapping[str, Any], step: Any, measured: bool = False) -> Any:
        """Return (gradients of the mean loss, loss, weight, aux, tallies), accumulated over the microbatches."""
        trained = {n: p for n, p in state["params"].items() if n in self.program.trainable}
        frozen = {n: p for n, p in state["params"].items() if n not in self.program.trainable}

        def one(micro: Any, across: Across, layout: Layout) -> Any:
            grads, (total, weight, auxes, tallies) = jax.grad(self._loss, has_aux=True)(
                trained, frozen, state["state"], micro, step, across, layout, measured
            )
            return grads, total, weight, auxes, tallies

        def compared(micro: Any, across: Across, layout: Layout) -> None:
            ops = self._ops(micro, step, training=True, across=across, layout=layout)
            self._module(state["params"], state["state"])(ops, micro)

        stored = {t.info.name: self._sharding(t).spec for t in self._inventory if t.role == "params"}
        sums = Accumulation(one=one, compared=compared, layout=self.layout, devices=self.devices, stored=stored)
        grads, total, weight, auxes, tallies = sums(batch)
        inverse = 1.0 / weight
        return jax.tree.map(lambda g: g * inverse, grads), total * inverse, weight, auxes, tallies

    def _deltas(self, state: State, grads: Any, norm: Any, scale: Any) -> tuple[Any, RuleState]:
        """Return (the update of each trained parameter, the next optimizer state)."""
        if (clip := self.program.clip_norm) is not None:
            factor = clip_scale(xp, norm, clip)
            grads = {n: g * factor for n, g in grads.items()}
        return self.tx.update(grads, state["opt"], {n: state["params"][n] for n in grads}, scale=scale)

    def _updated(self, state: State, grads: Any, norm: Any, tallies: Any, step: Any, scale: Any) -> State:
        """Return the state after an update. `norm` is the norm of the gradients of the mean loss."""
        program = self.program
        deltas, opt = self._deltas(state, grads, norm, scale)
        trained = {
            n: kept(state["params"][n] + d, self.definition.params[n], "params", program.seed, opt.count)
            for n, d in deltas.items()
        }
        params = {**state["params"], **trained}
        states = {n: state["state"][n] + tallies[n] if n in tallies else s for n, s in state["state"].items()}
        ops = self._ops({}, step, training=True)
        states = run_after_step(self.definition, states, ops, jnp.stack)
        ema = state["ema"]
        if program.ema_decay is not None:
            ema = {n: a + (1 - program.ema_decay) * (params[n] - a) for n, a in ema.items()}
        return {**state, "params": params, "state": states, "ema": ema, "opt": opt}

    def _step(
        self, state: State, batch: Any, step: Any, scale: Any, limits: Any = None, *, measured: bool = False
    ) -> tuple[State, Any]:
        grads, loss, weight, auxes, tallies = self._accumulate(state, batch, step, measured)
        activations, auxes = split(auxes)
        norm = global_norm(xp, grads)
        good = within_on_device(jnp, loss, norm, limits)

        def update() -> State:
            return self._updated(state, grads, norm, tallies, step, scale)

        if self.devices.devices.flat[0].platform == "cpu":
            # Here a selection would first copy every slot, because XLA fuses the update into each of its results.
            new = jax.lax.cond(good, update, lambda: state)
        else:  # where a branch may have to wait for the host
            new = jax.tree.map(lambda a, b: jnp.where(good, a, b), update(), state)
        aux = {k: aux_value(v) for k, v in auxes.items()}
        skipped = 1 - good.astype(jnp.int32)
        found = {"loss": loss, "grad_norm": norm, "skipped": skipped, "weight": weight, "aux": aux}
        if measured:
            found["statistics"] = {**self._norms(state, grads, norm, scale, roles=("params",)), **activations}
        return new, found

    def step(
        self,
        state: State,
        batch: Mapping[str, np.ndarray],
        *,
        step: int,
        scale: float,
        limits: Limits | None = None,
        statistics: bool = False,
    ) -> tuple[State, StepResult]:
        run = self._measured if statistics else self._steps
        state, found = run(state, self._put(batch, 1), np.int32(step), np.float32(scale), limits)
        return state, StepResult.of(found.pop("aux"), **found)

    def abstract_step(self, batch: Mapping[str, np.ndarray]) -> tuple[Any, tuple[Any, ...]]:
        """Return the function that `step` calls and its arguments without contents, to compile without a device. Only
        the shapes and dtypes of `batch` count."""

        def like(tensor: StateTensor) -> Any:
            return jax.ShapeDtypeStruct(tensor.info.shape, tensor.info.dtype, sharding=self._sharding(tensor))

        state = self._assemble(like, None)
        count = jax.ShapeDtypeStruct((), jnp.int32, sharding=self._replicated)
        state["opt"] = RuleState(count, state["opt"].slots)
        shapes = {}
        for key, value in batch.items():
            shape, dtype = ((*value.shape, 2), np.int32) if key == "sample" else (value.shape, value.dtype)
            axes = (None, "batch") + (None,) * (len(shape) - 2)
            placed = NamedSharding(self.devices, partition_spec(self.layout.spec(axes)))
            shapes[key] = jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
        step, scale = (jax.ShapeDtypeStruct((), d, sharding=self._replicated) for d in (jnp.int32, jnp.float32))
        return self._steps, (state, shapes, step, scale)

    def gradients(self, state: State, batch: Mapping[str, np.ndarray], *, step: int) -> tuple[float, Arrays]:
        loss, _, grads = self.weighed_gradients(state, batch, step=step)
        return loss, grads

    def weighed_gradients(
        self, state: State, batch: Mapping[str, np.ndarray], *, step: int
    ) -> tuple[float, float, Arrays]:
        grads, loss, weight, *_ = self._gradients_of(state, self._put(batch, 1), np.int32(step))
        return float(loss), float(weight), {n: np.array(g) for n, g in grads.items()}

    # ---- without an update

    def _probe(self, state: State, batch: Mapping[str, Any], step: Any, scale: Any) -> dict[str, Any]:
        grads, *_ = self._accumulate(state, batch, step)
        return self._norms(state, grads, global_norm(xp, grads), scale)

    def _norms(
        self, state: State, grads: Any, norm: Any, scale: Any, roles: Sequence[str] | None = None
    ) -> dict[str, Any]:
        deltas, _ = self._deltas(state, grads, norm, scale)
        wide = self.devices.devices.flat[0].platform in ("cpu", "gpu", "cuda", "rocm")
        arrays = [(t, a) for t, a in self.state_arrays(state) if roles is None or t.role in roles]
        return norms(self.definition.params, arrays, grads, deltas, wide=wide)

    def probe(self, state: State, batch: Mapping[str, np.ndarray], *, step: int, scale: float) -> Arrays:
        found = self._probes(state, self._put(batch, 1), np.int32(step), np.float32(scale))
        return {k: np.asarray(v, np.float64) for k, v in found.items()}

    def _eval(self, params: Any, states: Any, batch: Mapping[str, Any], rows: int | None) -> dict[str, Any]:
        ops = self._ops(batch, 0, training=False, across=Across(rows=rows))
        with self.ids.model_runs():
            loss = check_loss(self._module(params, states)(ops, batch), self.definition.model)
        means = {k: a.value_B / (a.count if a.reduce == "mean" else 1) for k, a in ops.auxes.items()}
        return {"loss_B": loss.loss_B, "weight_B": loss.weight_B, **means}

    def _predict(self, params: Any, states: Any, batch: Mapping[str, Any], rows: int | None) -> Any:
        ops = self._ops(batch, 0, training=False, across=Across(rows=rows))
        with self.ids.model_runs(PREDICTED):
            return self._module(params, states).predict(ops, batch)

    def eval(self, state: State, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = next(iter(batch.values())).shape[0]
        even = self._even(batch)
        samples = None if even is batch else rows
        found = self._evals(state["params"], state["state"], self._put(even, 0), samples)
        return {k: np.asarray(v)[:rows] for k, v in found.items()}

    def predict(self, state: State, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        rows = next(iter(batch.values())).shape[0]
        even = self._even(batch)
        samples = None if even is batch else rows
        found = self._predicts(state["params"], state["state"], self._put(even, 0), samples)
        return np.asarray(found)[:rows]

    def cached(self, state: State) -> JaxCached | None:
        return JaxCached(self, state) if self.layout.mesh.devices == 1 else None

    def _even(self, batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return pad_rows(batch, self.layout.mesh.over(self.layout.spec(("batch",))[0]))

    def rows_here(self, samples: int) -> np.ndarray | None:
        if self.processes == 1:
            return None
        mine = np.zeros(samples, bool)
        sharding = NamedSharding(self.devices, partition_spec(self.layout.spec(("batch",))))
        for index in sharding.addressable_devices_indices_map((samples,)).values():
            mine[index] = True
        return mine

    def _put(self, batch: Mapping[str, np.ndarray], lead: int) -> dict[str, Any]:
        """Put the batch on the devices; `lead` is the axis of the samples."""
        self.ids.begin(batch)
        placed = {}
        for key, value in batch.items():
            value = sample_words(value) if key == "sample" else value
            axes = (None,) * lead + ("batch",) + (None,) * (value.ndim - lead - 1)
            sharding = NamedSharding(self.devices, partition_spec(self.layout.spec(axes)))
            if self.processes == 1:
                placed[key] = jax.device_put(value, sharding)
            else:  # which would first have all processes compare what they were given
                placed[key] = jax.make_array_from_callback(value.shape, sharding, value.__getitem__)
        return placed
