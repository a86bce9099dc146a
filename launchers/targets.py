"""Turn the names of --cluster into the facts that a job needs: engine, backend, mesh, hosts, processes.

A plan is made for every cluster before anything is submitted (`portatrain.plan`). A cluster on which the recipe cannot
run is refused with the planner's reason.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launchers.base import Job, carriers, launcher, launcher_names
from launchers.cluster_options import GENERAL
from portatrain.errors import UserError, choice
from portatrain.plan.clusters import names
from portatrain.plan.clusters.catalog import stack_of
from portatrain.plan.clusters.cluster import Cluster
from portatrain.plan.cost import recipes
from portatrain.plan.result import Plan
from portatrain.plan.search import plan
from portatrain.recipe import Recipe
from portatrain.runs.code_snapshot import where
from portatrain.system import terminal
from portatrain.system.paths import config_folder
from portatrain.system.text import counted
from portatrain.system.urls import is_remote

RESOURCES = {
    "jax-tpu": "google.com/tpu",
    "torch-cuda": "nvidia.com/gpu",
    "torch-rocm": "amd.com/gpu",
    "hpu": "habana.ai/gaudi",
    "neuron": "aws.amazon.com/neuron",
}
"""The resource name in Kubernetes for the chips of each software stack."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A cluster that a job can be sent to. `cluster` is None for one that is a launcher's name: `local`."""

    name: str
    engine: str
    cluster: Cluster | None = None
    backend: str | None = None
    mesh: str | None = None
    devices: int | None = None
    hosts: int = 1
    processes: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    track: tuple[str, ...] = ()

    @property
    def cluster_shape(self) -> dict[str, Any]:
        """The cluster's data for the job's engine; see `Job.cluster_shape`."""
        cluster = self.cluster
        if cluster is None:
            return {}
        return {
            "chip": cluster.chip.name,
            "chips": cluster.chips,
            "slices": cluster.slices,
            "topology": "x".join(map(str, cluster.dims)),
            "resource": RESOURCES.get(cluster.chip.stack, ""),
            "chips_per_host": min(cluster.chip.chips_in_host, cluster.chips // cluster.slices),
        }


def targets(
    given: Sequence[str], recipe: str, *, mesh: str | None, devices: int | None, backend: str | None
) -> list[Target]:
    """Return the target of each name; UserError for an unknown name."""
    found = []
    for name in given:
        if _is_cluster(name):
            found.append(Target(name=name, engine=name, mesh=mesh, devices=devices, backend=backend))
        else:
            (cluster,) = names.find([name], recipe, ["local"])
            found.append(_target(cluster, mesh, devices, backend))
    at_once = [t.name for t in found if t.engine and not launcher(t.engine).queues]
    if len(found) > 1 and at_once:
        local = at_once[0]
        raise UserError(
            f"--cluster {','.join(given)}",
            expected="clusters of schedulers, or one alone",
            got=f"{local}, which starts at once",
            do=f"Use --cluster {local}, or leave it out.",
        )
    return found


def _is_cluster(name: str) -> bool:
    """Return whether `name` names a launcher that starts jobs at once, which needs no description of a cluster."""
    return name in launcher_names() and not launcher(name).queues


def _target(cluster: Cluster, mesh: str | None, devices: int | None, backend: str | None) -> Target:
    if cluster.engine and cluster.engine not in launcher_names():
        raise choice(f"{cluster.where}: cluster {cluster.name!r}, engine", cluster.engine, launcher_names())
    options: dict[str, Any] = dict(cluster.options)
    general = {key: options.pop(key) for key in GENERAL if key in options}
    backend = backend or general.get("backend") or stack_of(cluster.chip).backend or None
    devices = general.get("devices", cluster.devices) if devices is None else devices
    hosts = general.get("hosts") or (1 if cluster.chip.name.startswith("cpu") else cluster.hosts)
    from portatrain.backends.base import process_per_device

    processes = general.get("processes") or (devices if process_per_device(backend) else hosts)
    for key, value in (("devices", devices), ("hosts", hosts), ("processes", processes)):
        if not isinstance(value, int) or value < 1:
            raise UserError(
                f"cluster {cluster.name}: option {key}",
                expected="a whole number of at least 1",
                got=repr(value),
                do=f"Correct it in {cluster.where or 'clusters.toml'}.",
            )
    assert devices is not None
    if processes % hosts or devices % processes:
        raise UserError(
            f"cluster {cluster.name}",
            expected="devices that divide over processes, and processes over hosts",
            got=f"devices={devices}, processes={processes}, hosts={hosts}",
            do="Correct the options of this cluster in clusters.toml.",
        )
    return Target(
        name=cluster.name,
        engine=cluster.engine,
        cluster=cluster,
        backend=backend,
        mesh=mesh or general.get("mesh"),
        devices=devices,
        hosts=hosts,
        processes=processes,
        options=options,
        track=cluster.track,
    )


def fitting(found: Sequence[Target], recipe: Recipe) -> list[Target]:
    """Those that the recipe can run on, each with its mesh; the others are named on standard error with the reason.

    Raises:
        UserError: it can run on none, or one of them has no engine that could carry a job there.
    """
    good = []
    for target in found:
        try:
            good.append(_fit(target, recipe))
        except UserError as error:
            if len(found) == 1:
                raise
            print(f"refused: {error}", file=sys.stderr)
    if not good:
        raise UserError(
            f"recipe {recipe.name}",
            expected="a cluster that it can run on",
            got=f"none of {len(found)}, for the reasons above",
            do="`portatrain plan` shows what would fit.",
        )
    return good


def _fit(target: Target, recipe: Recipe) -> Target:
    cluster = target.cluster
    if cluster is None:
        return target
    if not target.engine:
        raise _no_engine(cluster)
    from portatrain.backends.program import make_program

    if target.mesh is None:
        target = replace(target, mesh=_planned_mesh(cluster, recipe, target.devices))
    # It refuses what does not divide, before anything is submitted.
    there = make_program(recipe, mesh=target.mesh or "").layout.mesh.devices
    if there != target.devices:
        raise UserError(
            f"cluster {cluster.name}: mesh {target.mesh}",
            expected=f"a mesh of its {counted(target.devices or 0, 'devices')}",
            got=f"one of {there}",
            do="Change the mesh or the count.",
        )
    return target


def _planned_mesh(cluster: Cluster, recipe: Recipe, devices: int | None) -> str:
    from portatrain.plan.cost import recipes
    from portatrain.plan.cost.policy import REMATS
    from portatrain.plan.search import plan

    remats = (recipe.remat,) if recipe.remat in REMATS else tuple(REMATS)
    made = plan(recipes.shape_of(recipe), cluster, remats=remats)
    if made.refusal is not None:
        raise made.refusal
    if made.chosen is None or not made.fits or made.used.devices != devices:
        from portatrain.plan import render

        reason = "; ".join(made.notes) if made.chosen else render._misfit(made)
        raise UserError(
            f"cluster {cluster.name} for {recipe.name}",
            expected="a mesh on which it fits as it is",
            got=reason,
            do=f"`portatrain plan {recipe.name} --cluster {cluster.name}` says more.",
        )
    return made.chosen.mesh_text if made.chosen.mesh_text != "1" else "fsdp=1"


def _no_engine(cluster: Cluster) -> UserError:
    return UserError(
        f"cluster {cluster.name}",
        expected=f"a table in clusters.toml with an engine: {', '.join(carriers(cluster.chip))}",
        got="a name of the catalog, which gives the hardware and no scheduler",
        do=f"Add a table to clusters.toml, beside the recipe or in {config_folder()}, with these lines, "
        f"and use its name: {'; '.join(_table(cluster))}. --dry-run shows the job for each engine.",
    )


def _table(cluster: Cluster) -> list[str]:
    """Return the lines of clusters.toml that would configure it, for the first launcher that could carry a job."""
    engine = carriers(cluster.chip)[0]
    return [
        f"[my-{cluster.chip.name}]",
        f'chip = "{cluster.chip.name}"',
        f"count = {cluster.chips}",
        f'engine = "{engine}"',
        f"options = {launcher(engine).example_options}",
    ]


# ---- --dry-run


def show(jobs: Sequence[Job], found: Sequence[Target], recipe: Recipe) -> None:
    """Print the plan of each job and exactly what would be submitted. If a cluster has no engine, print the job for
    each launcher that could carry it, and how to configure one."""
    clusters = [t.cluster for t in found if t.cluster is not None]
    plans = _show_plans(recipe, clusters) if clusters else []
    meshes = {p.cluster.name: p.chosen.mesh_text for p in plans if p.chosen}
    by_name = {t.name: t for t in found}
    for number, job in enumerate(jobs, 1):
        cluster = by_name[job.cluster].cluster
        numbered = replace(job, number=number, mesh=job.mesh or meshes.get(job.cluster))
        if job.detached:
            folder, source, _ = where(Path(job.run_dir), job.recipe)
            code = f"{job.run_dir}/code/{folder.name}" if is_remote(job.run_dir) else str(folder)
            numbered = replace(numbered, code=code, recipe=source.replace(str(folder), code, 1))
        if cluster is None and job.engine == "local":
            print(f"# {_local_plan(recipe, job)}")
        if cluster is None or job.engine:
            title = f"# {job.cluster} by {job.engine}\n" if job.detached else ""
            print(title + launcher(job.engine).materialize(numbered if job.detached else job))
            continue
        for engine in carriers(cluster.chip):
            print(f"\n# {job.cluster} by {engine} (not configured)")
            print(launcher(engine).materialize(replace(numbered, engine=engine)))
        print(
            f"\n# To launch there: put this, with your own values, into clusters.toml beside the recipe or in "
            f"{config_folder()}, then launch --cluster my-{cluster.chip.name}"
        )
        print("\n".join(_table(cluster)))


def _local_plan(recipe: Recipe, job: Job) -> str:
    """Return the plan of a local job in one line. It loads no framework, so accelerators are unknown."""
    from portatrain.backends.program import make_program
    from portatrain.plan.recorded import of_run
    from portatrain.system.text import duration

    try:
        given = job.mesh if job.mesh is not None else f"fsdp={job.devices or 1}"
        mesh = make_program(recipe, mesh=given).layout.mesh
        made = of_run(recipe, mesh, "cpu")
    except UserError as error:
        return f"not planned: {error}"
    if not made["planned"]:
        return f"not planned: {made['why']}"
    step_s, memory = float(made["plan"]["step_s"]), float(made["plan"]["memory_total_bytes"])
    return (
        f"plan, if it runs on CPU devices: mesh {mesh}, {step_s:.3g} s a step, {memory / 2**30:.2f} GiB a device, "
        f"{duration(step_s * recipe.steps)} for {counted(recipe.steps, 'steps')}"
    )


def _show_plans(recipe: Recipe, wanted: Sequence[Cluster]) -> list[Plan]:
    """Print the plan of `recipe` for every cluster, in the order of preference; return the plans."""

    from portatrain.plan import render

    shape = recipes.shape_of(recipe)
    plans = [plan(shape, cluster) for cluster in wanted]
    console = terminal.console(180)
    render.show(plans, console, details=len(plans) == 1)
    return plans
