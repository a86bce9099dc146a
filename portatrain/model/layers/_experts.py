"""Mixtures of experts. Shape letters: B batch, S seq, E embed, M mlp, X experts, C chosen experts a token, N rows of a
token and an expert, G groups."""

from __future__ import annotations

from typing import Any

from portatrain.errors import UserError, choice
from portatrain.model.layers._mlp import GatedMLP, _activate, _check
from portatrain.model.module import Module, Param, State
from portatrain.model.ops import Array, Ops

SCORES = ("softmax", "sigmoid")


class Router(Module):
    """Choose experts for each token, and their weights.

    The logits of a token are x W in float32 (x W + b with `bias`). Its scores are their softmax or their sigmoid; the
    `chosen` experts with the largest scores get it, weighted by their scores.

    Args:
        embed, experts, chosen: sizes; `chosen` experts a token.
        scores: 'softmax' (Shazeer et al. 2017) or 'sigmoid' (DeepSeek-V3, arXiv:2412.19437, eq. 15).
        normalise: divide the weights of a token by their sum (Mixtral, Qwen 3). With softmax this equals a softmax
            over the chosen logits alone (gpt-oss).
        scale: multiply the weights (DeepSeek-V3: 2.5).
        bias: add a learned bias to the logits (gpt-oss).
        groups, chosen_groups: choose among the experts of `chosen_groups` of `groups` groups of neighbours only.
        group_best: a group counts as the sum of its so many largest scores (DeepSeek-V2: 1, V3: 2).
        balance_rate: balance the load without a loss (Wang et al. 2024, arXiv:2408.15664): a State is added to the
            scores for the choice alone; after a step it falls by this rate for experts with more than the mean load,
            and rises for the others. 0: no such State.
        balance_loss: the factor of X sum_x share_x score_x (Fedus et al. 2021, eq. 4), for each sample, as DeepSeek-V3
            has it for each sequence (eq. 17): share_x is the part of the sample's choices that fell on x, score_x its
            mean score, with the scores of a token divided by their sum.
        z_loss: the factor of the mean of logsumexp(logits)^2 (Zoph et al. 2022, eq. 5).

    Metrics, by sample and mean over layers: `router_balance`, which is 1 for an even load; `router_z`;
    `router_entropy`, of a token's scores, in nats; and `router_largest_share`, the largest part of a sample's choices
    that one expert has, the largest of all samples and layers. By layer, and mean over the samples of the step:
    `router_loads` (layers, X), how many of a sample's choices fell on each expert, and `router_entropies` (layers,).

    Raises:
        UserError: more chosen experts than there are, unknown scores, or groups that do not fit.
    """

    def __init__(
        self,
        *,
        embed: int,
        experts: int,
        chosen: int,
        scores: str = "softmax",
        normalise: bool = True,
        scale: float = 1.0,
        bias: bool = False,
        groups: int = 1,
        chosen_groups: int = 1,
        group_best: int = 2,
        balance_rate: float = 0.0,
        balance_loss: float = 0.0,
        z_loss: float = 0.0,
    ) -> None:
        if scores not in SCORES:
            raise choice("Router, scores", scores, SCORES)
        _check_sizes(experts, chosen, groups, chosen_groups, group_best)
        self.weight = Param(embed=embed, experts=experts)
        self.bias: Any = Param(experts=experts, fan_in_axes=0, init="zeros") if bias else None
        self.balance: Any = State(experts=experts) if balance_rate else None
        self.load: Any = State(experts=experts) if balance_rate else None
        self.experts, self.experts_per_token, self.scores = experts, chosen, scores
        self.normalise, self.scale = normalise, scale
        self.groups, self.chosen_groups, self.group_best = groups, chosen_groups, group_best
        self.balance_rate, self.balance_loss, self.z_loss = balance_rate, balance_loss, z_loss

    def __call__(self, ops: Ops, x_BSE: Array) -> tuple[Array, Array]:
        """Return (experts (B, S, C) int32, weights (B, S, C) float32), the largest score first."""
        logits_BSX = ops.einsum("bse,ex->bsx", x_BSE, self.weight, dtype="float32")
        if self.bias is not None:
            logits_BSX = logits_BSX + ops.cast(ops.weight(self.bias), "float32")
        logits_BSX = ops.name(logits_BSX, "routes")
        scores_BSX = ops.sigmoid(logits_BSX) if self.scores == "sigmoid" else ops.softmax(logits_BSX)
        ranks_BSX = ops.stop_gradient(scores_BSX)
        if self.balance is not None:
            ranks_BSX = ranks_BSX + ops.weight(self.balance)
        if self.groups > 1:
            ranks_BSX = self._in_groups(ops, ranks_BSX)
        _, experts_BSC = ops.top_k(ranks_BSX, self.experts_per_token)
        chosen_BSCX = ops.one_hot(experts_BSC, self.experts)
        weights_BSC = (chosen_BSCX * scores_BSX[:, :, None]).sum(-1)
        if self.normalise and self.experts_per_token == 1:
            # The weight is 1 whatever the score; a quotient would leave rounding as its gradient.
            weights_BSC = ops.stop_gradient(weights_BSC) * 0.0 + 1.0
        elif self.normalise:
            weights_BSC = weights_BSC / weights_BSC.sum(-1)[..., None]
        self._record(ops, logits_BSX, scores_BSX, chosen_BSCX.sum(2))
        return experts_BSC, weights_BSC * self.scale if self.scale != 1.0 else weights_BSC

    def _in_groups(self, ops: Ops, ranks_BSX: Array) -> Array:
        """Return the ranks, with those of groups that are not chosen below all others."""
        size = self.experts // self.groups
        ranks_BSGY = ranks_BSX.reshape(-1, ranks_BSX.shape[1], self.groups, size)
        best_BSG = ops.top_k(ranks_BSGY, self.group_best)[0].sum(-1)
        _, groups_BSK = ops.top_k(best_BSG, self.chosen_groups)
        open_BSG = ops.one_hot(groups_BSK, self.groups).sum(2)
        kept_BSGY = ops.where(open_BSG[..., None] > 0.5, ranks_BSGY, -1e30)
        return kept_BSGY.reshape(-1, ranks_BSX.shape[1], self.experts)

    def _record(self, ops: Ops, logits_BSX: Array, scores_BSX: Array, chosen_BSX: Array) -> None:
        axes = ("batch", "seq", None)
        if self.load is not None:
            ops.tally(self, load=ops.sum(chosen_BSX, axes, over=("batch", "seq")))
        sums_BS1 = scores_BSX.sum(-1)[..., None]
        shares_BSX = scores_BSX if self.scores == "softmax" else scores_BSX / sums_BS1
        loads_BX = ops.sum(ops.stop_gradient(chosen_BSX), axes, over=("seq",))
        load_BX = loads_BX / (chosen_BSX.shape[1] * self.experts_per_token)
        balance_B = (load_BX * ops.mean(shares_BSX, axes, over=("seq",))).sum(-1) * self.experts
        ops.aux("router_balance", balance_B, loss=self.balance_loss)
        z_BS = ops.logsumexp(logits_BSX)
        ops.aux("router_z", ops.mean(z_BS * z_BS, ("batch", "seq"), over=("seq",)), loss=self.z_loss)
        quiet_BSX = ops.stop_gradient(shares_BSX)
        entropy_BS = -(quiet_BSX * ops.log(quiet_BSX + 1e-30)).sum(-1)
        entropy_B = ops.mean(entropy_BS, ("batch", "seq"), over=("seq",))
        ops.aux("router_entropy", entropy_B)
        ops.aux("router_entropies", entropy_B, reduce="layers")
        ops.aux("router_loads", loads_BX, reduce="layers")
        ops.aux("router_largest_share", ops.max(load_BX), reduce="max")

    def after_step(self, ops: Any) -> None:
        """Move the balance against the load of the step, if `balance_rate` is not 0."""
        if self.balance is None:
            return
        mean = ops.mean(self.load, ("experts",), over=("experts",))
        ops.update(self, balance=self.balance + self.balance_rate * ops.sign(mean - self.load), load=self.load * 0.0)


