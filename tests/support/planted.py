"""Recipes with one fault each, for the tests of `portatrain check`: models that leave the one trajectory.

B batch, F features, M mlp, C classes.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from portatrain.data.spec import DataSpec
from portatrain.model.module import Module, Param, Stack, State
from portatrain.optim import AdamW, Rule, Slot
from portatrain.optim.schedules import Constant
from portatrain.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Points(DataSpec):
    """Drawn points with a label; every fourth point is zero, as black pixels are."""

    version: str = "1"

    def __len__(self) -> int:
        return 64

    def sample(self, index: int) -> Mapping[str, Any]:
        rng = np.random.default_rng(index)
        x = rng.normal(size=6).astype(np.float32) * (index % 4 != 0)
        return {"x": x, "label": np.int32(rng.integers(4))}


class Base(Module):
    """A classifier: logits = relu(x W + b) V; a fault overrides `hidden` or more."""

    def __init__(self) -> None:
        self.into = Param(embed=6, mlp=8)
        self.bias = Param(mlp=8, fan_in_axes=0, init="zeros")
        self.out = Param(mlp=8, embed=10)
        self.head = Param(classes=4, embed=10, fan_in_axes=0, init=0.4)

    def hidden(self, ops: Any, h_BM: Any) -> Any:
        return ops.relu(h_BM)

    def __call__(self, ops: Any, batch: Any) -> Any:
        h_BM = ops.bias(ops.einsum("bf,fm->bm", batch["x"], self.into), self.bias)
        z_BE = ops.einsum("bm,me->be", self.hidden(ops, h_BM), self.out)
        return ops.cross_entropy(z_BE, self.head, batch["label"])


def hidden(function: Callable[[Any, Any, Any], Any]) -> type[Base]:
    """Return a model whose `hidden(self, ops, h_BM)` is `function`."""
    return type("Planted", (Base,), {"hidden": function})


class BatchLoss(Base):
    """Two towers with the other samples as negatives."""

    def __call__(self, ops: Any, batch: Any) -> Any:
        za = ops.einsum("bf,fm->bm", batch["x"], self.into)
        zb = ops.bias(za, self.bias)
        z = ops.einsum("bm,me->be", zb, self.out)
        logits = ops.einsum("be,ce->bc", za, zb)
        return ops.cross_entropy(z + logits.sum(-1)[:, None], self.head, batch["label"])


class Contrast(Base):
    """`BatchLoss` as it ought to be."""

    def __call__(self, ops: Any, batch: Any) -> Any:
        za = ops.einsum("bf,fm->bm", batch["x"], self.into)
        z = ops.einsum("bm,me->be", ops.relu(ops.bias(za, self.bias)), self.out)
        return ops.across_samples(lambda *args: self.compared(ops, *args), z, batch["label"])

    def compared(self, ops: Any, z_GNE: Any, label_GN: Any, there_GN: Any) -> Any:
        scores_GNM = ops.einsum("gne,gme->gnm", z_GNE, z_GNE)
        others_GNM = ops.where(there_GN[:, None], scores_GNM, -1e9)
        right_GN = ops.einsum("gnc,ce,gne->gn", ops.one_hot(label_GN, 4), self.head, z_GNE)
        return ops.logsumexp(others_GNM, axis=-1) - right_GN, ops.cast(there_GN, "float32")


class GroupContrast(Contrast):
    """In groups of 16 samples, which a batch of 8 does not hold."""

    def __call__(self, ops: Any, batch: Any) -> Any:
        z = ops.einsum("bm,me->be", ops.bias(ops.einsum("bf,fm->bm", batch["x"], self.into), self.bias), self.out)
        return ops.across_samples(lambda *args: self.compared(ops, *args), z, batch["label"], group=16)


class OwnDropout(Base):
    """Dropout by a generator that the model holds."""

    def __init__(self) -> None:
        super().__init__()
        self.drawing = np.random.default_rng(0)

    def hidden(self, ops: Any, h_BM: Any) -> Any:
        if not ops.training:
            return ops.relu(h_BM)
        keep = ops.arange(8) * 0 + 1.0
        return ops.relu(h_BM) * keep * float(self.drawing.random() > 0.5)


class RarelyDrawn(Base):
    """Skips its hidden layer in one call of a hundred."""

    def hidden(self, ops: Any, h_BM: Any) -> Any:
        return h_BM if ops.training and random.random() < 0.01 else ops.relu(h_BM)


class DrawnInAnArgument(Base):
    """The line that draws calls another method of the file before it ends."""

    def hidden(self, ops: Any, h_BM: Any) -> Any:
        return self.scaled(ops, h_BM, 1.0 + random.random())

    def scaled(self, ops: Any, h_BM: Any, factor: float) -> Any:
        return ops.relu(h_BM) * factor


class DrawnWhenBuilt(Base):
    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0 + random.random()

    def hidden(self, ops: Any, h_BM: Any) -> Any:
        return ops.relu(h_BM) * self.factor


class Counting(Base):
    """A State set in the forward pass, as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = State()

    def hidden(self, ops: Any, h_BM: Any) -> Any:
        self.seen = ops.weight(self.seen) + 1.0
        return ops.relu(h_BM)


