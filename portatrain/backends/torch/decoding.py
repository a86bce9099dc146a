"""Decode with a cache in torch, one layer after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from portatrain.backends.decoding import CachedAttention, Decoding, Placed, Probe, ProbedOps, last_logits
from portatrain.backends.token_ids import PREDICTED
from portatrain.backends.torch.ops import TorchOps
from portatrain.model.ops import check_layer


class Layers:
    """Run the layers of a Stack with the operations that the model was given, and nothing compiled."""

    def stack(self: Any, stack: Any, carry: Any, shared: Sequence[Any], per_layer: Any) -> tuple[Any, Any]:
        outs, made, held = [], [], self.cache_of_stack()
        for index, block in enumerate(stack):
            extra = () if per_layer is None else (tree_map(lambda a, i=index: a[i], per_layer),)
            inner = dataclasses.replace(
                self,
                layer=self.layer * stack.n + index,
                auxes={},
                tallies={},
                across=None,
                **self.in_layer(None if held is None else held[index]),
            )
            carry, out = check_layer(block, block.forward(inner, carry, *shared, *extra))
            outs.append(out)
            made.append(inner)
        self.after_stack(made)
        return carry, None if outs[0] is None else tree_map(lambda *xs: torch.stack(xs), *outs)

    def cache_of_stack(self) -> Any:
        """Return what the last call left in the Stack, by layer."""
        return None

    def in_layer(self, held: Any) -> dict[str, Any]:
        """Return the fields of the operations of a layer."""
        return {}

    def after_stack(self, layers: Sequence[Any]) -> None:
        """Keep what the operations of the layers hold."""


@dataclasses.dataclass
class DecodingOps(Layers, CachedAttention, TorchOps):
    """The operations of `TorchOps` with a cache."""

    decoding: Any = None

    def cache_of_stack(self) -> Any:
        return self.decoding.take()

    def in_layer(self, held: Any) -> dict[str, Any]:
        return {"decoding": self.decoding.inside(held)}

    def after_stack(self, layers: Sequence[Any]) -> None:
        self.decoding.made.append([ops.decoding.made for ops in layers])

    def into_cache(self, cache_BTKD: Tensor, x_BSKD: Tensor, at: int) -> Tensor:
        cache_BTKD[:, at : at + x_BSKD.shape[1]] = x_BSKD  # in place: no other step reads the cache
        return cache_BTKD


@dataclasses.dataclass
class ProbingOps(Layers, ProbedOps, TorchOps):
    """The operations of `TorchOps` that show what mixes positions."""

    probe: Any = None

    def in_layer(self, held: Any) -> dict[str, Any]:
        return {"probe": self.probe}


class TorchCached:
    """See `portatrain.backends.decoding.CachedModel`."""

    def __init__(self, backend: Any, state: Any) -> None:
        self._backend, self._state = backend, state

    def begin(self, batch: Mapping[str, np.ndarray], offset_B: np.ndarray, length: int) -> tuple[np.ndarray, Any]:
        return self._run(batch, offset_B, length, None, None)

    def extend(
        self, batch: Mapping[str, np.ndarray], offset_B: np.ndarray, cache: Any, at: int
    ) -> tuple[np.ndarray, Any]:
        made, length = cache
        return self._run(batch, offset_B, length, made, at)

    @torch.no_grad()
    def probe(self, batch: Mapping[str, np.ndarray], poison_BS: np.ndarray) -> tuple[np.ndarray, list[str]]:
        there, probe = self._backend._put(batch), Probe(torch.from_numpy(poison_BS).to(self._backend.device))
        found = self._predicted(ProbingOps(**_fields(self._backend._ops(there, 0, False)), probe=probe), there)
        return found.float().cpu().numpy(), probe.found

    @torch.no_grad()
    def _run(
        self, batch: Mapping[str, np.ndarray], offset_B: np.ndarray, length: int, held: Any, at: int | None
    ) -> tuple[np.ndarray, Any]:
        there, (rows, new) = self._backend._put(batch), batch["tokens"].shape
        plain = self._backend._ops(there, 0, False)
        offsets = torch.from_numpy(offset_B.astype(np.int32)).to(self._backend.device)
        decoding = Decoding(Placed.of(plain, offsets, new, length, at), held)
        ops = DecodingOps(**_fields(plain), decoding=decoding)
        logits = last_logits(self._predicted(ops, there), rows, new, self._backend.definition.model)
        return logits.float().cpu().numpy(), (decoding.made, length)

    def _predicted(self, ops: Any, batch: Mapping[str, Tensor]) -> Any:
        with self._backend.ids.model_runs(PREDICTED):
            return self._state.module.predict(ops, batch)


def _fields(ops: TorchOps) -> dict[str, Any]:
    return {f.name: getattr(ops, f.name) for f in dataclasses.fields(ops)}
