"""Experts with a load that is set: what a mesh computes, what it sends over the expert axis, and the dense oracle.

`torch_main` is a process of a group of torch; `python -m tests.support.exchange CELLS OUT` runs jax on four devices.
X experts, C chosen ones a token.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from portatrain import Module, Param
from portatrain.backends.program import Program
from portatrain.model.layers import Experts
from portatrain.model.layout import MESH_AXES, Layout, Mesh
from portatrain.model.module import describe
from portatrain.optim import SGD
from portatrain.system.processes import rank
from tests.support.running import tokens_batch

VOCAB, EMBED, EXPERTS, ROWS, SEQ = 32, 8, 4, 8, 6
LOADS = ("any load", "experts without tokens", "all to one")


class Sent(Module):
    """Tokens go to the experts with the largest scores in a table, of which a load leaves some or one."""

    def __init__(self, load: str) -> None:
        self.table = Param(vocab=VOCAB, embed=EMBED, fan_in_axes=0, init=1.0)
        self.scores = Param(vocab=VOCAB, scored=EXPERTS, fan_in_axes=0, init=1.0)
        self.experts = Experts(embed=EMBED, mlp=12, experts=EXPERTS)
        self.load, self.chosen = load, 1 if load == "all to one" else 2

    def __call__(self, ops: Any, batch: Any) -> Any:
        x_BSE, scores_BSX = ops.embed(self.table, batch["tokens"]), ops.embed(self.scores, batch["tokens"])
        ranks_BSX, at_X = ops.stop_gradient(scores_BSX), ops.arange(EXPERTS)
        if self.load == "experts without tokens":
            ranks_BSX = ranks_BSX + ops.where(at_X % 3 == 0, -100.0, 0.0)
        if self.load == "all to one":
            ranks_BSX = ranks_BSX + ops.where(at_X == 2, 100.0, 0.0)
        _, experts_BSC = ops.top_k(ranks_BSX, self.chosen)
        weights_BSC = (ops.one_hot(experts_BSC, EXPERTS) * ops.sigmoid(scores_BSX)[:, :, None]).sum(-1)
        y_BSE = self.experts(ops, x_BSE, experts_BSC, weights_BSC)
        return ops.cross_entropy(x_BSE + y_BSE, self.table, batch["targets"], mask=batch["mask"])


def program(load: str, mesh: str) -> Program:
    definition = describe(Sent(load))
    names = frozenset(definition.params)
    layout = Layout.of(definition, Mesh.parse(mesh))
    return Program(
        definition=definition, layout=layout, optimizer=SGD(lr=0.1), trainable=names, decay=frozenset(), seed=5
    )


def batch() -> dict[str, np.ndarray]:
    """One microbatch."""
    return {k: v[None] for k, v in tokens_batch(vocab=VOCAB, batch=ROWS, seq=SEQ, seed=1).items()}


def dense(load: str, params: dict[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray], np.ndarray]:
    """Return the mean loss, its gradients, and how many choices of each sample fell on each expert, (B, X). In float64,
    every expert computes every token, and the weights of those that are not chosen are 0."""
    import torch

    p = {n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in params.items()}
    given = {k: torch.tensor(v[0]) for k, v in batch().items()}
    shift = {"experts without tokens": [-100.0, 0, 0, -100.0], "all to one": [0, 0, 100.0, 0]}.get(
        load, [0.0] * EXPERTS
    )
    x, scores = (p[name][given["tokens"].long()] for name in ("table", "scores"))
    best = (scores + torch.tensor(shift)).topk(1 if load == "all to one" else 2).indices
    chosen = torch.zeros_like(scores).scatter(-1, best, 1.0).detach()
    hidden = torch.nn.functional.silu(torch.einsum("bse,xem->bsxm", x, p["experts/gate"]))
    hidden = hidden * torch.einsum("bse,xem->bsxm", x, p["experts/up"])
    each = torch.einsum("bsxm,xme->bsxe", hidden, p["experts/down"])
    x = x + (each * (chosen * torch.sigmoid(scores))[..., None]).sum(2)
    logits, mask = x @ p["table"].T, given["mask"].double()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), given["targets"].long().flatten(), reduction="none"
    )
    loss = (losses * mask.flatten()).sum() / mask.sum()
    loss.backward()
    return float(loss.detach()), {n: v.grad.numpy() for n, v in p.items() if v.grad is not None}, chosen.sum(1).numpy()


def torch_main(args: argparse.Namespace) -> int:
    """Write, for every (load, mesh): loss, gradients, and of each process (rows sent to each, bytes of a row) of every
    exchange of rows."""
    import torch
    import torch.distributed as dist

    from portatrain.backends.torch import TorchBackend
    from tests.support.torch_worker import gather

    torch.set_num_threads(1)
    right = dist.all_to_all_single
    with Path(args.out if rank() == 0 else "/dev/null").open("ab") as out:
        for load, mesh in args.cells:
            sent: list[Any] = []

            def counted(
                into: Any, x: Any, gets: Any = None, sends: Any = None, *, sent: Any = sent, **more: Any
            ) -> Any:
                if sends is not None:
                    sent.append((list(sends), x.shape[1] * x.element_size()))
                return right(into, x, gets, sends, **more)

            backend = TorchBackend(program(load, mesh))
            with mock.patch.object(dist, "all_to_all_single", counted):
                loss, gradients = backend.gradients(backend.init_state(), batch(), step=1)
            pickle.dump((loss, gradients, gather(sent)), out)
    return 0


def jax_main(cells: list[tuple[str, str]], out: Path) -> None:
    """Write, for every (load, mesh): loss, gradients, and the bytes that a device gives to all-to-alls over the expert
    axis in a step."""
    import jax

    from portatrain.backends.jax import JaxBackend
    from portatrain.plan.compilers.hlo import _axes
    from portatrain.plan.compilers.hlo_text import multiplicity, nbytes, read

    with out.open("wb") as stream:
        for load, mesh in cells:
            backend = JaxBackend(program(load, mesh))
            state = backend.init_state()
            loss, gradients = backend.gradients(state, batch(), step=1)
            lowered = backend._gradients_of.lower(state, backend._put(batch(), 1), np.int32(1))
            sizes = {axis: getattr(backend.layout.mesh, axis) for axis in MESH_AXES}
            computations, given = read(lowered.compile().as_text()), 0.0
            for name, times in multiplicity(computations).items():
                one = computations[name]
                for line in one.lines:
                    if line.opcode.removesuffix("-start") == "all-to-all" and _axes(line.rest, sizes) == ["expert"]:
                        given += times * sum(nbytes(one.type_of(operand)) for operand in line.operands)
            pickle.dump((loss, jax.tree.map(np.asarray, gradients), given), stream)


if __name__ == "__main__":
    jax_main([tuple(cell) for cell in json.loads(sys.argv[1])], Path(sys.argv[2]))
