"""Continue texts with a trained model, several at a time.

Two ways give the logits of the next token. With a cache of keys and values the model runs on the new tokens alone; the
rows of a batch end at one index, and shorter prompts begin later. Without, it runs on the whole text for every token.
`Generator.recomputes` says why, if it does.

Shape letters: B rows, S positions, V vocab.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from collections.abc import Generator as Stream
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from portatrain.backends.base import Backend
from portatrain.errors import UserError
from portatrain.training.drawing import Drawing
from portatrain.training.left_to_right import BATCH, batch_of, check_causal, why_no_cache

ROUND = 32
"""Lengths of prompts and caches are rounded up to a multiple of this, so that few programs are compiled."""
Logits = Stream[np.ndarray, np.ndarray, None]
"""Gives logits, (B, V), and is sent the tokens drawn from them, (B,)."""


@dataclass(frozen=True, kw_only=True)
class Continued:
    """The continuation of a prompt: its token ids, without the one at which it stopped."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    stopped: bool
    """True if it ended with a token of `stop`, False if `max_tokens` ended it."""


@dataclass
class Progress:
    """What was generated so far. Seconds and tokens of the first two positions, which compile, are apart."""

    tokens: int = 0
    texts: int = 0
    steady_tokens: int = 0
    steady_s: float = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second after the first two of every batch; None if there were no others."""
        return self.steady_tokens / self.steady_s if self.steady_s else None


class Generator:
    """Continue texts with `backend`'s model in a state.

    Args:
        state: the state, or a function that returns it.
        context: the number of tokens of the samples that the model was trained on, which is what it runs on if there is
            no cache: a longer text is continued from its last `context` tokens. None: the length of the text.
        cache: False to use no cache.
    """

    def __init__(
        self, backend: Backend, state: Callable[[], Any], *, context: int | None = None, cache: bool = True
    ) -> None:
        self._backend, self._state, self._context, self._cache = backend, state, context, cache
        model = backend.program.definition.model
        if not callable(getattr(model, "predict", None)):
            raise no_predict(f"model {type(model).__name__}")

    @functools.cached_property
    def recomputes(self) -> str:
        """Why every token runs the model on the whole text; '' if a cache is used."""
        if not self._cache:
            return "no cache was asked for"
        if self._cached is None:
            return f"backend {self._backend.name} has no cache on this mesh"
        program = self._backend.program
        with self._of_tokens():
            return why_no_cache(self._cached, program.definition, program.precision)

    @functools.cached_property
    def _cached(self) -> Any:
        make: Any = getattr(self._backend, "cached", None)
        return None if make is None else make(self._state())

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        drawing: Drawing | None = None,
        stop: Collection[int] = (),
        rows: int = 8,
        progress: Callable[[Progress], None] = lambda told: None,
    ) -> list[Continued]:
        """Return the continuation of every prompt, of at most `max_tokens` tokens.

        Args:
            prompts: token ids, at least one each. The number of a prompt in this list enters its draws.
            stop: ids at which a text ends.
            rows: the number of texts in a batch.
            progress: called after every position of a batch.

        Raises:
            UserError: no prompt, an empty one, or one with an id outside the vocabulary; logits that are not finite; a
                model whose predictions depend on later tokens.
        """
        _check(prompts, max_tokens, rows)
        with self._of_tokens():
            return self._continued(prompts, max_tokens, drawing or Drawing(), frozenset(stop), rows, progress)

    @contextmanager
    def _of_tokens(self) -> Iterator[None]:
        """Raise UserError if the model reads something of a batch that a text does not give."""
        try:
            yield
        except KeyError as error:
            key = error.args[0] if error.args else None
            if not isinstance(key, str) or key in BATCH:
                raise
            raise UserError(
                f"{type(self._backend.program.definition.model).__name__}.predict",
                expected=f"a model that predicts from {', '.join(BATCH)}",
                got=f"one that reads {key!r} of the batch",
                do="Only a model of tokens continues texts; predict(batch) takes any batch.",
            ) from error

    def _continued(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        drawing: Drawing,
        stop: frozenset[int],
        rows: int,
        progress: Callable[[Progress], None],
    ) -> list[Continued]:
        told = Progress()
        longest = max(map(len, prompts))
        rows = min(rows, len(prompts))
        found: list[Continued] = []
        for first in range(0, len(prompts), rows):
            numbers = [min(n, len(prompts) - 1) for n in range(first, first + rows)]  # the last batch is filled up
            batch = [np.asarray(prompts[n], np.int32) for n in numbers]
            logits = (self._again if self.recomputes else self._with_cache)(batch, longest, max_tokens)
            texts = self._batch(logits, batch, numbers, max_tokens, drawing, stop, told, progress)
            found += texts[: len(prompts) - first]
            told.texts = len(found)
            progress(told)
        return found

    def _batch(
        self,
        stream: Logits,
        batch: Sequence[np.ndarray],
        numbers: Sequence[int],
        max_tokens: int,
        drawing: Drawing,
        stop: frozenset[int],
        told: Progress,
        progress: Callable[[Progress], None],
    ) -> list[Continued]:
        texts: list[list[int]] = [[] for _ in batch]
        live = list(range(len(set(numbers))))
        ended: set[int] = set()
        logits_BV = next(stream)
        began_s = time.perf_counter()
        for n in range(max_tokens):
            drawn_B = np.zeros(len(batch), np.int32)
            for row in live:
                at = len(batch[row]) + n
                token = drawing.token(logits_BV[row], text=numbers[row], position=at)
                if token in stop:
                    ended.add(row)
                else:
                    drawn_B[row] = token
                    texts[row].append(token)
            live = [row for row in live if row not in ended]
            told.tokens += len(live)
            if n > 1:
                now_s = time.perf_counter()
                told.steady_tokens, told.steady_s = told.steady_tokens + len(live), told.steady_s + now_s - began_s
            began_s = time.perf_counter()
            progress(told)
            if not live or n + 1 == max_tokens:
                break
            logits_BV = stream.send(drawn_B)
        stream.close()
        return [
            Continued(prompt=tuple(p.tolist()), tokens=tuple(texts[row]), stopped=row in ended)
            for row, p in enumerate(batch)
        ]

    def _with_cache(self, batch: Sequence[np.ndarray], longest: int, max_tokens: int) -> Logits:
        size = _rounded(longest)
        lengths_B = np.array([len(p) for p in batch])
        offset_B, rows = size - lengths_B, len(batch)
        tokens_BS = np.zeros((rows, size), np.int32)
        for row, prompt in zip(tokens_BS, batch, strict=True):
            row[size - len(prompt) :] = prompt
        cached = self._cached
        logits_BV, cache = cached.begin(batch_of(tokens_BS, offset_B), offset_B, _rounded(size + max_tokens))
        for at in range(size, size + max_tokens):
            drawn_B = yield logits_BV
            step = {
                "tokens": drawn_B[:, None],
                "segment_ids": np.ones((rows, 1), np.int32),
                "positions": (at - offset_B)[:, None].astype(np.int32),
            }
            logits_BV, cache = cached.extend(step, offset_B, cache, at)

    def _again(self, batch: Sequence[np.ndarray], longest: int, max_tokens: int) -> Logits:
        size = self._context or _rounded(longest + max_tokens)
        self._check_causal(size)
        texts = [p.tolist() for p in batch]
        while True:
            seen = [text[-size:] for text in texts]
            ends_B = np.array([len(text) for text in seen])
            tokens_BS = np.zeros((len(texts), size), np.int32)
            for row, text in zip(tokens_BS, seen, strict=True):
                row[: len(text)] = text
            predicted = self._predict(batch_of(tokens_BS, ends_B=ends_B))
            drawn_B = yield predicted[np.arange(len(texts)), ends_B - 1]
            for text, token in zip(texts, drawn_B.tolist(), strict=True):
                text.append(token)

    def _predict(self, batch: Any) -> np.ndarray:
        found = self._backend.predict(self._state(), batch)
        if found.ndim != 3 or found.shape[:2] != batch["tokens"].shape:
            raise UserError(
                f"{type(self._backend.program.definition.model).__name__}.predict",
                expected=f"logits of every position, of shape {(*batch['tokens'].shape, 'vocabulary')}",
                got=f"shape {found.shape}",
                do="Return (B, S, V) from predict(ops, batch); only such a model continues texts.",
            )
        return found

    @functools.lru_cache(maxsize=8)  # noqa: B019  a Generator lives as long as its model
    def _check_causal(self, size: int) -> None:
        if size > 1:
            check_causal(self._predict, self._backend, size)


def no_predict(what: str) -> UserError:
    """Return the error for a model without a method `predict`."""
    return UserError(
        what,
        expected="a model with a method predict(ops, batch)",
        got="none",
        do="Write one that returns what the model predicts, of a language model the logits (B, S, V); evaluate(batch) "
        "needs no such method.",
    )


def _rounded(length: int) -> int:
    return -(-length // ROUND) * ROUND


def _check(prompts: Sequence[Sequence[int]], max_tokens: int, rows: int) -> None:
    for what, value in (("max_tokens", max_tokens), ("rows", rows)):
        if value < 1:
            raise UserError(what, expected="a whole number of at least 1", got=str(value), do="Choose a larger one.")
    if not prompts:
        raise UserError("prompts", expected="at least one", got="none", do="Give a list of them.")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(
                f"prompt {number}",
                expected="at least one token to continue",
                got="none",
                do="Give a text. An empty one needs an id that opens a document, which this data has not.",
            )
