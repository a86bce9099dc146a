"""The splash kernel of jax, interpreted on a CPU: values and gradients beside the oracle, and on meshes of devices."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from portatrain.testing import Case, check_case
from portatrain.testing.case import Args, Rng
from tests.support.kernels import naming
from tests.support.running import BACKENDS

pytestmark = pytest.mark.skipif("jax" not in BACKENDS, reason="jax is not installed")

# 200 positions and a head size of 24 are padded to 256 and 128.
SELF = ((2, 200, 4, 24), (2, 200, 2, 24), (2, 200, 2, 24))
MLA = ((2, 140, 4, 24), (2, 140, 2, 24), (2, 140, 2, 136), (4,))
CROSS = ((2, 130, 4, 24), (2, 300, 1, 24), (2, 300, 1, 24))


def drawn(shapes: tuple[tuple[int, ...], ...], *, segments: bool) -> Callable[[Rng], Args]:
    def draw(rng: Rng) -> Args:
        ids = np.sort(rng.integers(0, 5, shapes[0][:2])).astype(np.int32)
        ids[0] = rng.integers(-1, 2, shapes[0][1])  # scattered segments, the ids of which may be negative
        arrays = tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)
        return (*arrays, ids) if segments else arrays

    return draw


def case(name: str, shapes: Any = SELF, *, segments: bool = True, precisions: Any = ("fp32",), **options: Any) -> Case:
    def fn(ops: Any, q: Any, k: Any, v: Any, *more: Any) -> Any:
        given = dict(zip((["sinks"] if len(shapes) > 3 else []) + ["segment_ids"], more, strict=False))
        return ops.attention(q, k, v, **given, **options)

    return Case(name=f"splash, {name}", fn=fn, args=drawn(shapes, segments=segments), precisions=precisions)


CASES = [
    case("causal, window, segments, softcap, scale", window=70, softcap=3.0, scale=0.3),
    case("causal", segments=False, precisions=("fp32", "bf16")),
    case("causal, segments", precisions=("fp32", "bf16")),
    case("sinks and wide values", MLA, precisions=("fp32", "bf16"), window=50),
    case("full, segments", causal=False, precisions=("fp32", "bf16")),
    case("full, window, softcap", causal=False, window=20, softcap=3.0),
    case("full, no padding", ((1, 256, 2, 128), (1, 256, 2, 128), (1, 256, 2, 128)), segments=False, causal=False),
    case("full, more keys", CROSS, segments=False, causal=False),
    case("causal, more keys", CROSS, segments=False),
    case("several blocks of 512", ((1, 1100, 2, 8), (1, 1100, 1, 8), (1, 1100, 1, 8)), window=600),
]


@pytest.mark.parametrize(
    "one",
    [
        pytest.param(one, id=one.name, marks=() if i == 0 else pytest.mark.full if i < 9 else pytest.mark.hand)
        for i, one in enumerate(CASES)
    ],
)
def test_values_and_gradients_are_the_oracles(one: Case) -> None:
    for precision in one.precisions:
        check_case(naming("jax", "splash"), one, precision)


def test_float32_is_not_rounded_by_any_matmul_of_the_kernel() -> None:
    """Interpreted, every matmul is exact; on a TPU it is what its precision says."""
    import jax
    import jax.numpy as jnp

    from portatrain.backends.jax.splash import splash

    def matmuls(jaxpr: Any, inside: bool = False) -> list[Any]:
        found = []
        for equation in jaxpr.eqns:
            within = inside or equation.primitive.name == "pallas_call"
            if within and equation.primitive.name == "dot_general":
                found.append(equation.params["precision"])
            for value in equation.params.values():
                for sub in value if isinstance(value, (tuple, list)) else (value,):
                    if hasattr(sub, "eqns") or hasattr(sub, "jaxpr"):
                        found += matmuls(getattr(sub, "jaxpr", sub), within)
        return found

    def gradients(precision: Any, dtype: Any) -> list[Any]:
        q, k = jnp.zeros((1, 128, 2, 128), dtype), jnp.zeros((1, 128, 1, 128), dtype)

        def total(q: Any, k: Any, v: Any) -> Any:
            return splash(q, k, v, precision=precision, device="tpu").astype(jnp.float32).sum()

        return matmuls(jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(q, k, k).jaxpr)

    highest = jax.lax.Precision.HIGHEST
    exact = gradients(highest, jnp.float32)
    assert len(exact) == 2 + 3 + 4 and set(exact) == {(highest, highest)}  # forward, queries, keys and values
    assert set(gradients(None, jnp.bfloat16)) == {None}


def test_every_share_over_context_has_as_many_blocks() -> None:
    """Blocks that the kernel computes, forward: 8 shares of 16,384 positions, with a causal mask."""
    from portatrain.backends.jax.splash import _kernel
    from portatrain.model.context_chunks import dealt, imbalance, in_order

    def blocks(shares: Any) -> list[int]:
        leaves, tree, _ = _kernel(True, None, 2048, 16_384, shares, None, True, None)
        import jax

        forward = jax.tree.unflatten(tree, leaves).fwd_mask_info
        return [int((part > 0).sum()) for part in np.split(np.asarray(forward.block_mask), len(shares), axis=1)]

    assert imbalance(blocks(dealt(8, 16_384, causal=True, window=None))) == 1
    assert imbalance(blocks(in_order(8, 16_384))) > 1.8


MESHES = """
import dataclasses, json, sys
import jax, jax.numpy as jnp, numpy as np
from portatrain.backends import choose_kernel, kernels
from portatrain.backends.base import Context
from portatrain.backends.jax import JaxBackend
from portatrain.backends.jax.mesh import device_mesh
from portatrain.model.layout import Layout, Mesh

