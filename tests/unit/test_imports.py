"""What each package may load, each asked in a process of its own."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FRAMEWORKS = ("jax", "flax", "optax", "torch", "deepspeed", "torch_xla")
ARRAYS = ("numpy", "scipy", "ml_dtypes")

PROBE = """
import json, sys, importlib
before = set(sys.modules)
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print(json.dumps(sorted({name.partition('.')[0] for name in set(sys.modules) - before})))
"""


def fresh(code: str, *arguments: str) -> str:
    """The last line that ``code`` prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def loaded_by(*modules: str) -> set[str]:
    """The top-level names that importing ``modules`` in a fresh process brings in."""
    return set(json.loads(fresh(PROBE, json.dumps(modules))))


def loaded_when(code: str) -> set[str]:
    """The top-level names that a fresh process has after running ``code``."""
    return {name.partition(".")[0] for name in fresh(f"{code}; import sys; print(*sys.modules)").split()}


def modules_below(package: str) -> list[str]:
    """Every module of ``package``, found on disk: nothing is imported."""
    found = [package]
    for info in pkgutil.iter_modules([str(ROOT / package.replace(".", "/"))]):
        name = f"{package}.{info.name}"
        found += modules_below(name) if info.ispkg else [name]
    return found


BACKENDS = (
    *(f"portatrain.backends.{name}" for name in ("reference", "jax", "torch", "deepspeed", "torch_xla")),
    "portatrain.checkpoint.interop.plain_jax",  # these two are a framework's, as a backend is
    "portatrain.checkpoint.interop.plain_torch",
)
CORE = [name for name in modules_below("portatrain") if not name.startswith(BACKENDS)]
# These are about arrays; everything else in the core works without NumPy.
ARRAY_MODULES = tuple(
    f"portatrain.{name}"
    for name in (
        "model.rng",
        "model.dropout_hash",
        "data.",
        "backends",
        "training.trainer",
        "training.two_runs",
        "training.arrival",
        "training.continuity",
        "training.changed",
        "training.drawing",
        "training.evaluation",
        "training.generation",
        "training.harness",
        "training.left_to_right",
        "training.begin",
        "training.blame",
        "training.evidence",
        "training.jury",
        "training.open_data",
        "training.referee",
        "training.rewind",
        "training.saves",
        "training.spike_guard",
        "training.statistics",
        "training.step_records",
        "training.view",
        "testing",
        "checkpoint.saver",
        "checkpoint.carry",
        "checkpoint.format_layout",
        "checkpoint.fingerprints",
        "checkpoint.rewrite",
        "training.arrival",
        "checkpoint.errors",
        "checkpoint.fingerprints",
        "checkpoint.interop.hub_folder",
        "checkpoint.interop.hub_start",
        "checkpoint.interop.hub_stored",
        "checkpoint.interop.hub_tokenizer",
        "checkpoint.newest",
        "checkpoint.object_store",
        "checkpoint.restore",
        "checkpoint.shared_reads",
        "checkpoint.surgery",
        "checkpoint.host_copies",
        "checkpoint.diff",
        "checkpoint.interop.export_import",
        "checkpoint.interop.huggingface",
        "checkpoint.interop.trees",
        "checkpoint.interop.plain_",
        "runs.find_checkpoints",
        "runs.remote_",
        "system.object_store",
        "plan.compilers.xla",
        "plan.compilers.fsdp2",
    )
)
LIGHT = [name for name in CORE if not name.startswith(ARRAY_MODULES)]


def test_portatrain_loads_no_framework_and_no_numpy() -> None:
    assert not loaded_by("portatrain") & {*FRAMEWORKS, *ARRAYS, "rich", "matplotlib"}


def test_public_names_load_no_framework_and_no_numpy() -> None:
    names = loaded_when("import portatrain; [getattr(portatrain, name) for name in portatrain.__all__]")
    assert "portatrain" in names
    assert not names & {*FRAMEWORKS, *ARRAYS}


def test_import_is_fast_and_small() -> None:
    # The hard limit is the number of modules, which no busy machine changes; the clock is the best of several.
    code = (
        "import sys, time; n = len(sys.modules); t = time.perf_counter(); import portatrain; "
        "print(time.perf_counter() - t, len(sys.modules) - n)"
    )
    runs = [fresh(code).split() for _ in range(5)]
    assert min(float(seconds) for seconds, _ in runs) < 0.1
    assert max(int(count) for _, count in runs) < 60


@pytest.mark.parametrize("package", ["portatrain", "launchers", "recipes", "checkpoints_format"])
def test_no_module_outside_the_backends_loads_a_framework(package: str) -> None:
    modules = CORE if package == "portatrain" else modules_below(package)
    assert len(modules) > 1
    found = loaded_by(*modules)
    assert not found & set(FRAMEWORKS)


def test_light_core_loads_no_numpy() -> None:
    assert len(LIGHT) > 20
    assert not loaded_by(*LIGHT, *modules_below("launchers"), *modules_below("recipes")) & set(ARRAYS)


def test_checkpoints_format_stands_alone() -> None:
    assert not loaded_by(*modules_below("checkpoints_format")) & {"portatrain", "launchers", "recipes"}


@pytest.mark.parametrize(
    ("backend", "others"),
    [
        ("jax", {"torch", "deepspeed", "torch_xla"}),
        ("torch", {"jax", "flax", "optax", "deepspeed", "torch_xla"}),
        ("reference", set(FRAMEWORKS)),
    ],
)
def test_backends_do_not_load_one_another(backend: str, others: set[str]) -> None:
    if backend != "reference":
        pytest.importorskip(backend)
    assert not loaded_by(f"portatrain.backends.{backend}") & others


def test_nothing_imports_recipes() -> None:
    assert "recipes" not in loaded_by(*CORE, *modules_below("launchers"))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["train", "--help"],
        ["train", "nothing", "--run-dir", "x"],
        ["init", "--help"],
        ["init", "folder/of/mine.txt"],
        ["show", "--help"],
        ["show", "nothing"],
    ],
)
def test_help_and_first_errors_load_no_framework_and_no_numpy(arguments: list[str]) -> None:
    names = loaded_when(f"from portatrain.cli import main; main({arguments!r})")
    assert "portatrain" in names
    assert not names & {*FRAMEWORKS, *ARRAYS}
