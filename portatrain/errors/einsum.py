"""What is wrong with the arguments of an einsum, in words of its letters and shapes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from portatrain.errors import UserError

FORM = '"bse,em->bsm": a letter for each axis, a comma between the operands, and the letters of the result after "->"'


def fault(spec: object, shapes: Sequence[tuple[int, ...] | None]) -> tuple[str, str, str] | None:
    """Return what was expected of an einsum, what came and what to do; None if its letters fit.

    spec: such as "bse,em->bsm". shapes: of its operands; None for one that is no array.
    """
    if not isinstance(spec, str):
        got = "an array" if hasattr(spec, "shape") else type(spec).__name__
        return f"a text such as {FORM}", f"{got} in the place of the spec", "Give the spec first."
    inputs, arrow, out = spec.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or not re.fullmatch(r"[a-zA-Z,]*", inputs + out):
        return f"a spec such as {FORM}", repr(spec), "Write every axis as a letter; `...` is not one."
    if len(terms) != len(shapes):
        return (
            f"{len(terms)} operands, as many as {spec!r} has before '->'",
            f"{len(shapes)}, of {' and '.join(map(_shown, shapes)) or 'no shape'}",
            "Give one operand for each group of letters.",
        )
    sizes: dict[str, tuple[int, str, tuple[int, ...]]] = {}
    for term, shape in zip(terms, shapes, strict=True):
        if shape is None:
            continue
        if len(term) != len(shape):
            return (
                f"a letter for each axis of every operand of {spec!r}",
                f"{len(term)} letters {term!r} for the {len(shape)} axes of {_shown(shape)}",
                "Correct the letters, or reshape the operand.",
            )
        for letter, size in zip(term, shape, strict=True):
            before = sizes.setdefault(letter, (size, term, shape))
            if before[0] != size:
                return (
                    f"one size for the letter {letter} of {spec!r}",
                    f"{before[0]} in {before[1]!r}, {_shown(before[2])}, and {size} in {term!r}, {_shown(shape)}",
                    "Write the letters in the order of the axes: a Param's are those of its keywords.",
                )
    unknown = [letter for letter in out if letter not in inputs]
    if unknown:
        return (
            f"letters of the operands after '->' in {spec!r}",
            f"{', '.join(unknown)}, which no operand has",
            "Correct the letters of the result.",
        )
    twice = [letter for letter in dict.fromkeys(out) if out.count(letter) > 1]
    if twice:
        return (
            f"each letter once after '->' in {spec!r}",
            f"{', '.join(twice)} more than once",
            "Give each axis of the result its own letter.",
        )
    return None


def apart(spec: str) -> tuple[str, str, str] | None:
    """Return what is wrong with letters that should be one, as e and f in "bse,fm->bsm"; None if all is well.

    NumPy sums each of two such axes by itself, and the result is not that of the product that was meant.
    """
    inputs, _, out = spec.replace(" ", "").partition("->")
    terms = inputs.split(",")
    alone = [(c, term) for term in terms for c in term if inputs.count(c) == 1 and c not in out]
    found = [f"{c} in {term!r}" for i, (c, term) in enumerate(alone) if term not in [other for _, other in alone[:i]]]
    if len(found) < 2:
        return None
    return (
        f"one letter for the axes that {spec!r} contracts with each other",
        f"{' and '.join(found)}, each of which no other operand and not the result has",
        "Give both axes the same letter. To sum over them one by one, use ops.sum.",
    )


def check_spec(spec: object) -> None:
    """Raise UserError for a spec that is none of `FORM`'s form, such as "be,em" or "...e,em->...m", which NumPy takes
    and a mesh cannot, and for one with axes `apart`."""
    formed = isinstance(spec, str) and "->" in spec and "." not in spec
    found = apart(str(spec)) if formed else fault(spec, ())
    if found is not None:
        expected, got, do = found
        raise UserError("ops.einsum", expected=expected, got=got, do=do)


def _shown(shape: tuple[int, ...] | None) -> str:
    return "what is no array" if shape is None else str(shape)
