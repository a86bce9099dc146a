"""The definition of a model, as plain Python data: no framework and no NumPy.

A model is a class with `Param`s, `State`s, other `Module`s and plain values as attributes. Its `__call__(self, ops,
...)` computes with the operations of `portatrain.model.ops.Ops`::

    class Attention(Module):
        def __init__(self, *, embed: int, heads: int, head_dim: int):
            self.wq = Param(embed=embed, heads=heads, head_dim=head_dim)
            self.wo = Param(heads=heads, head_dim=head_dim, embed=embed, fan_in_axes=2)

One `Param` line says everything about a parameter: each keyword is a logical axis, its value is the size, the order of
the keywords is the order in memory, and the attribute is the name in checkpoints. `describe` lists the logical tensors
of a model; a backend makes a native `torch.nn.Module` or `flax.nnx.Module` from it.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from portatrain.errors import UserError
from portatrain.model.reserved_names import RESERVED_NAMES as RESERVED_NAMES
from portatrain.model.reserved_names import check_names

BATCH_AXES = frozenset({"layers", "experts"})
"""Axes that count copies of a smaller tensor if they come first. Initialisation, optimizer rules and norms treat each
copy as a tensor of its own. The axis of every `Stack` is a batch axis too."""


@dataclass(frozen=True, kw_only=True)
class Normal:
    """Initialise from a normal distribution cut at two sigma, with standard deviation `std` after the cut."""

    std: float


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Initialise every element to `value`."""

    value: float


@dataclass(frozen=True, kw_only=True)
class Values:
    """Initialise to given numbers, in row-major order, each copy in a Stack alike: such as a decay for each head."""

    values: tuple[float, ...]


Init = Normal | Constant | Values
_NAMED_INITS = {"zeros": Constant(value=0.0), "ones": Constant(value=1.0)}


def _init(given: str | float | Init | None) -> Init | None:
    if isinstance(given, str):
        if given not in _NAMED_INITS:
            raise UserError(
                "init",
                expected="'zeros', 'ones', a standard deviation, Normal(std=...), Constant(value=...) or Values(...)",
                got=repr(given),
                do="Leave init out to get the standard deviation 1/sqrt(fan-in).",
            )
        return _NAMED_INITS[given]
    if isinstance(given, (int, float)):
        return Normal(std=float(given))
    return given


def _sizes(kind: str, axes: dict[str, int]) -> dict[str, int]:
    for axis, size in axes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UserError(
                f"{kind}({', '.join(axes)})",
                expected=f"a size of at least 1 for axis {axis!r}",
                got=repr(size),
                do=f"Give every logical axis its size, as in {kind}(embed=512, mlp=2048).",
            )
    return axes


class Param:
    """A trainable tensor: `Param(embed=512, heads=8, head_dim=64)`.

    Args:
        axes: each keyword is a logical axis with its size, in the order of the tensor's dimensions.
        fan_in_axes: the number of axes, counted after the batch axes (layers, experts), that the forward pass
            contracts: 1 for most weights, 2 for an output projection over (heads, head_dim), 0 for an embedding, a
            norm's scale or a bias. Their sizes multiply to the fan-in. They are also the rows of the matrix that Muon
            and Adafactor see.
        init: 'zeros', 'ones', a standard deviation, `Normal`, `Constant` or `Values`. The default is a normal with
            standard deviation 1/sqrt(fan-in), or 0.02 if fan_in_axes is 0.
        inputs: the former name of `fan_in_axes`, deprecated.

    Use one object in two places to tie weights.

    Raises:
        UserError: a size below 1, an unknown `init`, `Values` of another number than there are elements, or more
            `fan_in_axes` than there are axes.
    """

    def __init__(
        self, *, fan_in_axes: int = 1, init: str | float | Init | None = None, inputs: int | None = None, **axes: int
    ) -> None:
        if inputs is not None:
            warnings.warn("Param(inputs=n) is now Param(fan_in_axes=n)", DeprecationWarning, stacklevel=2)
            fan_in_axes = inputs
        self.axes = _sizes("Param", axes)
        self.fan_in_axes, self.init = fan_in_axes, _init(init)
        if isinstance(self.init, Values) and len(self.init.values) != math.prod(axes.values()):
            raise UserError(
                f"Param({', '.join(f'{axis}={size}' for axis, size in axes.items())})",
                expected=f"{math.prod(axes.values())} initial values, one for each element",
                got=str(len(self.init.values)),
                do="Give Values(values=...) as many numbers as the axes have elements.",
            )
        free = sum(axis not in BATCH_AXES for axis in axes)
        if not 0 <= fan_in_axes <= free:
            raise UserError(
                f"Param({', '.join(axes)})",
                expected=f"fan_in_axes between 0 and {free}, the number of its axes that are not batch axes",
                got=str(fan_in_axes),
                do="Count the leading axes that the forward pass contracts; an embedding or a bias has 0.",
            )

    @property
    def inputs(self) -> int:
        """The former name of `fan_in_axes`, deprecated."""
        return _former_inputs("Param", self.fan_in_axes)

    def __repr__(self) -> str:
        return f"Param({', '.join(f'{k}={v}' for k, v in self.axes.items())}, fan_in_axes={self.fan_in_axes})"


