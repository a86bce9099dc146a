"""Submit jobs to Kubernetes: one JobSet for each acceptable cluster. Kueue queues it if the options name a queue.

Every pod runs `launchers.rank_entry`; in the first pod the supervisor starts it. Each start of the JobSet is one
attempt. After exit code 85 and after disruptions (preemption, node drain, spot) the JobSet restarts, and this does not
count against maxRestarts; other failures do. The run directory is on a volume that every pod mounts at the same path,
or in an object store.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from launchers.base import (
    Job,
    JobRuntime,
    JobState,
    Launcher,
    Option,
    Rank,
    RuntimeInImage,
    check_options,
    commands_in_image,
    each_sibling,
    host_processes,
    missing,
    option,
    shell,
    variables,
)
from launchers.yaml_text import to_yaml
from portatrain.errors import UserError, choice
from portatrain.plan.clusters.chip import Chip
from portatrain.system import environment
from portatrain.system.environment import whole_number
from portatrain.system.exit_codes import RESUMABLE
from portatrain.system.urls import is_remote

GRACE_S = 60
VOLUME = "the volume claim that every pod mounts, and its path in the pods: { claim = NAME, path = FOLDER }"
OPTIONS = {
    "image": Option("the container image, with Python and the frameworks", example='"registry/image:tag"'),
    "namespace": Option("a namespace", default="default"),
    "queue": Option("a local queue of Kueue", default="none: the JobSet starts when nodes are free"),
    "priority_class": Option("a priority class"),
    "volume": Option(VOLUME, (dict,), "none: needed unless the runs are in an object store"),
    "node_selector": Option("more node labels to select by, a table", (dict,)),
    "tolerations": Option("tolerations of the pods, a list of tables", (list,)),
    "service_account": Option("the service account of the pods", default="the namespace's default"),
    "resources": Option("resource limits of a pod, a table", (dict,), "the chips of a host"),
    "env": Option("environment variables, a table", (dict,)),
    "python": Option("the Python in the image", default="python3"),
    "grace_s": Option("seconds from SIGTERM to the kill", (int,), GRACE_S),
    "context": Option("a context of your kubeconfig", default="its current context"),
}
GROUP, VERSION, PLURAL = "jobset.x-k8s.io", "v1alpha2", "jobsets"
PORT = 8476
"""The port of process 0. Every attempt has new pods with networks of their own, so one number serves all attempts."""
GKE_TPU = {
    "tpu-v4": "tpu-v4-podslice",
    "tpu-v5e": "tpu-v5-lite-podslice",
    "tpu-v5p": "tpu-v5p-slice",
    "tpu-v6e": "tpu-v6e-slice",
    "tpu-7x": "tpu7x",
}
"""The label cloud.google.com/gke-tpu-accelerator of each chip's node pools."""