def _check_sizes(experts: int, chosen: int, groups: int, chosen_groups: int, group_best: int) -> None:
    if not 1 <= chosen <= experts:
        raise UserError(
            "Router",
            expected=f"between 1 and {experts} chosen experts, the number of experts",
            got=str(chosen),
            do="Choose fewer experts a token, or have more experts.",
        )
    if groups == 1 and chosen_groups == 1:
        return
    size = experts // groups if groups > 0 else 0
    if groups < 1 or experts % groups or not 1 <= chosen_groups <= groups or not 1 <= group_best <= size:
        raise UserError(
            "Router, groups",
            expected="groups that divide the experts, of which some are chosen by one or more of their experts each",
            got=f"experts={experts}, groups={groups}, chosen_groups={chosen_groups}, group_best={group_best}",
            do="Use groups=1 to choose among all experts.",
        )
    if chosen > chosen_groups * size:
        raise UserError(
            "Router, groups",
            expected=f"at most {chosen_groups * size} chosen experts, those of {chosen_groups} groups of {size}",
            got=str(chosen),
            do="Choose more groups or fewer experts.",
        )


class Experts(Module):
    """`experts` feed-forward parts, each for the tokens that are sent to it: down(silu(gate x) * up x), without biases.

    For another kind of expert, subclass it: set the parameters in `__init__`, return them from `params`, and compute
    with them in `expert`.

    Args:
        embed, mlp, experts: sizes; mlp is the hidden size of one expert.
        activation: 'silu', 'gelu', 'gelu_tanh' or 'relu'.
    """

    def __init__(self, *, embed: int, mlp: int, experts: int, activation: str = "silu") -> None:
        self.gate = Param(experts=experts, embed=embed, mlp=mlp)
        self.up = Param(experts=experts, embed=embed, mlp=mlp)
        self.down = Param(experts=experts, mlp=mlp, embed=embed)
        self.activation = _check("Experts", activation)

    def params(self) -> tuple[Any, ...]:
        """Return the parameters that `expert` gets, each with the axis `experts` first."""
        return self.gate, self.up, self.down

    def expert(self, ops: Ops, x_NE: Array, gate_XEM: Array, up_XEM: Array, down_XME: Array) -> Array:
        """Map rows (N, E) to (N, E), each by its own expert; a body of `Ops.experts`."""
        gate_NM = ops.name(ops.grouped_matmul(x_NE, gate_XEM), "hidden")
        up_NM = ops.name(ops.grouped_matmul(x_NE, up_XEM), "hidden")
        product_NM = ops.name(_activate(ops, self.activation, gate_NM) * up_NM, "product")
        return ops.grouped_matmul(product_NM, down_XME)

    def __call__(self, ops: Ops, x_BSE: Array, experts_BSC: Array, weights_BSC: Array) -> Array:
        """Map x (B, S, E) to (B, S, E), in the compute dtype, sharded as the residual stream.

        Args:
            x_BSE: (B, S, E).
            experts_BSC, weights_BSC: (B, S, C), as `Router` returns them.
        """
        out_BSE = ops.experts(self.expert, x_BSE, experts_BSC, weights_BSC, *self.params())
        return ops.shard(out_BSE, "batch", "res_seq", None)


