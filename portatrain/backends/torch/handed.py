"""Hand block masks from layer to layer if blocks are compiled.

A compiled block sees tensors and constants. So what it makes is one of its results, and what earlier layers made is one
of its arguments: the first layer is compiled by itself, and all others together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

BLOCK_MASK = "block mask"
"""The name of the block masks of FlexAttention. They are not fused with their uses, as other masks are."""


@dataclass
class Handed:
    """The block masks of a stack of layers. earlier: those of earlier layers. args: the tensors that every layer gets.
    made: those of this layer.

    A key consists of values and of places in `args`, so that it is the same in every layer and a constant for
    torch.compile.
    """

    earlier: dict[str, Any]
    args: tuple[Tensor, ...]
    made: dict[str, Any] = field(default_factory=dict)

    def keep(self, what: str, of: tuple[Any, ...], make: Callable[..., Any]) -> Any:
        """Return make(*of), or the result that an earlier layer got for the same tensors and values."""
        if what != BLOCK_MASK:
            return make(*of)
        key = what
        for value in of:
            if not isinstance(value, Tensor):
                key += f" {value}"
                continue
            place = -1
            for n, arg in enumerate(self.args):
                if arg is value:
                    place = n
            if place < 0:  # this layer made the tensor, so another layer has another one
                return make(*of)
            key += f" #{place}"
        if key in self.earlier:
            return self.earlier[key]
        if key not in self.made:
            self.made[key] = make(*of)
        return self.made[key]
