"""Merge the factors of LoRA into their weights, or drop them. Both leave a model without factors (`--set lora=none`).

Merged, W' = W + alpha / rank * A B, in float64: the function stays. The checkpoint keeps W' in the dtype of W, which
rounds it; the proof has that difference too. Dropped, W stays, and the function is that of the model before LoRA.

W was not trained under LoRA, so it has no slots: they start at zero.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from portatrain.checkpoint.surgery.edits import Edit, Surgery, named, tensors
from portatrain.errors import UserError
from portatrain.model.lora import is_factor
from portatrain.model.module import Definition, TensorInfo


def merge_lora(before: Definition, after: Definition) -> Surgery:
    """Return the surgery to the model in which every weight is its sum with the product of its factors."""
    return Surgery(
        edits={
            name: Edit(
                of=(name, f"{name}/lora_a", f"{name}/lora_b"),
                make=partial(_merged, before.params[name], _scale(before, name)),
            )
            for name in _adapted("merge-lora", before, after)
        }
    )


def drop_lora(before: Definition, after: Definition) -> Surgery:
    """Return the surgery to the model without factors."""
    _adapted("drop-lora", before, after)
    return Surgery(edits={}, changes="the product of the factors is left out")


def _adapted(what: str, before: Definition, after: Definition) -> list[str]:
    """Return the weights of which the factors are gone."""
    was, now = tensors(before), tensors(after)
    gone = [name for name in was if name not in now]
    other = [n for n in now if n not in was or was[n].shape != now[n].shape] + [n for n in gone if not is_factor(n)]
    if not gone or other:
        raise UserError(
            f"surgery {what}",
            expected="a model with factors of LoRA before it, the same model without them after it",
            got=f"other tensors too: {named(other)}" if other else "the same tensors before and after it",
            do="Set --set lora=none, and nothing else of the model."
            if any(map(is_factor, was))
            else "The run has no LoRA: there is nothing to merge or to drop.",
        )
    return sorted({name.rpartition("/")[0] for name in gone})


def _scale(before: Definition, name: str) -> float:
    """Return alpha / rank of an adapted weight."""
    return float(before.modules[name].scale)  # type: ignore[attr-defined]


def _merged(info: TensorInfo, scale: float, weight: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    lead, rank = info.shape[: info.batch_dims], a.shape[-1]
    product = np.matmul(a.reshape(*lead, -1, rank), b.reshape(*lead, rank, -1))
    return weight + scale * product.reshape(info.shape)
