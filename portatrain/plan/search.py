"""Search for the fastest way to train.

The search tries every legal mesh, with the largest microbatch that fits under each remat policy.

For a mesh, a remat policy and a precision a larger microbatch is never slower here (weights are gathered
less often, and nothing else changes), so only the largest that fits is timed. A mesh whose parameters and
optimizer state alone do not fit is dropped before anything else is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from portatrain.errors import UserError, choice
from portatrain.model.layout import split_positions
from portatrain.plan.attending import grouped_name_of, name_of, priced, refusal
from portatrain.plan.clusters import catalog
from portatrain.plan.clusters.cluster import Cluster
from portatrain.plan.cost import efficiency as factors
from portatrain.plan.cost import meshes
from portatrain.plan.cost.memory import Memory, memory, state_bytes
from portatrain.plan.cost.placement import assign_axes
from portatrain.plan.cost.policy import PRECISIONS, REMATS, Precision, Remat, Tuning, tuning_of
from portatrain.plan.cost.shapes import ModelShape
from portatrain.plan.cost.tensors import Sizes
from portatrain.plan.cost.timing import Rates, rates, step_time
from portatrain.plan.cost.workload import CONTEXT, OnMesh, on_mesh
from portatrain.plan.hints import what_would
from portatrain.plan.result import Candidate, Counts, Plan, Refused, slowest_term

KEEP = 10
MARGIN = 0.05
"""Memory that a plan leaves free if it can, since predictions are no more accurate than that."""


@dataclass
class _Search:
    """The state of one search; ``found`` holds the best candidate of every mesh."""

    shape: ModelShape
    cluster: Cluster
    remats: Sequence[Remat]
    precisions: Sequence[Precision]
    stack: Tuning
    given: Tuning | None
    rates: dict[str, Rates]
    capacity: float
    accumulation: int | None = None
    meshes: int = 0
    memories: int = 0
    times: int = 0
    found: list[Candidate] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)
    too_big: list[tuple[float, Sizes]] = field(default_factory=list)

    def run(self, fixed: Sizes | None) -> None:
        devices = self.cluster.devices
        per_domain = self.cluster.domain * self.cluster.chip.devices_per_chip
        known = [fixed] if fixed else meshes.legal(self.shape, devices, per_domain, self.refused)
        for mesh in known:
            self.meshes += 1
            self._mesh(mesh)
        self.found.sort(
            key=lambda one: (one.memory.total > self.roomy, one.step_s, sum(n > 1 for n in one.mesh), one.mesh)
        )

    @property
    def roomy(self) -> float:
        """Return the bytes of a device that a plan may use if it is to leave a margin."""
        return self.capacity * (1 - MARGIN)

    def _mesh(self, mesh: Sizes) -> None:
        work = on_mesh(self.shape, mesh)
        lightest = min(state_bytes(work, p, self.shape.slot_bytes, self.stack) for p in self.precisions)
        if lightest > self.capacity:
            self._miss(lightest, mesh)
            return
        fitting = list(self._fitting(work))
        if not fitting:
            return
        placements = assign_axes(self.cluster, mesh, self.cluster.devices)
        if isinstance(placements, str):
            self.refused[placements] = self.refused.get(placements, 0) + 1
            return
        best: Candidate | None = None
        for rows, accumulation, remat, precision, need in fitting:
            tokens, tuning = rows * work.seq, self._tuning(work, rows, precision)
            for placement in placements:
                self.times += 1
                time = step_time(
                    work,
                    placement,
                    tokens=tokens,
                    accumulation=accumulation,
                    remat=remat,
                    precision=precision,
                    slot_bytes=self.shape.slot_bytes,
                    rate=self.rates[precision.name],
                    tuning=tuning,
                )
                tight = need.total > self.roomy
                if best is None or (tight, time.total) < (best.memory.total > self.roomy, best.step_s):
                    best = Candidate(
                        mesh=mesh,
                        rows=rows,
                        accumulation=accumulation,
                        remat=remat.name,
                        precision=precision.name,
                        placement=placement,
                        memory=need,
                        time=time,
                        kernel=name_of(self.shape, mesh, rows, precision, self.stack),
                        grouped=grouped_name_of(self.shape, mesh, rows, precision, self.stack),
                    )
        if best is not None:
            self.found.append(best)

    def _fitting(self, work: OnMesh) -> list[tuple[int, int, Remat, Precision, Memory]]:
        """Return the largest microbatch that leaves the margin, for every remat policy and precision; if none does, the
        one that needs least, if it fits."""
        rows_here = self.shape.batch // work.rows
        found, smallest = [], None
        for precision in self.precisions:
            for remat in self.remats:
                tight = None
                for rows in self._microbatches(rows_here):
                    self.memories += 1
                    need = memory(
                        work,
                        tokens=rows * work.seq,
                        accumulation=rows_here // rows,
                        remat=remat,
                        precision=precision,
                        slot_bytes=self.shape.slot_bytes,
                        tuning=self._tuning(work, rows, precision),
                    )
                    way = rows, rows_here // rows, remat, precision, need
                    if need.total <= self.roomy:
                        found.append(way)
                        break
                    if need.total <= self.capacity and (tight is None or need.total < tight[-1].total):
                        tight = way
                    smallest = min(smallest or need.total, need.total)
                else:
                    found += [tight] if tight is not None else []
        if not found and smallest is not None:
            self._miss(smallest, work.mesh)
        return found

    def _tuning(self, work: OnMesh, rows: int, precision: Precision) -> Tuning:
        """Return the tuning as it was given, else the stack's, with the kernel of attention that runs."""
        return self.given or priced(self.stack, self.shape, work.mesh, rows, precision)

    def _microbatches(self, rows_here: int) -> list[int]:
        """Return the possible numbers of rows of a microbatch, the largest first."""
        if self.accumulation is None:
            return list(reversed(meshes.divisors(rows_here)))
        return [] if rows_here % self.accumulation else [rows_here // self.accumulation]

    def _miss(self, need: float, mesh: Sizes) -> None:
        self.too_big.append((need, mesh))


def plan(
    shape: ModelShape,
    cluster: Cluster,
    *,
    precisions: Sequence[str] | None = None,
    remats: Sequence[str] = tuple(REMATS),
    mesh: Sizes | None = None,
    accumulation: int | None = None,
    efficiency: factors.Efficiency | None = None,
    tuning: Tuning | None = None,
    hints: bool = True,
) -> Plan:
    """Return the best ways to train ``shape`` on ``cluster``.

    ``precisions``: the precisions to choose from; by default the recipe's alone, because another one changes the
    numbers. ``mesh`` and ``accumulation`` restrict the plan to one value. ``tuning`` replaces the tuning of the chip's
    stack. ``hints=False`` leaves out the changes that would make the recipe fit. A precision that the chip does not
    compute in is left out; if none is left, the plan has the error, and is none.

    Raises:
      UserError: an unknown precision or remat policy, or a ``mesh`` that does not fit recipe and cluster.
    """
    names = tuple(precisions or (shape.precision,))
    for what, given, valid in (("precision", names, PRECISIONS), ("remat", remats, REMATS)):
        for name in given:
            if name not in valid:
                raise choice(what, name, valid)
    factor = efficiency or factors.of(cluster.chip)
    reached = catalog.reached_by(cluster.chip)
    errors = {n: refusal(cluster.chip, PRECISIONS[n], tuning or tuning_of(cluster.chip.stack)) for n in names}
    names, refused = tuple(n for n in names if errors[n] is None), [e for e in errors.values() if e is not None]
    if cluster.chip.unplanned or not names:
        return Plan(
            asked=shape,
            shape=shape,
            cluster=cluster,
            used=cluster,
            efficiency=factor,
            notes=(reached,) if reached else (),
            hints=(f"{cluster.chip.name}: {cluster.chip.unplanned or refused[0]}",),
            refusal=None if names else refused[0],
        )
    if mesh is not None:
        _check_mesh(shape, cluster, mesh)
    search = _search(shape, cluster, names, remats, factor, tuning, mesh, accumulation)
    used, planned = cluster, shape
    notes = [*([reached] if reached else []), *(f"{error.what} is left out: {error.got}" for error in refused)]
    if not search.meshes and mesh is None:
        part = meshes.most_usable(shape, cluster)
        if part is not None and 2 * part.chips > cluster.chips:
            used = part
            idle = 1 - part.chips / cluster.chips
            notes.append(
                f"uses {part.chips} of {cluster.chips} chips ({100 * idle:.0f} % idle): batch={shape.batch} and the "
                "sizes of the model do not divide over more"
            )
            search = _search(shape, part, names, remats, factor, tuning)
        else:
            others = [shape.with_batch(batch) for batch in meshes.near_batches(shape, cluster)]
            tried = [(_search(other, cluster, names, remats, factor, tuning), other) for other in others]
            if tried:
                search, planned = max(tried, key=lambda pair: _tokens_per_s(*pair))
                notes.append(
                    f"batch={shape.batch} divides over no mesh of {cluster.devices} devices; this plan has "
                    f"batch={planned.batch}, which changes the loss curve"
                )
    best = tuple(search.found[:KEEP])
    if best and best[0].memory.total > search.roomy:
        notes.append(f"fits with less than {100 * MARGIN:.0f} % of memory to spare; in practice it may not fit")
    short = min((need - search.capacity for need, _ in search.too_big), default=None) if not best else None
    answer = Plan(
        asked=shape,
        shape=planned,
        cluster=cluster,
        used=used,
        efficiency=factor,
        best=best,
        refused=tuple(_reasons(search)),
        short_bytes=short,
        notes=tuple(notes),
        counts=Counts(meshes=search.meshes, memories=search.memories, times=search.times),
    )
    if best or not hints:
        return answer
    return replace(answer, hints=what_would(planned, cluster, names))


def _tokens_per_s(search: _Search, shape: ModelShape) -> float:
    return shape.tokens_per_step / search.found[0].step_s if search.found else 0.0


def _search(
    shape: ModelShape,
    cluster: Cluster,
    names: Sequence[str],
    remats: Sequence[str],
    factor: factors.Efficiency,
    tuning: Tuning | None,
    mesh: Sizes | None = None,
    accumulation: int | None = None,
) -> _Search:
    chosen = [PRECISIONS[name] for name in names]
    search = _Search(
        shape=shape,
        cluster=cluster,
        remats=[REMATS[name] for name in remats],
        precisions=chosen,
        stack=tuning or tuning_of(cluster.chip.stack),
        given=tuning,
        rates={p.name: rates(cluster.chip, p, factor.value) for p in chosen},
        capacity=cluster.chip.memory_bytes / cluster.chip.devices_per_chip,
        accumulation=accumulation,
    )
    search.run(mesh)
    return search


def _check_mesh(shape: ModelShape, cluster: Cluster, mesh: Sizes) -> None:
    devices = 1
    for n in mesh:
        devices *= n
    if devices != cluster.devices:
        raise UserError(
            f"mesh on {cluster.name}",
            expected=f"sizes that multiply to its {cluster.devices} devices",
            got=f"{devices}",
            do="Change the mesh or the cluster.",
        )
    if shape.recurrence and mesh[CONTEXT] > 1:
        raise split_positions(f"a layer of {shape.name}", mesh[CONTEXT])
    if not meshes.rules(shape).fits(mesh):
        checks = meshes.rules(shape)
        bad = next(s for s in (*checks.splits, checks.batch) if not s.fits(mesh))
        raise UserError(
            f"mesh for {shape.name}",
            expected=f"a size that divides {bad.axis}={bad.size}",
            got=f"{bad.shards(mesh)} shards",
            do="Leave --mesh out to see the meshes that work.",
        )


def _reasons(search: _Search) -> list[Refused]:
    """Return the reasons why the other meshes are not among the best, grouped."""
    found = []
    if search.too_big:
        need, mesh = min(search.too_big)
        found.append(
            Refused(
                reason=f"does not fit into {search.capacity / 2**30:.1f} GiB a device",
                count=len(search.too_big),
                nearest=f"{_text(mesh)} needs {need / 2**30:.1f} GiB",
            )
        )
    slower: dict[str, list[Candidate]] = {}
    for one in search.found[KEEP:]:
        slower.setdefault(slowest_term(one, search.found[0]), []).append(one)
    for term, those in sorted(slower.items(), key=lambda item: -len(item[1])):
        least = 100 * (those[0].step_s / search.found[0].step_s - 1)
        found.append(
            Refused(
                reason=f"slower, mostly by {term}", count=len(those), nearest=f"{those[0].mesh_text} +{least:.0f} %"
            )
        )
    found += [Refused(reason=why, count=n) for why, n in sorted(search.refused.items(), key=lambda item: -item[1])]
    return found


def _text(mesh: Sizes) -> str:
    from portatrain.model.layout import MESH_AXES

    return ",".join(f"{a}={n}" for a, n in zip(MESH_AXES, mesh, strict=True) if n > 1) or "1"
