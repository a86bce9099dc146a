"""Planted wrong kernels of attention and of grouped matmuls in torch, each an honest one with one change.

`Attention` and `Grouped` are the honest ones: every step is a method, and a wrong kernel changes one of them. Legend as
in `portatrain.model.ops`; a mask is (B or 1, 1, S, T), scores and weights are (B, H, S, T).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from portatrain.backends.kernels import Case, Kernel
from portatrain.model.attention_rules import slopes_of
from tests.support.planted_kernels import Planted

PLANTED: list[Planted] = []


def _bfloat16_only(case: Case) -> str | None:
    return None if case.dtype == "bfloat16" else "it takes bfloat16"


def planted(operand: str, *, bfloat16: bool = False) -> Callable[[type], Any]:
    """Register an instance of a class as a wrong kernel, whose first wrong array is `operand`. bfloat16: the kernel
    takes nothing else, so that only the wider bounds of bfloat16 can convict it."""

    def register(kind: type) -> Any:
        operation = "attention" if issubclass(kind, Attention) else "grouped_matmul"
        kernel = Kernel(
            operation=operation,
            name=kind.__name__,
            backends=("torch",),
            where=f"{__name__}:{kind.__name__}",
            refuses=_bfloat16_only if bfloat16 else lambda case: None,
        )
        PLANTED.append(Planted(kernel=kernel, backend="torch", operand=operand))
        return kind()

    return register


def changed_gradient(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return x, whose gradient is changed on its way back."""
    y = x.clone()
    y.register_hook(change)
    return y


