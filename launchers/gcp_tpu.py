"""Cloud TPU: one queued resource for every acceptable slice, through Google's typed client.

Every host runs the same start-up script, reads its rank from Google's instance metadata, and starts one process;
the first one under the supervisor. A preempted slice is not given back by Google: the queued resource ends as
SUSPENDED, `launch reconcile` says so, and `launch resume` asks for another. When the run is over the first host deletes
it, so that it costs no more. None of this was run at Google: requests are built and sent by the typed client, to a
fake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
    check_shared,
    commands_in_image,
    each_sibling,
    exports,
    option,
    shell,
    tolerantly,
    variables,
)
from launchers.yaml_text import to_yaml
from portatrain.errors import UserError
from portatrain.plan.clusters.chip import Chip
from portatrain.plan.clusters.slices import RULES
from portatrain.system import environment
from portatrain.system.environment import whole_number

OPTIONS = {
    "project": Option("a Google Cloud project", example='"my-project"'),
    "zone": Option("a zone, as in us-east5-a", example='"us-east5-a"'),
    "runtime": Option("the TPU software version", default="one for the chip, such as v2-alpha-tpuv6e"),
    "spot": Option("true: spot capacity", (bool,), "false"),
    "reservation": Option("true: reserved capacity", (bool,), "false"),
    "network": Option("a VPC network", default="the project's default network"),
    "service_account": Option("the e-mail address of a service account", default="the project's default account"),
    "setup": Option("shell lines to run before the start: mounts, environment"),
    "python": Option("the Python of the hosts", default="python3"),
    "env": Option("environment variables, a table", (dict,)),
    "endpoint": Option("another API address, for tests", default="Google's"),
}
RUNTIMES = {
    "tpu-v4": "tpu-ubuntu2204-base",
    "tpu-v5e": "v2-alpha-tpuv5-lite",
    "tpu-v5p": "v2-alpha-tpuv5",
    "tpu-v6e": "v2-alpha-tpuv6e",
    "tpu-7x": "v2-alpha-tpu7-ubuntu2404",
}
TYPES = {"tpu-v4": "V4", "tpu-v5e": "V5LITE_POD", "tpu-v5p": "V5P", "tpu-v6e": "V6E"}
"""Of the API's AcceleratorConfig; other chips are asked for by their accelerator type's name."""
PORT = 8476
NOTICE_S = 30
"""What Google gives a spot host between the notice and the end."""

PLACE = """\
METADATA=http://metadata.google.internal/computeMetadata/v1/instance/attributes
attribute() { curl -sf -H Metadata-Flavor:Google "$METADATA/$1"; }
export TPU_WORKER_ID=$(attribute agent-worker-number)
export TPU_WORKER_HOSTNAMES=$(attribute worker-network-endpoints | tr , '\\n' | cut -d : -f 3 | paste -sd ,)
export MEGASCALE_NUM_SLICES=$(attribute megascale-num-slices || echo 1)
export MEGASCALE_SLICE_ID=$(attribute megascale-slice-id || echo 0)
export MASTER_ADDR=$(attribute megascale-coordinator-address | cut -d : -f 1)
export MASTER_ADDR=${MASTER_ADDR:-${TPU_WORKER_HOSTNAMES%%,*}}"""


class GcpTpuLauncher(Launcher):
    """See `launchers.base.Launcher`."""

    name: ClassVar[str] = "gcp_tpu"
    example_options: ClassVar[str] = '{ project = "PROJECT", zone = "ZONE" }'
    options: ClassVar[Mapping[str, Option | str]] = OPTIONS

    def carries(self, chip: Chip) -> bool:
        return chip.vendor == "google"

    def materialize(self, job: Job) -> str:
        return to_yaml(request(job))

    def check_settings(self, job: Job) -> None:
        check_options(job, OPTIONS)
        if job.cluster_shape.get("chip") not in RUNTIMES:
            raise UserError(
                f"cluster {job.cluster}",
                expected=f"TPUs that can be queued for: {', '.join(RUNTIMES)}",
                got=str(job.cluster_shape.get("chip")),
                do="Use another engine.",
            )

    def check(self, job: Job) -> None:
        check_shared(job, None if option(job, "setup", str) else {}, "mount it there in the option setup")
        _client(job)

    def submit(self, job: Job) -> str:
        tpu = _types(job)
        _call(job, lambda api: api.create_queued_resource(request=tpu.CreateQueuedResourceRequest(request(job))))
        return job.name

    def describe(self, job: Job) -> JobState:
        if job.id is None:
            return JobState(state="gone", reason="never submitted")
        try:
            found = _call(job, lambda api: api.get_queued_resource(name=_name(job)))
        except UserError as error:
            if error.got.startswith("404"):
                return JobState(state="gone")
            raise
        state = found.state.state.name
        known = {"ACTIVE": "running", "PROVISIONING": "running", "SUSPENDED": "gone", "FAILED": "gone"}
        why = "SUSPENDED: Google took it back, and gives none again by itself" if state == "SUSPENDED" else state
        return JobState(state=known.get(state, "pending"), reason=why, where=option(job, "zone", str, ""))

    def logs(self, job: Job) -> Iterator[str]:
        yield f"gcloud compute tpus tpu-vm ssh {job.id} --worker=0 --command='journalctl -u google-startup-scripts'"

    def cancel(self, job: Job) -> None:
        if job.id is None:
            return
        tpu = _types(job)
        try:
            _call(
                job,
                lambda api: api.delete_queued_resource(
                    request=tpu.DeleteQueuedResourceRequest(name=_name(job), force=True)
                ),
            )
        except UserError as error:
            if not error.got.startswith("404"):
                raise

    def doctor(self, options: Mapping[str, Any], storage: Path | None) -> Iterator[tuple[str, str, str]]:
        job = Job(run_dir=str(storage or ""), recipe="", cluster="this cluster", engine="gcp_tpu", options=options)
        try:
            _call(job, lambda api: list(api.list_queued_resources(parent=_parent(job))))
            yield "queued resources", "ok", "the API answers, and you may list them"
        except UserError as error:
            yield "queued resources", "bad", str(error)

    def rank(self, env: Mapping[str, str]) -> Rank | None:
        if "TPU_WORKER_ID" not in env or "TPU_WORKER_HOSTNAMES" not in env:
            return None
        slices, each = whole_number(env, "MEGASCALE_NUM_SLICES", 1), len(env["TPU_WORKER_HOSTNAMES"].split(","))
        index = whole_number(env, "MEGASCALE_SLICE_ID", 0) * each + whole_number(env, "TPU_WORKER_ID")
        return Rank(rank=index, world=slices * each)

    def scheduler_facts(self, env: Mapping[str, str]) -> Mapping[str, str]:
        return {name: env[name] for name in ("TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE") if name in env}

    def runtime(self, job: Job) -> JobRuntime:
        return SliceRuntime(job)


def request(job: Job) -> dict[str, Any]:
    """Return the CreateQueuedResourceRequest as plain data."""
    chip, slices = str(job.cluster_shape.get("chip", "")), int(job.cluster_shape.get("slices", 1))
    node: dict[str, Any] = {
        "runtime_version": option(job, "runtime", str, RUNTIMES.get(chip, "RUNTIME")),
        "metadata": {"startup-script": script(job)},
        "labels": {"managed-by": "portatrain"},
    }
    if chip in TYPES:
        node["accelerator_config"] = {"type_": TYPES[chip], "topology": str(job.cluster_shape.get("topology", ""))}
    else:
        per_slice = int(job.cluster_shape.get("chips", 1)) // slices
        number = per_slice * (RULES[chip].per_name if chip in RULES else 1)
        node["accelerator_type"] = f"{chip.replace('-7x', '7x')}-{number}"
    if option(job, "network", str) is not None:
        node["network_config"] = {"network": job.options["network"], "enable_external_ips": False}
    if option(job, "service_account", str) is not None:
        node["service_account"] = {
            "email": job.options["service_account"],
            "scope": ["https://www.googleapis.com/auth/cloud-platform"],
        }
    spec: dict[str, Any] = {"parent": _parent(job), "node": node}
    if slices > 1:
        spec["multi_node_params"] = {"node_count": slices, "node_id_prefix": job.name}
    else:
        spec["node_id"] = job.name
    queued: dict[str, Any] = {"tpu": {"node_spec": [spec]}}
    if option(job, "spot", bool):
        queued["spot"] = {}
    elif option(job, "reservation", bool):
        queued["guaranteed"] = {"reserved": True}
    return {"parent": _parent(job), "queued_resource_id": job.name, "queued_resource": queued}


def script(job: Job) -> str:
    """Return the start-up script of every host."""
    first, other = commands_in_image(job)
    env = {
        "MASTER_PORT": str(PORT),
        environment.GRACE_S.name: str(NOTICE_S - 5),
        environment.NOTICES.name: "gcp",
        **variables(job),
    }
    setup = option(job, "setup", str, "").strip()
    lines = [
        "#!/bin/bash",
        PLACE,
        *exports(env),
        *([setup] if setup else []),
        "carry_out() {",
        f'    if [ "$TPU_WORKER_ID$MEGASCALE_SLICE_ID" = 00 ]; then {shell(first)}; else {shell(other)}; fi',
        "}",
        # Nobody else starts the hosts again after a failure; 2 is a mistake that stays one.
        f"for start in $(seq {job.max_restarts + 1}); do",
        "    carry_out && break",
        '    if [ "$?" = 2 ]; then break; fi',
        "    sleep 10",
        "done",
        "",
    ]
    return "\n".join(lines)


def _parent(job: Job) -> str:
    return f"projects/{option(job, 'project', str, 'PROJECT')}/locations/{option(job, 'zone', str, 'ZONE')}"


def _name(job: Job) -> str:
    return f"{_parent(job)}/queuedResources/{job.id}"


class SliceRuntime(RuntimeInImage):
    """The first host of a slice. A sibling that starts later ends without training, and is deleted."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.launcher = GcpTpuLauncher()

    def on_exit(self, outcome: str) -> None:
        if outcome == "over":
            each_sibling(self.job, self.launcher.cancel)
        if outcome in ("over", "superseded"):
            tolerantly(self.launcher.cancel, self.job)


