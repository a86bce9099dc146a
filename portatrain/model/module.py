"""The definition of a model: plain Python data, no framework and no NumPy.

A model is a class whose attributes are `Param`s, `State`s, other `Module`s, and plain values, and whose
`__call__(self, ops, ...)` computes with the operations of `portatrain.model.ops.Ops`::

    class Attention(Module):
        def __init__(self, *, embed: int, heads: int, head_dim: int):
            self.wq = Param(embed=embed, heads=heads, head_dim=head_dim)
            self.wo = Param(heads=heads, head_dim=head_dim, embed=embed, inputs=2)

A `Param` says everything about a parameter in one place: keyword = logical axis, value = size, order =
layout in memory, attribute = name in checkpoints. `describe` turns an instance into the list of its logical
tensors; a backend turns it into a native `torch.nn.Module` or `flax.nnx.Module`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from portatrain.errors import UserError

BATCH_AXES = frozenset({"layers", "experts"})
"""Axes that, where they lead a tensor, count copies of a smaller one: initialisation, optimizer rules and
norms act on each copy by itself. The axis of every `Stack` is one too."""


@dataclass(frozen=True, kw_only=True)
class Normal:
    """Truncated normal (2 sigma) of the given standard deviation."""

    std: float


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Every value the same."""

    value: float


Init = Normal | Constant
_NAMED_INITS = {"zeros": Constant(value=0.0), "ones": Constant(value=1.0)}


def _init(given: str | float | Init | None) -> Init | None:
    if isinstance(given, str):
        if given not in _NAMED_INITS:
            raise UserError(
                "init",
                expected="'zeros', 'ones', a standard deviation, Normal(std=...) or Constant(value=...)",
                got=repr(given),
                do="Leave init out for the standard deviation 1/sqrt(fan-in).",
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

    Keywords are logical axes in layout order. `inputs` counts the axes, after the batch axes (layers, experts),
    that the forward pass contracts: 1 for most weights, 2 for an output projection over (heads, head_dim), 0 for
    an embedding, a norm's scale or a bias. It gives the fan-in (standard deviation 1/sqrt(fan-in), 0.02 where
    inputs=0) and the matrix that Muon and Adafactor see. `init` overrides: 'zeros', 'ones', a standard
    deviation, `Normal` or `Constant`. The same object used in two places means tied weights.
    """

    def __init__(self, *, inputs: int = 1, init: str | float | Init | None = None, **axes: int) -> None:
        self.axes = _sizes("Param", axes)
        self.inputs, self.init = inputs, _init(init)
        free = sum(axis not in BATCH_AXES for axis in axes)
        if not 0 <= inputs <= free:
            raise UserError(
                f"Param({', '.join(axes)})",
                expected=f"inputs between 0 and {free}, the number of its axes that are not batch axes",
                got=str(inputs),
                do="inputs counts the leading axes that the forward pass contracts; an embedding or a bias has 0.",
            )

    def __repr__(self) -> str:
        return f"Param({', '.join(f'{k}={v}' for k, v in self.axes.items())}, inputs={self.inputs})"


class State:
    """A tensor without gradient, kept with the model and in its checkpoints: router biases, statistics.

    Keywords are logical axes, as in `Param`; `init` is 'zeros', 'ones' or `Constant`; `dtype` is 'float32',
    'int32' or 'bool'. It is changed functionally: `ops.tally(self, name=value)` adds in the forward pass, over
    all samples of a step, and `after_step(self, ops)` sets new values once a step with `ops.update(self, ...)`.
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
    """Base of every portable module. See the top of this file.

    `path` ('blocks/attn') and `site` (its hash, an int that seeds dropout) are set by `describe`, and on the
    native modules that a backend makes. Override `after_step` to change `State`s once per optimizer step.
    """

    path: str = ""
    site: int = 0
    unnamed: ClassVar[tuple[str, ...]] = ()
    """Attributes whose Param adds no name of its own: it is called as the module is."""

    def __call__(self, ops: Any, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} does not define __call__(self, ops, ...)")

    def after_step(self, ops: Any) -> None:
        """Called once after every applied optimizer step, with this module's States as arrays."""


