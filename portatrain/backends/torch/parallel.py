"""Shard a lowered module over the mesh: DTensors over tensor first, FSDP2 over them, then weights drawn box by box.

The module is made on the meta device, so that no process ever holds a whole tensor. The rule for each parameter: over
the mesh axes that its params spec and its compute spec share (tensor), it stays sharded while computing. Over the axes
of the params spec alone (fsdp), FSDP2 all-gathers it for each block. Over expert it is all-gathered for each use. Along
an axis that does not shard it, every rank holds it whole, and `Sharded.reduce` sums its gradient. After the backward
pass all arithmetic is on plain tensors of this process.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.utils import _pytree

from portatrain.backends.program import Program
from portatrain.backends.torch.lower import Piece, lower
from portatrain.backends.torch.mesh import REPLICAS, World
from portatrain.errors import UserError
from portatrain.model.layout import Layout, Spec
from portatrain.model.module import Stack, TensorInfo
from portatrain.model.ops import Loss

# FSDP2 warns of in-place operations on the result of a block; nothing here works in place.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)

# FSDP2 puts its hooks on the tensors that it finds in a module's output.
_pytree.register_pytree_node(
    Loss, lambda loss: ([loss.sum, loss.weight_B, loss.loss_B], None), lambda leaves, _: Loss(*leaves)
)


@dataclass(frozen=True)
class Cut:
    """How one layer of a parameter is sharded: `shape` without the axes of Stacks, and for each dimension the
    mesh axes that shard it, major first."""

    shape: tuple[int, ...]
    spec: Spec

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(a for dim in self.spec for a in dim)

    def dim(self, mesh_axis: str) -> int | None:
        """Return the dimension that `mesh_axis` shards."""
        return next((i for i, axes in enumerate(self.spec) if mesh_axis in axes), None)


def cut_of(layout: Layout, info: TensorInfo) -> Cut:
    """Return the cut of the parameter `info`; raise UserError if FSDP2 over tensor parallelism cannot hold it."""
    sizes = layout.mesh.sizes

    def real(spec: Spec) -> Spec:
        return tuple(tuple(a for a in dim if sizes[a] > 1) for dim in spec)

    held, used = real(layout.tensor_spec(info)), real(layout.tensor_spec(info, role="compute"))
    for axis, mine, computing in zip(info.axes, held, used, strict=True):
        fits = mine[: len(computing)] == computing and mine[len(computing) :] in ((), ("fsdp",))
        if not fits or computing not in ((), ("tensor",), ("expert",)):
            raise UserError(
                f"layout of {info.name}, axis {axis!r}, on the torch backend",
                expected="parameters cut over tensor or expert as while computing, then over fsdp",
                got=f"params over {mine or 'nothing'}, compute over {computing or 'nothing'}",
                do="Map the axis to 'tensor', to 'fsdp' or to ('tensor', 'fsdp') in params; or use --backend jax.",
            )
    n = info.stack_dims
    if any(held[:n]):
        raise UserError(
            f"layout of {info.name} on the torch backend",
            expected="the axis of a Stack not to be cut",
            got=f"{info.axes[:n]} over {held[:n]}",
            do="It holds one module a layer: map another axis.",
        )
    return Cut(info.shape[n:], held[n:])


def check_layout(layout: Layout, params: dict[str, TensorInfo]) -> None:
    """Raise UserError if the torch backend cannot run with this layout."""
    for info in params.values():
        cut_of(layout, info)


@dataclass
class Trained:
    """A trained parameter of the module and this process's part, a plain tensor that shares its memory.

    owner, attribute: the module's object and attribute that hold it. summed_over: the mesh axes over which its gradient
    must still be summed after the backward pass. copies_over: the mesh axes along which there are equal copies.
    """

    local: Tensor
    owner: nn.Module
    attribute: str
    summed_over: tuple[str, ...]
    copies_over: tuple[str, ...]

    @property
    def param(self) -> nn.Parameter:
        return getattr(self.owner, self.attribute)


@dataclass
class Sharded:
    """The result of `shard_module`. pieces: as `lower` returns them, with this process's plain tensors."""

    module: nn.Module
    pieces: list[Piece]
    trained: list[Trained]
    world: World

    def zero_grad(self) -> None:
        for t in self.trained:
            t.param.grad = t.local.grad = None

    def sync(self, *, last: bool) -> None:
        """Prepare a microbatch: shards are reduced after each microbatch, replicas only after the last one."""
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_all_reduce(last)
            self.module.set_is_last_backward(last)

    def fold(self) -> None:
        """Finish a microbatch: add up in float32 the gradients of parameters that are kept in bfloat16."""
        for t in self.trained:
            if t.local.dtype != torch.float32 and (grad := t.param.grad) is not None:
                mine = (grad.to_local() if isinstance(grad, DTensor) else grad).detach().float()
                t.local.grad = mine if t.local.grad is None else t.local.grad.add_(mine)
                t.param.grad = None

    def collect(self) -> None:
        """Sum every gradient over the mesh and leave it in the `.grad` of this process's parts."""
        waiting: dict[tuple[str, ...], list[Tensor]] = {}
        self.fold()
        for t in self.trained:
            grad = t.param.grad if t.local.grad is None else t.local.grad
            if grad is None:  # the loss does not depend on it
                t.local.grad = torch.zeros_like(t.local, dtype=torch.float32)
                continue
            # Autograd gives a gradient the strides of its parameter, but not inside a DTensor, and fused rules rely on
            # them.
            t.local.grad = (grad.to_local() if isinstance(grad, DTensor) else grad).detach().contiguous()
            if t.summed_over:
                waiting.setdefault(t.summed_over, []).append(t.local.grad)
        for axes in sorted(waiting):
            self.reduce(waiting[axes], axes)

    def reduce(self, grads: list[Tensor], axes: tuple[str, ...]) -> None:
        """Sum `grads` in place over `axes`, in one collective."""
        if self.world.group(axes) is None:
            return
        flat = self.world.all_reduce(torch.cat([g.flatten() for g in grads]), axes)
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def norm(self) -> Tensor:
        """Return () the 2-norm of the gradients of all logical tensors; each element counts once."""
        mine = [g for t in self.trained if self.world.first(t.copies_over) and (g := t.local.grad) is not None]
        square = torch.zeros((), device=self.world.device)
        if mine:
            square = torch.stack(torch._foreach_norm(mine)).square().sum()
        return self.world.all_reduce(square).sqrt()


