"""Remat policies by name: what the backward pass keeps of a block of a Stack, and what it computes again.

One list for recipes, backends and the planner; no framework. A policy means the same on every backend, and changes
memory and time alone: gradients are those of `none`.

| policy | kept of a block, besides its input |
|---|---|
| `none` | everything: nothing is computed again |
| `dots` | what contractions without a batch dimension returned: activations times weights |
| `attention` | what attention returned, so that a fused kernel is not run again |
| `block` | nothing |
| `keep:A+B` | the activations named A and B by `ops.name`, and nothing else |
| `offload:A+B` | those, in the host's memory |

The layers of `portatrain.model.layers` name theirs by `ACTIVATIONS`; a model names more with `ops.name(x, "routes")`. A
name that no block of the model uses is an error at the first step.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from portatrain.errors import UserError, choice

ACTIVATIONS = {
    "normed": "the inputs of attention and feed-forward, after their norms",
    "qkv": "queries, keys and values, rotated",
    "attention": "what attention returned; named by `ops.attention` itself",
    "projected": "the output projection of attention",
    "hidden": "gate and up of the feed-forward, before the activation",
    "product": "the activation, times up where there is a gate",
}
"""Names that the layers of `portatrain.model.layers` give, and what of."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """`names`: the activations that are kept (of `none` and `dots`, those of `ACTIVATIONS` that their rule covers).
    `dots`: the rule is the kind of operation, not the name. `offload`: they are kept in the host's memory."""

    name: str
    names: frozenset[str] = frozenset()
    dots: bool = False
    offload: bool = False

    @property
    def keeps_all(self) -> bool:
        return self.name == "none"

    @property
    def by_name(self) -> bool:
        """Whether `ops.name` decides what is kept."""
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
    """The policy `text`: a name of `POLICIES`, or `keep:A+B`, `offload:A+B` over names of activations.

    Raises UserError with the nearest choices.
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
    """Raise UserError for a name of `policy` that is not among those `used` in the model's blocks."""
    known = {*used, "attention"}  # which `ops.attention` names
    if policy.by_name:
        for name in sorted(policy.names - known):
            raise choice(f"remat {policy.name!r}: an activation named in the model's blocks", name, known)