class KubernetesLauncher(Launcher):
    """See `launchers.base.Launcher`."""

    name: ClassVar[str] = "kubernetes"
    example_options: ClassVar[str] = '{ image = "IMAGE", volume = { claim = "CLAIM", path = "FOLDER" } }'
    options: ClassVar[Mapping[str, Option | str]] = OPTIONS

    def carries(self, chip: Chip) -> bool:
        return chip.stack != "cpu"

    def materialize(self, job: Job) -> str:
        return to_yaml(manifest(job))

    def check_settings(self, job: Job) -> None:
        check_options(job, OPTIONS)
        volume = option(job, "volume", dict, {})
        if not is_remote(job.run_dir) and {"claim", "path"} - set(volume):  # pods need no volume for an object store
            raise missing(job, "volume", VOLUME, '{ claim = "runs", path = "/runs" }')

    def check(self, job: Job) -> None:
        volume = option(job, "volume", dict)
        if not is_remote(job.run_dir) and not Path(job.run_dir).is_relative_to(str(volume["path"])):
            raise UserError(
                f"run directory {job.run_dir}",
                expected=f"a folder below {volume['path']}, the path of the pods' volume",
                got=job.run_dir,
                do=f"Mount the volume here too, and give --runs {volume['path']}/...",
            )
        _api(job)

    def submit(self, job: Job) -> str:
        made = _call(job, lambda api: api.create_namespaced_custom_object(*_where(job), manifest(job)))
        return str(made["metadata"]["name"])

    def describe(self, job: Job) -> JobState:
        found = _get(job)
        if found is None:
            return JobState(state="gone")
        for condition in found.get("status", {}).get("conditions", []):
            if condition["type"] in ("Completed", "Failed") and condition["status"] == "True":
                return JobState(state="gone", reason=f"{condition['type']}: {condition.get('reason', '')}")
        if found.get("spec", {}).get("suspend"):
            held = found["metadata"].get("annotations", {}).get("portatrain/held") == "true"
            return JobState(state="held" if held else "pending", reason="suspended")
        rows = found.get("status", {}).get("replicatedJobsStatus", [])
        active = sum(row.get("active", 0) + row.get("ready", 0) for row in rows)
        return JobState(state="running" if active else "pending", where=option(job, "namespace", str, "default"))

    def logs(self, job: Job) -> Iterator[str]:
        namespace = option(job, "namespace", str, "default")
        yield f"kubectl logs --namespace {namespace} -l jobset.sigs.k8s.io/jobset-name={job.id}"

    def cancel(self, job: Job) -> None:
        if job.id is not None and _get(job) is not None:
            kind = {"propagation_policy": "Foreground"}
            _call(job, lambda api: api.delete_namespaced_custom_object(*_where(job), job.id, **kind))

    def hold(self, job: Job) -> None:
        """Suspend the job, which also removes any pods that it has."""
        self._suspend(job, True)

    def release(self, job: Job) -> None:
        self._suspend(job, False)

    def _suspend(self, job: Job, suspend: bool) -> None:
        change: dict[str, Any] = {"metadata": {"annotations": {"portatrain/held": str(suspend).lower()}}}
        if option(job, "queue", str) is None:  # with a queue, Kueue decides what is suspended
            change["spec"] = {"suspend": suspend}
            _call(job, lambda api: api.patch_namespaced_custom_object(*_where(job), job.id, change))
            return
        _call(job, lambda api: api.patch_namespaced_custom_object(*_where(job), job.id, change))
        uid = (_get(job) or {}).get("metadata", {}).get("uid", "")
        namespace = option(job, "namespace", str, "default")
        kueue = ("kueue.x-k8s.io", "v1beta1", namespace, "workloads")
        found = _call(
            job, lambda api: api.list_namespaced_custom_object(*kueue, label_selector=f"kueue.x-k8s.io/job-uid={uid}")
        )
        active = {"spec": {"active": not suspend}}
        for name in [workload["metadata"]["name"] for workload in found["items"]]:
            _call(job, partial(_patch, kueue, name, active))

    def doctor(self, options: Mapping[str, Any], storage: Path | None) -> Iterator[tuple[str, str, str]]:
        job = Job(run_dir=str(storage or ""), recipe="", cluster="this cluster", engine="kubernetes", options=options)
        try:
            _call(job, lambda api: api.list_namespaced_custom_object(*_where(job), limit=1))
            yield "JobSet", "ok", "the API of JobSets answers, and you have permission to list JobSets"
        except UserError as error:
            yield "JobSet", "bad", str(error)
        grace = int(options.get("grace_s", GRACE_S))
        text = f"{grace} s from SIGTERM to the kill; spot nodes give at most 30 s"
        yield "grace", "ok" if grace >= 30 else "warn", text
        if "queue" not in options:
            yield "Kueue", "warn", "the options name no queue: a JobSet starts when nodes are free, without a quota"

    def rank(self, env: Mapping[str, str]) -> Rank | None:
        if "JOB_COMPLETION_INDEX" not in env:  # the index of a pod within its job
            return None
        hosts = environment.HOSTS.get(env)
        each = environment.SLICE_HOSTS.get(env) or hosts
        index = whole_number(env, "JOB_INDEX", 0) * each + whole_number(env, "JOB_COMPLETION_INDEX")
        return Rank(rank=index, world=hosts)

    def scheduler_facts(self, env: Mapping[str, str]) -> Mapping[str, str]:
        return {name: env[name] for name in ("JOBSET_NAME", "JOB_COMPLETION_INDEX") if name in env}

    def runtime(self, job: Job) -> JobRuntime:
        return PodRuntime(job)


