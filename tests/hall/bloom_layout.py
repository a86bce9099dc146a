"""A checkpoint of one file a layer goes to another number of pipeline stages; the files are taken in the order of text.

What went wrong at BLOOM was not published. This cause has the effect that was: no error, a loss a little too high, and
a gradient norm ten times too high.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from portatrain.testing import audit
from tests.support.audited import rows

WHO = "BLOOM-176B"
LINK = "https://github.com/bigscience-workshop/bigscience/blob/master/train/tr11-176B-ml/reshaping-log.md"
WHAT = "another pipeline layout changes the loss from 1.944 to 2.043 and the gradient norm from 0.128 to 1.335"
COST = 'not found: "there are some subtle dependencies that we are missing here"'
KINDS = {"swapped", "loss", "gradients"}
SAYS = "it holds what 8.weight held"
LAYERS = 12


def stages(number: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(8, 8) for _ in range(LAYERS)]
    per = LAYERS // number
    return nn.Sequential(*(nn.Sequential(*layers[i * per : (i + 1) * per]) for i in range(number)))


def flat_name(name: str, number: int) -> str:
    """Return the number of a layer in the whole model, from `STAGE.LAYER.weight`."""
    stage, layer, rest = name.split(".")
    return f"{int(stage) * (LAYERS // number) + int(layer)}.{rest}"


def recorded(model: nn.Sequential, number: int) -> audit.Record:
    model.zero_grad()
    loss = model(torch.from_numpy(rows(0))).square().mean()
    loss.backward()
    names = {flat_name(n, number): p for n, p in model.named_parameters()}
    return audit.record(names, loss=loss, gradients={n: p.grad for n, p in names.items()})


def fault(wrong: bool) -> audit.Verdict:
    old, new = stages(4, seed=0), stages(6, seed=1)
    layers = [layer for stage in old for layer in stage]
    files: dict[str, Any] = {f"layer_{i}": layer.state_dict() for i, layer in enumerate(layers)}
    order = sorted(files, key=None if wrong else lambda name: int(name.split("_")[1]))
    for layer, name in zip([layer for stage in new for layer in stage], order, strict=True):
        layer.load_state_dict(files[name])
    return audit.compare(recorded(old, 4), recorded(new, 6))
