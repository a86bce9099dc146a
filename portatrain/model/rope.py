"""Rotary frequencies and their scalings for long contexts. Plain Python floats, which are float64: recipes import it,
and every backend rounds the same numbers once to float32.

A scaling is one of the classes below; `rotary` gives the frequencies. Each names its `rope_type` in transformers, and
tests compare it with that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from portatrain.config import require
from portatrain.errors import UserError


class Scaling:
    """Base class of the scalings: how rotary frequencies change for contexts that are longer than those trained.

    Raises:
        UserError: a number of a scaling is not finite and above 0.
    """

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]  # every scaling is a dataclass
            value = getattr(self, field.name)
            for number in value if isinstance(value, tuple) else (value,):
                good = number is None or isinstance(number, bool) or 0 < number < math.inf
                require(self, field.name, good, "finite, and above 0")

    def at(self, length: int) -> Scaling:
        """Return the scaling for texts of `length` positions, which no longer depends on the length."""
        return self

    def scaled(self, dim: int, theta: float) -> tuple[tuple[float, ...], float]:
        """Return (frequencies, in radians per position; the factor of both cosine and sine)."""
        raise NotImplementedError


def plain(dim: int, theta: float) -> tuple[float, ...]:
    """Return theta^(-2i/dim) for i below dim/2, in radians per position (Su et al. 2021, section 3.2.2)."""
    return tuple(float(theta) ** (-2 * i / dim) for i in range(dim // 2))


def rotary(dim: int, theta: float, scaling: Scaling | None, length: int) -> tuple[tuple[float, ...], float]:
    """Return (dim/2 frequencies, in radians per position; the factor of cosine and sine) for texts of `length`.

    Raises:
        UserError: theta is not finite and above 0.
    """
    if not 0 < theta < math.inf:
        raise UserError(
            "theta of ops.rope_table", expected="a finite number above 0", got=repr(theta), do="A usual one is 10000."
        )
    return (plain(dim, theta), 1.0) if scaling is None else scaling.at(length).scaled(dim, theta)


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Scaling):
    """Llama 3.1's scaling of rotary frequencies (Meta AI 2024, `rope_type: llama3` in transformers).

    With turns = original * frequency / (2 pi), a frequency of at least ``high`` turns does not change and one of at
    most ``low`` turns is divided by ``factor``. Between them, the two are interpolated linearly in the number of turns.
    """

    factor: float
    """Divisor of the lowest frequencies."""
    low: float = 1.0
    """Turns within ``original`` positions up to which a frequency is divided by the whole factor."""
    high: float = 4.0
    """Turns within ``original`` positions from which a frequency does not change."""
    original: int = 8192
    """Context length, in positions, for which the model was trained first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "high", self.high > self.low, f"above low={self.low}")

    def scaled(self, dim: int, theta: float) -> tuple[tuple[float, ...], float]:
        def one(frequency: float) -> float:
            turns = self.original / (2 * math.pi) * frequency
            kept = min(max((turns - self.low) / (self.high - self.low), 0.0), 1.0)
            return frequency * (kept + (1 - kept) / self.factor)

        return tuple(one(f) for f in plain(dim, theta)), 1.0


@dataclass(frozen=True, kw_only=True)
class LinearScaling(Scaling):
    """All frequencies divided by ``factor`` (Chen et al. 2023, arXiv:2306.15595; `rope_type: linear`)."""

    factor: float
    """Divisor of the frequencies."""

    def scaled(self, dim: int, theta: float) -> tuple[tuple[float, ...], float]:
        return tuple(f / self.factor for f in plain(dim, theta)), 1.0


