"""Find the tensors, counters and settings of a trainer's model and optimizer, by name, for torch and for jax."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from portatrain.errors import UserError
from portatrain.testing.audit.leaves import flat, is_array, is_torch, loaded

SLOTS = {
    "exp_avg": "m",
    "mu": "m",
    "exp_avg_sq": "v",
    "nu": "v",
    "momentum_buffer": "momentum",
    "trace": "momentum",
    "max_exp_avg_sq": "v_max",
    "nu_max": "v_max",
}
"""Names of optimizer slots in torch and optax, and the one name that records use."""
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Modules that compilation, sharding and remat put around a module; its parameters keep their names without them."""
SKIPPED = {"params", "step", "param_names"}


@dataclass
class State:
    """The state of a trainer on this process."""

    framework: str = "arrays"
    tensors: dict[str, Any] = field(default_factory=dict)
    """`ROLE/NAME`: an array; the role is `params`, `buffers` or a slot of the optimizer."""
    counters: dict[str, int] = field(default_factory=dict)
    """The optimizer's counts of steps, by parameter (torch) or by place in its state (jax)."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Learning rate, decay and so on, by parameter or by place in the state."""
    trained: dict[str, bool] = field(default_factory=dict)
    """Whether a parameter gets gradients and is in the optimizer, by parameter."""
    ties: list[list[str]] = field(default_factory=list)
    """Names that share one parameter."""
    rates: list[float] = field(default_factory=list)
    """The learning rate of every group of a torch optimizer."""
    optimizer: bool = False


def state_of(model: Any, optimizer: Any) -> State:
    """Return the state of a model and of its optimizer, or of several optimizers.

    Args:
        model: a torch module, a flax nnx module, or a tree of arrays (a state dict, a pytree of parameters).
        optimizer: a torch optimizer or a list of them; an nnx.Optimizer or the state of an optax transformation; None.

    Raises UserError for anything else.
    """
    torch, nnx = loaded("torch"), loaded("flax.nnx")
    state = State()
    if torch is not None and isinstance(model, torch.nn.Module):
        state.framework = "torch"
        _torch_model(state, model)
    elif nnx is not None and isinstance(model, nnx.Module):
        state.framework = "jax"
        _add_tree(state, "params", _pure(nnx, nnx.state(model, nnx.Param)))
        rest = nnx.state(model, nnx.Not(nnx.Param))
        _add_tree(state, "buffers", _pure(nnx, rest))
    else:
        _add_tree(state, "params", model)
        if loaded("jax") is not None and not any(is_torch(t) for t in state.tensors.values()):
            state.framework = "jax"
    if not any(key.startswith("params/") for key in state.tensors):
        raise UserError(
            "the model of an audit",
            expected="a torch module, a flax nnx module or a tree of arrays",
            got=f"{type(model).__name__} without a parameter",
            do="Pass the module, or its parameters.",
        )
    if optimizer is None:
        return state
    state.optimizer = True
    several = optimizer if isinstance(optimizer, (list, tuple)) and not hasattr(optimizer, "_fields") else [optimizer]
    if torch is not None and several and all(hasattr(one, "param_groups") for one in several):
        _torch_optimizers(state, model, several)
    elif nnx is not None and isinstance(optimizer, nnx.Optimizer):
        _optax(state, _pure(nnx, nnx.state(optimizer)))
    else:
        iterator = hasattr(optimizer, "__next__")
        leaves = [] if iterator else [leaf for _, leaf in flat(optimizer)]
        if iterator or (len(leaves) == 1 and leaves[0] is optimizer):
            raise UserError(
                "the optimizer of an audit",
                expected="a torch optimizer or a list of them, an nnx.Optimizer, or the state of an optax optimizer",
                got=type(optimizer).__name__,
                do="Pass the optimizer itself; in optax, what `init` and `update` return.",
            )
        _optax(state, optimizer)
    return state


# ---- torch


def plain_name(name: str) -> str:
    """Return a parameter's name without the wrappers around its modules."""
    kept = [part for part in name.split(".") if part not in WRAPPERS]
    return ".".join(kept)


def _unwrapped(model: Any) -> Any:
    parallel = loaded("torch.nn.parallel")
    kinds = tuple(getattr(parallel, n) for n in ("DistributedDataParallel", "DataParallel") if hasattr(parallel, n))
    while True:
        if kinds and isinstance(model, kinds):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def _torch_model(state: State, model: Any) -> None:
    model = _unwrapped(model)
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):  # FSDP2 keeps the root whole after a forward pass
            module.reshard()
    seen: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        name = plain_name(name)
        seen.setdefault(id(parameter), []).append(name)
        if len(seen[id(parameter)]) == 1:
            state.tensors[f"params/{name}"] = parameter
            state.trained[name] = bool(parameter.requires_grad)
    state.ties = sorted(sorted(names) for names in seen.values() if len(names) > 1)
    for name, buffer in model.named_buffers():
        state.tensors[f"buffers/{plain_name(name)}"] = buffer


