"""Train RECIPE in this process, from the newest checkpoint in DIR if there is one. Jobs run this command.

For a recipe that has not been checked here, one line says which `portatrain check` command does so; training begins.
The run directory DIR gets all records of the run: run.json, attempts/K/metrics.jsonl, the results.
The loss curve depends only on the recipe, not on backend, mesh or devices.

examples:
  portatrain train tiny-lm --run-dir runs/first
  portatrain train my_recipe.py --run-dir runs/wide --set model.embed=256 --set optimizer.lr=3e-4
  portatrain train tiny-vit --run-dir runs/vit --backend torch
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from portatrain.commands import options
from portatrain.errors import UserError, choice
from portatrain.system import environment
from portatrain.system.paths import place
from portatrain.system.urls import SCHEMES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_recipe(parser)
    options.add_init(parser)
    parser.add_argument(
        "--run-dir",
        metavar="DIR",
        type=place,
        required=True,
        help="the run directory, created if missing; or an object-store URL (s3://bucket/runs/NAME, gs://, az://)",
    )
    options.add_backend(parser)
    parser.add_argument("--mesh", metavar="AXES", help="the size of each mesh axis, such as fsdp=4,tensor=2")
    parser.add_argument("--devices", metavar="N", type=int, help="use N devices; on a CPU, N simulated ones")
    parser.add_argument(
        "--processes",
        metavar="N",
        type=int,
        help="use N processes on this machine, which share the devices as on a pod (jax; torch uses one per device)",
    )
    parser.add_argument("--stop-at", metavar="STEP", type=int, help="save after this step and end with exit code 85")
    parser.add_argument(
        "--accept-drift", metavar="REASON", help="continue although the continuity check fails; REASON is recorded"
    )
    parser.add_argument(
        "--checkpoints",
        metavar="URL",
        help="keep checkpoints in an object store (s3://bucket/prefix, gs://, az://); later attempts use it too",
    )
    parser.add_argument(
        "--kernel",
        metavar="OP=NAME",
        action="append",
        default=[],
        help="the implementation of an operation, such as attention=written-out (default: the first that supports it)",
    )
    options.add_profile(parser)
    options.add_track(parser)


def run(args: argparse.Namespace) -> int:
    from portatrain.system.processes import end_with_parent

    end_with_parent()
    return train(args)


def train(args: argparse.Namespace) -> int:
    """Check everything that can be checked without touching the disk, then train; return the exit code.

    ``args`` has the attributes of the options above.
    """
    from portatrain.backends.choose_kernel import parse as parse_kernels
    from portatrain.commands.unseen import suggest
    from portatrain.runs import changes
    from portatrain.runs.open import open_run
    from portatrain.system.processes import world_size

    recipe = changes.settled(open_run(args.run_dir).path, options.resolved_recipe(args))
    backend = options.resolved_backend(args.backend)
    options.positive("--devices", args.devices)
    options.positive("--stop-at", args.stop_at)
    options.positive("--processes", args.processes)
    if args.stop_at is not None and args.stop_at > recipe.steps:
        raise UserError(
            "--stop-at",
            expected=f"a step of the run, 1 to {recipe.steps}",
            got=str(args.stop_at),
            do="Leave it out to train to the end.",
        )
    profile = getattr(args, "profile", None)
    options.check_profile(profile, min(args.stop_at or recipe.steps, recipe.steps))
    if (url := getattr(args, "checkpoints", None)) is not None:
        from portatrain.checkpoint.locations import location_of

        if not url.startswith(SCHEMES):
            raise choice("--checkpoints", url.partition("://")[0] + "://", SCHEMES)
        location_of(url)  # reports problems of the URL or the environment before anything starts
    _check_mesh(args.mesh, args.devices)
    if world_size() is None:  # else it is one of the processes that this command started
        suggest(recipe, args)
    kernels = parse_kernels(getattr(args, "kernel", None) or ())
    args.backend, args.devices = backend, args.devices or _processes_there(backend, args.mesh)
    if (n := _processes_wanted(backend, args)) is not None:
        from portatrain.backends.program import make_program
        from portatrain.system.processes import run_processes

        # Reports options that conflict before any process starts.
        make_program(recipe, mesh=args.mesh or f"fsdp={args.devices or n}")
        open_run(args.run_dir).check(recipe)
        return run_processes(n, "portatrain.commands.train:train", vars(args))

    from portatrain.system.processes import rank
    from portatrain.training.metrics import Sink
    from portatrain.training.metrics.console import ConsoleSink
    from portatrain.training.metrics.trackers import tracker

    track = options.check_track("--track", args.track)
    trackers = [tracker(name) for name in track]  # reports a missing package before anything is written
    run_dir = open_run(args.run_dir, work=True)
    if rank() == 0:  # only process 0 writes there
        run_dir.check(recipe)
    sinks: list[Sink] = [ConsoleSink(), *trackers]

    from portatrain.system.cloud_notices import Notices
    from portatrain.system.stop_signals import StopSignals

    with (
        StopSignals() as signals,
        Notices(signals.ask),
    ):  # entered before the framework is imported, which takes seconds
        from portatrain.training.trainer import train as train_recipe

        return train_recipe(
            recipe,
            run_dir,
            backend=backend,
            mesh=args.mesh,
            devices=args.devices,
            stop_at=args.stop_at,
            accept_drift=args.accept_drift,
            checkpoints=getattr(args, "checkpoints", None),
            kernels=kernels,
            profile=profile,
            sinks=sinks,
            source=_source(args),
            signals=signals,
        )


def _source(args: argparse.Namespace) -> dict[str, Any] | None:
    """Return the data that `launch resume` needs for this run; None if a job or `launch` has recorded it."""
    if environment.CLUSTER.get():
        return None
    file = Path(args.recipe)
    known = {name: getattr(args, name, None) for name in ("backend", "mesh", "devices")}
    recipe = str(file.absolute()) if file.is_file() else args.recipe
    return {"recipe": recipe, "overrides": list(args.overrides), "cwd": os.getcwd(), **known}


def _processes_there(backend: str, mesh: str | None) -> int | None:
    """Return torchrun's number of processes, one device each; None with --mesh or --devices, or without torchrun."""
    from portatrain.backends.base import process_per_device
    from portatrain.system.processes import world_size

    return world_size() if process_per_device(backend) and mesh is None else None


def _processes_wanted(backend: str, args: argparse.Namespace) -> int | None:
    """Return the number of processes to start; None if this process is one of them or suffices alone."""
    from portatrain.backends.base import devices_a_process, process_per_device
    from portatrain.model.layout import Mesh
    from portatrain.system.processes import world_size

    if world_size() is not None:
        return None
    devices = Mesh.parse(args.mesh).devices if args.mesh is not None else args.devices or 1
    n = devices if process_per_device(backend) else args.processes or 1
    if args.processes not in (None, n):
        raise UserError(
            f"--processes {args.processes} on the {backend} backend",
            expected=f"{devices}, one per device",
            got=str(args.processes),
            do="Leave --processes out.",
        )
    devices_a_process(devices, n)
    return n if n > 1 else None


def _check_mesh(mesh: str | None, devices: int | None) -> None:
    if mesh is None:
        return
    from portatrain.model.layout import Mesh

    wanted = Mesh.parse(mesh).devices
    if devices is not None and wanted != devices:
        raise UserError(
            f"--mesh {mesh}",
            expected=f"a mesh of --devices {devices}",
            got=f"one of {wanted}",
            do=f"Use --devices {wanted}, or change the mesh.",
        )
