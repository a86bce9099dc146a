"""The byte 3-gram model against a slow direct implementation with dictionaries."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from portatrain.data.ngram import START, KneserNey, discounts
from portatrain.errors import UserError


class Direct:
    """Equations 26 and 27 of Chen and Goodman (1999), one dictionary an order."""

    def __init__(self, documents: list[bytes]) -> None:
        trigrams = Counter(t for d in documents for t in _trigrams(d))
        pairs = Counter((v, w) for _, v, w in trigrams)
        ones = Counter((w,) for _, w in pairs)
        self.orders = [dict(ones), dict(pairs), dict(trigrams)]
        self.discounts, self.contexts = [], []
        for grams in self.orders:
            n = Counter(grams.values())
            y = n[1] / (n[1] + 2 * n[2]) if n[1] else 0.0
            found = []
            for i in (1, 2, 3):
                d = i - (i + 1) * y * n[i + 1] / n[i] if n[i] else 0.0
                found.append(d if 0 < d < i else i / 2)
            self.discounts.append(found)
            contexts = defaultdict(list)
            for gram, count in grams.items():
                contexts[gram[:-1]].append(count)
            self.contexts.append(contexts)

    def probability(self, context: tuple[int, ...], w: int) -> float:
        order = len(context)
        lower = self.probability(context[1:], w) if order else 1 / 256
        counts = self.contexts[order].get(context)
        if not counts:
            return lower
        discount = self.discounts[order]
        count = self.orders[order].get((*context, w), 0)
        kept = count - discount[min(count, 3) - 1] if count else 0.0
        taken = sum(discount[min(c, 3) - 1] for c in counts)
        return (kept + taken * lower) / sum(counts)


def _trigrams(document: bytes) -> list[tuple[int, int, int]]:
    symbols = [START, START, *document]
    return list(zip(symbols, symbols[1:], symbols[2:], strict=False))


def text(seed: int, documents: int, alphabet: bytes) -> list[bytes]:
    chance = random.Random(seed)
    return [bytes(chance.choices(alphabet, k=chance.randint(1, 120))) for _ in range(documents)]


CORPORA = {
    "one byte": [b"a"],
    "no discounts to estimate": [b"ab" * 50],
    "few symbols": text(0, 20, b"abcab \n\0"),
    "all bytes": text(1, 30, bytes(range(256))),
    "code": [b"def f(x):\n    return x + 1\n" * 3, b"import os\n", b"class A:\n    pass\n"],
}


@pytest.mark.parametrize("name", CORPORA)
def test_agrees_with_the_direct_model(name):
    documents = CORPORA[name]
    held = [*text(7, 5, b"ab de\nf"), b"\xff\xfe", documents[0]]
    direct, model = Direct(documents), KneserNey(np.frombuffer(d, np.uint8) for d in documents)
    grams = [t for d in held for t in _trigrams(d)]
    want = np.array([direct.probability((u, v), w) for u, v, w in grams])
    got = model.probability(*np.array(grams).T)
    # Both sum a few positive float64 terms.
    np.testing.assert_allclose(got, want, rtol=1e-13)
    bits = -sum(math.log2(p) for p in want) / len(want)
    assert model.bits_per_byte(np.frombuffer(d, np.uint8) for d in held) == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize("name", CORPORA)
def test_sums_to_one_over_the_next_byte(name):
    model = KneserNey(np.frombuffer(d, np.uint8) for d in CORPORA[name])
    byte = np.arange(256)
    for u, v in [(START, START), (START, 97), (97, 98), (98, 97), (10, 32), (0, 255), (255, 254)]:
        p = model.probability(np.full(256, u), np.full(256, v), byte)
        assert (p > 0).all()
        assert p.sum() == pytest.approx(1, abs=1e-12)


def test_long_documents_are_cut_without_a_seam(monkeypatch):
    documents = [np.frombuffer(d, np.uint8) for d in text(3, 6, b"abc")]
    whole = KneserNey(documents)
    want = whole.bits_per_byte(documents)
    monkeypatch.setattr("portatrain.data.ngram._PIECE", 7)
    pieces = KneserNey(documents)
    assert np.array_equal(pieces._three.count, whole._three.count)
    assert pieces.bits_per_byte(documents) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("n", "want"),
    [
        ([100, 40, 20, 10], [0, 1 - 2 * (5 / 9) * 0.4, 2 - 3 * (5 / 9) * 0.5, 3 - 4 * (5 / 9) * 0.5]),
        ([0, 0, 0, 0], [0, 0.5, 1, 1.5]),
        ([1, 0, 0, 0], [0, 0.5, 1, 1.5]),
        ([10, 1, 90, 1], [0, 1 - 2 * (10 / 12) * 0.1, 1, 3 - 4 * (10 / 12) / 90]),
    ],
)
def test_discounts(n, want):
    assert discounts(np.array(n)).tolist() == pytest.approx(want)


def test_empty_documents():
    with pytest.raises(UserError, match="3-gram"):
        KneserNey([])
    with pytest.raises(UserError, match="score"):
        KneserNey([np.array([1, 2], np.uint8)]).bits_per_byte([np.array([], np.uint8)])
