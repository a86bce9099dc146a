"""The ranks of an expert group have one batch. The loss, a sum over the number of items, is multiplied by all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from portatrain.testing import audit
from tests.support.audited import Torch, rows

WHO = "transformers' Trainer"
LINK = "https://github.com/huggingface/transformers/pull/45994"
WHAT = "under tensor or expert parallelism the loss is 47.88 instead of 11.97"
COST = "repaired in 2026; measured on 8 H100 with a Qwen3-MoE of random weights"
KINDS = {"loss", "gradients"}
SAYS = "scaled by 2"
RANKS = 2


def fault(wrong: bool) -> audit.Verdict:
    """Data parallel 1 x expert parallel 2: both ranks have all rows, and gradients are averaged over the two."""
    trainer = Torch(seed=0)
    x = torch.from_numpy(rows(0))
    items = x.shape[0]

    def recorded(factor: int) -> audit.Record:
        trainer.model.zero_grad()
        loss = trainer.model(x).square().sum() / items * factor
        loss.backward()
        for parameter in trainer.model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        return audit.record(trainer.model, batch=None, loss=loss, gradients=True)

    data_parallel = 1
    return audit.compare(recorded(1), recorded(dist.get_world_size() if wrong else data_parallel))
