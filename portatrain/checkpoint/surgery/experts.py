"""Upcycle dense feed-forward parts to experts: every expert is a copy of the dense part (Komatsuzaki et al. 2023,
Sparse Upcycling, arXiv:2212.05055), and the router begins as in a new run.

The weights of the chosen experts add up to 1 if the router normalises them, so the function stays. A shared part beside
the experts starts with an output of zero.

Experts in some layers only put layers of two kinds in a row (`layers_of`), whose Stacks have other names: a tensor of
such a Stack is made of the same layers of the old one, with their slots.

Slots: routed evenly, an expert sees its part of the tokens with its part of the weight, so its gradient is the dense
one divided by the number of experts X. A mean of the gradient is divided by X, a mean of its square by X^2.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from portatrain.checkpoint.surgery.edits import INITIAL, Edit, Surgery, contracted, named, tensors
from portatrain.errors import UserError
from portatrain.model.layers import Group, MixtureMLP
from portatrain.model.module import Definition, Module, Stack, TensorInfo, children


def experts(before: Definition, after: Definition) -> Surgery:
    """Return the surgery from dense feed-forward parts to mixtures (`layers.MixtureMLP`), in all layers or in some."""
    edits: dict[str, Edit] = {}
    why = ""
    stacks = _stacks(before, after)
    parts = {path: module for path, module in after.modules.items() if isinstance(module, MixtureMLP)}
    upcycled = 0
    for name, info in tensors(after).items():
        stack = next((path for path in stacks if name.startswith(f"{path}/")), "")
        part = next((path for path in parts if name.startswith(f"{path}/")), "")
        was, rows = stacks.get(stack, (stack, None))
        dense = was + part.removeprefix(stack)
        if not part or f"{part}/experts/down" not in after.params or f"{dense}/down" not in before.params:
            if was != stack or rows is not None:
                edits[name] = _moved(was + name.removeprefix(stack), info, rows, before)
            continue
        upcycled += 1
        if not parts[part].router.normalise or parts[part].router.scale != 1.0:
            why = "the weights of a token's experts do not add up to 1 (the router does not normalise, or has a scale)"
        if name.startswith(f"{part}/experts/"):
            edits[name] = _copies(name, f"{dense}/{name.removeprefix(f'{part}/experts/')}", info, rows, before)
        elif name.startswith(f"{part}/shared/") and any(contracted(info, at) for at in _hidden(info)):
            edits[name] = Edit(of=(INITIAL,), make=np.zeros_like)
        else:
            edits[name] = Edit(of=(INITIAL,), make=np.array)
    if not upcycled:
        raise UserError(
            "surgery experts",
            expected="a new model with a MixtureMLP where the old one has a feed-forward part (gate, up, down)",
            got=f"none; the old model has {named(n for n in before.params if n.endswith('/down'))}",
            do="Choose a model with experts, such as --set model=recipes.models.mixtral:MixtralConfig --set "
            "model.experts=8 --set model.chosen=2 --set model.expert_mlp=SIZE.",
        )
    return Surgery(edits=edits, changes=why)


Rows = np.ndarray | None
"""The layers of an old Stack, by index; None: all of them."""


def places(model: Module, path: str = "") -> list[tuple[str, int]]:
    """Return (path of its block, index in its Stack) for each layer of a model, in the order in which they run."""
    found: list[tuple[str, int]] = []
    for name, child in children(model):
        here = "/".join(filter(None, (path, name)))
        if isinstance(child, Stack):
            size = len(child.block.layer) if isinstance(child.block, Group) else 1
            of = [f"{here}/layer/{i}" if isinstance(child.block, Group) else here for i in range(size)]
            found += [(of[i % size], i // size) for i in range(size * child.n)]
        elif isinstance(child, Module):
            found += places(child, here)
    return found


def _stacks(before: Definition, after: Definition) -> dict[str, tuple[str, Rows]]:
    """Return, for each path of a block in the new model, the path in the old one and which of its layers are here."""
    was, now = places(before.model), places(after.model)
    if len(was) != len(now):
        raise UserError(
            "surgery experts",
            expected=f"the {len(was)} layers that the model has",
            got=str(len(now)),
            do="Add layers in a fork of the fork (--surgery layers).",
        )
    found: dict[str, list[tuple[str, int]]] = {}
    for old, (path, _) in zip(was, now, strict=True):
        found.setdefault(path, []).append(old)
    made: dict[str, tuple[str, Rows]] = {}
    for path, olds in found.items():
        names = list(dict.fromkeys(name for name, _ in olds))
        if len(names) > 1:
            raise UserError(
                f"surgery experts: {path}",
                expected="layers that were in one Stack before, since slots come from one tensor",
                got=f"layers of {named(names)}",
                do="Begin with a model whose layers are of one kind, or write a surgery of your own: "
                "docs/run/surgery.md.",
            )
        (name,) = names
        rows = np.array([index for _, index in olds])
        whole = len(rows) == sum(old == name for old, _ in was) and np.array_equal(rows, np.arange(len(rows)))
        made[path] = name, None if whole else rows
    # The longest path first: 'blocks/runs/1' is no part of 'blocks/runs/10', and a group's layer is one of its Stack.
    return dict(sorted(made.items(), key=lambda item: -len(item[0])))


def _moved(old: str, info: TensorInfo, rows: Rows, before: Definition) -> Edit:
    was = tensors(before).get(old)
    wanted = None if was is None else (was.shape[0] if rows is None else len(rows), *was.shape[1:])
    if was is None or wanted != info.shape:
        raise UserError(
            f"surgery experts: {info.name}",
            expected=f"{old} of layers of shape {list(info.shape[1:])} in the old model",
            got="none" if was is None else str(list(was.shape[1:])),
            do="Leave out the --set that changes more than the feed-forward parts; a fork of the fork can do another "
            "surgery.",
        )
    return Edit(of=(old,), make=partial(_taken, rows), slots=lambda slot, degree: _taken(rows, slot))


def _taken(rows: Rows, array: np.ndarray) -> np.ndarray:
    return array if rows is None else array[rows]


def _hidden(info: TensorInfo) -> list[int]:
    return [at for at, axis in enumerate(info.axes) if axis == "mlp"]


def _copies(name: str, dense: str, info: TensorInfo, rows: Rows, before: Definition) -> Edit:
    at, was = info.axes.index("experts"), before.params.get(dense)
    wanted = (*info.shape[:at], *info.shape[at + 1 :])
    there = None if was is None else was.shape if rows is None else (len(rows), *was.shape[1:])
    if was is None or there != wanted:
        raise UserError(
            f"surgery experts: {name}",
            expected=f"a dense {dense} of shape {list(wanted)}, of which every expert is a copy",
            got="none" if there is None else str(list(there)),
            do="Give experts the hidden size of the dense part (model.expert_mlp = model.mlp): the function stays only "
            "if each expert is the whole of it, and has the same parts.",
        )
    n = info.shape[at]
    return Edit(of=(dense,), make=partial(_repeated, at, n, rows), slots=partial(_shared_out, at, n, rows))


def _repeated(at: int, n: int, rows: Rows, weight: np.ndarray) -> np.ndarray:
    return np.repeat(np.expand_dims(_taken(rows, weight), at), n, at)


def _shared_out(at: int, n: int, rows: Rows, slot: np.ndarray, degree: int) -> np.ndarray:
    return _repeated(at, n, rows, slot) / n**degree
