"""A job for every engine, as the goldens and the tests of the engines submit it."""

from __future__ import annotations

from typing import Any

from launchers import targets
from launchers.base import Job

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