rng = np.random.default_rng(0)
shapes = [(4, 320, 8, 24), (4, 320, 2, 24), (4, 320, 2, 40), (4, 320, 8, 40), (8,)]
q, k, v, g, sinks = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
ids = jnp.asarray(np.sort(rng.integers(0, 4, (4, 320))), jnp.int32)

def run(mesh, kernel, window):
    site = kernels.Site(backend="jax", mesh=mesh, named=(("attention", kernel),))
    ops = dataclasses.replace(JaxBackend._standalone(Context()), site=site)
    if mesh:
        layout = Layout(mesh=Mesh.parse(mesh))
        ops = dataclasses.replace(ops, layout=layout, devices=device_mesh(layout.mesh))

    def total(q, k, v, sinks):
        out = ops.attention(q, k, v, sinks=sinks, segment_ids=ids, window=window, softcap=5.0)
        return jnp.sum(out * g), out

    (_, out), grads = jax.jit(jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True))(q, k, v, sinks)
    return [np.asarray(x) for x in (out, *grads)], [made["shape"] for made in choose_kernel.taken()]

want = {window: run("", "written-out", window)[0] for window in (90, None)}
for mesh in json.loads(sys.argv[1]):
    window = None if "context=2," in mesh else 90  # without one, queries are exchanged over context
    got, shapes = run(mesh, "splash", window)
    error = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, want[window]))
    print(json.dumps([mesh, shapes, error]))
"""
ONE_OF_EACH = {"fsdp=2,context=2,tensor=2": [2, 160, 320, 4, 1, 24]}
ONE_BY_ONE = {
    "fsdp=2": [2, 320, 320, 8, 2, 24],
    "tensor=2": [4, 320, 320, 4, 1, 24],
    "context=2": [4, 160, 320, 8, 2, 24],
    "tensor=4": [4, 320, 320, 2, 1, 24],  # two devices share a kv head
    "replica=2,expert=2,tensor=2": [1, 320, 320, 4, 1, 24],
}


@pytest.mark.parametrize("meshes", [ONE_OF_EACH, pytest.param(ONE_BY_ONE, marks=pytest.mark.full)], ids=["all", "each"])
def test_values_and_gradients_on_a_mesh_are_those_of_one_device(meshes: dict[str, list[int]]) -> None:
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", MESHES, json.dumps(list(meshes))], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {mesh: shape for mesh, (shape,), _ in rows} == meshes
    assert all(error < 1e-6 for *_, error in rows), rows


STEP = """
import json, re, sys
import jax, numpy as np
from portatrain.backends import choose_kernel
from portatrain.backends.jax import JaxBackend
from portatrain.backends.program import make_program
from portatrain.plan.clusters.names import parse
from portatrain.plan.compilers import targets, xla
from portatrain.recipe import load_recipe
from portatrain.recipe.overrides import override

