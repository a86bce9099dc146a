"""What the mixtures of experts of recipes/models share: sizes, the routed part of a layer, and names in transformers.

Shape letters: B batch, S seq, E embed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from portatrain.checkpoint.interop import Fields, Hub, Row
from portatrain.model.layers import Experts, GatedMLP, MixtureMLP, Router, places_of
from portatrain.model.module import Module
from recipes.models.causal import HUB_FIELDS, MLP, CausalConfig, Kind, Names, flops, hub

# The parts of an expert: the end of its name in transformers, and ours.
EXPERT = (("gate_proj.weight", "gate"), ("up_proj.weight", "up"), ("down_proj.weight", "down"))
OVERRIDES = {
    **HUB_FIELDS,
    "num_local_experts": "model.experts",
    "num_experts": "model.experts",
    "n_routed_experts": "model.experts",
    "num_experts_per_tok": "model.chosen",
    "moe_intermediate_size": "model.expert_mlp",
    "norm_topk_prob": "model.normalise",
}


@dataclass(frozen=True)
class LayerKind(Kind):
    """A layer is routed, or dense."""

    routed: bool = True


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(CausalConfig):
    """The sizes that every family of mixtures has. `mlp` is the hidden size of a dense layer."""

    experts: int
    """Number of experts of a layer."""
    chosen: int
    """Experts that a token goes to."""
    expert_mlp: int
    """Hidden features of an expert."""
    balance_loss: float = 0.0
    """Weight of the load-balancing loss of a sample; see `layers.Router`."""
    router_z_loss: float = 0.0
    """Weight of the z-loss of the router's logits."""

    def small(self) -> Any:
        """Return the same kind of model with small sizes, for `portatrain check`."""
        made = super().small()
        return replace(made, experts=min(self.experts, 4), chosen=min(self.chosen, 2), expert_mlp=24)

    @property
    def active_mlp(self) -> int:
        """Weights of a routed layer's feed-forward part that one token meets, those of the router with them."""
        return 3 * self.embed * self.expert_mlp * self.chosen + self.embed * self.experts

    def flops_per_sample(self, seq_len: int) -> float:
        """Return the floating-point operations of forward and backward for one sample of `seq_len` tokens, as
        `CausalConfig.flops_per_sample`; of the experts, those that a token goes to are counted."""
        found = flops(self, seq_len, self.kinds, mlp=0)
        for kind in self.kinds:
            routed = getattr(kind, "routed", True)
            found += 6.0 * seq_len * (self.active_mlp if routed else 3 * self.embed * self.mlp_size)
        return found


def feed_forward(c: Any, kind: LayerKind, *, shared: int = 0, experts: Module | None = None, **router: Any) -> Module:
    """Return the feed-forward part of a layer: dense, or routed.

    shared: the hidden size of the part that every token takes beside its experts. experts: default `layers.Experts`.
    router: further arguments of `layers.Router`.
    """
    if not kind.routed:
        return GatedMLP(embed=c.embed, mlp=c.mlp_size)
    return MixtureMLP(
        router=Router(
            embed=c.embed,
            experts=c.experts,
            chosen=c.chosen,
            balance_loss=c.balance_loss,
            z_loss=c.router_z_loss,
            **router,
        ),
        experts=experts or Experts(embed=c.embed, mlp=c.expert_mlp, experts=c.experts),
        shared=GatedMLP(embed=c.embed, mlp=shared) if shared else None,
    )


def mixture_hub(
    c: Any,
    model_type: str,
    architecture: str,
    names: Names,
    *,
    part: str = "mlp",
    expert: Sequence[tuple[str, str]] = EXPERT,
    **more: Any,
) -> Hub:
    """Return the table of a mixture in transformers.

    names: those of a layer but for its feed-forward part. part: what that part is called. expert: the names of an
    expert's matrices; empty if the family adds its own rows. more: fields of config.json.
    """
    made = hub(c, model_type, architecture, names, **more)
    places = zip(c.kinds, places_of(c.kinds, "blocks"), strict=True)
    rows = [
        row
        for i, (kind, (path, index)) in enumerate(places)
        for row in feed_forward_rows(c, i, kind, path, index, part=part, expert=expert)
    ]
    return replace(made, rows=(*made.rows, *rows), overrides=OVERRIDES)


def feed_forward_rows(
    c: Any,
    i: int,
    kind: LayerKind,
    path: str,
    index: int,
    *,
    part: str = "mlp",
    expert: Sequence[tuple[str, str]] = EXPERT,
) -> Iterable[Row]:
    """Return the rows of the feed-forward part of layer `i`, which lies at `path` and `index`; the others as in
    `mixture_hub`."""
    layer = f"model.layers.{i}"
    if not kind.routed:
        for theirs, ours, inputs in MLP:
            yield Row(theirs=f"{layer}.{theirs}", ours=f"{path}/{ours}", layer=index, rows=inputs)
    elif expert:
        yield Row(theirs=f"{layer}.{part}.gate.weight", ours=f"{path}/mlp/router/weight", layer=index, rows=1)
        yield from _expert_rows(f"{layer}.{part}.experts", f"{path}/mlp/experts", index, c.experts, expert)


def _expert_rows(theirs: str, ours: str, layer: int, experts: int, names: Sequence[tuple[str, str]]) -> Iterable[Row]:
    for x in range(experts):
        for end, mine in names:
            yield Row(theirs=f"{theirs}.{x}.{end}", ours=f"{ours}/{mine}", layer=(layer, x), rows=1)


def experts_of(fields: Fields, name: str, default: int) -> int:
    """Return the number of experts: the field `name`, or `num_local_experts`, as transformers 5 writes it as well."""
    given = fields.get(name, fields.get("num_local_experts", default))
    if fields.get("num_local_experts", given) != given:
        fields.problem("num_local_experts", f"{given}, as {name} says")
    return fields.size(name if name in fields.config else "num_local_experts", default)


def chosen_of(fields: Fields, experts: int, default: int) -> int:
    """Return the number of experts of a token, at most `experts`."""
    found = fields.size("num_experts_per_tok", default)
    if found > experts:
        fields.problem("num_experts_per_tok", f"at most {experts}, the number of experts", found)
        return experts
    return found


def count(fields: Fields, name: str, default: int) -> int:
    """Return a whole number of at least 0."""
    found = fields.get(name, default)
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        fields.problem(name, "a whole number of at least 0")
        return 0
    return found


def pass_over_losses(fields: Fields) -> None:
    """Take the fields of transformers' balance loss, which is a loss over the batch and changes no logits.

    `MixtureConfig.balance_loss` is one of each sample, so that it does not depend on the microbatch.
    """
    for name in ("output_router_logits", "router_aux_loss_coef", "aux_loss_alpha", "seq_aux"):
        fields.get(name)
