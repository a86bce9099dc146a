"""`portatrain plan --compile`: the real compilers beside the planner, on programs small enough for a test.

Those that compile for a TPU or trace FSDP2 take a minute each and are marked full; where libtpu is not installed they
say so. The whole comparison is `make plan-accuracy`.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import fp8_matmuls
from portatrain.cli import main
from portatrain.errors import UserError
from portatrain.plan.clusters.gpu_devices import DEVICES
from portatrain.plan.clusters.names import parse
from portatrain.plan.compilers import gpus, job, targets
from portatrain.plan.recorded import chip_of

needs_rocm_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_rocm7_plugin") is None,
    reason="AMD's compiler is not installed (pip install 'portatrain[rocm-compile]')",
)
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (pip install 'portatrain[tpu]')"
)
SMALL = [
    "--set",
    "model.layers=4",
    "--set",
    "model.embed=512",
    "--set",
    "model.mlp=1536",
    "--set",
    "model.heads=8",
    "--set",
    "model.head_dim=64",
    "--set",
    "model.vocab=32768",
    "--set",
    "data.vocab=32768",
    "--set",
    "data.separator=0",
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "cache" / "portatrain" / "compiled"


def compiled(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan", *words, "--compile", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.full
@pytest.mark.timeout(900)
@needs_libtpu
@pytest.mark.parametrize(
    ("cluster", "mesh", "batch"),
    [("tpu-v5p-8", "fsdp=4", 16), ("tpu-v6e-8", "fsdp=4,tensor=2", 8), ("2*tpu-v4-8", "replica=2,fsdp=4", 8)],
)
def test_a_tpu_program(cluster: str, mesh: str, batch: int, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["llama3-8b", "--cluster", cluster, "--mesh", mesh, "--batch", str(batch), "--remat", "block", *SMALL]
    found = compiled(capsys, *words, "--seq-len", "2048")
    assert found["compiled"]["fits"] and not found["compiled"]["cached"]
    assert found["predicted"]["flops"] == pytest.approx(found["compiled"]["flops"], rel=0.05)
    assert found["predicted"]["peak_bytes"] == pytest.approx(found["compiled"]["peak_bytes"], rel=0.25)
    again = compiled(capsys, *words, "--seq-len", "2048")
    assert again["compiled"] == found["compiled"] | {"cached": True}


@pytest.mark.full
@pytest.mark.timeout(900)
@needs_rocm_plugin
def test_an_amd_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two hosts of MI355X, on a machine that has neither an AMD GPU nor ROCm."""
    words = ["llama3-1b", "--cluster", "mi355x-16", "--mesh", "fsdp=16", "--batch", "16", "--remat", "block"]
    found = compiled(capsys, *words)
    assert found["compiled"]["compiler"].startswith("rocm, jax-rocm7-pjrt") and found["compiled"]["fits"]
    assert found["compiled"]["flops"] == found["predicted"]["flops"]
    assert found["predicted"]["peak_bytes"] == pytest.approx(found["compiled"]["peak_bytes"], rel=0.1)
    moved = found["compiled"]["collective_bytes"]["fsdp"]
    assert moved == pytest.approx(found["predicted"]["collective_bytes"]["fsdp"], rel=0.05)
    kept = tmp_path / "cache" / "portatrain" / "rocm-stand-ins"
    assert kept.is_dir() or list(Path("/opt").glob("rocm*"))


@pytest.mark.full
@pytest.mark.timeout(900)
@needs_libtpu
def test_a_program_that_does_not_fit_is_an_answer() -> None:
    """The compiler is asked for more than the planner would: 64 samples a device, all activations kept."""
    from portatrain.plan.compilers.job import Request

    target = targets.target(parse("tpu-v5e-4"))
    asked = Request(
        compiler="tpu",
        recipe="llama3-8b",
        overrides=(*SMALL[1::2], "batch=1024", "data.seq_len=2048", "remat=none"),
        mesh="fsdp=4",
        options=target.options,
    )
    found = job.answer(asked, target, tell=lambda line: None)
    assert not found.fits and found.peak_bytes is None
    assert "RESOURCE_EXHAUSTED" in found.raw["said"] or "memory" in found.raw["said"]