sizes = ["vocab=512", "embed=256", "layers=2", "heads=4", "kv_heads=2", "mlp=512"]
recipe = override(load_recipe("tiny-lm"), [f"model.{s}" for s in sizes] + ["data.seq_len=2560", "batch=4"])
recipe = override(recipe, ["precision=bf16", f"remat={sys.argv[2]}"])
target = targets.target(parse("tpu-v5p-8"))
devices = xla.devices_of({"compiler": target.compiler, "options": target.options}, jax)
backend = JaxBackend(make_program(recipe, mesh=sys.argv[1]), devices)
step, args = backend.abstract_step(xla.batch_of(recipe.data, recipe.batch, recipe.accumulation))
text = step.trace(*args).lower(lowering_platforms=("tpu",)).compile().as_text()
(choice,) = choose_kernel.taken()
arrays = [[int(n) for n in dims.split(",")] for dims in re.findall(r"[a-z]+[0-9]+\\[([0-9,]+)\\]", text)]
print(json.dumps({
    "kernel": choice["kernel"],
    "calls": {phase: len(re.findall(f"%splash_mha_{phase}[^ ]* = [^=]*custom-call", text)) for phase in ("fwd", "dq", "dkv")},
    "square": [dims for dims in arrays if sum(n in (2560, 1280) for n in dims) > 1],
}))
"""  # noqa: E501


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(("mesh", "remat", "forward"), [("fsdp=2,context=2", "block", 2), ("fsdp=4", "attention", 1)])
def test_a_tpus_program_has_the_kernel_and_no_square_array(mesh: str, remat: str, forward: int) -> None:
    """The step of a whole model. With attention kept the forward kernel runs once, else once more in the backward pass:
    so the kernel's own results are what the policy keeps."""
    from portatrain.plan.compilers.targets import TPU_ENV

    env = {**os.environ, **TPU_ENV}
    done = subprocess.run(
        [sys.executable, "-c", STEP, mesh, remat], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"kernel": "splash", "calls": {"fwd": forward, "dq": 1, "dkv": 1}, "square": []}


KEEPING = """
import dataclasses, json
import jax, jax.numpy as jnp, numpy as np
from portatrain.backends import kernels
from portatrain.backends.jax import JaxBackend
from portatrain.backends.program import make_program
from portatrain.recipe import load_recipe
from portatrain.recipe.overrides import override

sizes = ["vocab=64", "embed=32", "layers=1", "heads=2", "kv_heads=1", "mlp=32"]
recipe = override(load_recipe("tiny-lm"), [f"model.{s}" for s in sizes] + ["data.seq_len=256", "batch=2"])
rng = np.random.default_rng(0)
shape = (1, 2, 256)
batch = {
    "tokens": rng.integers(0, 64, shape).astype(np.int32), "targets": rng.integers(0, 64, shape).astype(np.int32),
    "mask": np.ones(shape, np.float32), "positions": np.tile(np.arange(256, dtype=np.int32), (1, 2, 1)),
    "segment_ids": np.sort(rng.integers(0, 3, shape)).astype(np.int32), "sample": np.arange(2)[None],
}
def gradients(mesh, remat, kernel):
    made = make_program(override(recipe, [f"remat={remat}"]), mesh=mesh)
    backend = JaxBackend(dataclasses.replace(made, kernels=(("attention", kernel),)))
    grads, loss, *_ = backend._gradients_of(backend.init_state(), backend._put(batch, 1), np.int32(1))
    return {"loss": np.asarray(loss), **{n: np.asarray(g) for n, g in grads.items()}}

want = gradients("", "none", "written-out")
for mesh, remat in (("context=2", "attention"), ("tensor=2", "keep:qkv+attention"), ("fsdp=2", "block")):
    got = gradients(mesh, remat, "splash")
    print(json.dumps([mesh, max(float(np.abs(got[n] - w).max() / np.abs(w).max()) for n, w in want.items())]))
"""


@pytest.mark.full
def test_a_steps_gradients_under_remat_are_those_of_one_device() -> None:
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", KEEPING], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 3 and all(error < 2e-6 for _, error in rows), rows