def manifest(job: Job) -> dict[str, Any]:
    """Return the JobSet of `job`: one replicated job for each slice, with one pod for each of its hosts."""
    shape = dict(job.cluster_shape)
    slices = int(shape.get("slices", 1))
    hosts = max(1, job.hosts // slices)
    namespace, queue = option(job, "namespace", str, "default"), option(job, "queue", str)
    tpu = shape.get("chip") in GKE_TPU
    grace, volume = option(job, "grace_s", int, GRACE_S), _volume(job)
    labels = {"app.kubernetes.io/managed-by": "portatrain", **({"kueue.x-k8s.io/queue-name": queue} if queue else {})}
    annotations = {"portatrain/run": job.run}
    if tpu:  # each slice is a node pool
        annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
    pod_spec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": grace,
        **_given(job, "service_account", "serviceAccountName", str),
        **_given(job, "priority_class", "priorityClassName", str),
        "nodeSelector": {**_selector(shape), **option(job, "node_selector", dict, {})},
        **_given(job, "tolerations", "tolerations", list),
        "containers": [_container(job, shape, slices, hosts, grace)],
        **({"volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": volume["claim"]}}]} if volume else {}),
    }
    job_spec = {
        "completionMode": "Indexed",
        "completions": hosts,
        "parallelism": hosts,
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [RESUMABLE]}},
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"spec": pod_spec},
    }
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "JobSet",
        "metadata": {"name": job.name, "namespace": namespace, "labels": labels, "annotations": annotations},
        "spec": {
            "suspend": queue is not None,
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": job.max_restarts,
                "rules": [
                    {
                        "name": "saved",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [{"name": "slice", "replicas": slices, "template": {"spec": job_spec}}],
        },
    }


def _container(job: Job, shape: Mapping[str, Any], slices: int, hosts: int, grace: int) -> dict[str, Any]:
    first, other = commands_in_image(job)
    script = (
        f'if [ "$JOB_INDEX" = 0 ] && [ "$JOB_COMPLETION_INDEX" = 0 ]; then exec {shell(first)}; fi\nexec {shell(other)}'
    )
    env = {
        "MASTER_ADDR": f"{job.name}-slice-0-0.{job.name}",
        "MASTER_PORT": str(PORT),
        environment.GRACE_S.name: str(grace - 5),
        environment.HOSTS.name: str(slices * hosts),
        environment.SLICE_HOSTS.name: str(hosts),
        **host_processes(job),
        **variables(job),
    }
    each = int(shape.get("chips_per_host", 0))
    chips = {shape["resource"]: each} if shape.get("resource") and each else {}
    volume = _volume(job)
    index = {"fieldRef": {"fieldPath": "metadata.annotations['jobset.sigs.k8s.io/job-index']"}}
    return {
        "name": "train",
        "image": option(job, "image", str, "IMAGE"),
        "command": ["sh", "-c", script],
        "env": [{"name": "JOB_INDEX", "valueFrom": index}, *({"name": k, "value": v} for k, v in env.items())],
        "ports": [{"containerPort": PORT, "protocol": "TCP"}],
        "resources": {"limits": {k: str(v) for k, v in option(job, "resources", dict, chips).items()}},
        **({"volumeMounts": [{"name": "runs", "mountPath": volume["path"]}]} if volume else {}),
    }


def _volume(job: Job) -> dict[str, str] | None:
    """Return the volume; a placeholder if none is configured (--dry-run); None if the job needs none."""
    if is_remote(job.run_dir) and option(job, "volume", dict) is None:
        return None
    return option(job, "volume", dict) or {"claim": "CLAIM", "path": str(Path(job.run_dir).parent)}


def _selector(shape: Mapping[str, Any]) -> dict[str, str]:
    chip = shape.get("chip", "")
    if chip in GKE_TPU:
        return {
            "cloud.google.com/gke-tpu-accelerator": GKE_TPU[chip],
            "cloud.google.com/gke-tpu-topology": shape["topology"],
        }
    return {}


def _given(job: Job, name: str, key: str, kind: type) -> dict[str, Any]:
    value = option(job, name, kind)
    return {} if value is None else {key: value}


class PodRuntime(RuntimeInImage):
    """The first pod of a JobSet."""

    logs: ClassVar[bool] = False

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.launcher = KubernetesLauncher()

    def on_claimed(self) -> None:
        def hold(job: Job) -> None:
            if self.launcher.describe(job).state in ("pending", "running"):
                self.launcher.hold(job)

        each_sibling(self.job, hold)

    def on_exit(self, outcome: str) -> None:
        if outcome == "over":
            each_sibling(self.job, self.launcher.cancel)
        elif outcome == "preempted":
            each_sibling(self.job, self.launcher.release)
        elif outcome == "superseded":
            self.launcher.hold(self.job)
            time.sleep(GRACE_S)  # Kubernetes removes the pod meanwhile


# ---- the API


def _api(job: Job) -> Any:
    """Return the client; UserError if it is not installed or no cluster is configured."""
    try:
        from kubernetes import client, config
    except ImportError:
        raise UserError(
            f"cluster {job.cluster}",
            expected="the Kubernetes client to be installed",
            got="no module kubernetes",
            do="Install it with: pip install 'portatrain[kubernetes]'",
        ) from None
    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config()
        else:
            config.load_kube_config(context=option(job, "context", str))
    except Exception as error:
        known = []
        try:
            known = [c["name"] for c in config.list_kube_config_contexts()[0]]
        except Exception:
            known = []
        context = option(job, "context", str)
        if context is not None and known and context not in known:
            raise choice(f"cluster {job.cluster}: context {context!r}", context, known) from None
        raise UserError(
            f"cluster {job.cluster}",
            expected="a kubeconfig that can be loaded",
            got=str(error),
            do="Log in to the cluster first, so that `kubectl get nodes` answers.",
        ) from error
    return client.CustomObjectsApi()


def _where(job: Job) -> tuple[str, str, str, str]:
    return GROUP, VERSION, option(job, "namespace", str, "default"), PLURAL


def _call(job: Job, verb: Callable[[Any], Any]) -> Any:
    api = _api(job)
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    try:
        return verb(api)
    except ApiException as error:
        raise UserError(
            f"cluster {job.cluster}",
            expected="the Kubernetes API to accept the request",
            got=f"{error.status} {error.reason}: {str(error.body)[:300]}",
            do="Run `launch doctor CLUSTER`, which checks the configuration.",
        ) from error
    except HTTPError as error:
        raise UserError(
            f"cluster {job.cluster}",
            expected="an answer from the Kubernetes API",
            got=str(error),
            do="Check that `kubectl get nodes` answers.",
        ) from error


def _patch(where: tuple[str, str, str, str], name: str, change: dict[str, Any], api: Any) -> Any:
    return api.patch_namespaced_custom_object(*where, name, change)


def _get(job: Job) -> dict[str, Any] | None:
    if job.id is None:
        return None
    try:
        return _call(job, lambda api: api.get_namespaced_custom_object(*_where(job), job.id))
    except UserError as error:
        if error.got.startswith("404"):
            return None
        raise
