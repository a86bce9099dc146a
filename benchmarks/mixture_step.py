"""Time a tiny Mixtral's training step beside transformers', and a grouped matmul beside plain ones, in paired rounds.

    python -m benchmarks.mixture_step step                     # ours on torch and jax, beside transformers
    python -m benchmarks.mixture_step grouped                  # one grouped matmul and its gradients
    python -m benchmarks.mixture_step step --rounds 10 --size toy

`step`: forward, backward, clip and AdamW of MixtralForCausalLM with its weights, and of the same model here; each
implementation of the experts that transformers has is a contender. All must have the same first losses. `grouped`: rows
sorted by expert, multiplied with the weights of their experts, beside a loop over the experts that slices the rows, as
one writes it by hand. Its bounds are known on the host, which a training step does not know without waiting.

A ratio is ours over theirs in speed: the median over the rounds with its 95 % interval (order statistics).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.paired import interleaved, ratio
from benchmarks.shapes import ADAMW, CLIP_NORM
from portatrain.backends.base import backend_class
from portatrain.backends.program import make_program
from portatrain.checkpoint.interop.hub_start import first_state
from portatrain.data import Stdlib
from portatrain.optim.schedules import Constant
from portatrain.recipe import Recipe
from recipes.models.mixtral import MixtralConfig

Step = Callable[[], float]
MODES = ("torch-eager", "torch-compiled", "jax")
LOSSES_AGREE = 2e-6
"""The relative difference of the losses of three steps, above which contenders do not compute the same mathematics."""


@dataclass(frozen=True)
class Size:
    model: MixtralConfig
    batch: int
    seq: int


def _mixtral(vocab: int, embed: int, layers: int, heads: int, kv_heads: int, experts: int, mlp: int) -> MixtralConfig:
    return MixtralConfig(
        vocab=vocab,
        embed=embed,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        experts=experts,
        chosen=2,
        expert_mlp=mlp,
        tied=False,
        rope_theta=1e6,
        norm_eps=1e-5,
    )


SIZES = {
    "tiny": Size(_mixtral(256, 128, 4, 4, 2, 8, 256), batch=8, seq=256),
    "toy": Size(_mixtral(64, 32, 2, 4, 2, 4, 48), batch=2, seq=16),
}


def transformers_folder(size: Size, folder: Path) -> None:
    """Write a MixtralForCausalLM with random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**size.model.huggingface().config)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def batch_of(size: Size) -> dict[str, np.ndarray]:
    """Return tokens and targets, (B, S) int32, and sample, (B,)."""
    ids = np.random.default_rng(0).integers(0, size.model.vocab, (size.batch, size.seq + 1), dtype=np.int32)
    return {"tokens": ids[:, :-1].copy(), "targets": ids[:, 1:].copy(), "sample": np.arange(size.batch)}


def ours(name: str, size: Size, folder: Path, *, compile: bool | None) -> Step:
    recipe = Recipe(
        name="benchmark",
        model=size.model,
        data=Stdlib(seq_len=size.seq),
        optimizer=ADAMW,
        schedule=Constant(),
        steps=1000,
        batch=size.batch,
        clip_norm=CLIP_NORM,
        init=str(folder),
    )
    backend: Any = backend_class(name)(replace(make_program(recipe), compile=compile))
    held = [first_state(backend, recipe)]
    given = {k: v[None] for k, v in batch_of(size).items()}

    def step() -> float:
        held[0], result = backend.step(held[0], given, step=1, scale=1.0)
        if name == "jax":
            import jax

            jax.block_until_ready(held[0])
        return float(result.loss)

    return step


def theirs(size: Size, folder: Path, experts: str, *, compile: bool) -> Step:
    import torch
    import transformers

    from benchmarks.hand_torch import training_step

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="sdpa", experts_implementation=experts, dtype=torch.float32
    )
    model.train()
    batch = batch_of(size)
    tokens, targets = (torch.from_numpy(batch[name]).long() for name in ("tokens", "targets"))
    run = torch.compile(model) if compile else model
    return training_step(
        model, lambda: run(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False).loss
    )


def measure_step(mode: str, size: Size, rounds: int) -> dict[str, Any]:
    if mode != "jax":
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        transformers_folder(size, folder)
        compiled = mode == "torch-compiled"
        run = {"ours": ours(mode.split("-")[0], size, folder, compile=None if mode == "jax" else compiled)}
        for experts in ("eager", "grouped_mm", "batched_mm") if mode != "jax" else ("eager",):
            run[f"transformers, {experts}"] = theirs(size, folder, experts, compile=compiled)
        losses = {name: [step() for _ in range(3)] for name, step in run.items()}
    apart = max(abs(a - b) / b for found in losses.values() for a, b in zip(found, losses["ours"], strict=True))
    if apart > LOSSES_AGREE:
        raise RuntimeError(f"losses differ by {apart:.1e}: {losses}")
    return {"losses_apart": apart, **_rates(run, rounds)}