def _former_inputs(owner: str, fan_in_axes: int) -> int:
    warnings.warn(f"{owner}.inputs is now {owner}.fan_in_axes", DeprecationWarning, stacklevel=3)
    return fan_in_axes


class State:
    """A tensor without gradient that belongs to the model and its checkpoints, such as a router bias or a statistic.

    Args:
        axes: each keyword is a logical axis with its size, as in `Param`.
        init: 'zeros', 'ones' or `Constant`.
        dtype: 'float32', 'int32' or 'bool'; precision policies do not change it.

    Change it only through operations: `ops.tally(self, name=value)` adds in the forward pass, over all samples of a
    step; in `after_step(self, ops)`, `ops.update(self, name=value)` sets a new value, once per step.

    Raises:
        UserError: a size below 1, another `init`, or another `dtype`.
    """

    def __init__(self, *, init: str | Constant = "zeros", dtype: str = "float32", **axes: int) -> None:
        self.axes = _sizes("State", axes)
        made = _init(init)
        if not isinstance(made, Constant):
            raise UserError(
                "State", expected="init='zeros', 'ones' or Constant", got=repr(init), do="A State starts as a constant."
            )
        if dtype not in ("float32", "int32", "bool"):
            raise UserError(
                "State", expected="dtype 'float32', 'int32' or 'bool'", got=repr(dtype), do="Use one of those."
            )
        self.init, self.dtype = made, dtype

    def __repr__(self) -> str:
        return f"State({', '.join(f'{k}={v}' for k, v in self.axes.items())}, dtype={self.dtype!r})"


class Module:
    """Base class of every portable module. `__init__` sets its parameters, and `__call__(ops, ...)` computes with them.

    Override `after_step` to change `State`s once per optimizer step. The top of this file shows a module.
    """

    path: str = ""
    """The module's place in the model, such as 'blocks/attn'. `describe` sets it."""
    site: int = 0
    """`site_of(path)`, a 31-bit integer that distinguishes the dropout of this module. `describe` sets it."""
    unnamed: ClassVar[tuple[str, ...]] = ()
    """Attributes that add no part to a name: their Param has the name of the module itself, and their Module its
    path."""
    never_trained: ClassVar[tuple[str, ...]] = ()
    """Shell patterns over names below this module: parameters that no recipe may train, as of a frozen copy."""
    starts_as: str | None = None
    """The path of another module of the model ('': the model itself). The tensors of this module begin with the initial
    values of those with the same names there, also if a folder gives them: a frozen copy, or one that is trained in
    another way. None: values of its own."""

    def __call__(self, ops: Any, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} does not define __call__(self, ops, ...)")

    def after_step(self, ops: Any) -> None:
        """Change States after an optimizer step; the backend calls it once per applied step.

        In it, attributes that are States hold arrays; set new ones with `ops.update`.
        """


