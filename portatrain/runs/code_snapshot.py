"""The run's own copy of the code: `code/HASH/` in its run directory, on the PYTHONPATH of every attempt.

The copy has portatrain, the launchers, the checkpoint format, the shipped recipes, and below `recipe/` the recipe's
file with the modules beside it that it imported. `environment.json` has the version of Python and of every installed
package; an attempt on a machine with other versions records the differences. Frameworks are not copied: each machine
has its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

from portatrain.errors import UserError
from portatrain.recipe import shipped_recipes
from portatrain.system import json_files

PACKAGES = ("portatrain", "launchers", "checkpoints_format", "recipes")
SUFFIXES = (".py", ".json", ".toml", ".yaml", ".html", ".typed", ".md")
LARGEST = 256 << 20
"""The bytes of the files of a copy, at most."""
WATCHED = ("jax", "jaxlib", "flax", "optax", "torch", "numpy", "ml_dtypes", "libtpu", "deepspeed", "torch_xla")
"""Packages that can change the numbers of a run; an attempt records a difference of their versions as an event."""


def where(run_dir: Path, recipe: str) -> tuple[Path, str, dict[str, Path]]:
    """Return (folder that `pack` makes, RECIPE in the copy, target path -> source file). Writes nothing.

    Call it after the recipe has been loaded, because the modules that it imported from its folder are copied too.
    """
    sources = _packages()
    name = ""
    if recipe not in shipped_recipes():
        path = Path(recipe).resolve()
        for file in _beside(path):
            sources[f"recipe/{file.relative_to(path.parent)}"] = file
        name = f"recipe/{path.name}"
    folder = run_dir / "code" / _name(sources)
    return folder, str(folder / name) if name else recipe, sources


def _name(sources: Mapping[str, Path]) -> str:
    """Return the name of a copy of these files: a hash of their names and contents."""
    digest = hashlib.sha256()
    for target in sorted(sources):
        digest.update(target.encode() + b"\0" + hashlib.sha256(sources[target].read_bytes()).digest())
    return digest.hexdigest()[:16]


def archive(folder: Path, tar: Path) -> None:
    """Write a copy of the code as a tar file, without what Python has compiled."""

    def kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if "__pycache__" in Path(member.name).parts else member

    with tarfile.open(tar, "w") as file:
        file.add(folder, ".", filter=kept)


def extract(tar: Path, folder: Path, name: str) -> None:
    """Extract a copy of the code called `name` into a new folder, and check it against its name before it is run.

    Compiled files are left out. Raises UserError for links, devices and paths out of the folder, and for files other
    than those from which the name was made.
    """

    def refused(got: str) -> UserError:
        return UserError(
            f"the copy of the code {name}",
            expected="a tar file with exactly the files from which its name was made",
            got=got,
            do="Do not run it. `launch resume --new-code` goes on with the code that is installed here.",
        )

    files: dict[str, Path] = {}
    try:
        with tarfile.open(tar) as archive:
            members = archive.getmembers()
            if sum(member.size for member in members) > LARGEST:
                raise refused(f"more than {LARGEST >> 20} MiB")
            for member in members:
                parts = [part for part in member.name.split("/") if part not in ("", ".")]
                if member.name.startswith("/") or ".." in parts or "\\" in member.name or "\0" in member.name:
                    raise refused(f"the path {member.name!r}")
                if not (member.isreg() or member.isdir()):
                    raise refused(f"{member.name!r}, which is a link or a device")
                target = "/".join(parts)
                if member.isdir() or "__pycache__" in parts or target.endswith((".pyc", ".pyo")):
                    continue
                path = folder.joinpath(*parts)
                if target in files:
                    raise refused(f"{member.name!r} twice")
                path.parent.mkdir(parents=True, exist_ok=True)
                content = archive.extractfile(member)
                assert content is not None
                path.write_bytes(content.read())
                if target != "environment.json":
                    files[target] = path
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise refused(f"{type(error).__name__}: {error}") from error
    if _name(files) != name:
        raise refused(f"files that give {_name(files)}")


def pack(run_dir: Path, recipe: str) -> tuple[Path, str]:
    """Copy the code into the run; return (its folder, RECIPE in the copy). The same code gives the same folder."""
    folder, name, sources = where(run_dir, recipe)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".code-", dir=folder.parent))
        for target, file in sources.items():
            (partial / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, partial / target)
        json_files.write_json(partial / "environment.json", environment())
        partial.chmod(0o755)
        try:
            partial.rename(folder)
        except OSError:  # another process has just made it
            shutil.rmtree(partial)
            if not folder.exists():
                raise
    return folder, name


def environment() -> dict[str, object]:
    """Return the versions of Python and of every installed package, and the platform."""
    packages: dict[str, str] = {}
    for found in importlib.metadata.distributions():
        name = (found.metadata["Name"] or "").lower().replace("-", "_")
        if name:
            packages.setdefault(name, found.version)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "executable": sys.executable,
        "packages": dict(sorted(packages.items())),
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages of WATCHED that are installed, and of portatrain."""
    found = {}
    for name in ("portatrain", *WATCHED):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def differences(code: str | None) -> dict[str, list[str | None]]:
    """Return name -> [version when the code was packed, version here] if they differ, for Python and WATCHED."""
    path = Path(code) / "environment.json" if code else None
    if path is None or not path.exists():
        return {}
    there = json_files.read_object(path)
    packages = there.get("packages")
    if not isinstance(packages, dict) or "python" not in there:
        raise UserError(
            str(path),
            expected="the versions that portatrain wrote",
            got="something else",
            do="Restore the file from a copy, or resume with --new-code.",
        )
    pairs: dict[str, list[str | None]] = {"python": [there["python"], platform.python_version()]}
    for name in WATCHED:
        try:
            here: str | None = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            here = None
        pairs[name] = [packages.get(name), here]
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _packages() -> dict[str, Path]:
    sources = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            root = Path(folder)
            for file in root.rglob("*"):
                if file.suffix in SUFFIXES and "__pycache__" not in file.parts and file.is_file():
                    sources[f"{package}/{file.relative_to(root)}"] = file
    return sources


def _beside(recipe: Path) -> list[Path]:
    """Return the recipe's file and every loaded module below its folder."""
    found, roots = {recipe}, _roots()
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if not file or not str(file).endswith(".py"):
            continue
        path = Path(os.path.abspath(file))
        ours = any(path.is_relative_to(root) for root in roots)
        if path.is_relative_to(recipe.parent) and not ours and "site-packages" not in path.parts and path.is_file():
            found.add(path)
    total = sum(path.stat().st_size for path in found)
    if total > 64 << 20:
        raise UserError(
            f"recipe {recipe}",
            expected="at most 64 MiB of code in its folder",
            got=f"{total >> 20} MiB",
            do="Install the modules that it imports as a package.",
        )
    return sorted(found)


def _roots() -> list[Path]:
    """Return the folders of the packages that are always copied."""
    specs = [importlib.util.find_spec(package) for package in PACKAGES]
    return [Path(p).resolve() for spec in specs if spec for p in spec.submodule_search_locations or []]