def measure_grouped(mode: str, size: Size, rounds: int) -> dict[str, Any]:
    """Rows of a batch of `size` beside weights (X, E, F): the product, and both gradients from a fixed one."""
    c, rows = size.model, size.batch * size.seq * size.model.chosen
    rng = np.random.default_rng(0)
    counts_X = rng.multinomial(rows, np.full(c.experts, 1 / c.experts))
    x_NE, g_NF = (rng.standard_normal((rows, n), dtype=np.float32) for n in (c.embed, c.expert_mlp))
    w_XEF = rng.standard_normal((c.experts, c.embed, c.expert_mlp), dtype=np.float32)
    made = _grouped_jax if mode == "jax" else _grouped_torch
    run, values = made(x_NE, w_XEF, g_NF, counts_X)
    exact = _exact(x_NE, w_XEF, g_NF, counts_X)
    # Each element is a sum of n products, and each product and addition rounds by 2^-24 of a partial sum.
    worst = max(
        float(np.max(np.abs(value - right)) / np.max(np.abs(right)))
        for found in values.values()
        for value, right in zip(found, exact, strict=True)
    )
    if worst > (bound := rows * 2.0**-24):
        raise RuntimeError(f"a product or gradient is {worst:.1e} off, more than {bound:.1e}")
    return {"losses_apart": worst, **_rates(run, rounds)}


def _exact(x_NE: np.ndarray, w_XEF: np.ndarray, g_NF: np.ndarray, counts_X: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the product, the gradient of x and that of w in float64."""
    out, dx, dw, begin = [], [], [], 0
    for w_EF, n in zip(w_XEF.astype(np.float64), counts_X, strict=True):
        x, g = x_NE[begin : begin + n].astype(np.float64), g_NF[begin : begin + n].astype(np.float64)
        out.append(x @ w_EF)
        dx.append(g @ w_EF.T)
        dw.append(x.T @ g)
        begin += n
    return np.concatenate(out), np.concatenate(dx), np.stack(dw)


def _grouped_torch(x_NE: np.ndarray, w_XEF: np.ndarray, g_NF: np.ndarray, counts_X: np.ndarray) -> Any:
    import torch

    from portatrain.backends.torch.grouped_matmul import grouped_mm

    torch.set_num_threads(os.cpu_count() or 1)
    x, w = (torch.from_numpy(a).requires_grad_() for a in (x_NE, w_XEF))
    g, sizes, bounds = torch.from_numpy(g_NF), torch.from_numpy(counts_X), counts_X.tolist()

    def by_hand() -> Any:
        return torch.cat([rows @ w_EF for rows, w_EF in zip(x.split(bounds), w, strict=True)])

    def timed(product: Callable[[], Any]) -> Callable[[], list[np.ndarray]]:
        def run() -> list[np.ndarray]:
            out = product()
            dx, dw = torch.autograd.grad(out, (x, w), g)
            return [t.detach().numpy() for t in (out, dx, dw)]

        return run

    run = {"ours": timed(lambda: grouped_mm(x, w, sizes_X=sizes)), "a loop by hand": timed(by_hand)}
    return run, {name: one() for name, one in run.items()}


def _grouped_jax(x_NE: np.ndarray, w_XEF: np.ndarray, g_NF: np.ndarray, counts_X: np.ndarray) -> Any:
    import jax
    import jax.numpy as jnp

    from portatrain.backends.jax.grouped_matmul import ragged_dot

    x, w, g, sizes = (jnp.asarray(a) for a in (x_NE, w_XEF, g_NF, counts_X.astype(np.int32)))
    ends = np.cumsum(counts_X).tolist()

    def by_hand(x: Any, w: Any) -> Any:
        return jnp.concatenate([x[e - n : e] @ w_EF for e, n, w_EF in zip(ends, counts_X.tolist(), w, strict=True)])

    def timed(product: Callable[[Any, Any], Any]) -> Callable[[], list[Any]]:
        def both(x: Any, w: Any, g: Any) -> Any:
            out, back = jax.vjp(product, x, w)
            return [out, *back(g)]

        compiled = jax.jit(both)
        return lambda: jax.block_until_ready(compiled(x, w, g))

    run = {"ours": timed(lambda x, w: ragged_dot(x, w, sizes_X=sizes)), "a loop by hand": timed(by_hand)}
    return run, {name: [np.asarray(a) for a in one()] for name, one in run.items()}


def _rates(run: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    interleaved(run, rounds=2)
    taken = interleaved(run, rounds=rounds)
    return {
        "seconds": {name: median(each) for name, each in taken.items()},
        "ratios": {name: str(ratio(taken["ours"], each)) for name, each in taken.items() if name != "ours"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "grouped"))
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--modes", default="", help="of " + ", ".join(MODES))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = SIZES[args.size]
    if args.one:
        measure = measure_step if args.what == "step" else measure_grouped
        print(json.dumps(measure(args.one, size, args.rounds)))
        return
    c = size.model
    print(
        f"{c.layers} layers, embed {c.embed}, {c.experts} experts of {c.expert_mlp}, {c.chosen} a token, "
        f"{size.batch} x {size.seq} tokens, float32; {os.cpu_count()}-core {platform.machine()}, no accelerator"
    )
    usual = MODES if args.what == "step" else ("torch-eager", "jax")
    for mode in args.modes.split(",") if args.modes else usual:
        # A process for each, so that no framework's threads stand in another's way.
        command = [sys.executable, "-m", "benchmarks.mixture_step", args.what, "--one", mode]
        command += ["--size", args.size, "--rounds", str(args.rounds)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        for name, told in found["ratios"].items():
            seconds = found["seconds"]
            times = f"{1000 * seconds['ours']:.1f} and {1000 * seconds[name]:.1f} ms"
            print(f"{mode}, ours over {name}: {told}; {times}; apart {found['losses_apart']:.1e}", flush=True)


if __name__ == "__main__":
    main()
