"""Compile the jax backend's own step for devices that are absent. Runs in a separate process."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from portatrain.backends import choose_kernel
from portatrain.backends.program import make_program
from portatrain.data.open import blank_batch
from portatrain.data.spec import DataSpec
from portatrain.plan.recorded import ordered
from portatrain.recipe import load_recipe
from portatrain.recipe.overrides import override

PLATFORM = {"tpu": "tpu", "cuda": "cuda", "rocm": "rocm"}


def run(asked: Mapping[str, Any], stage: Callable[[str], None]) -> dict[str, Any]:
    """Compile; return the compiler's memory, FLOPs and collectives of one device. A program that does not fit is an
    answer too: 'fits' is False, and 'needs_bytes' is the memory that it needs."""
    recipe = override(load_recipe(asked["recipe"], cwd=None), asked["overrides"])
    stage("loading the compiler")
    import jax

    from portatrain.backends.jax import JaxBackend
    from portatrain.plan.compilers import hlo, rocm

    if asked["compiler"] == "rocm":
        rocm.count_a_gpu()
    devices = devices_of(asked, jax)
    program = ordered(make_program(recipe, mesh=asked["mesh"]), recipe)
    backend = JaxBackend(program, devices)
    stage(f"tracing for {len(devices)} x {devices[0].device_kind}")
    step, args = backend.abstract_step(batch_of(recipe.data, recipe.batch, recipe.accumulation))
    choose_kernel.taken()
    traced = step.trace(*args)
    stage("lowering")
    lowered = traced.lower(lowering_platforms=(PLATFORM[asked["compiler"]],))
    found: dict[str, Any] = {
        "compiler": f"{asked['compiler']}, {_version(asked['compiler'])}",
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "kernel_choices": choose_kernel.taken(),
        "traced_flops": flops(traced.jaxpr.jaxpr) / len(devices),
        "traced_flops_fp8": flops(traced.jaxpr.jaxpr, fp8=True) / len(devices),
    }
    stage("compiling, which may take minutes")
    with tempfile.TemporaryDirectory() as folder:
        # jaxlib cannot always read what a newer libtpu compiled, so the compiler writes its text to a file itself.
        try:
            compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            return found | {"fits": False, **_too_large(error)}
        stage("reading what was compiled")
        text, largest = _written(Path(folder))
    memory = compiled.memory_analysis()
    found |= {
        "fits": True,
        "peak_bytes": memory.peak_memory_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "largest_buffers": largest,
    }
    if not text:
        return found
    counted = hlo.measure(text, backend.layout.mesh.sizes)
    return found | {
        "flops": counted.flops,
        "flops_fp8": counted.flops_fp8,
        "dots": counted.dots,
        "collective_bytes": counted.bytes,
        "collective_kinds": counted.kinds,
        "collective_calls": counted.calls,
    }


def _written(folder: Path) -> tuple[str, list[str]]:
    """Return the optimised module as text, and the largest buffers that are live at its peak, one a line."""

    def largest(ending: str) -> str:
        files = sorted(folder.glob(f"*{ending}"), key=lambda path: path.stat().st_size)
        return files[-1].read_text(encoding="utf-8", errors="replace") if files else ""

    ranges = largest("live-range.txt").partition("(peak):")[2].splitlines()
    live = [line.strip().partition(" (cumulative")[0] for line in ranges if " bytes (cumulative" in line]
    return largest("after_optimizations.txt"), live[:24]


def batch_of(data: DataSpec, batch: int, accumulation: int) -> dict[str, np.ndarray]:
    """Return the shapes of a batch of ``data``, in the trainer's form, with blank contents."""
    made = blank_batch(data, batch)
    return {k: v.reshape(accumulation, batch // accumulation, *v.shape[1:]) for k, v in made.items()}


def flops(jaxpr: Any, *, fp8: bool = False) -> float:
    """Return the FLOPs of all matmuls of a traced program, or of those of 8-bit floats alone, over all devices. Loops
    count as often as they run, and recomputation counts too."""
    total = 0.0
    for equation in jaxpr.eqns:
        inside = sum(flops(getattr(sub, "jaxpr", sub), fp8=fp8) for sub in _inner(equation.params.values()))
        total += inside * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        eight = all(x.aval.dtype.name.startswith("float8") for x in equation.invars[:2])
        if equation.primitive.name == "dot_general" and (eight or not fp8):
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += (
                2.0 * float(np.prod([shape[d] for d in contracted])) * float(np.prod(equation.outvars[0].aval.shape))
            )
    return total


def _inner(params: Any) -> Any:
    for value in params:
        if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _inner(value)


def devices_of(asked: Mapping[str, Any], jax: Any) -> list[Any]:
    """Return the devices of the target, in the order in which the plan lays out the mesh."""
    from jax.experimental import topologies

    options = dict(asked["options"])
    if asked["compiler"] == "tpu":
        name = options.pop("topology_name")
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        made = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    else:
        made = topologies.get_topology_desc("plan", asked["compiler"], **options)
    from portatrain.plan.cost.device_order import ordered

    return ordered(list(made.devices), asked.get("places"))


def _version(compiler: str) -> str:
    from importlib import metadata

    plugin = {"tpu": "libtpu", "cuda": "jax-cuda13-pjrt", "rocm": "jax-rocm7-pjrt"}[compiler]
    return ", ".join(f"{name} {metadata.version(name)}" for name in (plugin, "jaxlib"))


def _too_large(error: Exception) -> dict[str, Any]:
    """Return the sizes in a RESOURCE_EXHAUSTED; raise any other error of the compiler."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
        raise error
    found = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])", text)
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    needs = float(found[1]) * units[found[2]] if found else None
    return {"needs_bytes": needs, "said": text.splitlines()[0][:400]}
