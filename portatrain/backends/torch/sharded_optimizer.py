"""Apply optimizer rules on a mesh: to this process's parts if a rule is elementwise, else to a whole layer's tensor.

A rule that reduces over a tensor (Muon's Newton-Schulz, Adafactor's means) needs the whole tensor. Gradient, parameter
and slots are all-gathered over the mesh axes that shard them, one tensor at a time, and every process keeps its part of
the result. So each such tensor moves once a step, and one of them must fit in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from portatrain.backends.torch.lower import Piece
from portatrain.backends.torch.mesh import World
from portatrain.backends.torch.optimizer import RuleOptimizer
from portatrain.model.layout import Spec
from portatrain.model.module import TensorInfo
from portatrain.optim import SGD, AdamW, Lion, Rule

ELEMENTWISE = (AdamW, Lion, SGD)
"""Rules whose update of an element depends on that element alone; all others are assumed to reduce."""


class ShardedOptimizer(RuleOptimizer):
    """Run a `RuleOptimizer` over parts. The tensors of `pieces` are this process's boxes under the layout of
    `world`."""

    def __init__(
        self,
        rule: Rule,
        pieces: Sequence[Piece],
        infos: dict[str, TensorInfo],
        decay: frozenset[str],
        world: World,
        seed: int = 0,
    ) -> None:
        self.world = world
        super().__init__(rule, pieces, infos, decay, seed)

    def box(self, info: TensorInfo) -> tuple[tuple[int, ...], tuple[int, ...]]:
        offset, shape = self.world.layout.box(info, self.world.at)
        return offset[info.stack_dims :], shape[info.stack_dims :]

    def _spec(self, info: TensorInfo) -> Spec:
        return self.world.layout.tensor_spec(info)[info.stack_dims :]

    def updated(self, rule: Rule, tensor: Tensor, slots: dict[str, Tensor], **options: Any) -> Any:
        if isinstance(rule, ELEMENTWISE):
            return super().updated(rule, tensor, slots, **options)
        (stacked, _), slot_infos, world = self.stacked[tensor], self.slot_infos[tensor], self.world
        whole = {n: world.gather_tensor(slots[n].float(), self._spec(i)) for n, i in slot_infos.items()}
        delta, new = rule.update(
            options.pop("xp"),
            info=self.infos[tensor][0],
            slots=whole,
            grad=world.gather_tensor(options.pop("grad"), self._spec(stacked)),
            param=world.gather_tensor(tensor.float(), self._spec(stacked)),
            **options,
        )
        return self._mine(delta, stacked), {n: self._mine(v, slot_infos[n]) for n, v in new.items()}

    def _mine(self, whole: Tensor, info: TensorInfo) -> Tensor:
        offset, shape = self.box(info)
        return whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
