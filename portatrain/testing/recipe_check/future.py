"""Whether a model that predicts the next token sees that token.

A batch is one of next tokens if its `targets` are its `tokens` one place later. The rule holds for every loss by
`ops.cross_entropy` over such a batch, whatever it predicts and however it shifts: one token of the text is changed,
in both arrays. Where a label of a call changes, that token is the answer there, and the features from which the call
predicts it may not change. Masked positions do not count.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from portatrain.backends.base import Context
from portatrain.backends.reference.guard import GuardedOps, unwrapped
from portatrain.backends.reference.run import forward
from portatrain.testing.guard import CLOSE
from portatrain.testing.recipe_check.report import Finding
from portatrain.testing.recipe_check.small import Batch
from portatrain.testing.recipe_check.subject import Subject

ROUNDS = 4
"""Changed tokens of each sample, each in a forward pass of its own."""
FEW = 0.5
"""Models that fill in masked tokens let some of them be seen, on purpose: up to this part of the predictions."""

Prediction = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Features (N, E), labels (N) and weights (N) of one call."""


def future(subject: Subject) -> list[Finding]:
    """Predictions that depend on the token which they are to predict."""
    batch = subject.batch
    if not is_next_tokens(batch):
        return []
    before, tried, seen = _predictions(subject, batch), 0, 0
    for changed in _changed(batch):
        after = _predictions(subject, changed)
        if len(before) != len(after):
            return []
        for (x, labels, weights), (y, others, _) in zip(before, after, strict=True):
            if x.shape != y.shape or len(labels) != len(others):
                return []
            answers = (labels != others) & (weights > 0)
            apart = np.abs(x - y).max(-1) > CLOSE * max(1.0, float(np.abs(x).max(initial=0.0)))
            tried, seen = tried + int(answers.sum()), seen + int((answers & apart).sum())
    if seen <= FEW * tried:
        return []
    return [
        Finding(
            what="ops.cross_entropy of the next token",
            said="expected predictions that do not depend on the token that they are to predict, got "
            f"{seen} of {tried} that change with it",
            do="Give ops.attention causal=True and let nothing else look at later positions; take the features from "
            "batch['tokens'] and the labels from batch['targets'], which are one token later already.",
        )
    ]


def is_next_tokens(batch: Batch) -> bool:
    """Return whether the targets are the tokens one place later, wherever they count."""
    tokens, targets = batch.get("tokens"), batch.get("targets")
    if tokens is None or targets is None or tokens.ndim != 2 or tokens.shape != targets.shape:
        return False
    if tokens.dtype.kind not in "iu" or targets.dtype.kind not in "iu" or tokens.shape[1] < 2:
        return False
    counts = _counts(batch)[:, :-1]
    return bool(counts.any() and ((tokens[:, 1:] == targets[:, :-1]) | ~counts).all())


def _counts(batch: Batch) -> np.ndarray:
    """Return which positions count, (samples, positions) bool; a mask may also be one of whole samples."""
    shape, mask = batch["tokens"].shape, np.asarray(batch.get("mask", 1.0))
    if mask.shape == shape[:1]:
        mask = mask[:, None]
    fits = mask.ndim in (0, 2) and all(m in (1, n) for m, n in zip(mask.shape, shape, strict=False))
    return np.broadcast_to(mask > 0, shape) if fits else np.ones(shape, bool)


def _changed(batch: Batch) -> Iterator[Batch]:
    """Yield the batch with one token of each sample changed to another one of the batch, within a document."""
    rng, tokens = np.random.default_rng(5), batch["tokens"]
    known, inside = np.unique(tokens), _counts(batch)[:, :-1]
    segments = np.asarray(batch.get("segment_ids", 0))
    if segments.shape == tokens.shape:
        inside = inside & (segments[:, 1:] == segments[:, :-1])
    if len(known) < 2:
        return
    for _ in range(ROUNDS):
        made = {**batch, "tokens": tokens.copy(), "targets": batch["targets"].copy()}
        for row, places in enumerate(inside):
            if places.any():
                at = int(rng.choice(np.flatnonzero(places))) + 1
                value = rng.choice(known[known != tokens[row, at]])
                made["tokens"][row, at] = made["targets"][row, at - 1] = value
        yield made


def _predictions(subject: Subject, batch: Batch) -> list[Prediction]:
    """Return what every call of `ops.cross_entropy` in training is given."""
    found: list[Prediction] = []

    class Noting(GuardedOps):
        """Keep the arguments of cross-entropies."""

        def cross_entropy(self, x: Any, table_VE: Any, targets: Any, *, mask: Any = None, **options: Any) -> Any:
            whole = np.asarray(unwrapped(targets))
            labels = whole.ravel()
            weights = np.broadcast_to(1.0 if mask is None else unwrapped(mask), whole.shape).ravel()
            features = np.asarray(unwrapped(x))
            found.append((features.reshape(-1, features.shape[-1]), labels, weights))
            return super().cross_entropy(x, table_VE, targets, mask=mask, **options)

    context = Context(seed=subject.recipe.seed, step=1, training=True)
    with np.errstate(all="ignore"):
        forward(subject.definition, subject.moved, batch, context, operations=Noting)
    return found
