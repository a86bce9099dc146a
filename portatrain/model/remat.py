"""Remat policies: which activations of a Stack's block are kept for the backward pass. The others are recomputed.

Recipes, backends and the planner share this list. A policy means the same on every backend. It changes memory and time
only: gradients are those of `none`.

| policy | kept activations of a block, besides its input |
|---|---|
| `none` | all: nothing is recomputed |
| `dots` | the results of contractions without a batch dimension: activations times weights; nothing inside experts |
| `attention` | the results of attention, so that a fused kernel does not run again |
| `block` | none |
| `keep:A+B` | the activations that `ops.name` names A and B, and no others |
| `offload:A+B` | the same ones, in host memory |

The layers of `portatrain.model.layers` use the names in `ACTIVATIONS`; a model adds names with `ops.name(x, "routes")`.
A policy with a name that no block of the model uses is an error at the first step.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from portatrain.errors import UserError, choice

ACTIVATIONS = {
    "normed": "the inputs of attention and feed-forward, after their norms",
    "qkv": "queries, keys and values, rotated",
    "attention": "the results of attention; `ops.attention` names them itself",
    "projected": "the output projection of attention",
    "hidden": "gate and up of the feed-forward, before the activation",
    "product": "the activation; times up if there is a gate",
}
"""The names that the layers of `portatrain.model.layers` use -> the activations that have them."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """One remat policy."""

    name: str
    names: frozenset[str] = frozenset()
    """The names of the kept activations; for `none` and `dots`, the names in `ACTIVATIONS` that they keep."""
    dots: bool = False
    """True if the kind of operation decides, and not the name."""
    offload: bool = False
    """True if kept activations are moved to host memory."""

    @property
    def keeps_all(self) -> bool:
        """True if nothing is recomputed."""
        return self.name == "none"

    @property
    def by_name(self) -> bool:
        """True if `ops.name` decides which activations are kept."""
        return bool(self.names) and not (self.keeps_all or self.dots)


POLICIES = {
    p.name: p
    for p in (
        Policy(name="none", names=frozenset(ACTIVATIONS)),
        Policy(name="dots", names=frozenset({"qkv", "projected", "hidden"}), dots=True),
        Policy(name="attention", names=frozenset({"attention"})),
        Policy(name="block"),
    )
}

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def parse(text: str) -> Policy:
    """Return the policy `text`: a name in `POLICIES`, or `keep:A+B` or `offload:A+B` with names of activations.

    Raises:
        UserError: no such policy, or an invalid or repeated name.
    """
    if text in POLICIES:
        return POLICIES[text]
    kind, colon, rest = text.partition(":")
    if not colon or kind not in ("keep", "offload"):
        raise choice("remat", text, (*POLICIES, "keep:NAME+NAME", "offload:NAME+NAME"))
    names = rest.split("+")
    if not all(_NAME.fullmatch(n) for n in names) or len(set(names)) != len(names):
        raise UserError(
            f"remat {text!r}",
            expected=f"names of activations, each once, joined by '+', as in {kind}:qkv+attention",
            got=repr(rest),
            do=f"The portable layers name {', '.join(ACTIVATIONS)}; a model names more with ops.name.",
        )
    return Policy(name=text, names=frozenset(names), offload=kind == "offload")


def check_used(policy: Policy, used: Iterable[str]) -> None:
    """Raise UserError if `policy` has a name that is not in `used`, the names in the model's blocks."""
    known = {*used, "attention"}  # `ops.attention` names its result itself

    if policy.by_name:
        for name in sorted(policy.names - known):
            raise choice(f"remat {policy.name!r}: an activation named in the model's blocks", name, known)