class Stack(Module):
    """`n` copies of `block` in a row, each with its own parameters.

    Every parameter of the block becomes one logical tensor with a leading axis of size n, `layers` unless `axis` names
    another. Call it as `carry, outs = stack(ops, carry, *shared, per_layer=None)`. It runs `block(ops, carry, *shared)`
    for each layer, or `block(ops, carry, *shared, slice)` if `per_layer` is a tree of arrays (n, ...), with the layer's
    slice of it. As with `jax.lax.scan`, a block returns `(carry, out)`, and the outs come back stacked, (n, ...), or
    None if they are None. JAX scans over the layers; torch holds one module per layer.

    Put layers of alternating kinds into one block. Give a Stack inside a Stack its own axis:
    `Stack(block, 3, axis="sublayers")`.

    Raises:
        UserError: n is below 1.
    """

    def __init__(self, block: Module, n: int, *, axis: str = "layers") -> None:
        if n < 1:
            raise UserError("Stack", expected="at least one layer", got=str(n), do="Give a positive number of layers.")
        self.block, self.n, self.axis = block, n, axis

    def __call__(self, ops: Any, carry: Any, *shared: Any, per_layer: Any = None) -> Any:
        return ops.stack(self, carry, shared, per_layer)


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """The facts about one logical tensor that layouts, optimizers and checkpoints use."""

    name: str
    """Path in the model, such as 'blocks/attn/wq'."""
    role: str
    """'params' for a Param, 'state' for a State."""
    shape: tuple[int, ...]
    """The whole tensor, with the leading axes of Stacks."""
    axes: tuple[str, ...]
    """One logical axis per dimension."""
    batch_dims: int
    """The number of leading batch axes (layers, experts)."""
    fan_in_axes: int
    """The number of contracted axes after the batch axes, as in `Param`."""
    init: Init
    """The initial values."""
    dtype: str = "float32"
    """The dtype in which the value is kept between steps."""
    stack_dims: int = 0
    """The number of leading axes that belong to Stacks; torch holds one tensor per index of these."""
    lr: float = 1.0
    """The factor of the optimizer's learning rate for this tensor; weight decay per step does not change with it."""
    kind: str = ""
    """How it has grown since the base width (`portatrain.model.widths`); '' in the standard parametrization."""
    multiplier: float = 1.0
    """The factor of what it gives where its features are contracted."""
    start: str = ""
    """The tensor with whose initial values it begins (`Module.starts_as`). '': its own."""

    @property
    def inputs(self) -> int:
        """The former name of `fan_in_axes`, deprecated."""
        return _former_inputs("TensorInfo", self.fan_in_axes)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Definition:
    """A model with its tensors and modules, as `describe` returns it."""

    model: Module
    params: dict[str, TensorInfo]
    """The parameters, by name."""
    states: dict[str, TensorInfo]
    """The States, by name."""
    owners: dict[int, str] = field(repr=False)
    """id() of a Param or State object -> its name; a tied one has the name of its first owner."""
    modules: dict[str, Module] = field(repr=False)
    """The modules, by path; '.' is the model itself."""

    @property
    def tensors(self) -> dict[tuple[str, str], TensorInfo]:
        """All tensors, by (role, name)."""
        return {(t.role, t.name): t for group in (self.params, self.states) for t in group.values()}

    @property
    def parameters(self) -> int:
        """The number of elements in all parameters, tied ones counted once."""
        return sum(t.size for t in self.params.values())

    @property
    def axes(self) -> frozenset[str]:
        """The logical axes of all tensors."""
        return frozenset(a for t in self.tensors.values() for a in t.axes)


def children(module: Module) -> Iterator[tuple[str, Any]]:
    """Yield (relative name, object) for the `Param`s, `State`s and `Module`s that `module` holds.

    The order is the order in which they were set. Items of lists, tuples and dicts are named 'name/0' and 'name/key'.
    A Stack's block has the empty name.
    """
    if isinstance(module, Stack):
        yield "", module.block
        return
    for name, value in vars(module).items():
        yield from _held("" if name in module.unnamed else name, value)


