"""The wheel: what it must hold, and that it trains where there is no checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.full


def run(*words: str | Path, cwd: Path, **more: str) -> str:
    """Run a command without anything of this checkout on its path; what it printed."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | more
    done = subprocess.run([str(w) for w in words], cwd=cwd, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the source, so that no build folder is left in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    tops = {"portatrain", "launchers", "recipes", "checkpoints_format", "pyproject.toml", "README.md", "LICENSE"}
    for name in listed.stdout.splitlines():
        if name.split("/")[0] in tops and (ROOT / name).is_file():
            path = source / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((ROOT / name).read_bytes())
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q")
    run(sys.executable, "-m", "pip", "wheel", *options, "-w", out, source, cwd=out)
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel in it, that sees this one's packages but not this checkout."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    options = ("--no-deps", "--no-index", "--disable-pip-version-check", "-q")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=folder)
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # Packages behind the wheel's: a plain line goes on the path, and .pth files in there are not read.
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_the_wheel_holds_what_is_read_at_run_time(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    packages = ("portatrain/", "launchers/", "recipes/", "checkpoints_format/")
    wanted = {n for n in listed if n.startswith(packages) and (ROOT / n).is_file()}
    vectors = {n for n in wanted if n.startswith("checkpoints_format/vectors/v1-")}  # test vectors stay in the source
    assert wanted - vectors - names == set()
    for name in ("recipes/tiny_lm.py", "recipes/models/decoder.py", "portatrain/py.typed"):
        assert name in names
    assert not [n for n in names if n.startswith(("tests/", "docs/", "benchmarks/"))]


def test_it_trains_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    where = run(installed / "bin" / "python", "-c", "import portatrain; print(portatrain.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed)
    small = ["steps=3", "batch=4", "model.layers=1", "model.embed=32", "data.seq_len=32", "data.validation=0.003"]
    words = [word for text in [*small, "schedule.warmup=1"] for word in ("--set", text)]
    run(installed / "bin" / "launch", "--cluster", "local", "tiny-lm", *words, cwd=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]
    summary = json.loads((tmp_path / "runs" / "tiny-lm" / "summary.json").read_text())
    assert summary["status"] == "done" and summary["step"] == 3
    run(installed / "bin" / "portatrain", "report", "runs/tiny-lm", cwd=tmp_path)
    assert "<html" in (tmp_path / "runs" / "tiny-lm" / "report.html").read_text().lower()


def test_what_else_reads_files_of_the_package(installed: Path, tmp_path: Path) -> None:
    portatrain, launch = installed / "bin" / "portatrain", installed / "bin" / "launch"
    version = run(portatrain, "--version", cwd=tmp_path).split()[1]
    assert version == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert "h100" in run(portatrain, "clusters", cwd=tmp_path)
    planned = run(portatrain, "plan", "tiny-lm", "--cluster", "tpu-v5p-8", "--json", cwd=tmp_path)
    assert len(json.loads(planned)) == 1
    (tmp_path / "clusters.toml").write_text('[lab]\nchip = "h100"\ncount = 8\nengine = "slurm"\n')
    assert "#SBATCH" in run(launch, "--cluster", "lab", "tiny-lm", "--dry-run", cwd=tmp_path)
