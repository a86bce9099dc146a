"""What is handed to each engine, word for word. A difference is read before it is accepted:
PORTATRAIN_GOLDEN=write python -m pytest tests/golden/test_jobs.py"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from launchers import gcp_tpu, kubernetes, skypilot, targets
from launchers.base import Job, launcher
from launchers.yaml_text import to_yaml

HERE = Path(__file__).parent
VOLUME = {"claim": "runs", "path": "/runs"}
POD: dict[str, Any] = {"image": "registry.example/train:1", "volume": VOLUME, "queue": "team"}
GCP: dict[str, Any] = {"project": "my-project", "zone": "us-east5-a", "spot": True}
ANY_OF = [
    {"accelerators": "H100:8", "infra": "aws/us-east-1", "use_spot": True},
    {"accelerators": "H200:8", "infra": "gcp"},
    {"accelerators": "MI300X:8", "infra": "kubernetes/lab"},
]
SKY: dict[str, Any] = {
    "env": {"NCCL_DEBUG": "WARN"},
    "setup": "pip install portatrain[torch]",
    "file_mounts": {"/runs": "gs://my-runs"},
}
SLURM: dict[str, Any] = {
    "partition": "gpu",
    "gres": "gpu:h100:8",
    "time": "24:00:00",
    "exclusive": True,
    "setup": "module load cuda",
    "env": {"NCCL_DEBUG": "WARN"},
    "python": "/opt/py/bin/python",
}

CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "kubernetes-tpu-slice": ("kubernetes", "tpu-v5p-256", "fsdp=128", POD),
    "kubernetes-tpu-multislice": ("kubernetes", "4*tpu-v5p-256", "replica=4,fsdp=128", POD),
    "kubernetes-h100-8-nodes": ("kubernetes", "h100-64", "replica=8,fsdp=8", POD),
    "gcp-tpu-slice": ("gcp_tpu", "tpu-v5p-256", "fsdp=128", GCP),
    "gcp-tpu-multislice": ("gcp_tpu", "2*tpu-v6e-256", "replica=2,fsdp=256", GCP),
    "skypilot-tpu-slice": ("skypilot", "tpu-v5e-256", "fsdp=256", {"infra": "gcp/us-east5"}),
    "skypilot-list": ("skypilot", "h100-64", "replica=8,fsdp=8", {"any_of": ANY_OF, **SKY}),
    "skypilot-h100": ("skypilot", "h100-64", "replica=8,fsdp=8", {"infra": "aws", "spot": True}),
    "slurm-h100": ("slurm", "h100-64", "replica=8,fsdp=8", SLURM),
}


def job(engine: str, cluster: str, mesh: str, options: dict[str, Any], number: int = 1) -> Job:
    (target,) = targets.targets([cluster], "", mesh=mesh, devices=None, backend=None)
    return Job(
        run_dir="/runs/llama",
        recipe="llama3-8b",
        overrides=("steps=1000",),
        cluster=cluster,
        engine=engine,
        backend=target.backend,
        mesh=mesh,
        devices=target.devices,
        hosts=target.hosts,
        processes=target.processes,
        cluster_shape=target.cluster_shape,
        options={"python": "python3", **options},
        code="/runs/llama/code/0123456789abcdef",
        cwd="/home/me",
        number=number,
    )


def golden(name: str, text: str) -> None:
    path = HERE / f"job-{name}.txt"
    if os.environ.get("PORTATRAIN_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", CASES)
def test_job(name: str) -> None:
    made = job(*CASES[name])
    golden(name, launcher(made.engine).materialize(made))


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