class Updating(Counting):
    def hidden(self, ops: Any, h_BM: Any) -> Any:
        ops.update(self, seen=ops.weight(self.seen) + 1.0)
        return ops.relu(h_BM)


class AfterStep(Counting):
    """A State set as an attribute after a step."""

    def hidden(self, ops: Any, h_BM: Any) -> Any:
        return ops.relu(h_BM)

    def after_step(self, ops: Any) -> None:
        self.seen = self.seen + 1.0


class Calls(Base):
    """A Python number that counts calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def hidden(self, ops: Any, h_BM: Any) -> Any:
        self.calls += 1
        return ops.relu(h_BM) * (1.0 + 0.1 * self.calls)


class KeptInDict(Base):
    """As `Calls`, where no attribute is set."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = Kept()

    def hidden(self, ops: Any, h_BM: Any) -> Any:
        self.kept.calls += 1
        return ops.relu(h_BM) * (1.0 + 0.1 * self.kept.calls)


class Kept:
    calls = 0


class MeanTallied(Base):
    """A State that a mean over samples is added to: twice as much with two microbatches."""

    def __init__(self) -> None:
        super().__init__()
        self.level = State(mlp=8)

    def hidden(self, ops: Any, h_BM: Any) -> Any:
        ops.tally(self, level=ops.mean(h_BM, ("batch", "mlp"), over=("batch",)))
        return ops.relu(h_BM)


class CallTallied(MeanTallied):
    """A State that counts calls: as many as there are microbatches."""

    def hidden(self, ops: Any, h_BM: Any) -> Any:
        ops.tally(self, level=0.0 * ops.weight(self.level) + 1.0)
        return ops.relu(h_BM)


class Normalised(Base):
    """Batch normalisation: by the mean of a microbatch."""

    def hidden(self, ops: Any, h_BM: Any) -> Any:
        return ops.relu(h_BM - ops.mean(h_BM, ("batch", "mlp"), over=("batch",)))


class Unused(Base):
    def __init__(self) -> None:
        super().__init__()
        self.spare = Param(embed=6, mlp=8)


class TimesZero(Unused):
    def hidden(self, ops: Any, h_BM: Any) -> Any:
        return ops.relu(h_BM) + 0.0 * ops.einsum("em->m", self.spare)


class Stopped(Unused):
    def hidden(self, ops: Any, h_BM: Any) -> Any:
        return ops.relu(h_BM) + ops.stop_gradient(ops.einsum("em->m", self.spare))


class OwnAxis(Base):
    def __init__(self) -> None:
        super().__init__()
        self.into = Param(embed=6, mpl=8)


class Layer(Module):
    def __init__(self) -> None:
        self.weight_1 = Param(mlp=8, mlp_out=8)
        self.spare = Param(mlp=8, fan_in_axes=0, init="ones")

    def __call__(self, ops: Any, x: Any) -> Any:
        return x + ops.einsum("bm,mn->bn", x, self.weight_1), None


class UnusedInStack(Base):
    def __init__(self) -> None:
        super().__init__()
        self.layers_1 = Stack(Layer(), 2)

    def hidden(self, ops: Any, h_BM: Any) -> Any:
        return self.layers_1(ops, ops.relu(h_BM))[0]


