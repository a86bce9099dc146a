"""Stand-ins for ROCm's libraries, on a small library that is built here in the plugin's place."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from portatrain.errors import UserError
from portatrain.plan.clusters.gpu_devices import AMD_DEVICES
from portatrain.plan.clusters.names import parse
from portatrain.plan.compilers import gpus, rocm, targets
from portatrain.plan.recorded import chip_of

needs_tools = pytest.mark.skipif(
    sys.platform != "linux" or any(shutil.which(name) is None for name in rocm.TOOLS),
    reason=f"needs Linux with {', '.join(rocm.TOOLS)}",
)
HIP = "libamdhip64.so.7"


def build(folder: Path, name: str, source: str, *options: str) -> Path:
    (folder / "built.c").write_text(source)
    words = ["gcc", "-shared", "-fPIC", "-w", str(folder / "built.c"), f"-Wl,-soname,{name}", "-o", str(folder / name)]
    subprocess.run([*words, *options], check=True)
    return folder / name


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library that takes symbols from two others, with versions and without, and from libm; both others are gone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("ROCM_PATH", "HIP_PATH", "LD_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "map").write_text("hip_4.2 { global: hipInit; };\nhip_6.0 { global: hipFree; };\n")
    hip = "int hipInit(void) { return 0; } int hipFree(void) { return 0; }"
    one = build(tmp_path, HIP, hip, f"-Wl,--version-script={tmp_path / 'map'}")
    other = build(tmp_path, "librccl.so.1", "int ncclSend(void) { return 0; }")
    uses = (
        "int hipInit(void); int hipFree(void); int ncclSend(void); double lgamma(double);"
        "int absent(void) __attribute__((weak));"
        "int all(void) { return hipInit() + hipFree() + ncclSend() + (int)lgamma(3.0) + (absent ? absent() : 0); }"
    )
    made = build(tmp_path, "plugin.so", uses, str(one), str(other), "-lm")
    one.unlink()
    other.unlink()
    return made


@needs_tools
def test_a_library_loads_with_stand_ins_and_not_without(plugin: Path) -> None:
    with pytest.raises(OSError, match=HIP):
        ctypes.CDLL(str(plugin))
    folder = rocm.stand_ins(plugin, "1.2.3")
    assert folder is not None
    assert sorted(path.name for path in folder.iterdir()) == [HIP, "librccl.so.1"]
    # LD_LIBRARY_PATH is read when a process starts, so another one loads it. Every function returns an error.
    code = f"import ctypes; print(ctypes.CDLL({str(plugin)!r}).all())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"LD_LIBRARY_PATH": str(folder)}
    )
    assert done.stdout.split() == [str(3 * rocm.ERROR)] and not done.stderr
    assert "hip_6.0" in subprocess.run(["readelf", "-VW", folder / HIP], capture_output=True, text=True).stdout


@needs_tools
def test_they_are_made_once_for_a_version_and_again_if_one_is_gone(
    plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = rocm.stand_ins(plugin, "1.2.3")
    assert folder is not None and folder != rocm.stand_ins(plugin, "1.2.4")
    made = (folder / HIP).stat().st_ino
    assert rocm.stand_ins(plugin, "1.2.3") == folder and (folder / HIP).stat().st_ino == made
    (folder / "librccl.so.1").unlink()
    assert rocm.stand_ins(plugin, "1.2.3") == folder and (folder / "librccl.so.1").is_file()
    assert not list(folder.parent.glob(".making-*"))
    monkeypatch.setattr(rocm, "FORMAT", rocm.FORMAT + 1)
    assert rocm.stand_ins(plugin, "1.2.3") != folder


@needs_tools
def test_none_are_made_where_rocm_is_installed(plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "rocm" / "lib"
    real.mkdir(parents=True)
    (real / "libamdhip64.so.6").write_bytes(b"")
    monkeypatch.setenv("ROCM_PATH", str(real.parent))
    with pytest.raises(UserError, match=r"without libamdhip64.so.7, librccl.so.1"):
        rocm.stand_ins(plugin, "1.2.3")
    assert not (tmp_path / "cache").exists()


@needs_tools
def test_none_are_made_if_nothing_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    complete = build(tmp_path, "complete.so", "int one(void) { return 1; }")
    assert rocm.stand_ins(complete, "1.2.3") is None
    assert not (tmp_path / "cache").exists()


@needs_tools
def test_a_missing_tool_is_named(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    which = shutil.which
    monkeypatch.setattr(rocm.shutil, "which", lambda name: None if name in ("gcc", "nm") else which(name))
    with pytest.raises(UserError) as told:
        rocm.stand_ins(plugin, "1.2.3")
    assert "no gcc, nm" in str(told.value) and "apt-get install gcc binutils" in str(told.value)


@needs_tools
def test_a_tool_that_fails_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(UserError, match="ldd"):
        rocm.stand_ins(tmp_path / "text.so", "1.2.3")


def test_what_the_loader_does_not_find() -> None:
    text = (
        "\tlinux-vdso.so.1 (0x00007f)\n\tlibrccl.so.1 => not found\n\tlibm.so.6 => /lib/libm.so.6 (0x00007f)\n"
        "\tlibrccl.so.1 => not found\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n"
    )
    assert rocm.libraries(text) == (["librccl.so.1"], {"libm.so.6": Path("/lib/libm.so.6")})


@pytest.mark.parametrize(
    ("jaxlib", "plugin", "fits"),
    [("0.10.2", "0.10.2", True), ("0.10.1", "0.10.1.post1", True), ("0.11.2", "0.10.2", False)],
)
def test_versions_must_match(jaxlib: str, plugin: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: jaxlib if name == "jaxlib" else plugin)
    monkeypatch.setattr(targets, "_there", lambda name: True)
    wanted = targets.target(parse("mi300x-8"))
    if fits:
        targets.check_installed(wanted)
        return
    with pytest.raises(UserError) as told:
        targets.check_installed(wanted)
    assert "jax-rocm7-pjrt 0.10.2" in str(told.value) and "jax-rocm7-pjrt==0.11.2" in str(told.value)


def test_only_amds_compiler_gets_the_stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rocm, "library_folder", lambda: tmp_path / "made")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/own")
    assert targets.environment(targets.target(parse("mi300x-8")))["LD_LIBRARY_PATH"] == f"{tmp_path / 'made'}:/own"
    assert targets.environment(targets.target(parse("h100-8")))["LD_LIBRARY_PATH"] == "/own"
    monkeypatch.setattr(rocm, "library_folder", lambda: None)  # ROCm is installed
    assert targets.environment(targets.target(parse("mi300x-8")))["LD_LIBRARY_PATH"] == "/own"


@pytest.mark.parametrize("name", AMD_DEVICES)
def test_a_description_agrees_with_the_catalog(name: str) -> None:
    one = AMD_DEVICES[name]
    chip = chip_of(one.name)
    assert chip is not None and chip.name == name
    # Dense bf16 operations of a compute unit in a cycle, by generation: the peak of the data sheet follows.
    each = {"gfx90a": 1024, "gfx942": 2048, "gfx950": 4096}[one.isa]
    peak = one.cores * chip.devices_per_chip * one.clock_ghz * each / 1000
    assert peak == pytest.approx(chip.peaks["bf16"].value, rel=0.01)
    text = gpus.description(chip)
    assert f'"{one.isa}:sramecc+:xnack-"' in text and f"core_count: {one.cores}\n" in text
    assert f"device_memory_size: {int(chip.memory_bytes / chip.devices_per_chip)}\n" in text


def test_what_the_compiler_is_told_of_hosts() -> None:
    assert targets.target(parse("mi250x-16")).options["topology"] == "4x1x8"  # two devices a chip
    assert targets.target(parse("mi355x-64")).options["topology"] == "8x1x8"