def _torch_optimizers(state: State, model: Any, optimizers: Iterable[Any]) -> None:
    torch = loaded("torch")
    names: dict[int, str] = {}
    if isinstance(model, torch.nn.Module):
        for name, parameter in _unwrapped(model).named_parameters():
            names[id(parameter)] = plain_name(name)
    else:
        names = {id(t): key.partition("/")[2] for key, t in state.tensors.items()}
    held = set()
    for number, optimizer in enumerate(optimizers):
        for place, group in enumerate(optimizer.param_groups):
            settings = {k: _setting(v) for k, v in group.items() if k not in SKIPPED and _setting(v) is not None}
            if "lr" in group:
                state.rates.append(float(group["lr"]))
            for at, parameter in enumerate(group["params"]):
                name = names.get(id(parameter)) or f"optimizer {number}, group {place}, parameter {at}"
                held.add(name)
                state.settings[name] = settings
                _torch_slots(state, name, parameter, optimizer.state.get(parameter, {}))
            if "step" in group:  # some fused optimizers count by group
                state.counters[f"group {place}"] = int(group["step"])
    for name in state.trained:
        state.trained[name] &= name in held


def _torch_slots(state: State, name: str, parameter: Any, slots: Mapping[str, Any]) -> None:
    for key, value in slots.items():
        if key == "step":
            state.counters[name] = int(value)
        elif is_array(value):
            state.tensors[f"{SLOTS.get(key, key)}/{name}"] = value
        elif isinstance(value, (list, tuple)) and all(map(is_array, value)):
            state.tensors |= {f"{key}.{at}/{name}": one for at, one in enumerate(value)}
        elif isinstance(value, int) and not isinstance(value, bool):
            state.counters[f"{name} {key}"] = value


def _setting(value: Any) -> Any:
    """Return a setting as JSON; None if it is no number and no choice."""
    if is_array(value):
        return float(value) if value.ndim == 0 else None
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)) and all(isinstance(v, (bool, int, float)) for v in value):
        return list(value)
    return None


# ---- jax


def _pure(nnx: Any, state: Any) -> Any:
    """Return an nnx state as a nested mapping of arrays."""
    return nnx.to_pure_dict(state)


def _add_tree(state: State, role: str, tree: Any) -> None:
    for path, value in flat(tree):
        if is_array(value):
            name = plain_name(".".join(_without_value(path))) or "value"
            key = role
            if role == "params" and is_torch(value) and not value.is_floating_point() and not value.is_complex():
                key = "buffers"
            state.tensors[f"{key}/{name}"] = value
            if key == "params":
                state.trained[name] = True


def _without_value(path: tuple[str, ...]) -> tuple[str, ...]:
    return path[:-1] if len(path) > 1 and path[-1] in ("value", "raw_value") else path


def _optax(state: State, optimizer: Any) -> None:
    """Add an optax state: a leaf whose path ends with the name of a parameter is a slot of that parameter."""
    known = {tuple(key.partition("/")[2].split(".")) for key in state.tensors if key.startswith("params/")}
    for path, value in flat(optimizer):
        path = tuple(part for piece in _without_value(path) for part in piece.split("."))
        at = next((i for i in range(len(path)) if path[i:] in known), None)
        if not is_array(value) and not isinstance(value, (int, float)):
            continue
        if at is None:
            _optax_scalar(state, path, value)
            continue
        before = [part for part in path[:at] if not re.fullmatch(r"\d+", part)]
        role, name = (before[-1] if before else "slot"), ".".join(path[at:])
        key = f"{SLOTS.get(role, role)}/{name}"
        if key in state.tensors:
            key = f"{'.'.join(path[:at])}/{name}"
        state.tensors[key] = value


def _optax_scalar(state: State, path: tuple[str, ...], value: Any) -> None:
    place, shape = ".".join(path), tuple(getattr(value, "shape", ()))
    if shape:
        state.tensors[f"optimizer/{place}"] = value
    elif "int" in str(getattr(value, "dtype", type(value).__name__)):
        state.counters[place] = int(value)
    else:
        name = "lr" if path[-1] in ("learning_rate", "lr") else path[-1]
        state.settings.setdefault(".".join(path[:-1]), {})[name] = float(np.asarray(value))
