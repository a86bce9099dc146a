"""What the fields of a mixture must be, and how many samples of a block each source has; without arrays."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

from portatrain.errors import UserError, choice

EXHAUSTED = ("repeat", "error")


def counts(weights: tuple[float, ...], block: int) -> list[int]:
    """Return the samples of each source in a block, by largest remainders; ties: earlier first."""
    share = [block * w / math.fsum(weights) for w in weights]
    out = [math.floor(s) for s in share]
    rest = sorted(range(len(share)), key=lambda i: (out[i] - share[i], i))
    for i in rest[: block - sum(out)]:
        out[i] += 1
    return out


def check(spec: Any) -> None:
    """Raise UserError if the fields of a mixture are invalid or do not fit together."""
    if not spec.sources or spec.block < 1:
        raise UserError(
            "Mixture",
            expected="at least one source and a block of at least one sample",
            got=f"{len(spec.sources)} sources and block={spec.block}",
            do="Give the sources; a block of about a thousand samples fits most mixtures.",
        )
    if spec.names and (
        len(spec.names) != len(spec.sources) or not all(re.fullmatch(r"[\w.-]+", name) for name in spec.names)
    ):
        raise UserError(
            "Mixture names",
            expected=f"{len(spec.sources)} names of letters, digits, '.', '_' and '-', one a source",
            got=", ".join(map(repr, spec.names)),
            do="Name every source, or none. Sources with the same name are reported together.",
        )
    if spec.exhausted not in EXHAUSTED:
        raise choice("Mixture exhausted", str(spec.exhausted), EXHAUSTED)
    lengths = [getattr(s, "seq_len", None) for s in spec.sources]
    if None in lengths or len(set(lengths)) > 1:
        raise UserError(
            "Mixture sources",
            expected="token sources with the same seq_len",
            got=", ".join(f"{type(s).__name__}(seq_len={n})" for s, n in zip(spec.sources, lengths, strict=True)),
            do="Give every source the same seq_len; images and mixtures cannot be sources.",
        )
    firsts = [0, *(first for first, _ in spec.schedule)]
    if any(b <= a for a, b in itertools.pairwise(firsts)):
        raise UserError(
            "Mixture schedule",
            expected="increasing first blocks, from 1",
            got=str(firsts[1:]),
            do="Sort the pieces; before the first piece, `weights` apply.",
        )
    for what, weights in (("weights", spec.weights), *((f"schedule at block {f}", w) for f, w in spec.schedule)):
        ok = (
            len(weights) == len(spec.sources) and all(math.isfinite(w) and w >= 0 for w in weights) and sum(weights) > 0
        )
        if not ok:
            raise UserError(
                f"Mixture {what}",
                expected=f"{len(spec.sources)} finite weights of at least 0, not all 0",
                got=str(weights),
                do="Give one weight per source.",
            )
        lost = [i for i, (w, c) in enumerate(zip(weights, counts(weights, spec.block), strict=True)) if w and not c]
        if lost:
            raise UserError(
                f"Mixture {what}",
                expected=f"at least one sample of every weighted source in a block of {spec.block}",
                got=f"none of source {lost[0]} with weight {weights[lost[0]]}",
                do="Use a larger block or a larger weight, or remove the source.",
            )
