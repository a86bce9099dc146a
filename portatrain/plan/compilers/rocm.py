"""Load XLA's compiler for AMD GPUs on a machine that has neither ROCm nor such a GPU.

The compiler comes in the wheels jax-rocm7-pjrt and jax-rocm7-plugin, as a shared library that is linked against ROCm's
own libraries (HIP, RCCL, rocBLAS and others). The dynamic loader needs those to load the compiler, but the compiler
calls them only to run a program. If they are missing, this module makes stand-ins: libraries with the names, the
symbols and the symbol versions that the plugin asks for, in which every function returns an error. They are kept in
the cache, and only the process that compiles gets them (`LD_LIBRARY_PATH`). Where ROCm is installed, none are made.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from portatrain.errors import UserError
from portatrain.system.paths import cache_folder

FORMAT = 1  # of the stand-ins: a new number makes them anew
PLUGINS = ("jax-rocm7-pjrt", "jax-rocm7-plugin")
MODULE, LIBRARY, HIP = "jax_plugins.xla_rocm7", "xla_rocm_plugin.so", "libamdhip64.so"
TOOLS = {"gcc": "gcc", "nm": "binutils", "readelf": "binutils", "ldd": "libc-bin"}
"""Command -> the Debian package that has it."""
ERROR = 100
"""The result of every function of a stand-in: hipErrorNoDevice, and an error in the other libraries too."""

Symbols = dict[str, list[str]]
"""Symbol version -> symbols; the version is '' for symbols without one."""


def check_versions() -> None:
    """Raise UserError if the plugin's packages and jaxlib are not of one version."""
    jaxlib = metadata.version("jaxlib")
    found = {name: metadata.version(name) for name in PLUGINS}
    if any(_release(version) != _release(jaxlib) for version in found.values()):
        wanted = ".".join(map(str, _release(jaxlib)))
        raise UserError(
            "--compile with rocm",
            expected=f"{' and '.join(PLUGINS)} of jaxlib's version, {jaxlib}",
            got=", ".join(f"{name} {version}" for name, version in found.items()),
            do=f"Install them with: pip install {' '.join(f'{name}=={wanted}' for name in PLUGINS)}, or change jax. "
            "Without them, --compiler fsdp2 traces the torch backend.",
        )


def library_folder() -> Path | None:
    """Return the folder with stand-ins for ROCm's libraries, made now or before; None if ROCm itself is installed.

    Raises:
      UserError: a tool that makes them is missing or fails, or ROCm lacks a library that the plugin needs.
    """
    spec = importlib.util.find_spec(MODULE)
    if spec is None or spec.origin is None:
        raise UserError(MODULE, expected="the package", got="none", do="pip install 'portatrain[rocm-compile]'.")
    return stand_ins(Path(spec.origin).with_name(LIBRARY), metadata.version(PLUGINS[0]))


def stand_ins(plugin: Path, version: str) -> Path | None:
    """Return the folder with stand-ins for the libraries that the loader does not find for ``plugin``."""
    _check_tools(["ldd"])
    missing, there = libraries(_output("ldd", str(plugin)))
    if not missing:
        return None
    installed = _rocm(there)
    if installed is not None:
        raise UserError(
            "--compile with rocm",
            expected=f"the libraries of ROCm that {PLUGINS[0]} {version} is made for",
            got=f"ROCm in {installed}, without {', '.join(missing)}",
            do="Install that version of ROCm, or plan on a machine without ROCm: stand-ins are never used beside the "
            "real libraries.",
        )
    folder = cache_folder() / "rocm-stand-ins" / f"{PLUGINS[0]}-{version}-{platform.machine()}-{FORMAT}"
    if all((folder / name).is_file() for name in missing):
        return folder
    _check_tools(TOOLS)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
        made = Path(scratch) / "libraries"
        made.mkdir()
        for name, symbols in _symbols(plugin, missing, there.values()).items():
            _make(made / name, symbols, Path(scratch))
        shutil.rmtree(folder, ignore_errors=True)  # if it is there, it is incomplete
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process made the same libraries meanwhile
                raise
    return folder


def count_a_gpu() -> None:
    """Let the plugin start in this process although the machine has no AMD GPU: it counts them, and gives up at 0."""
    from jax._src import hardware_utils

    count = hardware_utils.num_available_amd_gpus
    hardware_utils.num_available_amd_gpus = lambda stop_at=None: max(1, count(stop_at))


