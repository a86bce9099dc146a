"""Two microbatches, each with the mean over its own unmasked tokens, are averaged: short rows count too much."""

from __future__ import annotations

import torch
from torch.nn import functional

from portatrain.testing import audit
from tests.support.audited import Torch

WHO = "transformers, and most trainers"
LINK = "https://github.com/huggingface/transformers/issues/24725"
WHAT = "accumulation over microbatches with unequal masks changes the loss and the gradient"
COST = "reported in July 2023, repaired in October 2024; every run that accumulated until then"
KINDS = {"loss", "gradients"}
SAYS = "loss: loss:"
ROWS, TOKENS = 4, 16


def recorded(model: torch.nn.Module, microbatches: int, wrong: bool) -> audit.Record:
    rng = torch.Generator().manual_seed(0)
    x_BTE = torch.randn(ROWS, TOKENS, 8, generator=rng)
    labels_BT = torch.randint(0, 4, (ROWS, TOKENS), generator=rng)
    for row in range(ROWS):
        labels_BT[row, 2 + 4 * row :] = -100  # 2, 6, 10 and 14 tokens
    model.zero_grad()
    total = torch.zeros(())
    whole = (labels_BT != -100).sum()
    for x, labels in zip(x_BTE.chunk(microbatches), labels_BT.chunk(microbatches), strict=True):
        part = functional.cross_entropy(model(x).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        part = part / ((labels != -100).sum() * microbatches if wrong else whole)
        part.backward()
        total += part.detach()
    return audit.record(model, batch={"x": x_BTE, "labels": labels_BT}, loss=total, gradients=True)


def fault(wrong: bool) -> audit.Verdict:
    model = Torch().model
    return audit.compare(recorded(model, 1, wrong), recorded(model, 2, wrong))