def shard_module(
    program: Program, world: World, value: Callable[[str, str, tuple[int, ...]], Tensor], compute: torch.dtype
) -> Sharded:
    """Return the module of `program`, sharded over `world`. `value(role, name, index)` gives this process's parts."""
    definition = program.definition
    cuts = {name: cut_of(world.layout, info) for name, info in definition.params.items()}

    def make(role: str, name: str, index: tuple[int, ...]) -> Tensor:
        if role == "state":
            return value(role, name, index)
        return _on_meta(world, cuts[name], getattr(torch, definition.params[name].dtype))

    module, pieces = lower(definition, make)
    module.requires_grad_(False)
    names = {id(p.tensor): p.name for p in pieces if p.role == "params"}
    held: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for attribute, param in owner._parameters.items():
            held.setdefault(id(param), []).append((owner, attribute))
    for p in pieces:
        if p.role == "params":
            p.tensor.requires_grad_(p.name in program.trainable)
    _apply_fsdp(module, world, cuts, names, compute)
    new: list[Piece] = []
    trained: list[Trained] = []
    for p in pieces:
        if p.role == "state":
            new.append(p)
            continue
        places = held[id(p.tensor)]
        local = value(p.role, p.name, p.index)
        _place(places, local)
        new.append(dataclasses.replace(p, tensor=local))
        if p.name in program.trainable:
            if local.dtype != torch.float32:
                local.grad_dtype = torch.float32
            axes = cuts[p.name].axes
            over: tuple[str, ...] = () if _managed(world, cuts[p.name]) else (*REPLICAS, "fsdp")
            over += tuple(a for a in ("expert", "tensor") if a not in axes)
            copies = tuple(a for a, n in world.mesh.sizes.items() if n > 1 and a not in axes)
            trained.append(Trained(local, *places[0], tuple(a for a in over if world.mesh.sizes[a] > 1), copies))
    return Sharded(module, new, trained, world)