def test_the_size_in_an_error_of_memory_is_read() -> None:
    from portatrain.plan.compilers.xla import _too_large

    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 25.5G of 15.75G hbm. Exceeded by 9.75G."
    assert _too_large(RuntimeError(said))["needs_bytes"] == 25.5 * 2**30
    assert _too_large(RuntimeError("RESOURCE_EXHAUSTED: no sizes"))["needs_bytes"] is None
    with pytest.raises(RuntimeError, match="another"):
        _too_large(RuntimeError("another error"))


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize("mesh", ["fsdp=8", "fsdp=4,tensor=2"])
def test_fsdp2_traced(mesh: str, own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["llama3-8b", "--cluster", "h100-8", "--mesh", mesh, "--batch", "16", "--remat", "block", *SMALL]
    found = compiled(capsys, *words, "--seq-len", "2048", "--compiler", "fsdp2")
    assert found["compiled"]["compiler"].startswith("FSDP2 traced")
    (kept,) = own_cache.glob("*.json")
    # Documents on a GPU: the kernel of the target, though the trace's tensors are a CPU's.
    assert {c["kernel"] for c in json.loads(kept.read_text())["kernel_choices"]} == {"flex"}
    predicted, traced = found["predicted"], found["compiled"]
    assert traced["flops"] == predicted["flops"]
    # Numbers that all processes add up, such as the gradient's norm, are not planned.
    moved = {axes: nbytes for axes, nbytes in traced["collective_bytes"].items() if nbytes > 1024}
    assert moved == pytest.approx(predicted["collective_bytes"], rel=0.001)
    assert traced["peak_bytes"] == pytest.approx(predicted["peak_bytes"], rel=0.1)


def test_every_chip_has_the_compiler_that_knows_it() -> None:
    kinds = {
        name: targets.target(parse(name)).compiler
        for name in (
            "tpu-v4-8",
            "tpu-v5e-4",
            "tpu-v5p-8",
            "tpu-v6e-1",
            "tpu-7x-8",
            "h100-8",
            "b200-8",
            "gb300-72",
            "mi250x-4",
            "mi300x-8",
            "gaudi3-8",
        )
    }
    assert kinds == {
        "tpu-v4-8": "tpu",
        "tpu-v5e-4": "tpu",
        "tpu-v5p-8": "tpu",
        "tpu-v6e-1": "tpu",
        "tpu-7x-8": "tpu",
        "h100-8": "cuda",
        "b200-8": "cuda",
        "gb300-72": "cuda",
        "mi250x-4": "rocm",
        "mi300x-8": "rocm",
        "gaudi3-8": "fsdp2",
    }


def test_what_the_compiler_is_told() -> None:
    for name, device in (("h100-8", "cuda"), ("mi300x-8", "cuda"), ("gaudi3-8", "hpu")):
        assert targets.target(parse(name), "fsdp2").options == {"world": 8, "device": device}
    v4 = targets.target(parse("2*tpu-v4-8"))
    assert v4.options == {"topology_name": "v4:2x2x1", "chip_config_name": "megacore", "num_slices": 2}
    assert targets.target(parse("tpu-v6e-1")).options["chips_per_host_bounds"] == (1, 1, 1)
    assert targets.target(parse("tpu-7x-4x4x4")).options == {"topology_name": "tpu7x:4x4x4"}
    assert targets.target(parse("h100-64")).options["topology"] == "8x1x8"
    assert targets.target(parse("gb200-72")).options["topology"] == "1x18x4"


@pytest.mark.parametrize("name", DEVICES)
def test_a_gpu_is_found_by_the_name_that_its_description_has(name: str) -> None:
    found = chip_of(DEVICES[name].name)
    assert found is not None and found.name == name
    assert f"memory_bandwidth: {int(found.memory_bw.value * 1e9)}" in gpus.description(found)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["llama2-70b", "--cluster", "h100-64"], "a preset shape"),
        (["llama3-1b", "--cluster", "mi300x-64", "--compiler", "tpu"], "a TPU of generation"),
        (["llama3-1b", "--cluster", "mi300x-64", "--compiler", "cuda"], "h100-sxm"),
        (["llama3-1b", "--cluster", "h100-64", "--compiler", "rocm"], "mi300x"),
        (["llama3-1b", "--cluster", "tpu-v5p-64", "--compiler", "fsdp2"], "a chip that torch runs on"),
        (["llama3-1b", "--cluster", "tpu-v5p-64", "--compiler", "gcc"], "--compiler"),
    ],
)
def test_mistakes(words: list[str], told: str, own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words, "--compile"]) == 2
    assert told in capsys.readouterr().err
    assert not own_cache.exists()


