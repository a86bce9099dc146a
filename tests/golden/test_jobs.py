"""What is handed to each engine, word for word. A difference is read before it is accepted:
PORTATRAIN_GOLDEN=write python -m pytest tests/golden/test_jobs.py"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launchers import gcp_tpu, kubernetes, skypilot, slurm_doctor
from launchers.base import Option, check_options, launcher, variables
from launchers.cluster_options import SHARED
from launchers.yaml_text import to_yaml
from portatrain.errors import UserError
from portatrain.system import environment
from tests.support.jobs import CASES, POD, job

HERE = Path(__file__).parent


def golden(name: str, text: str) -> None:
    path = HERE / f"job-{name}.txt"
    if os.environ.get("PORTATRAIN_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", CASES)
def test_job(name: str) -> None:
    made = job(*CASES[name])
    golden(name, launcher(made.engine).materialize(made))


@pytest.mark.parametrize("name", CASES)
def test_the_cache_of_compiled_programs_and_the_profile_reach_every_engine(name: str) -> None:
    engine, cluster, mesh, options = CASES[name]
    made = replace(job(engine, cluster, mesh, {**options, "compile_cache": "/shared/compiled"}), profile="5:7")
    text = launcher(engine).materialize(made)
    assert environment.COMPILE_CACHE.name in text and "/shared/compiled" in text
    assert made.train()[-4:-2] == ["--profile", "5:7"] and variables(made)[environment.COMPILE_CACHE.name]
    own = replace(made, options={**made.options, "env": {environment.COMPILE_CACHE.name: "off"}})
    assert variables(own)[environment.COMPILE_CACHE.name] == "off"
    with pytest.raises(UserError, match="Did you mean compile_cache"):
        check_options(replace(made, options={"compile_cach": "x"}), {})
    with pytest.raises(UserError, match="option compile_cache: expected a str"):
        variables(replace(made, options={"compile_cache": 3}))


@pytest.mark.parametrize("name", CASES)
def test_wrong_options_are_refused_before_anything_is_asked_for(name: str) -> None:
    made = job(*CASES[name])
    found = launcher(made.engine)
    found.check_settings(made)
    known = {**found.options, **SHARED}
    for option in known:
        with pytest.raises(UserError, match=f"Did you mean .*{option}"):
            found.check_settings(replace(made, options={**made.options, option[:-1] + "_": "x"}))
        with pytest.raises(UserError, match=f"option {option}: expected a "):
            found.check_settings(replace(made, options={**made.options, option: 1j}))
    for option in made.options:
        one = known[option]
        if isinstance(one, Option) and one.example:
            with pytest.raises(UserError, match=f"option {option}: expected .*got none"):
                found.check_settings(replace(made, options={k: v for k, v in made.options.items() if k != option}))


def test_a_list_of_both() -> None:
    texts = []
    for number, (cluster, mesh) in enumerate((("tpu-v5p-256", "fsdp=128"), ("h100-64", "replica=8,fsdp=8")), 1):
        made = job("kubernetes", cluster, mesh, POD, number)
        texts.append(kubernetes.KubernetesLauncher().materialize(made))
    golden("kubernetes-list", "---\n".join(texts))


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("slurm")])
def test_yaml_reads_back_as_it_was_meant(name: str) -> None:
    made = job(*CASES[name])
    data = {"kubernetes": kubernetes.manifest, "gcp_tpu": gcp_tpu.request, "skypilot": skypilot.task}[made.engine](made)
    assert yaml.safe_load(to_yaml(data)) == data


@pytest.mark.parametrize(
    "value",
    [
        "yes",
        "null",
        "1.5",
        "4x4x8",
        "a: b",
        "- x",
        "#c",
        "",
        " lead",
        "a\nb",
        "a\n\n b\n",
        "tab\there\nand",
        "ü\n\x07",
        "'\"",
        "0o17",
        "1_000",
        "2026-11-21",
        "~",
        "=",
        "<<",
        "a\n",
    ],
)
def test_any_text_is_quoted_where_it_must_be(value: str) -> None:
    for data in ({"k": value}, [value, {"n": value}], {value or "k": [[value], {}], "e": [], "n": None, "t": True}):
        assert yaml.safe_load(to_yaml(data)) == data


def test_names_are_short_enough_for_every_engine() -> None:
    long = replace(job(*CASES["kubernetes-tpu-slice"]), run_dir="/runs/" + "X" * 63, number=123)
    other = replace(long, run_dir="/runs/" + "X" * 62)
    assert long.name != other.name
    for one in (long, other):
        # A pod's host name is NAME-slice-INDEX-INDEX, which Kubernetes allows 63 characters.
        assert len(f"{one.name}-slice-99-9999") <= 63 and one.name == one.name.lower()


@pytest.mark.parametrize(("said", "advice"), [("Unable to contact slurm controller", "scontrol ping"), ("Nope", "Ask")])
def test_the_doctor_never_advises_itself(
    said: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sbatch", "scontrol", "sinfo"):
        script = tmp_path / name
        script.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    ((what, level, text),) = slurm_doctor.look({}, None)
    assert (what, level) == ("controller", "bad") and said in text
    assert advice in text and "launch doctor" not in text
