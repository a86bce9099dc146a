"""Models of text that predict the next token, some of which see it. Shapes: B batch, S seq, E embed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from portatrain import Module
from portatrain.model.layers import Attention, Embedding, Linear, RMSNorm
from portatrain.recipe import Recipe, load_recipe

HEAD = 8


class Text(Module):
    """An embedding, attention with a residual, a norm, and the loss."""

    def __init__(self, *, causal: bool = True, window: int | None = None) -> None:
        self.embed = Embedding(vocab=64, embed=16)
        self.attn = Attention(embed=16, heads=2, kv_heads=2, head_dim=HEAD, causal=causal, window=window)
        self.norm = RMSNorm(embed=16)

    def features(self, ops: Any, batch: Any, tokens: Any) -> Any:
        x_BSE = self.embed(ops, tokens)
        rope = ops.rope_table(batch["positions"], HEAD)
        return self.norm(ops, x_BSE + self.attn(ops, x_BSE, rope, batch["segment_ids"]))

    def __call__(self, ops: Any, batch: Any) -> Any:
        x_BSE = self.features(ops, batch, batch["tokens"])
        return ops.cross_entropy(x_BSE, self.embed.table, batch["targets"], mask=batch["mask"])


class OfTargets(Text):
    """Predicts the targets from the targets."""

    def __call__(self, ops: Any, batch: Any) -> Any:
        x_BSE = self.features(ops, batch, batch["targets"])
        return ops.cross_entropy(x_BSE, self.embed.table, batch["targets"], mask=batch["mask"])


class NotShifted(Text):
    """Predicts the tokens from the tokens."""

    def __call__(self, ops: Any, batch: Any) -> Any:
        x_BSE = self.features(ops, batch, batch["tokens"])
        return ops.cross_entropy(x_BSE, self.embed.table, batch["tokens"], mask=batch["mask"])


class ShiftedBack(Text):
    """Reads one token ahead."""

    def __call__(self, ops: Any, batch: Any) -> Any:
        x_BSE = self.features(ops, batch, ops.roll(batch["tokens"], -1, axis=1))
        return ops.cross_entropy(x_BSE, self.embed.table, batch["targets"], mask=batch["mask"])


class MeanOfAll(Text):
    """Adds the mean over the whole sample to every position."""

    def features(self, ops: Any, batch: Any, tokens: Any) -> Any:
        x_BSE = super().features(ops, batch, tokens)
        return x_BSE + ops.mean(x_BSE, ("batch", "seq", "embed"), over=("seq",))[:, None]


class Centred(Text):
    """Mixes each position with both of its neighbours."""

    def features(self, ops: Any, batch: Any, tokens: Any) -> Any:
        x_BSE = super().features(ops, batch, tokens)
        return x_BSE + ops.roll(x_BSE, 1, axis=1) + ops.roll(x_BSE, -1, axis=1)


class OwnShift(Text):
    """Shifts by itself, as many models do: the features of all but the last token, and the tokens from the second."""

    def __call__(self, ops: Any, batch: Any) -> Any:
        x_BSE = self.features(ops, batch, batch["tokens"])
        targets, mask = batch["tokens"][:, 1:], batch["mask"][:, :-1]
        return ops.cross_entropy(x_BSE[:, :-1], self.embed.table, targets, mask=mask)


class OwnShiftTwice(Text):
    """The features of a token, and the same token: the shift of the features and that of the labels cancel."""

    def __call__(self, ops: Any, batch: Any) -> Any:
        x_BSE = self.features(ops, batch, batch["tokens"])
        targets, mask = batch["targets"][:, :-1], batch["mask"][:, :-1]
        return ops.cross_entropy(x_BSE[:, 1:], self.embed.table, targets, mask=mask)


class Masked(Text):
    """Fills in tokens that it hides from itself, and looks at both sides."""

    def __init__(self) -> None:
        super().__init__(causal=False)

    def __call__(self, ops: Any, batch: Any) -> Any:
        drawn_BS = ops.noise(batch["tokens"].shape[1], site=self.site, kind="uniform")
        x_BSE = self.features(ops, batch, ops.where(drawn_BS < 0.3, 0, batch["tokens"]))
        hidden_BS = ops.where(drawn_BS < 0.3, batch["mask"], 0.0)
        return ops.cross_entropy(x_BSE, self.embed.table, batch["tokens"], mask=hidden_BS)


class TwoAhead(Text):
    """Predicts the token after the next one, too, from the next one's features."""

    def __init__(self) -> None:
        super().__init__()
        self.second = Linear({"embed": 16}, {"embed_out": 16})

    def __call__(self, ops: Any, batch: Any) -> Any:
        x_BSE = self.features(ops, batch, batch["tokens"])
        table, targets, mask = self.embed.table, batch["targets"], batch["mask"]
        after_BSE = self.second(ops, x_BSE[:, :-1])
        after = ops.cross_entropy(after_BSE, table, targets[:, 1:], mask=mask[:, 1:])
        ops.aux("after", after.loss_B, loss=0.1)
        return ops.cross_entropy(x_BSE, table, targets, mask=mask)


SEE: dict[str, Callable[[], Module]] = {
    "attention to all positions": lambda: Text(causal=False),
    "a window to both sides": lambda: Text(causal=False, window=3),
    "targets from targets": OfTargets,
    "tokens from tokens": NotShifted,
    "one token ahead": ShiftedBack,
    "a mean of all positions": MeanOfAll,
    "both neighbours": Centred,
    "a shift back": OwnShiftTwice,
}
DO_NOT_SEE: dict[str, Callable[[], Module]] = {
    "attention to earlier positions": Text,
    "a window": lambda: Text(window=3),
    "a shift of its own": OwnShift,
    "masked tokens": Masked,
    "two tokens ahead": TwoAhead,
}


@dataclass(frozen=True, kw_only=True)
class Spec:
    kind: str

    def build(self) -> Module:
        return {**SEE, **DO_NOT_SEE}[self.kind]()


def recipe(kind: str) -> Recipe:
    given = {"name": "text", "model": Spec(kind=kind), "hooks": (), "compute": {"embed_out": ()}}
    return dataclasses.replace(load_recipe("tiny-lm"), **given)