# ---- the API


def _types(job: Job) -> Any:
    try:
        from google.cloud import tpu_v2alpha1
    except ImportError:
        raise UserError(
            f"cluster {job.cluster}",
            expected="Google's Cloud TPU client to be installed",
            got="no module google.cloud.tpu_v2alpha1",
            do="Install it with: pip install 'portatrain[gcp]'",
        ) from None
    return tpu_v2alpha1


def _client(job: Job) -> Any:
    tpu = _types(job)
    endpoint = option(job, "endpoint", str)
    if endpoint is not None:
        import grpc
        from google.cloud.tpu_v2alpha1.services.tpu.transports import TpuGrpcTransport

        return tpu.TpuClient(transport=TpuGrpcTransport(channel=grpc.insecure_channel(endpoint)))
    from google.auth.exceptions import DefaultCredentialsError

    try:
        return tpu.TpuClient()
    except DefaultCredentialsError as error:
        raise UserError(
            f"cluster {job.cluster}",
            expected="Google credentials",
            got="none on this machine",
            do="Log in with: gcloud auth application-default login.",
        ) from error


def _call(job: Job, verb: Callable[[Any], Any]) -> Any:
    api = _client(job)
    from google.api_core.exceptions import GoogleAPICallError, RetryError

    try:
        return verb(api)
    except GoogleAPICallError as error:
        raise UserError(
            f"cluster {job.cluster}",
            expected="the Cloud TPU API to accept the request",
            got=f"{int(error.code) if error.code else ''} {error.message}".strip(),
            do="Correct the option that the message names.",
        ) from error
    except RetryError as error:
        raise UserError(
            f"cluster {job.cluster}", expected="an answer from the Cloud TPU API", got=str(error), do="Try again."
        ) from error