class Rotated(Base):
    """Zero-initialised gates hide nothing: a is reached although b starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Param(mlp=8, lora_rank=2)
        self.b = Param(lora_rank=2, mlp=8, init="zeros")

    def hidden(self, ops: Any, h_BM: Any) -> Any:
        return ops.relu(h_BM) + ops.einsum("br,rm->bm", ops.einsum("bm,mr->br", h_BM, self.a), self.b)


MODELS: dict[str, type[Module]] = {
    "nothing": Base,
    "factors that start at zero": Rotated,
    "a label in a reduction": hidden(
        lambda self, ops, h: h - ops.mean(h, ("batch", "points"), over=("points",))[:, None]
    ),
    "a comparison of samples": Contrast,
    "a comparison in groups": GroupContrast,
    "an einsum of two samples": BatchLoss,
    "an einsum over samples": hidden(lambda self, ops, h: ops.relu(h) * ops.einsum("bm->m", h)),
    "the samples in another order": hidden(lambda self, ops, h: ops.relu(h) + ops.roll(h, 2, axis=0)),
    "the first sample": hidden(lambda self, ops, h: ops.relu(h + h[:1])),
    "a sort over samples": hidden(lambda self, ops, h: ops.relu(h) + ops.cumsum(h, axis=0)),
    "std": hidden(lambda self, ops, h: h / h.std()),
    "std of features": hidden(lambda self, ops, h: h / h.std(-1)[:, None]),
    "max": hidden(lambda self, ops, h: h - h.max(-1)[:, None]),
    "a sum over samples": hidden(lambda self, ops, h: h - h.sum(0)),
    "a mean over all": hidden(lambda self, ops, h: h - h.mean()),
    "a Python random number": hidden(lambda self, ops, h: ops.relu(h) * random.random()),
    "a Python random number of its own": hidden(lambda self, ops, h: ops.relu(h) * random.Random(0).random()),
    "a Python random number in an argument": DrawnInAnArgument,
    "a NumPy random number": hidden(lambda self, ops, h: ops.relu(h) * float(np.random.rand())),
    "a NumPy generator made in the pass": hidden(
        lambda self, ops, h: ops.relu(h) * float(np.random.default_rng(0).normal())
    ),
    "a random number in one call of a hundred": RarelyDrawn,
    "bytes of the system": hidden(lambda self, ops, h: ops.relu(h) * (1 + os.urandom(1)[0])),
    "the time": hidden(lambda self, ops, h: ops.relu(h) * (1 + time.perf_counter())),
    "a random number when built": DrawnWhenBuilt,
    "a dropout of its own": OwnDropout,
    "a dropout by a mask of NumPy": hidden(lambda self, ops, h: h * (np.random.rand(*h.shape) > 0.5)),
    "a State set as an attribute": Counting,
    "a State updated in the forward pass": Updating,
    "a State set as an attribute after a step": AfterStep,
    "a counter": Calls,
    "a counter in an object": KeptInDict,
    "a mean that is tallied": MeanTallied,
    "a call that is tallied": CallTallied,
    "a mean over the microbatch": Normalised,
    "a mean over the batch in evaluation": hidden(
        lambda self, ops, h: (
            ops.relu(h) if ops.training else ops.relu(h - ops.mean(h, ("batch", "mlp"), over=("batch",)))
        )
    ),
    "a parameter that is not used": Unused,
    "a parameter times zero": TimesZero,
    "a parameter of a Stack that is not used": UnusedInStack,
    "a parameter behind stop_gradient": Stopped,
    "the rank of a process": hidden(lambda self, ops, h: ops.relu(h) * (1.0 + int(os.environ.get("RANK", "0")))),
    "an axis of a value": hidden(lambda self, ops, h: ops.shard(ops.relu(h), "batch", "mpl")),
    "an axis of other layers": hidden(lambda self, ops, h: ops.shard(ops.relu(h), "batch", "head_dim")),
    "two samples in one row": hidden(lambda self, ops, h: ops.relu(h.reshape(-1, 16)).reshape(-1, 8)),
    "two samples that see each other": hidden(
        lambda self, ops, h: ops.softmax(h.reshape(-1, 16)).reshape(-1, 8) if h.shape[0] > 1 else ops.softmax(h)
    ),
    "the number of samples": hidden(lambda self, ops, h: ops.relu(h) if h.shape[0] != 4 else ops.tanh(h)),
    "a misspelt axis": OwnAxis,
    "a division by zero": hidden(lambda self, ops, h: h / (h - h)),
    "a root of zero": hidden(lambda self, ops, h: ops.sqrt(h * h)),
    "an error": hidden(lambda self, ops, h: h + None),
}


@dataclass(frozen=True, kw_only=True)
class Spec:
    kind: str = "nothing"

    def build(self) -> Module:
        return MODELS[self.kind]()


@dataclass(frozen=True, kw_only=True)
class OwnRandomRule(Rule):
    """A rule that draws numbers."""

    def slots(self, info: Any) -> dict[str, Slot]:
        return {}

    def step(self, xp: Any, *, grad: Any, lr: Any, slots: Any, **_: Any) -> Any:
        return lr * grad * (1.0 + random.random()), {}


@dataclass(frozen=True, kw_only=True)
class DividingRule(OwnRandomRule):
    def step(self, xp: Any, *, grad: Any, lr: Any, slots: Any, **_: Any) -> Any:
        return lr * grad / (grad - grad), {}


@dataclass(frozen=True, kw_only=True)
class SummedRule(OwnRandomRule):
    def step(self, xp: Any, *, grad: Any, param: Any, lr: Any, slots: Any, **_: Any) -> Any:
        return lr * (grad[None] + param), {}


def recipe(kind: str = "nothing", **fields: Any) -> Recipe:
    batch = 32 if kind == "a comparison in groups" else 8
    given = {"optimizer": AdamW(lr=1e-3), "name": "planted", "batch": batch, **fields}
    return Recipe(model=Spec(kind=kind), data=Points(), schedule=Constant(), steps=4, compute={"mlp_out": ()}, **given)