def libraries(text: str) -> tuple[list[str], dict[str, Path]]:
    """Read the output of ldd: the names of libraries that the loader does not find, and the paths of the others."""
    found = re.findall(r"^\s*(\S+) => (not found|\S+)", text, re.MULTILINE)
    missing = dict.fromkeys(name for name, where in found if where == "not found")
    return list(missing), {name: Path(where) for name, where in found if where.startswith("/")}


def _rocm(there: Mapping[str, Path]) -> Path | None:
    """Return the folder of ROCm's HIP library, if there is one."""
    loaded = [path.parent for name, path in there.items() if name.startswith(HIP)]
    roots = [os.environ.get("ROCM_PATH"), os.environ.get("HIP_PATH"), "/opt/rocm"]
    kept = [path.parent for root in filter(None, roots) for path in sorted(Path(str(root)).glob(f"lib*/{HIP}*"))]
    return next(iter([*loaded, *kept]), None)


def _symbols(plugin: Path, missing: Sequence[str], there: Iterable[Path]) -> dict[str, Symbols]:
    """Return the symbols that ``plugin`` takes from every missing library, by their versions.

    A symbol with a version names its library. One without can be in any library, and the loader takes the first that
    has it: so it goes to the first stand-in, unless a library that is there defines it.
    """
    found: dict[str, Symbols] = {name: {} for name in missing}
    owners = dict(_owners(_output("readelf", "-VW", str(plugin))))
    others = {symbol for path in there for symbol, _ in _named(_output("nm", "-D", "--defined-only", str(path)))}
    for symbol, version in _named(_output("nm", "-D", "--undefined-only", str(plugin))):
        owner = owners.get(version) if version else missing[0] if symbol not in others else None
        if owner in found:
            found[owner].setdefault(version, []).append(symbol)
    return found


def _owners(text: str) -> Iterator[tuple[str, str]]:
    """Read readelf's list of needed versions: (version, library that has it)."""
    library = ""
    for kind, name in re.findall(r"\b(File|Name): (\S+)", text.partition("Version needs section")[2]):
        if kind == "File":
            library = name
        else:
            yield name, library


def _named(text: str) -> Iterator[tuple[str, str]]:
    """Read nm's list: (symbol, version). Weak symbols, which may stay undefined, are left out."""
    yield from re.findall(r"^[0-9a-f]*\s+[^wv\s] ([^\s@]+)(?:@+(\S+))?$", text, re.MULTILINE)


def _make(path: Path, symbols: Symbols, scratch: Path) -> None:
    """Compile one stand-in."""
    source, versions = scratch / "source.c", scratch / "versions"
    every = sorted({symbol for some in symbols.values() for symbol in some})
    source.write_text(
        "".join(
            f'int f{n}(void) __asm__("{symbol}");\nint f{n}(void) {{ return {ERROR}; }}\n'
            for n, symbol in enumerate(every)
        )
    )
    versions.write_text("".join(f"{v} {{ global: {'; '.join(some)}; }};\n" for v, some in symbols.items() if v))
    script = [f"-Wl,--version-script={versions}"] if any(symbols) else []
    _output(
        "gcc", "-shared", "-fPIC", "-nostdlib", "-w", str(source), *script, f"-Wl,-soname,{path.name}", "-o", str(path)
    )


def _check_tools(names: Iterable[str]) -> None:
    gone = [name for name in names if shutil.which(name) is None]
    if gone:
        packages = " ".join(dict.fromkeys(TOOLS[name] for name in gone))
        raise UserError(
            "--compile with rocm",
            expected=f"{', '.join(TOOLS)}, with which stand-ins for ROCm's libraries are made",
            got=f"no {', '.join(gone)}",
            do=f"Install them, for example with: apt-get install {packages}. Or use --compiler fsdp2.",
        )


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=os.environ | {"LC_ALL": "C"})
    if done.returncode:
        told = done.stderr.strip().splitlines()
        raise UserError(
            "--compile with rocm",
            expected=f"{command[0]} to read the plugin and to make stand-ins for ROCm's libraries",
            got=f"exit code {done.returncode}: {told[-1][:400] if told else 'nothing on stderr'}",
            do="Leave --compile out for the plan by arithmetic, or use --compiler fsdp2.",
        )
    return done.stdout


def _release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version without its suffix: AMD repairs a wheel as 0.10.1.post1."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])