def _on_meta(world: World, cut: Cut, dtype: torch.dtype) -> Tensor:
    """Return a parameter in its form during the computation, without memory: a DTensor over tensor if the mesh has that
    axis, and over expert if the parameter is sharded over it."""
    sizes = world.mesh.sizes
    names = tuple(a for a in ("expert", "tensor") if sizes[a] > 1 and (a == "tensor" or a in cut.axes))
    dims = [cut.dim(a) for a in names]
    shape = list(cut.shape)
    for name, dim in zip(names, dims, strict=True):
        if dim is not None:
            shape[dim] //= sizes[name]
    local = torch.empty(shape, dtype=dtype, device="meta")
    if not names:
        return local
    whole = torch.empty(cut.shape, dtype=dtype, device="meta")
    return DTensor.from_local(
        local,
        world.params[names],
        [Replicate() if dim is None else Shard(dim) for dim in dims],
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def _managed(world: World, cut: Cut) -> bool:
    """Return whether FSDP2 holds the parameter. Scalars, and parameters without a shard over fsdp, stay whole."""
    return world.data_parallel is not None and cut.shape != () and (world.mesh.fsdp == 1 or "fsdp" in cut.axes)


def _apply_fsdp(
    module: nn.Module, world: World, cuts: dict[str, Cut], names: dict[int, str], compute: torch.dtype
) -> None:
    """Apply fully_shard to every block of every Stack, innermost first, and to the root."""
    mesh = world.data_parallel
    if mesh is None:
        return

    def placement(param: nn.Parameter) -> Shard:
        return Shard(cuts[names[id(param)]].dim("fsdp") or 0)

    def whole(part: nn.Module) -> set[nn.Parameter]:
        return {p for p in part.parameters() if id(p) in names and not _managed(world, cuts[names[id(p)]])}

    def shard(part: nn.Module, *, root: bool) -> None:
        low = compute if compute != torch.float32 else None
        policy = MixedPrecisionPolicy(
            param_dtype=low, reduce_dtype=torch.float32 if low else None, cast_forward_inputs=False
        )
        fully_shard(
            part,
            mesh=mesh,
            reshard_after_forward=not root,
            shard_placement_fn=placement,
            mp_policy=policy,
            ignored_params=whole(part),
        )

    for stack in reversed(list(module.modules())):
        if isinstance(stack, Stack):
            for block in stack.children():
                shard(block, root=False)
                block.run_layer = functools.partial(_run_layer, block)  # type: ignore[assignment]
                register_fsdp_forward_method(block, "run_layer")
    shard(module, root=True)
    if hasattr(module, "predict"):
        register_fsdp_forward_method(module, "predict")
    assert isinstance(module, FSDPModule)
    # A loss is a sum over the whole batch, divided once by its weight: gradients are summed, never averaged.
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)


def _run_layer(block: nn.Module, run: Callable[..., Any], *args: Any) -> Any:
    """Run `run(block, ...)` between FSDP2's hooks, which gather the block's parameters and see all its results."""
    return run(block, *args)


def _place(places: Sequence[tuple[nn.Module, str]], local: Tensor) -> None:
    """Give a parameter of the module its memory, in every object that holds it."""
    owner, attribute = places[0]
    old = getattr(owner, attribute)
    data: Any = local
    if isinstance(old, DTensor):
        placements: Sequence[Placement] = old.placements
        data = DTensor.from_local(
            local, old.device_mesh, placements, run_check=False, shape=old.shape, stride=old.stride()
        )
        if data._local_tensor.data_ptr() != local.data_ptr():
            raise RuntimeError("a DTensor did not take its local tensor as it is")
    param = nn.Parameter(data, requires_grad=old.requires_grad)
    for owner, attribute in places:
        setattr(owner, attribute, param)
