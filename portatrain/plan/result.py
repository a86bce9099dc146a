"""Hold the planner's answer: the best ways to run a recipe on a cluster, and the reasons against the others."""

from __future__ import annotations

from dataclasses import dataclass, field

from portatrain.errors import UserError
from portatrain.model.layout import MESH_AXES
from portatrain.plan.clusters.cluster import Cluster
from portatrain.plan.cost.efficiency import Efficiency
from portatrain.plan.cost.interval import Interval, interval
from portatrain.plan.cost.memory import Memory
from portatrain.plan.cost.placement import Placement
from portatrain.plan.cost.policy import PRECISIONS
from portatrain.plan.cost.shapes import ModelShape
from portatrain.plan.cost.tensors import Sizes
from portatrain.plan.cost.timing import Time

CONVENTION = "6 x parameters multiplied with each token + 12 x layers x width x length x 1/2 (causal); no recomputation"
"""The FLOPs that MFU counts, over the peak for the precision of the matmuls."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run a step. ``rows``: samples of a microbatch on each device along replica, fsdp and expert.
    ``kernel``: the kernel of attention; empty without attention. ``grouped``: that of the grouped matmuls of experts;
    empty without experts."""

    mesh: Sizes
    rows: int
    accumulation: int
    remat: str
    precision: str
    placement: Placement
    memory: Memory
    time: Time
    kernel: str = ""
    grouped: str = ""

    @property
    def step_s(self) -> float:
        return self.time.total

    @property
    def mesh_text(self) -> str:
        """Return the mesh as --mesh takes it: ``fsdp=16,tensor=8``."""
        return ",".join(f"{a}={n}" for a, n in zip(MESH_AXES, self.mesh, strict=True) if n > 1) or "1"

    def why(self, best: Candidate) -> str:
        """Return why it is slower than ``best``: the two largest differences."""
        if self is best:
            return _largest(best)
        mine, its = self.time.terms(), best.time.terms()
        more = sorted(((mine[t] - its[t], t) for t in mine), reverse=True)
        parts = [f"{_NAMES[t]} +{100 * d / best.step_s:.1f} %" for d, t in more[:2] if d > 0.001 * best.step_s]
        return ", ".join(parts) or "as fast; more axes or another remat policy"


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A reason, the number of meshes that it rules out, and the mesh that came nearest."""

    reason: str
    count: int
    nearest: str = ""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Count the work of a search. A test checks these counts, because times depend on the machine."""

    meshes: int = 0
    memories: int = 0
    times: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer for one cluster. ``used``: the part of the cluster that works. ``shape``: the recipe as planned.
    ``asked``: the recipe as given, which differs from ``shape`` if only another batch divides. ``unplanned``: why no
    plan was made; '' if one was. ``refusal``: the error, if the chip does not compute in the recipe's precision."""

    asked: ModelShape
    shape: ModelShape
    cluster: Cluster
    used: Cluster
    efficiency: Efficiency
    best: tuple[Candidate, ...] = ()
    refused: tuple[Refused, ...] = ()
    short_bytes: float | None = None
    hints: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    counts: Counts = field(default_factory=Counts)
    refusal: UserError | None = None

    @property
    def unplanned(self) -> str:
        return self.cluster.chip.unplanned or (str(self.refusal) if self.refusal else "")

    @property
    def chosen(self) -> Candidate | None:
        return self.best[0] if self.best else None

    @property
    def fits(self) -> bool:
        """Return whether the recipe runs as it was given."""
        return bool(self.best) and self.shape is self.asked

    @property
    def device_bytes(self) -> float:
        return self.cluster.chip.memory_bytes / self.cluster.chip.devices_per_chip

    @property
    def tokens_per_s(self) -> float:
        return self.shape.tokens_per_step / self.best[0].step_s if self.best else 0.0

    @property
    def interval(self) -> Interval | None:
        """Return how far the predicted time may be off; None without a plan."""
        return interval(self.cluster.chip, self.shape, self.best[0].precision) if self.best else None

    @property
    def peak(self) -> float:
        """Return the FLOPs per second that MFU is relative to, over the chips in use."""
        chip, one = self.cluster.chip, self.best[0].precision if self.best else "bf16"
        kind = PRECISIONS[one].peak
        return (chip.peaks.get(kind) or chip.peaks["bf16"]).value * 1e12 * self.used.chips

    @property
    def mfu(self) -> float:
        return self.tokens_per_s * self.shape.model_flops / self.peak

    @property
    def usd_per_billion(self) -> float | None:
        """Return USD per billion tokens, over all chips of the cluster, idle chips too."""
        price = self.cluster.price
        if price is None or not self.best:
            return None
        return self.cluster.chips * price[1].value * 1e9 / self.tokens_per_s / 3600

    @property
    def kwh_per_billion(self) -> float | None:
        """Return kWh per billion tokens at the chips' rated power; hosts, network and cooling come on top."""
        power = self.cluster.chip.power
        if power is None or not self.best:
            return None
        return self.cluster.chips * power.value / 1000 * 1e9 / self.tokens_per_s / 3600

    @property
    def days(self) -> float | None:
        """Return the days for the recipe's tokens, without interruption."""
        tokens = self.shape.train_tokens
        return tokens / self.tokens_per_s / 86_400 if tokens and self.best else None

    @property
    def usd_per_run(self) -> float | None:
        """Return the USD for the recipe's tokens."""
        tokens, each = self.shape.train_tokens, self.usd_per_billion
        return tokens / 1e9 * each if tokens and each is not None else None

    @property
    def kwh_per_run(self) -> float | None:
        tokens, each = self.shape.train_tokens, self.kwh_per_billion
        return tokens / 1e9 * each if tokens and each is not None else None

    def estimates(self) -> dict[str, tuple[str, ...]]:
        """Return, for every figure of the plan, the estimates behind it; an empty tuple: only confirmed figures."""
        chip, found = self.cluster.chip, {}
        found["memory"] = _marked(memory=chip.memory)
        kind = PRECISIONS[self.best[0].precision].peak if self.best else "bf16"
        paths = self.best[0].placement.paths if self.best else ()
        links = {"memory_bw": chip.memory_bw, "peak": chip.peaks.get(kind)}
        if any(path.inner > 1 for path in paths):
            links |= {"link": chip.link, "scale_up": chip.scale_up if chip.kind == "switched" else None}
            links |= {"die_to_die": chip.die_to_die if chip.devices_per_chip > 1 else None}
        if any(path.outer > 1 for path in paths):
            links |= {"scale_out": chip.scale_out}
        marks = [*_marked(**links), *(["efficiency"] if self.efficiency.estimate else [])]
        if kind not in chip.peaks:
            marks.append("peak")
        found["time"] = tuple(marks)
        price = self.cluster.price
        found["usd"] = (*marks, *_marked(price=price[1] if price else None))
        found["kwh"] = (*marks, *_marked(power=chip.power))
        return found


_NAMES = {
    "matmul": "matmuls",
    "attention": "attention",
    "recompute": "recomputation",
    "elementwise": "memory-bound work",
    "optimizer": "optimizer",
    "fsdp": "weight gathering",
    "tensor": "tensor collectives",
    "context": "context collectives",
    "expert": "expert exchange",
    "replica": "gradient reduction",
}


def _largest(one: Candidate) -> str:
    """Return the three terms that take the most time."""
    terms = sorted(one.time.terms().items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{_NAMES[t]} {100 * s / one.step_s:.0f} %" for t, s in terms if s)


def slowest_term(one: Candidate, best: Candidate) -> str:
    """Return the term in which ``one`` loses most time against ``best``, in words."""
    its = best.time.terms()
    return _NAMES[max(its, key=lambda t: one.time.terms()[t] - its[t])]


def _marked(**figures: object) -> tuple[str, ...]:
    return tuple(name for name, figure in figures.items() if getattr(figure, "estimate", False))