def _held(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (Param, State, Module)):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _held(f"{name}/{index}", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _held(f"{name}/{key}", item)


def site_of(path: str) -> int:
    """Return the first 31 bits of the SHA-256 of `path`, an integer that enters the dropout hash."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") >> 1


def describe(model: Module) -> Definition:
    """Return the tensors and modules of `model`, and set `path` and `site` on its modules.

    A tied tensor has the name of its first owner.

    Raises:
        UserError: a name that a native module class already uses, one object tied across different Stacks, an axis
            that repeats in a tensor, a `starts_as` without tensors of the same names and shapes, or a model without
            parameters.
    """
    found = Definition(model=model, params={}, states={}, owners={}, modules={})
    _walk(found, model, "", (), seen={})
    _set_starts(found)
    if not found.params:
        raise UserError(
            type(model).__name__,
            expected="a model with at least one Param",
            got="none",
            do="Set Params (or Modules that have some) as attributes in __init__.",
        )
    return found


def _walk(
    found: Definition, module: Module, path: str, stack: tuple[tuple[str, int], ...], seen: dict[int, tuple]
) -> None:
    if id(module) in seen:
        _same_stack(type(module).__name__, path, stack, seen[id(module)])
        return
    seen[id(module)] = (path, stack)
    check_names(type(module).__name__, vars(module), [name for name, _ in children(module)])
    module.path, module.site = path, site_of(path)
    if isinstance(module, Stack):
        # The block has its Stack's path: in torch this is the path of the list of layers.
        _walk(found, module.block, path, (*stack, (module.axis, module.n)), seen)
        return
    place = path or "."  # which an unnamed module shares with the one that holds it
    found.modules[f"{place} {type(module).__name__}" if place in found.modules else place] = module
    inner = stack
    for name, value in children(module):
        full = "/".join(part for part in (path, name) if part)
        if isinstance(value, Module):
            _walk(found, value, full, inner, seen)
        elif id(value) in found.owners:
            _same_stack(repr(value), full, inner, seen[id(value)])
        else:
            seen[id(value)] = (full, inner)
            found.owners[id(value)] = full
            info = _info(value, full, inner)
            (found.params if info.role == "params" else found.states)[full] = info


def _set_starts(found: Definition) -> None:
    for path, module in found.modules.items():
        if module.starts_as is None:
            continue
        for group in (found.params, found.states):
            for name, info in group.items():
                if not name.startswith(f"{path}/"):
                    continue
                start = f"{module.starts_as}{name[len(path) :]}".lstrip("/")
                like = group.get(start)
                if like is None or like.shape != info.shape:
                    raise UserError(
                        f"{type(module).__name__}.starts_as of {path}",
                        expected=f"a tensor {start} of shape {info.shape}, as {name} has",
                        got="none" if like is None else f"shape {like.shape}",
                        do="Name the path of a module with the same tensors, and adapt both by LoRA, or none.",
                    )
                group[name] = replace(info, start=start, init=like.init)


def _info(value: Param | State, name: str, stack: tuple[tuple[str, int], ...]) -> TensorInfo:
    axes = (*(a for a, _ in stack), *value.axes)
    shape = (*(n for _, n in stack), *value.axes.values())
    if len(set(axes)) != len(axes):
        raise UserError(
            name,
            expected="every logical axis once in a tensor",
            got=", ".join(axes),
            do="Rename the second use (embed_out), or give a Stack inside a Stack its own axis=.",
        )
    batch_dims = len(stack)
    while batch_dims < len(axes) and axes[batch_dims] in BATCH_AXES:
        batch_dims += 1
    if isinstance(value, State):
        return TensorInfo(
            name=name,
            role="state",
            shape=shape,
            axes=axes,
            batch_dims=batch_dims,
            fan_in_axes=0,
            init=value.init,
            dtype=value.dtype,
            stack_dims=len(stack),
        )
    fan_in = math.prod(shape[batch_dims : batch_dims + value.fan_in_axes])
    init = value.init or Normal(std=1 / math.sqrt(fan_in) if value.fan_in_axes else 0.02)
    return TensorInfo(
        name=name,
        role="params",
        shape=shape,
        axes=axes,
        batch_dims=batch_dims,
        fan_in_axes=value.fan_in_axes,
        init=init,
        stack_dims=len(stack),
    )


def _same_stack(what: str, path: str, stack: tuple, first: tuple) -> None:
    if stack != first[1]:
        raise UserError(
            what,
            expected="tied tensors to lie in the same Stack, or outside all of them",
            got=f"{first[0]!r} and {path!r}",
            do="Hold the shared tensor outside the Stack and pass it in as a shared argument.",
        )
