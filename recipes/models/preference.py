"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290): learn from pairs of answers, of which one
was preferred, beside a frozen copy of the model.

Shape letters: B batch (a sample is a pair), S positions of both sides, E embed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from portatrain.checkpoint.interop import Hub
from portatrain.errors import UserError
from portatrain.model.module import Module
from portatrain.model.ops import Array, Batch, Loss, Ops
from recipes.models.causal import CausalLM

REFERENCE = "reference/*"
"""The parameters of the frozen copy: a recipe must have ``frozen=(REFERENCE,)``."""


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """A decoder, and how strongly it is held to its frozen copy.

    Raises:
        UserError: beta is not above 0, or the policy is not a decoder whose tokens all take the same path.
    """

    policy: Any
    """The sizes of the model, of any family of recipes/models but the mixtures of experts."""
    beta: float = 0.1
    """Scale of the log-ratios: the smaller, the further the policy may move from its copy."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError("DPOConfig.beta", expected="a number above 0", got=repr(self.beta), do="Usual ones: 0.1.")

    def build(self) -> DPO:
        """Return the model."""
        return DPO(self)

    def small(self) -> DPOConfig:
        """Return the same kind of model with small sizes, for `portatrain check`."""
        return replace(self, policy=self.policy.small())

    def huggingface(self) -> Hub:
        """Return the table of the policy: what a run begins with and what is exported."""
        hub: Hub = self.policy.huggingface()
        ours = {theirs: f"model.policy.{field.removeprefix('model.')}" for theirs, field in hub.overrides.items()}
        return replace(hub, overrides=ours)

    def flops_per_sample(self, seq_len: int) -> float:
        """Return the floating-point operations of a pair of `seq_len` tokens: forward and backward of the policy, and
        the forward pass of its copy."""
        return 4 / 3 * float(self.policy.flops_per_sample(seq_len))


class DPO(Module):
    """A policy and its frozen copy. A batch is that of `Preferences`.

    The loss of a pair is -log sigmoid(m), its margin m = beta * ((pi_c - ref_c) - (pi_r - ref_r)), where pi_c is the
    log-likelihood of the targets of the chosen side under the policy (eq. 7). The policy's tensors have the names that
    they have without its copy, so patterns, LoRA, generation and exports are those of the policy.
    """

    unnamed: ClassVar[tuple[str, ...]] = ("policy",)
    never_trained: ClassVar[tuple[str, ...]] = (REFERENCE,)

    def __init__(self, c: DPOConfig) -> None:
        self.policy, self.reference = _decoder(c.policy), _decoder(_steady(c.policy))
        self.reference.starts_as = ""
        self.beta = c.beta

    def __call__(self, ops: Ops, batch: Batch) -> Loss:
        """Return the summed loss of the pairs."""
        segment_BS = batch["segment_ids"]
        side_BS = ops.where(segment_BS == 1, 1.0, ops.where(segment_BS == 2, -1.0, 0.0)) * batch["mask"]
        there_BS = ops.cast(segment_BS > 0, "float32")
        there_B = ops.cast(ops.sum(there_BS, ("batch", "seq"), over=("seq",)) > 0, "float32")

        def loss(model: CausalLM, x_BSE: Array, weight_BS: Array) -> Loss:
            """The cross-entropy of the targets; with the weights +1 and -1, -(log-likelihood of c - that of r)."""
            return ops.cross_entropy(
                x_BSE, model.output_table, batch["targets"], mask=weight_BS, softcap=model.logit_softcap
            )

        x_BSE = self.policy.hidden(ops, batch)
        held_B = loss(self.reference, ops.stop_gradient(self.reference.hidden(ops, batch)), side_BS).loss_B
        margin_B = self.beta * (held_B - loss(self.policy, ops.stop_gradient(x_BSE), side_BS).loss_B)
        loss_B = there_B * ops.softplus(-margin_B)
        # The margin has no gradient, since logits exist for one chunk of tokens at a time. So the gradient of the loss
        # is made of those of the cross-entropies: each sample's times the derivative of its loss, a constant then.
        slope_B = there_B * self.beta * ops.sigmoid(-margin_B)
        pull = loss(self.policy, x_BSE, side_BS * slope_B[:, None]).sum
        ops.aux("reward_margin", margin_B)
        ops.aux("reward_accuracy", ops.cast(margin_B > 0, "float32"))
        made = ops.loss(loss_B, there_B)
        return Loss(made.sum + (pull - ops.stop_gradient(pull)), made.weight_B, made.loss_B)

    def predict(self, ops: Ops, batch: Batch) -> Array:
        """Return the logits of the policy, (B, S, V) float32. The batch needs no targets."""
        return self.policy.predict(ops, batch)


def _steady(c: Any) -> Any:
    """Return the sizes without dropout, which a frozen copy must not have."""
    return replace(c, dropout=0.0) if getattr(c, "dropout", 0.0) else c


def _decoder(c: Any) -> CausalLM:
    model = c.build()
    if not isinstance(model, CausalLM) or getattr(c, "experts", None):
        raise UserError(
            "DPOConfig.policy",
            expected="the sizes of a dense decoder of recipes/models, such as DecoderConfig",
            got=type(c).__name__,
            do="Routers of experts would record and balance those of the frozen copy too; take a dense model.",
        )
    return model
