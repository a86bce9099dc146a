"""Prove portatrain on the one GPU of this machine, in under ten minutes: numbers, a move, kernels, speed.

    python -m benchmarks.gpu_proof                       # or: make gpu-proof; writes runs/gpu-proof/proof.md and .json
    python -m benchmarks.gpu_proof --device cpu          # the same parts at tiny sizes, without a GPU
    python -m benchmarks.gpu_proof --only parity,move

parity       five steps of a decoder in fp32 by jax and torch, on the CPU and on the device: losses and gradients
             within the bound that follows from the lengths of the sums
move         a run that begins with jax on the device, goes on with torch on it, and ends on the CPU, beside an
             undisturbed one; every resume has to be `continuous`
court        the kernels of the device on hard cases, beside float64
rates        the FLOP/s of one large matrix product, by framework and dtype
speed        tokens a second and peak memory of decoders with layers of Llama 3 8B and 1B, as many as fit, in bf16 and
             fp8 at 4k and 8k tokens, beside transformers, the plan and the measured matmul rate

Parts and cells that the time does not reach are listed as such. The exit code is 1 if a part says no, 2 if there is no
such device.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu_proof.jobs import Jobs
from benchmarks.gpu_proof.page import page
from benchmarks.gpu_proof.parts import court, move, parity, rates, speed

PARTS: dict[str, Callable[[Jobs, dict[str, Any]], dict[str, Any]]] = {
    "parity": parity,
    "move": move,
    "court": court,
    "rates": rates,
    "speed": speed,
}


def device_here() -> str:
    """Return the device of torch or jax on this machine: cuda, rocm or cpu."""
    if importlib.util.find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            return "rocm" if getattr(torch.version, "hip", None) else "cuda"
    if importlib.util.find_spec("jax"):
        import jax

        first = jax.devices()[0]
        if first.platform in ("gpu", "cuda", "rocm"):
            return "rocm" if "rocm" in first.client.platform_version.lower() else "cuda"
    return "cpu"


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu_proof", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "rocm", "cpu"), help="default: the GPU of this machine")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-proof"), help="folder of the results")
    parser.add_argument("--minutes", type=float, default=10.0, help="begin nothing that would end later")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, of {','.join(PARTS)}")
    args = parser.parse_args()
    began = time.monotonic()
    wanted = args.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"--only: expected {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    here = device_here()
    device = args.device or here
    if args.device is None and here == "cpu":
        parser.error(
            "expected a GPU that torch or jax sees, got none. Add --device cpu to try the parts at tiny sizes."
        )
    if device not in ("cpu", here):
        parser.error(f"--device {device}: expected a device of this machine, got {here}.")
    backends = [name for name in ("jax", "torch") if importlib.util.find_spec(name)]
    args.out.mkdir(parents=True, exist_ok=True)
    files = args.out / "files"
    files.mkdir(exist_ok=True)
    jobs = Jobs(device=device, folder=files, until=began + 60 * args.minutes)
    found: dict[str, Any] = {"device": device, "backends": backends, "minutes": args.minutes}
    found["about"] = jobs.answer("about", {"backends": backends, "device": device}, device=device, most_s=120)
    for name in PARTS:
        if name in wanted:
            print(f"gpu-proof: {name} ... ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
            found[name] = PARTS[name](jobs, found)
    found["seconds"] = time.monotonic() - began
    (args.out / "proof.json").write_text(json.dumps(found, indent=1))
    (args.out / "proof.md").write_text(page(found))
    print(page(found))
    return 0 if all(found[name]["good"] for name in PARTS if name in found) else 1


if __name__ == "__main__":
    sys.exit(main())