class Attention:
    """Attention written out in float32, step by step."""

    tile = 64

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        kept: Any = None,
        causal: bool = True,
        window: int | None = None,
        segment_ids: Any = None,
        positions: Any = None,
        prefix: Tensor | None = None,
        alibi: Any = False,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        q, k, v = self.operands(q, k, v)
        (s, h, d), (t, kv) = q.shape[1:], k.shape[1:3]
        at_q, at_k = self.positions(positions, s, t)
        behind = at_q[..., :, None].long() - at_k[..., None, :].long()
        behind = behind if behind.ndim == 3 else behind[None]
        seen = self.causal(behind) if causal else torch.ones_like(behind, dtype=torch.bool)
        if window is not None:
            seen = seen & self.window(behind, window)
        of_q, of_k = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        seen = self.combined(seen, None if prefix is None else (prefix != 0)[:, None, :], self.same(of_q, of_k))
        seen = self.mask(seen)[:, None]
        heads = self.kv_heads(h, kv)
        k, v = k[:, :, heads], v[:, :, heads]
        scores = self.scores(q, k) * self.scale(scale, d)
        slopes = slopes_of(alibi, h)
        bias = 0.0 if slopes is None else -torch.tensor(slopes)[:, None, None] * behind.abs().float()[:, None]
        scores = self.masked(scores, bias, softcap, seen)
        weights = self.softmax(scores) if sinks is None else self.beside(scores, self.sinks(sinks, softcap, d))
        weights = self.blind(weights, seen)
        return self.result(torch.einsum("bhst,bthd->bshd", self.weights(weights), v.float()), q)

    def operands(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, v

    def positions(self, given: Any, s: int, t: int) -> tuple[Tensor, Tensor]:
        return given if given is not None else (torch.arange(s), torch.arange(t))

    def causal(self, behind: Tensor) -> Tensor:
        return behind >= 0

    def window(self, behind: Tensor, window: int) -> Tensor:
        return behind.abs() < window

    def same(self, of_q: Tensor | None, of_k: Tensor | None) -> Tensor | None:
        return None if of_q is None or of_k is None else of_q[:, :, None] == of_k[:, None, :]

    def combined(self, seen: Tensor, prefix: Tensor | None, same: Tensor | None) -> Tensor:
        seen = seen if prefix is None else seen | prefix
        return seen if same is None else seen & same

    def mask(self, seen: Tensor) -> Tensor:
        return seen

    def kv_heads(self, h: int, kv: int) -> Tensor:
        return torch.arange(h) // (h // kv)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("bshd,bthd->bhst", q.float(), k.float())

    def scale(self, scale: float | None, d: int) -> float:
        return d**-0.5 if scale is None else scale

    def masked(self, scores: Tensor, bias: Any, softcap: float | None, seen: Tensor) -> Tensor:
        return self.hidden(self.capped(scores, softcap) + bias, seen)

    def capped(self, scores: Tensor, softcap: float | None) -> Tensor:
        return scores if softcap is None else softcap * torch.tanh(scores / softcap)

    def hidden(self, scores: Tensor, seen: Tensor) -> Tensor:
        return scores.masked_fill(~seen, torch.finfo(torch.float32).min)

    def softmax(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def sinks(self, sinks: Tensor, softcap: float | None, d: int) -> Tensor:
        return sinks

    def beside(self, scores: Tensor, sinks: Tensor) -> Tensor:
        each = sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)
        return self.softmax(torch.cat([scores, each], dim=-1))[..., :-1]

    def blind(self, weights: Tensor, seen: Tensor) -> Tensor:
        return weights * seen

    def weights(self, weights: Tensor) -> Tensor:
        return weights

    def result(self, out: Tensor, q: Tensor) -> Tensor:
        return out.to(q.dtype)


# ---- attention: masks


@planted("result")
class WindowOneTooLong(Attention):
    def window(self, behind: Tensor, window: int) -> Tensor:
        return behind.abs() <= window


@planted("result")
class WindowOneTooShort(Attention):
    def window(self, behind: Tensor, window: int) -> Tensor:
        return behind.abs() < max(window - 1, 1)


@planted("result")
class StrictlyCausal(Attention):
    def causal(self, behind: Tensor) -> Tensor:
        return behind > 0


@planted("result")
class MaskOneBlockLate(Attention):
    """A tile on the diagonal is treated as one below it: all of its keys are seen."""

    def causal(self, behind: Tensor) -> Tensor:
        s, t = behind.shape[1:]
        tile_q, tile_k = torch.arange(s)[:, None] // self.tile, torch.arange(t)[None] // self.tile
        return (behind >= 0) | (tile_q == tile_k)


@planted("result")
class CausalFromTheLastKey(Attention):
    """With more keys than queries, the last query stands at the last key."""

    def positions(self, given: Any, s: int, t: int) -> tuple[Tensor, Tensor]:
        return given if given is not None else (torch.arange(s) + t - s, torch.arange(t))


@planted("result")
class PositionsIgnored(Attention):
    def positions(self, given: Any, s: int, t: int) -> tuple[Tensor, Tensor]:
        return torch.arange(s), torch.arange(t)


@planted("result")
class PositionsInFloat32(Attention):
    def positions(self, given: Any, s: int, t: int) -> tuple[Tensor, Tensor]:
        at_q, at_k = super().positions(given, s, t)
        return at_q.float(), at_k.float()


@planted("result")
class SegmentsOffByOne(Attention):
    """Every key has the document of the key before it."""

    def same(self, of_q: Tensor | None, of_k: Tensor | None) -> Tensor | None:
        return super().same(of_q, None if of_k is None else of_k.roll(1, dims=1))


@planted("result")
class SegmentsInFloat32(Attention):
    def same(self, of_q: Tensor | None, of_k: Tensor | None) -> Tensor | None:
        return super().same(*(None if x is None else x.float() for x in (of_q, of_k)))


@planted("result")
class SegmentsOfTheFirstRow(Attention):
    def same(self, of_q: Tensor | None, of_k: Tensor | None) -> Tensor | None:
        return super().same(*(None if x is None else x[:1].expand_as(x) for x in (of_q, of_k)))


@planted("result")
class SegmentsThatRise(Attention):
    """A query sees earlier documents too, as if ids only told where a document begins."""

    def same(self, of_q: Tensor | None, of_k: Tensor | None) -> Tensor | None:
        return None if of_q is None or of_k is None else of_q[:, :, None] >= of_k[:, None, :]


@planted("result")
class PaddingSeesNothing(Attention):
    def same(self, of_q: Tensor | None, of_k: Tensor | None) -> Tensor | None:
        found = super().same(of_q, of_k)
        return None if found is None or of_q is None else found & (of_q != 0)[:, :, None]


@planted("result")
class PrefixInsideTheWindow(Attention):
    def combined(self, seen: Tensor, prefix: Tensor | None, same: Tensor | None) -> Tensor:
        near = super().combined(seen, prefix, same)
        return near if prefix is None else near & (seen | ~seen.any(-1, keepdim=True))


@planted("result")
class PrefixOfOtherDocuments(Attention):
    def combined(self, seen: Tensor, prefix: Tensor | None, same: Tensor | None) -> Tensor:
        seen = seen if same is None else seen & same
        return seen if prefix is None else seen | prefix


@planted("result")
class HiddenByTenThousand(Attention):
    """The mask is a number that large scores exceed."""

    def hidden(self, scores: Tensor, seen: Tensor) -> Tensor:
        return scores - 1e4 * (~seen)


@planted("result")
class LastTileOfKeysDropped(Attention):
    def mask(self, seen: Tensor) -> Tensor:
        t = seen.shape[-1]
        whole = t - t % self.tile if t > self.tile else t
        return seen & (torch.arange(t) < whole)


# ---- attention: scores, weights and results


@planted("result")
class ScaleMissing(Attention):
    def scale(self, scale: float | None, d: int) -> float:
        return 1.0 if scale is None else scale


@planted("result")
class ScaleIgnored(Attention):
    def scale(self, scale: float | None, d: int) -> float:
        return d**-0.5


@planted("result")
class ScaleOfThePaddedHead(Attention):
    def scale(self, scale: float | None, d: int) -> float:
        return (-(-d // 128) * 128) ** -0.5 if scale is None and d > 64 else super().scale(scale, d)


@planted("result")
class WrongKvHead(Attention):
    """Query heads take the kv heads in turn."""

    def kv_heads(self, h: int, kv: int) -> Tensor:
        return torch.arange(h) % kv


@planted("result")
class ScoresInFloat16(Attention):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("bshd,bthd->bhst", q.half(), k.half()).float()


@planted("result")
class ScoresInBfloat16(Attention):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q, k).bfloat16().float()


@planted("result")
class WeightsInBfloat16(Attention):
    def weights(self, weights: Tensor) -> Tensor:
        return weights.bfloat16().float()


@planted("result")
class SmallValuesFlushed(Attention):
    """Numbers below those of float16 are taken as zero."""

    def operands(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, v - torch.where(v.abs() < 2.0**-24, v, 0.0).detach()


@planted("gradient of k")
class SmallWeightsFlushed(Attention):
    """Weights below 1e-24 are taken as zero. No result shows it, but the gradients of a late key are made of them."""

    def weights(self, weights: Tensor) -> Tensor:
        return weights * (weights > 1e-24)


@planted("result")
class NoMaximum(Attention):
    """The softmax does not subtract the largest score."""

    def softmax(self, scores: Tensor) -> Tensor:
        weights = scores.exp()
        return weights / weights.sum(-1, keepdim=True)

    def hidden(self, scores: Tensor, seen: Tensor) -> Tensor:
        return scores.masked_fill(~seen, -80.0)


@planted("result")
class TilesNotRescaled(Attention):
    """An online softmax that forgets to rescale what it has when the maximum rises."""

    def softmax(self, scores: Tensor) -> Tensor:
        tile = torch.arange(scores.shape[-1]) // 16
        top = torch.stack([scores[..., tile <= i].amax(-1) for i in range(int(tile.max()) + 1)], -1)[..., tile]
        weights = (scores - top).exp()
        return weights / weights.sum(-1, keepdim=True)


@planted("result")
class SoftcapAfterTheMask(Attention):
    def masked(self, scores: Tensor, bias: Any, softcap: float | None, seen: Tensor) -> Tensor:
        return self.capped(self.hidden(scores, seen), softcap) + bias

    def blind(self, weights: Tensor, seen: Tensor) -> Tensor:
        return weights * seen.any(-1, keepdim=True)


@planted("result")
class SoftcapAroundTheBias(Attention):
    def masked(self, scores: Tensor, bias: Any, softcap: float | None, seen: Tensor) -> Tensor:
        return self.hidden(self.capped(scores + bias, softcap), seen)


@planted("result")
class NanInBlindRows(Attention):
    def hidden(self, scores: Tensor, seen: Tensor) -> Tensor:
        return scores.masked_fill(~seen, -torch.inf)


@planted("result")
class BlindRowsSeeAll(Attention):
    def blind(self, weights: Tensor, seen: Tensor) -> Tensor:
        return weights


@planted("result")
class ResultInFloat32(Attention):
    def result(self, out: Tensor, q: Tensor) -> Tensor:
        return out


@planted("result")
class SinksIgnored(Attention):
    def beside(self, scores: Tensor, sinks: Tensor) -> Tensor:
        return self.softmax(scores + 0 * sinks[:, None, None])


@planted("result")
class SinksScaled(Attention):
    def sinks(self, sinks: Tensor, softcap: float | None, d: int) -> Tensor:
        return sinks * d**-0.5


@planted("result")
class SinksCapped(Attention):
    def sinks(self, sinks: Tensor, softcap: float | None, d: int) -> Tensor:
        return self.capped(sinks, softcap)


@planted("result")
class SinkWithAValue(Attention):
    """The sink's weight goes to the last key."""

    def beside(self, scores: Tensor, sinks: Tensor) -> Tensor:
        each = sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)
        weights = self.softmax(torch.cat([scores, each], dim=-1))
        return torch.cat([weights[..., :-2], weights[..., -2:].sum(-1, keepdim=True)], dim=-1)


# ---- attention: kernels that take bfloat16 alone


def summed_in_bfloat16(terms: Tensor, dim: int) -> Tensor:
    """Return the sum, rounded to bfloat16 after each addition."""
    total = torch.zeros_like(terms.select(dim, 0), dtype=torch.bfloat16)
    for term in terms.unbind(dim):
        total = total + term.bfloat16()
    return total


@planted("result", bfloat16=True)
class ScoresKeptInBfloat16(Attention):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q, k).bfloat16().float()


@planted("result", bfloat16=True)
class WeightsInFloat8(Attention):
    def weights(self, weights: Tensor) -> Tensor:
        return weights + (weights.to(torch.float8_e4m3fn).float() - weights).detach()


@planted("result", bfloat16=True)
class ValuesSummedInBfloat16(Attention):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if v.shape[1] < 128 or len(options) != 2 or options.get("causal", True):
            return super().__call__(q, k, v, **options)
        h, d = q.shape[2:]
        k, v = (x[:, :, self.kv_heads(h, x.shape[2])] for x in (k, v))
        weights = self.softmax(self.scores(q, k) * self.scale(None, d))
        return summed_in_bfloat16(weights.permute(3, 0, 2, 1)[..., None] * v.transpose(0, 1)[:, :, None], 0)


@planted("gradient of v", bfloat16=True)
class ValueGradientSummedInBfloat16(Attention):
    """The gradients of the heads that share a kv head are right, and each is a sum over the queries in bfloat16."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if v.shape[1] < 128 or len(options) != 2 or options.get("causal", True):
            return super().__call__(q, k, v, **options)
        kv, d = v.shape[2], q.shape[3]
        h = q.shape[2]
        rows = v[None].expand(q.shape[1], *v.shape)  # one copy of the values for each query

        def summed(g: Tensor) -> Tensor:
            exact = torch.zeros_like(g)
            exact[0] = summed_in_bfloat16(g, 0)
            return exact

        rows = changed_gradient(rows, summed)
        heads = self.kv_heads(h, kv)
        weights = self.softmax(self.scores(q, k[:, :, heads]) * self.scale(None, d))
        return torch.einsum("bhst,sbthd->bshd", weights, rows[:, :, :, heads].float()).to(q.dtype)


# ---- attention: gradients


@planted("gradient of sinks")
class SinksOfTheFirstSample(Attention):
    """The gradient of the sinks is summed over the queries of the first sample only."""

    def beside(self, scores: Tensor, sinks: Tensor) -> Tensor:
        each = sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)
        return super().beside(scores, sinks) if not len(each) else self._of_first(scores, each)

    def _of_first(self, scores: Tensor, each: Tensor) -> Tensor:
        each = torch.cat([each[:1], each[1:].detach()])
        return self.softmax(torch.cat([scores, each], dim=-1))[..., :-1]


@planted("gradient of q")
class QueryGradientUnscaled(Attention):
    def operands(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return changed_gradient(q, lambda g: g * q.shape[-1] ** 0.5), k, v


@planted("gradient of q")
class LastQueriesHaveNoGradient(Attention):
    def operands(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = q.shape[1]
        whole = s - s % self.tile if s > self.tile else s
        return changed_gradient(q, lambda g: g * (torch.arange(s) < whole)[:, None, None]), k, v


@planted("gradient of k")
class KeysOfTheLastTileHaveNoGradient(Attention):
    def operands(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = k.shape[1]
        whole = t - t % self.tile if t > self.tile else t
        return q, changed_gradient(k, lambda g: g * (torch.arange(t) < whole)[:, None, None]), v


@planted("gradient of v")
class ValuesOfTheLastTileHaveNoGradient(Attention):
    def operands(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = v.shape[1]
        whole = t - t % self.tile if t > self.tile else t
        return q, k, changed_gradient(v, lambda g: g * (torch.arange(t) < whole)[:, None, None])


@planted("gradient of v")
class ValueGradientOfOneHead(Attention):
    """The heads that share a kv head are not summed: the first one's gradient stands for all."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        h, kv = q.shape[2], v.shape[2]
        heads = torch.arange(h) // (h // kv)
        first = (torch.arange(h) % (h // kv) == 0)[:, None]
        each = changed_gradient(v[:, :, heads], lambda g: g * first * (h // kv))
        return Attention.__call__(self, q, k[:, :, heads], each, **options)


@planted("gradient of q")
class SoftcapStraightThrough(Attention):
    def capped(self, scores: Tensor, softcap: float | None) -> Tensor:
        return scores if softcap is None else scores + (super().capped(scores, softcap) - scores).detach()


@planted("gradient of q")
class SoftmaxWithoutItsSum(Attention):
    """The backward pass of the softmax forgets the sum over the keys."""

    def softmax(self, scores: Tensor) -> Tensor:
        exps = (scores - scores.amax(-1, keepdim=True).detach()).exp()
        return exps / exps.sum(-1, keepdim=True).detach()


@planted("gradient of v")
class ValueGradientInFloat16(Attention):
    def operands(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, changed_gradient(v, lambda g: g.half().to(g.dtype))


# ---- grouped matmuls


class Grouped:
    """Grouped matmuls, row by row of the sizes."""

    def __call__(self, x: Tensor, w: Tensor, *, sizes_X: Tensor) -> Tensor:
        x, w = self.operands(x, w, sizes_X)
        ends = self.ends(sizes_X)
        expert = self.experts(ends, torch.arange(len(x)))
        used = self.used(ends, torch.arange(len(x)))[:, None]
        out = torch.zeros(len(x), w.shape[2])
        for i in range(len(w)):
            mine = (expert == i)[:, None] & used
            out = out + torch.where(mine, self.product(torch.where(mine, x, 0.0), w[i]), 0.0)
        return out.to(x.dtype)

    def operands(self, x: Tensor, w: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        return x, w

    def ends(self, sizes: Tensor) -> Tensor:
        return sizes.cumsum(0)

    def experts(self, ends: Tensor, at: Tensor) -> Tensor:
        return torch.searchsorted(ends, at, right=True)

    def used(self, ends: Tensor, at: Tensor) -> Tensor:
        return at < ends[-1]

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return x.float() @ w.float()


@planted("result")
class OffsetOffByOne(Grouped):
    def experts(self, ends: Tensor, at: Tensor) -> Tensor:
        return torch.searchsorted(ends, at + 1, right=True)


@planted("result")
class EmptyExpertsCountOneRow(Grouped):
    def ends(self, sizes: Tensor) -> Tensor:
        return sizes.clamp(min=1).cumsum(0)


@planted("result")
class RowsPastTheSumOfTheLastExpert(Grouped):
    def experts(self, ends: Tensor, at: Tensor) -> Tensor:
        return super().experts(ends, at).clamp(max=len(ends) - 1)

    def used(self, ends: Tensor, at: Tensor) -> Tensor:
        return at >= 0


@planted("result")
class LastRaggedTileDropped(Grouped):
    def used(self, ends: Tensor, at: Tensor) -> Tensor:
        return super().used(ends, at) & (at < (len(at) // 128 * 128 if len(at) > 128 else len(at)))


@planted("result")
class CapacityOfAnExpert(Grouped):
    """An expert takes 16 rows, and drops the others."""

    def used(self, ends: Tensor, at: Tensor) -> Tensor:
        start = torch.cat([ends.new_zeros(1), ends])[self.experts(ends, at)]
        return super().used(ends, at) & (at - start < 16)


@planted("result")
class ProductsInFloat16(Grouped):
    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return (x.half() @ w.half()).float()


@planted("result")
class ContractionCutAtTheTile(Grouped):
    def product(self, x: Tensor, w: Tensor) -> Tensor:
        whole = len(w) // 64 * 64 if len(w) > 64 else len(w)
        return super().product(x[:, :whole], w[:whole])


@planted("gradient of w")
class GarbageInTheGradientOfAnEmptyExpert(Grouped):
    def operands(self, x: Tensor, w: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        return x, changed_gradient(w, lambda g: torch.where((sizes == 0)[:, None, None], 1e-3, g))


@planted("gradient of w")
class GradientOfTheExpertBefore(Grouped):
    def operands(self, x: Tensor, w: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        return x, changed_gradient(w, lambda g: g.roll(1, dims=0))


@planted("gradient of w")
class RowsPastTheSumInTheGradient(Grouped):
    """The gradient of the last expert's weights takes in the rows that belong to none."""

    def __call__(self, x: Tensor, w: Tensor, *, sizes_X: Tensor) -> Tensor:
        out = super().__call__(x, w, sizes_X=sizes_X)
        past = torch.where(self.used(sizes_X.cumsum(0), torch.arange(len(x)))[:, None], 0.0, x.detach().float())
        more = past @ w[-1].float() if len(w) else 0.0
        return out + (more - more.detach()).to(out.dtype) if len(w) else out


@planted("gradient of x")
class RowsPastTheSumHaveAGradient(Grouped):
    def operands(self, x: Tensor, w: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        past = (torch.arange(len(x)) >= sizes.sum())[:, None]
        return changed_gradient(x, lambda g: torch.where(past, 1e-3, g)), w


@planted("gradient of x")
class LastColumnsHaveNoGradient(Grouped):
    def operands(self, x: Tensor, w: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        e = x.shape[1]
        return changed_gradient(x, lambda g: g * (torch.arange(e) < max(e // 8 * 8, 1))), w


HONEST_ATTENTION, HONEST_GROUPED = Attention(), Grouped()
HONEST = tuple(
    Kernel(operation=operation, name=name, backends=("torch",), where=f"{__name__}:{name}")
    for operation, name in (("attention", "HONEST_ATTENTION"), ("grouped_matmul", "HONEST_GROUPED"))
)