@dataclass(frozen=True, kw_only=True)
class DynamicScaling(Scaling):
    """A theta that grows with the length of the text (NTK-aware, bloc97 and emozilla 2023; `rope_type: dynamic`).

    With l the larger of the length and ``original``, theta is multiplied by
    (factor l / original - (factor - 1))^(dim / (dim - 2)). Texts up to ``original`` change nothing.
    """

    factor: float
    """How fast theta grows."""
    original: int
    """Context length, in positions, up to which nothing changes: `max_position_embeddings` in transformers."""
    length: int | None = None
    """Length of the text; None: that of the batch."""

    def at(self, length: int) -> DynamicScaling:
        given = self.length if self.length is not None else length
        return DynamicScaling(factor=self.factor, original=self.original, length=given)

    def scaled(self, dim: int, theta: float) -> tuple[tuple[float, ...], float]:
        longer = max(self.length or 0, self.original)
        if longer == self.original:
            return plain(dim, theta), 1.0
        if dim == 2:
            raise UserError(
                "DynamicScaling", expected="heads of at least 4 rotated features", got="2", do="Use another scaling."
            )
        grown = self.factor * longer / self.original - (self.factor - 1)
        return plain(dim, theta * grown ** (dim / (dim - 2))), 1.0


@dataclass(frozen=True, kw_only=True)
class YarnScaling(Scaling):
    """YaRN (Peng et al. 2023, arXiv:2309.00071, sections 3.2 and 3.4; `rope_type: yarn`).

    Frequencies with more than ``beta_fast`` turns within ``original`` positions do not change, those with fewer than
    ``beta_slow`` are divided by ``factor``; between them the index of the frequency interpolates linearly.
    """

    factor: float
    """Divisor of the lowest frequencies."""
    original: int
    """Context length, in positions, for which the model was trained first."""
    beta_fast: float = 32.0
    """Turns within ``original`` positions from which a frequency does not change."""
    beta_slow: float = 1.0
    """Turns within ``original`` positions up to which a frequency is divided by the whole factor."""
    attention_factor: float | None = None
    """The factor of cosine and sine. None: 0.1 ln(factor) + 1, or 1 for a factor of at most 1."""
    truncate: bool = True
    """Round the indices between which it interpolates outwards to whole numbers."""

    def scaled(self, dim: int, theta: float) -> tuple[tuple[float, ...], float]:
        def index(turns: float) -> float:  # of the frequency that has so many turns
            return dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = index(self.beta_fast), index(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high = high + 0.001 if low == high else high
        factor = self.attention_factor
        if factor is None:
            factor = 1.0 if self.factor <= 1 else 0.1 * math.log(self.factor) + 1.0

        def one(i: int, frequency: float) -> float:
            ramp = min(max((i - low) / (high - low), 0.0), 1.0)
            return frequency / self.factor * ramp + frequency * (1 - ramp)

        return tuple(one(i, f) for i, f in enumerate(plain(dim, theta))), factor


@dataclass(frozen=True, kw_only=True)
class LongScaling(Scaling):
    """LongRoPE: a divisor for each frequency, searched for (Ding et al. 2024, arXiv:2402.13753; `rope_type: longrope`).

    Texts of up to ``original`` positions take the divisors ``short``, longer ones ``long``.
    """

    short: tuple[float, ...]
    """Divisors of the frequencies for short texts, one for each."""
    long: tuple[float, ...]
    """Divisors of the frequencies for long texts, one for each."""
    original: int
    """The longest text, in positions, that counts as short."""
    attention_factor: float = 1.0
    """The factor of cosine and sine, for short texts too."""

    def at(self, length: int) -> LongScaling:
        chosen = self.long if length > self.original else self.short
        return LongScaling(short=chosen, long=chosen, original=self.original, attention_factor=self.attention_factor)

    def scaled(self, dim: int, theta: float) -> tuple[tuple[float, ...], float]:
        frequencies = plain(dim, theta)
        if len(self.short) != len(frequencies):
            raise UserError(
                "LongScaling",
                expected=f"{len(frequencies)} divisors, one for each frequency of {dim} rotated features",
                got=str(len(self.short)),
                do="Give those of this head size.",
            )
        return tuple(f / d for f, d in zip(frequencies, self.short, strict=True)), self.attention_factor
