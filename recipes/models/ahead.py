"""Multi-token prediction (DeepSeek-AI 2024, arXiv:2412.19437, section 2.2): modules after the last layer, each of which
predicts one token further than the one before it.

Shape letters: B batch, S seq, E embed, P the features of two vectors in a row, 2 E.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from portatrain.checkpoint.interop import Row
from portatrain.model.module import Module, Param, Stack
from portatrain.model.ops import Array, Batch, Loss, Ops
from recipes.models.causal import CausalLM, rms_norm

METRIC = "predict_loss"


class Ahead(Module):
    """Join the features of a token with the embedding of a later one, and run a layer: what a Stack of one layer has.

    Args:
        c: the sizes; embed and norm_eps of them are read here.
        layer: a layer of the family, called as layer(ops, x_BSE, *shared).
    """

    def __init__(self, c: Any, layer: Module) -> None:
        self.embed_norm, self.hidden_norm = rms_norm(c), rms_norm(c)
        self.project = Param(joined=2 * c.embed, embed=c.embed)
        self.layer = layer
        self.final_norm = rms_norm(c)

    def __call__(self, ops: Ops, x_BSE: Array, embedded_BSE: Array, *shared: Any) -> tuple[Array, None]:
        """Return (the normalised features before the output table, None).

        x_BSE: those of the module before this one, or of the model. embedded_BSE: the later token of each position.
        """
        both_BSP = ops.concat([self.embed_norm(ops, embedded_BSE), self.hidden_norm(ops, x_BSE)], axis=2)
        x_BSE = ops.shard(ops.einsum("bsp,pe->bse", both_BSP, self.project), "batch", "res_seq", None)
        x_BSE, _ = self.layer(ops, x_BSE, *shared)
        return ops.shard(self.final_norm(ops, x_BSE), "batch", "seq", None), None


class AheadLM(CausalLM):
    """A `CausalLM` with modules for further tokens, if `predict_depth` of its sizes is not 0.

    The module of depth k sees, at position i, the features of depth k - 1 and the embedding of token i + k, and
    predicts token i + k + 1 with the model's own embedding and output table. Its targets are those of position i + k,
    with their weights; one in another document, or past the end of the sample, has none. Its attention is as that of
    any layer, at the position of token i.

    The training loss grows by `predict_weight` / `predict_depth` times the summed loss of every depth, and is divided
    by the weight of the main targets, as in the paper (eq. 24 and 25). The loss of an evaluation does not: it is that
    of the next token. `predict_loss_1`, `predict_loss_2`, ... are recorded in both, the mean over samples of a sample's
    mean loss.

    Args:
        ahead: a layer of each module, `predict_depth` of them.
        c, blocks, final_norm, options: as in `CausalLM`.
    """

    def __init__(self, c: Any, blocks: Module, final_norm: Module, *, ahead: Sequence[Module], **options: Any) -> None:
        super().__init__(c, blocks, final_norm, **options)
        self.ahead = [Stack(Ahead(c, layer), 1) for layer in ahead]
        self.predict_depth = len(ahead)

    def __call__(self, ops: Ops, batch: Batch) -> Loss:
        """Return the summed cross-entropy, in nats, of the next token, and in training also of those after it."""
        x_BSE, shared = self.features(ops, batch)
        loss = total = self.loss_of(ops, x_BSE, batch["targets"], batch.get("mask"))
        for depth, module in enumerate(self.ahead, start=1):
            tokens_BS = ops.roll(batch["tokens"], -depth, axis=1)
            embedded_BSE = ops.shard(self.embedded(ops, tokens_BS, batch.get("positions")), "batch", "res_seq", None)
            x_BSE, _ = module(ops, x_BSE, embedded_BSE, *shared)
            targets_BS = ops.roll(batch["targets"], -depth, axis=1)
            found = self.loss_of(ops, x_BSE, targets_BS, mask_of(ops, batch, depth))
            total = _plus(total, found, self.config.predict_weight / self.predict_depth)
            weight_B = ops.where(found.weight_B > 0, found.weight_B, 1.0)
            ops.aux(f"{METRIC}_{depth}", ops.stop_gradient(found.loss_B) / weight_B)
        return total if ops.training else loss


def mask_of(ops: Ops, batch: Batch, depth: int) -> Array:
    """Return the weights, (B, S) float32, of the targets at position i + depth for each position i: 0 if that position
    is in another document or past the end."""
    tokens_BS, mask_BS, segments_BS = batch["tokens"], batch.get("mask"), batch.get("segment_ids")
    length = tokens_BS.shape[1]
    mask_BS = ops.cast(tokens_BS * 0 + 1, "float32") if mask_BS is None else mask_BS
    mask_BS = ops.where(ops.arange(length) < length - depth, ops.roll(mask_BS, -depth, axis=1), 0.0)
    if segments_BS is None:
        return mask_BS
    return ops.where(ops.roll(segments_BS, -depth, axis=1) == segments_BS, mask_BS, 0.0)


def rows_of(depth: int, theirs: str, *, tied: bool) -> list[Row]:
    """Return the rows, in the files of DeepSeek-V3, of the module of a depth, counted from 0, but for its layer's.

    theirs: how the names of the module's tensors begin there.
    """
    ours = f"ahead/{depth}"
    return [
        Row(theirs=f"{theirs}.enorm.weight", ours=f"{ours}/embed_norm/scale", layer=0),
        Row(theirs=f"{theirs}.hnorm.weight", ours=f"{ours}/hidden_norm/scale", layer=0),
        Row(theirs=f"{theirs}.eh_proj.weight", ours=f"{ours}/project", layer=0, rows=1),
        Row(theirs=f"{theirs}.shared_head.norm.weight", ours=f"{ours}/final_norm/scale", layer=0),
        # The tables are those of the model; the files have them again.
        Row(theirs=f"{theirs}.embed_tokens.weight", ours="embed/table", copy=True),
        Row(theirs=f"{theirs}.shared_head.head.weight", ours="embed/table" if tied else "head", copy=True),
    ]


def _plus(loss: Loss, more: Loss, factor: float) -> Loss:
    return Loss(loss.sum + factor * more.sum, loss.weight_B, loss.loss_B + factor * more.loss_B)