@pytest.mark.parametrize(
    ("cluster", "module", "extra"),
    [("tpu-v5p-64", "libtpu", "tpu"), ("mi300x-64", "jax_plugins.xla_rocm7", "rocm-compile")],
)
def test_a_compiler_that_is_not_installed(
    cluster: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(targets, "_there", lambda name: name != module)
    assert main(["plan", "llama3-1b", "--cluster", cluster, "--compile"]) == 2
    told = capsys.readouterr().err
    assert f"no {module}" in told and f"pip install 'portatrain[{extra}]'" in told
    assert ("--compiler fsdp2" in told) == (extra != "tpu")


def test_a_compiler_that_fails_is_one_paragraph(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(targets, "check_installed", lambda wanted: None)
    monkeypatch.setattr(targets, "environment", lambda wanted: {"PATH": "/nowhere"})  # no portatrain, no jax
    monkeypatch.setattr(job.sys, "executable", "/usr/bin/false")
    assert main(["plan", "llama3-1b", "--cluster", "tpu-v5p-64", "--compile"]) == 2
    told = capsys.readouterr().err
    assert "exit code 1" in told.splitlines()[-1]


@pytest.mark.parametrize("part", job._SOURCES)
def test_what_decides_the_program_is_there(part: str) -> None:
    """A source that has moved would leave the key as it is, and an old answer would be taken for a new program."""
    path = Path(job.__file__).parents[2] / part
    assert path.is_file() or list(path.rglob("*.py"))


def test_the_answer_is_kept_by_what_it_depends_on(tmp_path: Path) -> None:
    one = job.Request(compiler="tpu", recipe="llama3-8b", overrides=("batch=8",), mesh="fsdp=4", options={"a": 1})
    other = job.Request(compiler="tpu", recipe="llama3-8b", overrides=("batch=16",), mesh="fsdp=4", options={"a": 1})
    assert one.key != other.key and one.key == job.Request(**vars(one)).key


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("chip", fp8_matmuls.CLUSTERS)
def test_the_compilers_keep_the_matmuls_of_8_bits(chip: str) -> None:
    target = targets.target(parse(fp8_matmuls.CLUSTERS[chip]))
    try:
        targets.check_installed(target)
    except UserError as error:
        pytest.skip(str(error))
    assert "| 100.0 % |" in fp8_matmuls.row(chip, "fsdp=8", "tensor")


def test_an_answer_that_cannot_be_kept_is_given_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(targets, "check_installed", lambda wanted: None)

    def compiled(question: Path, path: Path, *_: object) -> None:
        assert question.is_file()
        path.write_text('{"fits": true, "compiler": "a test", "seconds": 1.0}')

    monkeypatch.setattr(job, "_run", compiled)
    target = targets.target(parse("h100-8"))
    asked = job.Request(compiler="cuda", recipe="llama3-1b", overrides=(), mesh="", options=target.options)
    told: list[str] = []
    assert job.answer(asked, target, tell=told.append).compiler == "a test"
    assert len(told) == 1 and "will not be kept" in told[0] and str(tmp_path / "file") in told[0]