class MixtureMLP(Module):
    """A router, its experts, and a feed-forward part that every token takes beside them, if there is one.

    Args:
        router: chooses the experts of each token.
        experts: computes them.
        shared: added for every token (DeepSeek-V2, arXiv:2405.04434, section 2.1.2): a `GatedMLP` with the hidden size
            of all shared experts together. None: there is none.
        shared_gate: multiply the shared part by sigmoid(x w) of each token (Qwen 2 MoE).
    """

    def __init__(
        self, *, router: Router, experts: Module, shared: GatedMLP | None = None, shared_gate: bool = False
    ) -> None:
        if shared_gate and shared is None:
            raise UserError(
                "MixtureMLP", expected="a shared part for shared_gate", got="none", do="Give shared=GatedMLP(...)."
            )
        self.router, self.experts, self.shared = router, experts, shared
        embed = router.weight.axes["embed"]
        self.shared_gate: Any = Param(embed=embed, shared_gates=1) if shared_gate else None

    def __call__(self, ops: Ops, x_BSE: Array) -> Array:
        """Map x (B, S, E) to (B, S, E), in the compute dtype, sharded as the residual stream."""
        x_BSE = ops.name(x_BSE, "normed")
        out_BSE = self.experts(ops, x_BSE, *self.router(ops, x_BSE))
        if self.shared is None:
            return out_BSE
        shared_BSE = self.shared(ops, x_BSE)
        if self.shared_gate is not None:
            shared_BSE = shared_BSE * ops.sigmoid(ops.einsum("bse,eo->bso", x_BSE, self.shared_gate))
        return out_BSE + shared_BSE
