"""Compile one plan in a separate process, show its progress, and cache the answer by everything that it depends on."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from portatrain.errors import UserError
from portatrain.plan.compilers import targets
from portatrain.plan.compilers.targets import Target
from portatrain.plan.cost import placement
from portatrain.plan.result import Candidate, Plan
from portatrain.system import json_files
from portatrain.system.paths import cache_folder

FORMAT = 2
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "libtpu",
    "jax-cuda13-pjrt",
    "jax-rocm7-pjrt",
    "jax-rocm7-plugin",
    "torch",
)
_SOURCES = (
    *("backends", "model", "optim", "recipe", "plan/compilers"),
    *("data/open.py", "data/spec.py", "plan/recorded.py", "plan/cost/device_order.py"),
)
"""Folders and files of this package that decide what is compiled."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request to compile a recipe, named as on the command line, on a mesh, for devices in an order.

    ``places``: see `portatrain.plan.cost.device_order`; None: the devices as the compiler lists them.
    """

    compiler: str
    recipe: str
    overrides: tuple[str, ...]
    mesh: str
    options: Mapping[str, Any]
    places: tuple[tuple[int, tuple[int, ...]], ...] | None = None
    source: str = ""
    """SHA-256 of a recipe file's contents; '' for a recipe of this package."""

    @property
    def key(self) -> str:
        """Return the cache key: a hash of the request, of the installed versions and of portatrain's sources."""
        text = json.dumps([FORMAT, asdict(self), versions(), sources()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def request(plan: Plan, chosen: Candidate, target: Target, recipe: str, overrides: tuple[str, ...]) -> Request:
    """Return the request for one candidate of a plan, with the batch, accumulation and remat of that plan."""
    own = Path(recipe).read_bytes() if recipe.endswith(".py") else b""
    asked = (
        *overrides,
        f"batch={plan.shape.batch}",
        f"accumulation={chosen.accumulation}",
        f"remat={chosen.remat}",
        f"precision={chosen.precision}",
    )
    places = None
    if target.compiler != "fsdp2":
        places = tuple(placement.coordinates(plan.used, chosen.mesh, chosen.placement))
    return Request(
        compiler=target.compiler,
        recipe=str(Path(recipe).resolve()) if own else recipe,
        overrides=asked,
        mesh=chosen.mesh_text if chosen.mesh_text != "1" else "",
        options=target.options,
        places=places,
        source=hashlib.sha256(own).hexdigest() if own else "",
    )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A compiler's answer for one device; None for a figure that it does not report. ``peak_bytes``: of a program
    that fits; otherwise ``needs_bytes``. ``flops``: of its matmuls. ``collectives``: bytes by mesh axes."""

    fits: bool
    peak_bytes: float | None
    needs_bytes: float | None
    flops: float | None
    collectives: Mapping[str, float] | None
    compiler: str
    seconds: float
    cached: bool
    raw: Mapping[str, Any] = field(default_factory=dict)


def answer(
    asked: Request, target: Target, *, tell: Callable[[str], None], fresh: bool = False, limit_s: float = 3600
) -> Answer:
    """Return the answer, from the cache unless ``fresh``. ``tell`` gets a line at every stage and every few seconds.
    An answer that cannot be kept is given all the same.

    Raises:
      UserError: the compiler is not installed, or it failed for another reason than memory.
    """
    path = cache_folder() / "compiled" / f"{asked.key}.json"
    if path.is_file() and not fresh:
        return _read(path, cached=True)
    targets.check_installed(target)
    with tempfile.TemporaryDirectory() as folder:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:  # read-only, full, or no folder
            tell(f"the answer will not be kept: {error}")
            path = Path(folder) / "answer.json"
        question = Path(folder) / "request.json"
        question.write_text(json.dumps(asdict(asked)), encoding="utf-8")
        _run(question, path, target, tell, limit_s)
        return _read(path, cached=False)


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that compile."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def sources() -> str:
    """Return the SHA-256 of the sources that decide what is compiled."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted(_files(root)):
        digest.update(f"{path.relative_to(root.parent)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _files(root: Path) -> Iterator[Path]:
    for name in _SOURCES:
        path = root / name
        yield from path.rglob("*.py") if path.is_dir() else [path]
    yield from (root.parent / "recipes").rglob("*.py")


def _run(question: Path, path: Path, target: Target, tell: Callable[[str], None], limit_s: float) -> None:
    command = [sys.executable, "-m", "portatrain.plan.compilers.worker", str(question), str(path)]
    errors = question.with_name("stderr")
    with (
        errors.open("wb") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, env=targets.environment(target), text=True
        ) as process,
    ):
        try:
            _follow(process, tell, limit_s)
        except BaseException:
            process.kill()
            raise
    if process.returncode or not path.is_file():
        lines = [line for line in errors.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        told = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "nothing on stderr")
        raise UserError(
            f"--compile with {target.compiler}",
            expected="the compiler to end with an answer",
            got=f"exit code {process.returncode}: {told[:600]}",
            do="Leave --compile out for the plan by arithmetic. If the message names a missing library, install "
            f"'portatrain[{target.extra}]' anew.",
        )


def _follow(process: subprocess.Popen[str], tell: Callable[[str], None], limit_s: float) -> None:
    """Pass on the stages, and every ten seconds the time since the start."""
    import threading

    began_s, now = time.monotonic(), "starting"
    lines: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: lines.extend(line.strip() for line in process.stdout or ()), daemon=True)
    reader.start()
    told = -10.0
    while process.poll() is None:
        spent_s = time.monotonic() - began_s
        if spent_s > limit_s:
            raise UserError(
                "--compile",
                expected=f"an answer within {limit_s:.0f} s",
                got="none",
                do="Compile fewer devices or layers.",
            )
        if lines and lines[-1] != now:
            now, told = lines[-1], -10.0
        if spent_s - told >= 10:
            tell(f"{now} ({spent_s:.0f} s)")
            told = spent_s
        time.sleep(0.2)
    reader.join(timeout=5)


def _read(path: Path, *, cached: bool) -> Answer:
    raw = json_files.loads(path.read_text(encoding="utf-8"))
    return Answer(
        fits=raw["fits"],
        peak_bytes=raw.get("peak_bytes"),
        needs_bytes=raw.get("needs_bytes"),
        flops=raw.get("flops", raw.get("traced_flops")),
        collectives=raw.get("collective_bytes"),
        compiler=raw["compiler"],
        seconds=raw["seconds"],
        cached=cached,
        raw=raw,
    )
