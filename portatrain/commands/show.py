"""Show every parameter of RECIPE: shape, axes, sharding, bytes per device, initialiser, trained or not, decay.

With precision fp8 it also shows the weights whose matmuls are computed from 8-bit operands. With a parametrization it
shows how each parameter has grown since the base width, the factor of its learning rate, and its multiplier.

The mesh is that of --mesh, or the planned mesh of --cluster, or one device. A warning names each axis that no mapping
has, such as a misspelt one, because it is not sharded. The command trains nothing and needs no framework.

examples:
  portatrain show tiny-lm
  portatrain show llama3-8b --mesh fsdp=16,tensor=4
  portatrain show llama3-8b --cluster h100-64 --set precision=bf16-state
  portatrain show my_recipe.py --set lora=LoRA --json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from portatrain.commands import options
from portatrain.errors import UserError
from portatrain.model.fp8 import quantised_names
from portatrain.model.layers import Attention, LatentAttention
from portatrain.model.layout import Layout, Mesh, axis_warning, unknown_axes
from portatrain.model.module import Constant, Definition, Init, TensorInfo, Values
from portatrain.recipe import Recipe
from portatrain.system import terminal
from portatrain.system.text import counted

BYTES = {"float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "bool": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_recipe(parser)
    parser.add_argument("--mesh", metavar="AXES", help="the size of each mesh axis, such as fsdp=4,tensor=2")
    parser.add_argument("--cluster", metavar="NAME", help="use the planned mesh of this cluster")
    parser.add_argument("--json", action="store_true", help="print one JSON object with all data")


def run(args: argparse.Namespace) -> int:
    if args.mesh is not None and args.cluster is not None:
        raise UserError(
            "portatrain show", expected="--mesh or --cluster", got="both", do="Leave one out: a cluster gives a mesh."
        )
    recipe = options.resolved_recipe(args)
    mesh = args.mesh or (_planned(args.cluster, args.recipe, recipe) if args.cluster else "")
    found = facts(recipe, Mesh.parse(mesh))
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        _print(found)
    return 0


def facts(recipe: Recipe, mesh: Mesh) -> dict[str, Any]:
    """Return the data that the command shows, as a JSON object. Sizes per device are in bytes.

    Raises:
        UserError: the recipe's rules name no parameter, or the mesh does not divide a size.
    """
    from portatrain.backends.state import slot_tensors
    from portatrain.plan.cost.policy import PRECISIONS

    definition = recipe.describe()
    recipe.check_names(definition.params)
    layout = Layout.of(definition, mesh, compute=recipe.compute, params=recipe.params)

    def held(tensor: TensorInfo) -> int:
        shards = mesh.over(axis for over in layout.tensor_spec(tensor) for axis in over)
        return tensor.size * BYTES[tensor.dtype] // shards

    low = quantised_names(definition)
    rows, optimizer, gradients, averages = [], 0, 0, 0
    gradient_bytes = PRECISIONS[recipe.precision].grad
    for tensor in definition.tensors.values():
        trains = tensor.role == "params" and recipe.trains(tensor.name)
        slots = slot_tensors(recipe.optimizer, tensor) if trains else {}
        optimizer += sum(held(slot) for slot in slots.values())
        numbers = held(tensor) // BYTES[tensor.dtype]
        gradients += int(numbers * gradient_bytes) if trains else 0
        averages += 4 * numbers if trains and recipe.averages(tensor.name) else 0
        rows.append(
            {
                "name": tensor.name,
                "role": tensor.role,
                "shape": list(tensor.shape),
                "axes": list(tensor.axes),
                "split": [list(over) for over in layout.tensor_spec(tensor)],
                "bytes_per_device": held(tensor),
                "init": f"as {tensor.start}" if tensor.start else _init(tensor.init),
                "dtype": tensor.dtype,
                "trains": trains,
                "decays": trains and recipe.decays(tensor),
                "fp8": tensor.name in low,
                "kind": tensor.kind,
                "lr_factor": tensor.lr,
                "multiplier": tensor.multiplier,
            }
        )
    trained = [t for t in definition.params.values() if recipe.trains(t.name)]
    unknown = unknown_axes(definition, compute=recipe.compute, params=recipe.params)
    return {
        "recipe": recipe.name,
        "sha256": recipe.sha256,
        "mesh": str(mesh),
        "devices": mesh.devices,
        "precision": recipe.precision,
        "lr": recipe.optimizer.lr,
        "parametrization": None if recipe.parametrization is None else type(recipe.parametrization).__name__,
        "axes_since_base": _since_base(recipe, definition),
        "attention_scales": _scales(definition) if recipe.parametrization is not None else {},
        "tensors": rows,
        "parameters": definition.parameters,
        "trained_parameters": sum(t.size for t in trained),
        "bytes_per_device": {
            "parameters": sum(held(t) for t in definition.params.values()),
            "gradients": gradients,
            "optimizer": optimizer,
            "averages": averages,
            "states": sum(held(t) for t in definition.states.values()),
        },
        "unknown_axes": [
            {"axis": u.axis, "tensors": list(u.tensors), "nearest": u.nearest, "said": str(u)} for u in unknown
        ],
        "axis_warning": axis_warning(unknown),
    }


def _planned(cluster: str, given: str, recipe: Recipe) -> str:
    """Return the mesh that a plan chooses for `recipe` on `cluster`; UserError if there is none on which it fits."""
    from portatrain.plan import render
    from portatrain.plan.clusters import clusters_toml, names
    from portatrain.plan.cost import recipes
    from portatrain.plan.cost.policy import REMATS
    from portatrain.plan.search import plan

    remats = (recipe.remat,) if recipe.remat in REMATS else tuple(REMATS)
    there = names.resolve(cluster, files=clusters_toml.files(given))
    made = plan(recipes.shape_of(recipe), there, remats=remats)
    if made.refusal is not None:
        raise made.refusal
    if made.chosen is None:
        raise UserError(
            f"cluster {cluster} for {recipe.name}",
            expected="a mesh on which it fits",
            got=render._misfit(made),
            do=f"`portatrain plan {given} --cluster {cluster}` says more; --mesh shows any mesh.",
        )
    return "" if made.chosen.mesh_text == "1" else made.chosen.mesh_text


def _init(init: Init) -> str:
    if isinstance(init, Constant):
        return {0.0: "zeros", 1.0: "ones"}.get(init.value, f"{init.value:g}")
    if isinstance(init, Values):
        return f"values {min(init.values):.4g} to {max(init.values):.4g}"
    return f"normal {init.std:.4g}"


def _print(found: Mapping[str, Any]) -> None:
    from rich.table import Table

    console = terminal.console(180)
    in_fp8 = any(row["fp8"] for row in found["tensors"])
    grows = found["parametrization"] is not None
    table = Table(
        *("tensor", "shape", "split over", "a device", "starts as", "dtype", "trains", "decays"),
        *["matmuls"] * in_fp8,
        *["kind", "lr", "gives"] * grows,
    )
    for row in found["tensors"]:
        table.add_row(
            row["name"] if row["role"] == "params" else f"{row['name']} (state)",
            ", ".join(f"{axis}={size}" for axis, size in zip(row["axes"], row["shape"], strict=True)),
            ", ".join(f"{a}: {'/'.join(s)}" for a, s in zip(row["axes"], row["split"], strict=True) if s) or "nothing",
            _size(row["bytes_per_device"]),
            row["init"],
            row["dtype"],
            "yes" if row["trains"] else "no",
            "yes" if row["decays"] else "no",
            *["fp8" if row["fp8"] else ""] * in_fp8,
            *[row["kind"], f"x {row['lr_factor']:.4g}", _gives(row)] * grows,
        )
    console.print(table)
    held = found["bytes_per_device"]
    frozen = found["parameters"] - found["trained_parameters"]
    lines = [
        f"{found['recipe']}: {found['parameters']:,} parameters" + (f", {frozen:,} of them frozen" if frozen else ""),
        f"mesh {found['mesh']}, {counted(found['devices'], 'devices')}, {found['precision']}",
        "a device holds "
        + ", ".join(f"{name} {_size(size)}" for name, size in held.items() if size)
        + f"; together {_size(sum(held.values()))}, without activations (`portatrain plan` has those)",
    ]
    if grows:
        axes = found["axes_since_base"].items()
        grown = [f"{axis} {was} -> {now}" for axis, (was, now) in axes if was != now]
        same = [f"{axis} {now}" for axis, (was, now) in axes if was == now]
        lines.append(
            f"{found['parametrization']}: since the base width "
            + (", ".join(grown) or "nothing has grown")
            + (f"; as there: {', '.join(same)}" if same else "")
        )
        if less := [axis for axis, (was, now) in axes if now < was]:
            lines.append(f"narrower than its base in {', '.join(less)}: `base` is where the learning rate was tuned")
        lines.append(f"lr x 1 is {found['lr']:.4g}; docs/start/widths.md explains the kinds")
        lines += [f"{path}: scores of attention times {scale:.4g}" for path, scale in found["attention_scales"].items()]
    console.print("\n".join(lines), soft_wrap=True, markup=False, highlight=False)
    if found["axis_warning"]:
        print(f"warning: {found['axis_warning']}", file=sys.stderr)


def _gives(row: Mapping[str, Any]) -> str:
    if row["multiplier"] == 1:
        return ""
    return f"x {row['multiplier']:.4g}" + (" as an output" if row["kind"] == "table" else "")


def _since_base(recipe: Recipe, definition: Definition) -> dict[str, list[int]]:
    """Return axis -> [size at the base width, size here], of all axes but batch axes; an axis of several sizes is left
    out."""
    if recipe.parametrization is None:
        return {}
    base = replace(recipe, model=recipe.parametrization.spec_at_base(recipe.model)).describe()
    found: dict[str, set[tuple[int, int]]] = {}
    for name, info in definition.params.items():
        pairs = zip(info.axes, base.params[name].shape, info.shape, strict=True)
        for axis, was, now in list(pairs)[info.batch_dims :]:
            found.setdefault(axis, set()).add((was, now))
    return {axis: list(next(iter(sizes))) for axis, sizes in found.items() if len(sizes) == 1}


def _scales(definition: Definition) -> dict[str, float]:
    """Return the scales of attention that differ from head_dim^-0.5, by the path of the module."""
    found = {p: m.scale for p, m in definition.modules.items() if isinstance(m, (Attention, LatentAttention))}
    return {path: scale for path, scale in found.items() if scale is not None}


def _size(nbytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} B"