class Stack(Module):
    """`n` copies of `block`, each with parameters of its own: one logical tensor a parameter, with a leading
    axis (`layers` unless named).

    `stack(ops, carry, *shared, per_layer=None) -> (carry, outs)` runs `block(ops, carry, *shared)`, or
    `block(ops, carry, *shared, mine)` where `per_layer` is a tree of arrays with a leading layers axis and `mine`
    its slice. As with `jax.lax.scan`, a block returns `(carry, out)`; the outs come back stacked (None stays
    None). JAX scans; torch holds one module per layer. Layers that alternate form one block: a superblock.
    A Stack inside a Stack names an axis of its own: `Stack(block, 3, axis="sublayers")`.
    """

    def __init__(self, block: Module, n: int, *, axis: str = "layers") -> None:
        if n < 1:
            raise UserError("Stack", expected="at least one layer", got=str(n), do="Give a positive number of layers.")
        self.block, self.n, self.axis = block, n, axis

    def __call__(self, ops: Any, carry: Any, *shared: Any, per_layer: Any = None) -> Any:
        return ops.stack(self, carry, shared, per_layer)


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One logical tensor: what layouts, optimizers and checkpoints know of it.

    `name` is its path ('blocks/attn/wq'); `role` is 'params' or 'state'; `shape` and `axes` include the leading
    axes of Stacks; the first `batch_dims` axes are batch axes; `inputs` as in `Param`.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    batch_dims: int
    inputs: int
    init: Init
    dtype: str = "float32"
    stack_dims: int = 0
    """How many of the leading axes are axes of Stacks (torch holds one tensor per index of those)."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Definition:
    """A model with all that `describe` found: its tensors by role, where they live, and its modules by path."""

    model: Module
    params: dict[str, TensorInfo]
    states: dict[str, TensorInfo]
    owners: dict[int, str] = field(repr=False)
    """id of a Param or State object -> its name (the first owner's)."""
    modules: dict[str, Module] = field(repr=False)

    @property
    def tensors(self) -> dict[tuple[str, str], TensorInfo]:
        return {(t.role, t.name): t for group in (self.params, self.states) for t in group.values()}

    @property
    def parameters(self) -> int:
        """The number of parameters, tied ones counted once."""
        return sum(t.size for t in self.params.values())

    @property
    def axes(self) -> frozenset[str]:
        return frozenset(a for t in self.tensors.values() for a in t.axes)


def children(module: Module) -> Iterator[tuple[str, Any]]:
    """The `Param`s, `State`s and `Module`s held by `module`, as (relative name, object), in the order in which
    they were set; those in lists, tuples and dicts under 'name/0', 'name/key'. A Stack's block adds no name."""
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
    """The word of a module's path in dropout's hash: the first 31 bits of SHA-256 of the path."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") >> 1


def describe(model: Module) -> Definition:
    """Walk `model` once: name its tensors, resolve tied ones to their first owner, set `path` and `site`.

    Raises UserError for names that a native module class already uses, for one object tied across different
    Stacks, for an axis that repeats in a tensor, and for a model without parameters.
    """
    found = Definition(model=model, params={}, states={}, owners={}, modules={})
    _walk(found, model, "", (), seen={})
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
    _refuse_reserved(module)
    module.path, module.site = path, site_of(path)
    if isinstance(module, Stack):
        # The block shares its Stack's path: the list of layers is what a reader sees there.
        _walk(found, module.block, path, (*stack, (module.axis, module.n)), seen)
        return
    found.modules[path or "."] = module
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


def _info(value: Param | State, name: str, stack: tuple[tuple[str, int], ...]) -> TensorInfo:
    axes = (*(a for a, _ in stack), *value.axes)
    shape = (*(n for _, n in stack), *value.axes.values())
    if len(set(axes)) != len(axes):
        raise UserError(
            name,
            expected="every logical axis once in a tensor",
            got=", ".join(axes),
            do="Give a second use a name of its own (embed_out), and a Stack inside a Stack its own axis=.",
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
            inputs=0,
            init=value.init,
            dtype=value.dtype,
            stack_dims=len(stack),
        )
    fan_in = math.prod(shape[batch_dims : batch_dims + value.inputs])
    init = value.init or Normal(std=1 / math.sqrt(fan_in) if value.inputs else 0.02)
    return TensorInfo(
        name=name,
        role="params",
        shape=shape,
        axes=axes,
        batch_dims=batch_dims,
        inputs=value.inputs,
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


def _refuse_reserved(module: Module) -> None:
    """Whatever its value, an attribute would hide what the native class has under that name, or be hidden by it."""
    ours = {"path": str, "site": int}  # as `describe` sets them
    taken = [n for n, v in vars(module).items() if n in RESERVED_NAMES and not isinstance(v, ours.get(n, ()))]
    for name, _ in children(module):
        # Keys of dicts become attributes of an nn.ModuleDict, which has the names of a dict besides.
        first, *keys = name.split("/")
        if name.startswith("_") or "." in name:
            taken.append(first if "." not in name else name)
        taken += [key for key in keys if key in RESERVED_NAMES or hasattr(dict, key)]
    if taken:
        raise UserError(
            f"{type(module).__name__}.{taken[0]}",
            expected="a name that torch.nn.Module and flax.nnx.Module do not use, without '.' or a leading '_'",
            got=repr(taken[0]),
            do=f"Rename it, for instance to {taken[0].strip('_').replace('.', '_') or 'weight'}_1.",
        )


# Public attributes of torch.nn.Module (2.11 to 2.13) and flax.nnx.Module (0.12), and our own. A test compares.
_RESERVED = """
    T_destination add_module apply bfloat16 buffers call_super_init children compile cpu cuda double dump_patches
    eval extra_repr float forward get_buffer get_extra_state get_parameter get_submodule half ipu iter_children
    iter_modules load_state_dict modules mtia named_buffers named_children named_modules named_parameters parameters
    perturb register_backward_hook register_buffer register_forward_hook register_forward_pre_hook
    register_full_backward_hook register_full_backward_pre_hook register_load_state_dict_post_hook
    register_load_state_dict_pre_hook register_module register_parameter register_state_dict_post_hook
    register_state_dict_pre_hook requires_grad_ set_attributes set_extra_state set_submodule share_memory sow
    state_dict to to_empty train training type xpu zero_grad
    path site after_step
"""
RESERVED_NAMES = frozenset(_RESERVED.split())
