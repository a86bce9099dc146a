"""The parts of the proof. Each returns plain data with `good`: False if it says no, and what it measured."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_proof.jobs import Jobs
from benchmarks.gpu_proof.speed import layers_that_fit, matmul_flops
from portatrain.backends.kernels import TABLE, TRIED
from portatrain.runs.run_dir import RunDir
from portatrain.system.exit_codes import FOUND, OK, RESUMABLE
from portatrain.testing import parity as checks

Found = dict[str, Any]

SMALL = (
    *("model.layers=2", "model.embed=64", "model.mlp=128", "model.dropout=0.1", "data.seq_len=64"),
    *("batch=8", "accumulation=2", "steps=12", "schedule.warmup=2", "eval_every=none", "hooks=()"),
)
LARGER = ("model.layers=4", "model.embed=256", "model.mlp=512", "data.seq_len=256")
STEPS = 5


def sizes(jobs: Jobs) -> list[str]:
    """Return the overrides of tiny-lm for the parts on numbers."""
    return [*SMALL, *(LARGER if jobs.device != "cpu" else ())]


def places(jobs: Jobs, found: Found) -> list[tuple[str, str]]:
    """Return (backend, device) of every process that the parts on numbers compare; the first is the baseline."""
    return [(b, d) for d in dict.fromkeys(("cpu", jobs.device)) for b in found["backends"]]


def parity(jobs: Jobs, found: Found) -> Found:
    """Compare losses, norms and gradients of a few fp32 steps with those of the first framework on the CPU."""
    traces: dict[str, checks.Trace] = {}
    rows, bound = [], 0.0
    for backend, device in places(jobs, found):
        name = f"{backend}, {device}"
        arrays = jobs.folder / f"{backend}-{device}.npz"
        job = {"recipe": "tiny-lm", "overrides": sizes(jobs), "steps": STEPS, "backend": backend, "arrays": str(arrays)}
        said = jobs.answer("trace", job, device=device, most_s=150)
        if "error" in said:
            rows.append({"who": name, "error": said["error"]})
            continue
        bound = said["bound"]
        traces[name] = _trace(said, arrays)
        if len(traces) > 1:
            first, baseline = next(iter(traces.items()))
            verdict = checks.compare(baseline, traces[name], bound=bound)
            rows.append({"who": name, "beside": first, "loss": verdict.loss, "gradient": verdict.gradient})
            rows[-1] |= {"worst": verdict.worst_gradient, "norm": verdict.norm, "failures": verdict.failures}
    good = len(traces) > 1 and all(not row.get("failures") and "error" not in row for row in rows)
    return {"good": good, "bound": bound, "steps": STEPS, "rows": rows}


def _trace(said: Found, arrays: Path) -> checks.Trace:
    with np.load(arrays) as held:
        roles: dict[str, dict[str, np.ndarray]] = {"g": {}, "p": {}}
        for key in held.files:
            role, _, name = key.partition("/")
            roles[role][name] = held[key]
    return checks.Trace(losses=said["losses"], norms=said["norms"], gradients=roles["g"], updated=roles["p"])


def move(jobs: Jobs, found: Found) -> Found:
    """Move a run from one framework to the other on the device, then to the CPU, beside an undisturbed run."""
    backends = found["backends"]
    legs = [(backends[0], jobs.device, 4), (backends[-1], jobs.device, 8), (backends[0], "cpu", None)]
    moved, whole = jobs.folder / "moved", jobs.folder / "undisturbed"
    for run in (moved, whole):
        shutil.rmtree(run, ignore_errors=True)
    for run, (backend, device, stop) in ((moved, legs[0]), (moved, legs[1]), (moved, legs[2]), (whole, legs[2])):
        words = [sys.executable, "-m", "portatrain.cli", "train", "tiny-lm", "--run-dir", str(run)]
        words += [word for size in sizes(jobs) for word in ("--set", size)] + ["--backend", backend]
        words += ["--stop-at", str(stop)] if stop else []
        code, said = jobs.run(words, device=device, most_s=120)
        if code not in (OK, RESUMABLE):
            return {"good": False, "error": f"{backend} on {device}: {said[-600:].strip()}"}
    one, two = RunDir(whole).curve(), RunDir(moved).curve()
    apart = max(abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in zip(one, two, strict=True))
    resumes = [{"step": e["step"], "verdict": e["verdict"]} for e in RunDir(moved).events("resumed")]
    continuous = len(resumes) == 2 and all(one["verdict"] == "continuous" for one in resumes)
    ways = [f"{backend} on {device}" for backend, device, _ in legs]
    return {"good": continuous, "legs": ways, "resumes": resumes, "steps": len(two), "loss_apart": apart}


def court(jobs: Jobs, found: Found) -> Found:
    """Try the kernels of the table for the installed frameworks on the device."""
    rows = []
    pairs = dict.fromkeys(
        (k.name, k.operation, b) for k in TABLE if k.operation in TRIED for b in k.backends if b in found["backends"]
    )
    for name, operation, backend in pairs:
        on = {"jax": "gpu", "torch": "cuda"}[backend] if jobs.device != "cpu" else "cpu"
        words = [
            sys.executable,
            "-m",
            "portatrain.testing.kernels",
            name,
            "--operation",
            operation,
            "--json",
            "--quick",
        ]
        code, said = jobs.run([*words, "--backend", backend, "--device", on], device=jobs.device, most_s=60)
        row: Found = {"kernel": name, "operation": operation, "backend": backend, "exit_code": code}
        if code in (OK, FOUND) and (start := said.find("{")) >= 0:
            (verdict,) = json.loads(said[start:])["verdicts"]
            row |= {k: verdict[k] for k in ("verdict", "passed", "convicted", "largest")}
            row["refused"] = len(verdict["refused"])
        else:
            row["error"] = said
        rows.append(row)
    tried = [row for row in rows if "verdict" in row]
    return {"good": bool(tried) and all(row["verdict"] != "convicted" for row in tried), "rows": rows}


def rates(jobs: Jobs, found: Found) -> Found:
    """Measure a large matrix product in each framework."""
    job = {"n": 8192 if jobs.device != "cpu" else 512, "device": jobs.device}
    row: Found = {}
    for backend in found["backends"]:
        said = jobs.answer("rates", {**job, "backends": [backend]}, device=jobs.device, most_s=60)
        row |= said.get("flops_per_s", {f"{backend}": said.get("error")})
    return {"good": any(isinstance(v, float) for v in row.values()), "n": job["n"], "flops_per_s": row}


def speed(jobs: Jobs, found: Found) -> Found:
    """Time decoders, the most wanted cells first; cells that the time does not reach are named."""
    about = found["about"]
    name = about.get("torch", {}).get("name") or about.get("jax", {}).get("name") or "cpu"
    free = about.get("torch", {}).get("free_bytes") or about.get("jax", {}).get("free_bytes")
    small = jobs.device == "cpu"
    cells = itertools.product(("tiny",) if small else ("8b", "1b"), (64,) if small else (4096, 8192), ("bf16", "fp8"))
    contenders: list[tuple[str, Callable[[str], bool]]] = [
        *((backend, lambda precision: True) for backend in found["backends"]),
        *([("transformers", lambda precision: precision == "bf16")] if _has(about, "transformers", "torch") else []),
    ]
    rows = []
    for shape, seq, precision in cells:
        layers = 2 if small else layers_that_fit(shape, free or 16 * 2**30)
        job = {"shape": shape, "seq": seq, "precision": precision, "batch": 1, "layers": layers, "name": name}
        job |= {"device": jobs.device, "seconds": 1 if small else 4}
        for who, takes in contenders:
            if not takes(precision):
                continue
            row: Found = {"who": who, "shape": shape, "seq": seq, "precision": precision, "layers": layers}
            if not layers:
                rows.append(row | {"error": "not one layer fits beside the table"})
                continue
            do = who if who == "transformers" else "speed"
            row |= jobs.answer(do, {**job, "backend": who}, device=jobs.device, most_s=90)
            if "step_s" in row:
                row["tokens_per_s"] = seq / row["step_s"]
                row["matmul_flops_per_s"] = matmul_flops(job) / row["step_s"]
            rows.append(row)
    return {"good": any("step_s" in row for row in rows), "rows": rows}


def _has(about: Found, *packages: str) -> bool:
    return all(about.get("packages", {}).get(p, "not installed") != "not installed" for p in packages)
