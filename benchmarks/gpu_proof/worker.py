"""What a process of the proof computes: python -m benchmarks.gpu_proof.worker DO JOB.json ANSWER.json."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("jax", "jaxlib", "torch", "transformers", "torchtitan", "deepspeed", "numpy")
WARM = 2
"""Steps before the clock starts: they compile."""

Job = Mapping[str, Any]


def about(job: Job) -> dict[str, Any]:
    """Return what the frameworks say of the first device: its name, the number of devices, bytes free and in all."""
    packages: dict[str, str] = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    found: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform(), "packages": packages}
    if "torch" in job["backends"]:
        import torch

        found["torch"] = {"device": job["device"], "build": torch.__version__}
        if torch.cuda.is_available():
            free, whole = torch.cuda.mem_get_info()
            found["torch"] |= {"name": torch.cuda.get_device_name(), "free_bytes": free, "bytes": whole}
            found["torch"] |= {"cuda": torch.version.cuda, "hip": getattr(torch.version, "hip", None)}
    if "jax" in job["backends"]:
        import jax

        first = jax.devices()[0]
        stats = first.memory_stats() or {}
        found["jax"] = {"platform": first.platform, "name": first.device_kind, "devices": len(jax.devices())}
        found["jax"]["free_bytes"] = stats.get("bytes_limit")
    return found


def trace(job: Job) -> dict[str, Any]:
    """Run a few steps of a recipe; write the arrays to job["arrays"], and return losses, norms and the bound."""
    from portatrain.backends.base import backend_class
    from portatrain.recipe import apply_overrides, load_recipe
    from portatrain.testing import parity

    recipe = apply_overrides(load_recipe(job["recipe"]), job["overrides"])
    given = parity.batches(recipe, job["steps"])
    made = parity.trace(backend_class(job["backend"]), recipe, given)
    roles = (("g", made.gradients), ("p", made.updated))
    held: dict[str, Any] = {f"{role}/{name}": value for role, arrays in roles for name, value in arrays.items()}
    np.savez(job["arrays"], **held)
    return {"losses": made.losses, "norms": made.norms, "bound": parity.bound_of(recipe, given)}


def speed(job: Job) -> dict[str, Any]:
    """Time the step of a decoder: seconds a step (median), bytes at the peak, the losses, and the plan's figures."""
    from benchmarks.gpu_proof.speed import batch_of, recipe_of
    from portatrain.backends.base import backend_class
    from portatrain.backends.program import make_program
    from portatrain.model.layout import Mesh
    from portatrain.plan import recorded

    recipe = recipe_of(job)
    backend = backend_class(job["backend"])(make_program(recipe))
    given = {k: v[None] for k, v in batch_of(job, recipe).items()}
    held = [backend.init_state()]

    def step() -> float:
        held[0], result = backend.step(held[0], given, step=1, scale=1.0)
        return float(result.loss)  # waits for the step

    found = _timed(step, job["seconds"])
    plan = recorded.of_run(recipe, Mesh(), job["name"])
    found["peak_bytes"] = backend.describe_memory(held[0]).get("peak")
    if plan["planned"]:
        found["planned_s"], found["planned_bytes"] = plan["plan"]["step_s"], plan["plan"]["memory_total_bytes"]
    else:
        found["not_planned"] = plan["why"]
    return found


def transformers(job: Job) -> dict[str, Any]:
    """Time LlamaForCausalLM of transformers at the same sizes: autocast to bf16, fused AdamW, its own attention."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.gpu_proof.speed import batch_of, recipe_of

    recipe = recipe_of(job)
    model: Any = recipe.model
    where = "cpu" if job["device"] == "cpu" else "cuda"
    here = {"max_position_embeddings": job["seq"], "attn_implementation": "sdpa", "use_cache": False}
    config = LlamaConfig.from_dict({**model.huggingface().config, **here})
    with torch.device(where):
        net = LlamaForCausalLM(config)
    net.gradient_checkpointing_enable()
    rule = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=where != "cpu")
    batch = batch_of(job, recipe)
    tokens, targets = (torch.from_numpy(batch[k]).long().to(where) for k in ("tokens", "targets"))

    def step() -> float:
        with torch.autocast(where, torch.bfloat16, enabled=job["precision"] != "fp32"):
            loss = net(input_ids=tokens, labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        rule.step()
        rule.zero_grad(set_to_none=True)
        return float(loss)

    found = _timed(step, job["seconds"])
    found["peak_bytes"] = torch.cuda.max_memory_allocated() if where == "cuda" else None
    return found


def rates(job: Job) -> dict[str, Any]:
    """Return the FLOP/s of a square matrix product of `n`, by framework and dtype: the best of several."""
    n: int = job["n"]
    found: dict[str, float] = {}
    if "torch" in job["backends"]:
        found |= {f"torch {dtype}": 2 * n**3 / s for dtype, s in _torch_products(n, job["device"]).items()}
    if "jax" in job["backends"]:
        import jax
        import jax.numpy as jnp

        x = jnp.ones((n, n), jnp.bfloat16)
        product = jax.jit(lambda a, b: a @ b)
        found["jax bfloat16"] = 2 * n**3 / _best(lambda: product(x, x).block_until_ready())
    return {"flops_per_s": found}


def _torch_products(n: int, device: str) -> dict[str, float]:
    import torch

    where = "cpu" if device == "cpu" else "cuda"
    wait = torch.cuda.synchronize if where == "cuda" else lambda: None
    x = torch.ones(n, n, dtype=torch.bfloat16, device=where)

    def bf16() -> None:
        x @ x
        wait()

    found = {"bfloat16": _best(bf16)}
    if where == "cuda" and torch.cuda.get_device_capability() >= (8, 9) and not getattr(torch.version, "hip", None):
        y, one = x.to(torch.float8_e4m3fn), torch.ones((), device=where)

        def fp8() -> None:
            torch._scaled_mm(y, y.T, one, one, out_dtype=torch.bfloat16)
            wait()

        found["float8_e4m3fn"] = _best(fp8)
    return found


def _best(call: Callable[[], object], times: int = 10) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


def _timed(step: Callable[[], float], seconds: float) -> dict[str, Any]:
    losses = [step() for _ in range(WARM)]
    taken: list[float] = []
    began = time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        losses.append(step())
        taken.append(time.perf_counter() - start)
    return {"step_s": statistics.median(taken), "steps": len(taken), "losses": losses[:3]}


DO = {f.__name__: f for f in (about, trace, speed, transformers, rates)}


if __name__ == "__main__":
    do, job, answer = sys.argv[1:]
    Path(answer).write_text(json.dumps(DO[do](json.loads(Path(job).read_text()))))
