"""Compiled programs survive an attempt: a resume in the same place compiles nothing; a bad folder never ends a run."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from portatrain.backends import compiling
from portatrain.backends.compiling import CompileTime, cpu_key
from portatrain.recipe import Recipe
from portatrain.runs import first_steps
from portatrain.runs.events import Kind
from portatrain.runs.history import read_history
from portatrain.runs.report.page import page
from portatrain.runs.run_dir import RunDir
from portatrain.system import environment
from portatrain.training.metrics.console import ConsoleSink
from portatrain.training.start_times import PARTS
from portatrain.training.trainer import train
from tests.support.short_runs import small

CACHE = environment.COMPILE_CACHE.name


def tiny(folder: Path) -> Recipe:
    """Return a recipe of four small steps on a few texts below `folder`."""
    texts = folder / "texts"
    texts.mkdir()
    for n in range(40):
        (texts / f"{n}.txt").write_text(f"Text {n} of a small file. " * 20)
    sizes = ("model.layers=1", "steps=4", "schedule.warmup=0", "eval_final_batches=1")
    return small(*sizes, "data=TextFiles", "data.seq_len=16", f"data.paths={texts}")


@pytest.fixture
def no_cache_of_the_user(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without JAX_COMPILATION_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR, which come before ours."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], None)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.usefixtures("no_cache_of_the_user")
def test_a_resume_in_the_same_place_compiles_nothing_on_jax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    recipe, run, said = tiny(tmp_path), RunDir(tmp_path / "run"), io.StringIO()
    assert train(recipe, run, backend="jax", stop_at=2) == 85
    assert train(recipe, run, backend="jax", sinks=[ConsoleSink(said)]) == 0
    cold, warm = run.events(Kind.FIRST_STEP)
    assert cold["programs_compiled"] > 0
    assert (warm["programs_compiled"], warm["programs_reused"] > 0) == (0, True)
    for event in (cold, warm):
        assert sum(event["parts"].values()) == pytest.approx(event["total_s"], abs=1e-6)
        assert set(event["parts"]) <= set(PARTS) and min(event["parts"].values()) >= 0
    assert "init" in cold["parts"] and {"restore", "verify", "compile"} <= set(warm["parts"])
    (folder,) = {event["folder"] for event in run.events(Kind.COMPILE_CACHE)}
    assert Path(folder).parent == tmp_path / "cache" and Path(folder).name.endswith(f"-cpu-{cpu_key()}")
    assert list(Path(folder).glob("jit__step-*"))
    lines = [line for line in said.getvalue().splitlines() if line.startswith("first step done")]
    assert len(lines) == 1 and "0 programs compiled" in lines[0] and "restore" in lines[0]
    assert "From the start of the process to the first step" in page(read_history(run), [])


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("no_cache_of_the_user")
@pytest.mark.filterwarnings("ignore")  # of the compiler that inductor calls
def test_a_resume_in_the_same_place_compiles_nothing_on_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from portatrain.backends.torch import one_device

    row = one_device.row_of(torch.device("cpu"))
    monkeypatch.setattr(one_device, "row_of", lambda device: dataclasses.replace(row, compiles=True))
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    recipe, run = tiny(tmp_path), RunDir(tmp_path / "run")
    for stop in (2, None):
        torch._dynamo.reset()
        assert train(recipe, run, backend="torch", stop_at=stop) == (0 if stop is None else 85)
    cold, warm = run.events(Kind.FIRST_STEP)
    assert cold["programs_compiled"] > 0 and cold["parts"]["compile"] > 0
    assert (warm["programs_compiled"], warm["programs_reused"] > 0) == (0, True)
    (folder,) = {event["folder"] for event in run.events(Kind.COMPILE_CACHE)}
    assert Path(folder).parent == tmp_path / "cache" and f"-{cpu_key()}" in folder


@pytest.mark.usefixtures("no_cache_of_the_user")
def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv(CACHE, str(tmp_path / "file" / "cache"))
    run, said = RunDir(tmp_path / "run"), io.StringIO()
    assert train(tiny(tmp_path), run, backend="jax", stop_at=1, sinks=[ConsoleSink(said)]) == 85
    (event,) = run.events(Kind.NO_COMPILE_CACHE)
    assert "Not a directory" in event["what"] and str(tmp_path / "file") in event["what"]
    assert "no compile cache: " in said.getvalue() and not run.events(Kind.COMPILE_CACHE)


@pytest.mark.usefixtures("no_cache_of_the_user")
def test_a_folder_of_the_user_that_cannot_be_written_is_told_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only the one that portatrain chooses: a framework would tell of it at every program, or not at all."""
    import jax

    from portatrain.backends.jax import compile_cache as of_jax
    from portatrain.backends.torch import compile_cache as of_torch

    (tmp_path / "file").write_text("not a folder")
    bad = str(tmp_path / "file" / "cache")
    monkeypatch.setenv(of_torch.FOLDER, bad)
    before = jax.config.jax_compilation_cache_dir
    try:
        for given, refused in ((bad, True), ("gs://bucket/cache", False)):
            jax.config.update("jax_compilation_cache_dir", given)
            with pytest.raises(NotADirectoryError) if refused else contextlib.nullcontext():
                of_jax.use(tmp_path / "ours", "cpu")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    with pytest.raises(NotADirectoryError):
        of_torch.use(tmp_path / "ours")


@pytest.mark.usefixtures("no_cache_of_the_user")
def test_the_folder_of_the_user_comes_first_and_another_cpu_has_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import jax

    from portatrain.backends.jax import compile_cache as of_jax
    from portatrain.backends.torch import compile_cache as of_torch

    ours = tmp_path / "ours"
    places = {of_jax.use(ours, "cpu"), of_torch.use(ours)}
    for module in (of_jax, of_torch):
        monkeypatch.setattr(module, "cpu_key", lambda: "another")
    places |= {of_jax.use(ours, "cpu"), of_torch.use(ours), of_jax.use(ours, "tpu")}
    assert len(places) == 5 and {place.parent for place in places} == {ours}
    assert jax.__version__ in of_jax.use(ours, "tpu").name
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert of_jax.use(ours, "cpu") == of_torch.use(ours) == tmp_path / "mine"


def test_spans_inside_a_span_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = (3.0, 4.0, 5.0, 5.5, 6.0)
    clock, spans = iter(ends), CompileTime()
    monkeypatch.setattr(compiling.time, "perf_counter", lambda: next(clock))
    totals = []
    for seconds in (1.0, 0.5, 4.0, 0.25, 1.0):
        spans.add(seconds)
        totals.append(spans.total_s)
    # The third span, from 1 to 5, has the first two inside it; the last one begins before the end of the third.
    assert totals == [1.0, 1.5, 4.0, 4.25, 5.0]


@pytest.mark.parametrize("event", [{}, {"total_s": "x", "parts": {}}, {"total_s": 1, "parts": 3}, {"total_s": -1.0}])
def test_damaged_times_are_left_out(event: dict[str, Any]) -> None:
    assert first_steps.of_event(event) is None and first_steps.in_words(event) == "first step done"
    odd = {"total_s": 2, "parts": {"restore": "x", "claim": 1, "a" * 99: 1e300}, "programs_compiled": True}
    found = first_steps.of_event(odd)
    assert found is not None and found.parts == {"claim": 1.0} and found.compiled == ""
