"""Trace steps with jax.profiler, and add up the time of each operation of the compiled programs."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import jax.extend.backend

from portatrain.backends.profile import Operation

CONTROL = ("while", "call", "conditional")
"""HLO operations that only run others; their own time is a wait."""


class JaxTrace:
    """See `portatrain.backends.profile.Trace`. Beside the trace it writes an .xplane.pb, which xprof opens."""

    def __init__(self) -> None:
        # jax cannot start another trace after one that it failed to write, so it writes to a folder of this machine.
        self._made = Path(tempfile.mkdtemp(prefix="portatrain-trace-"))
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # Python's own calls would be most of the events
        try:
            jax.profiler.start_trace(self._made, profiler_options=options)
        except BaseException:
            shutil.rmtree(self._made, ignore_errors=True)
            raise

    def step(self, step: int) -> AbstractContextManager[object]:
        return jax.profiler.StepTraceAnnotation("step", step_num=step)

    def stop(self, folder: Path, name: str) -> tuple[list[Path], list[Operation]]:
        try:
            jax.profiler.stop_trace()
            chrome = next(self._made.rglob("*.trace.json.gz"))
            planes = next(self._made.rglob("*.xplane.pb"))
            operations = _operations(planes)
            # Tools that read profiles look for plugins/profile/SESSION/HOST.xplane.pb.
            kept = [folder / f"{name}.trace.json.gz", folder / "plugins" / "profile" / name / planes.name]
            for path, made in zip(kept, (chrome, planes), strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(made, path)
            return kept, operations
        finally:
            shutil.rmtree(self._made, ignore_errors=True)


def _operations(planes: Path) -> list[Operation]:
    """Return the operations of a profile: of its accelerators, or of the host if it has none."""
    found: dict[bool, dict[tuple[str, str], list[float]]] = {True: {}, False: {}}
    for plane in jax.profiler.ProfileData.from_file(str(planes)).planes:
        totals = found[plane.name.startswith("/device:")]
        lines = list(plane.lines)
        named = [line for line in lines if line.name == "XLA Ops"]
        for line in named or lines:
            for key, own_s in _own_times(line, every_event=bool(named)):
                totals.setdefault(key, []).append(own_s)
    totals = found[True] or found[False]
    about = _origins({module for module, _ in totals})
    return [
        Operation(name=name, about=about.get((module, name), ""), calls=len(times), time_s=sum(times))
        for (module, name), times in totals.items()
        if name.partition(".")[0] not in CONTROL
    ]


def _own_times(line: Any, *, every_event: bool) -> Iterator[tuple[tuple[str, str], float]]:
    """Yield ((module, operation), its seconds without those of operations inside it) for each call on one line.

    Without `every_event`, only events that name their HLO operation count.
    """
    calls = []
    for event in line.events:
        stats = dict(event.stats)
        name = stats.get("hlo_op") or (event.name.partition(" = ")[0].lstrip("%") if every_event else "")
        if name:
            calls.append((event.start_ns, -event.duration_ns, str(stats.get("hlo_module", "")), str(name)))
    open_calls: list[list[Any]] = []  # [end, own time, key] of the calls around the current one
    for start_ns, negative_ns, module, name in sorted(calls):
        while open_calls and open_calls[-1][0] <= start_ns:
            _, own_ns, key = open_calls.pop()
            yield key, max(0.0, own_ns) / 1e9
        if open_calls:
            open_calls[-1][1] += negative_ns
        open_calls.append([start_ns - negative_ns, -negative_ns, (module, name)])
    for _, own_ns, key in open_calls:
        yield key, max(0.0, own_ns) / 1e9


_ORIGIN = re.compile(r'^\s*(?:ROOT )?%(\S+) = .*metadata=\{[^}]*op_name="([^"]*)"', re.MULTILINE)


def _origins(modules: set[str]) -> dict[tuple[str, str], str]:
    """Return where each operation of the loaded programs `modules` comes from: the path of the model's operation."""
    found: dict[tuple[str, str], str] = {}
    for program in jax.extend.backend.get_backend().live_executables():
        for module in program.hlo_modules():
            if module.name not in modules:
                continue
            for name, origin in _ORIGIN.findall(module.to_string()):
                # Two programs of one name may number their operations differently; then neither is known.
                key = (module.name, name)
                found[key] = origin if found.get(key, origin) == origin else ""
    return found
