"""Requests built by Google's typed client and sent to a gRPC server of loopback that keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from dataclasses import replace
from typing import Any

import pytest

from launchers.base import Job
from launchers.gcp_tpu import GcpTpuLauncher, request, script
from portatrain.errors import UserError
from tests.support.jobs import CASES, GCP, job

pytestmark = pytest.mark.engines

MINE = [name for name in CASES if name.startswith("gcp")]


@pytest.mark.parametrize("name", MINE)
def test_the_typed_request_reads_all_of_it(name: str) -> None:
    from google.cloud import tpu_v2alpha1 as tpu

    made = request(job(*CASES[name]))
    typed = tpu.CreateQueuedResourceRequest(made)
    back = tpu.CreateQueuedResourceRequest.to_dict(typed, use_integers_for_enums=False)
    assert _within(made, back) == []


def _within(a: Any, b: Any, at: str = "") -> list[str]:
    """What of `a` is not in `b`."""
    if isinstance(a, dict):
        return [text for k, v in a.items() for text in (_within(v, b[k], f"{at}.{k}") if k in b else [f"{at}.{k}"])]
    if isinstance(a, list):
        return [text for i, (x, y) in enumerate(zip(a, b, strict=True)) for text in _within(x, y, f"{at}[{i}]")]
    return [] if a == b else [f"{at}: {a!r} became {b!r}"]


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, Any]]]:
    import grpc
    from google.cloud import tpu_v2alpha1 as tpu
    from google.longrunning import operations_pb2
    from google.protobuf import any_pb2

    kept: dict[str, Any] = {}

    def done() -> Any:
        answer = any_pb2.Any()
        answer.Pack(tpu.QueuedResource.pb(tpu.QueuedResource()))
        return operations_pb2.Operation(name="op", done=True, response=answer)

    def create(asked: Any, context: Any) -> Any:
        name = f"{asked.parent}/queuedResources/{asked.queued_resource_id}"
        if name in kept:
            context.abort(grpc.StatusCode.ALREADY_EXISTS, f"{name} exists")
        made = tpu.QueuedResource(asked.queued_resource)
        made.name, made.state.state = name, tpu.QueuedResourceState.State.WAITING_FOR_RESOURCES
        kept[name] = made
        return done()

    def get(asked: Any, context: Any) -> Any:
        if asked.name not in kept:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such queued resource")
        return kept[asked.name]

    def delete(asked: Any, context: Any) -> Any:
        assert asked.force
        if kept.pop(asked.name, None) is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such queued resource")
        return done()

    verbs = {
        "CreateQueuedResource": (create, tpu.CreateQueuedResourceRequest, None),
        "GetQueuedResource": (get, tpu.GetQueuedResourceRequest, tpu.QueuedResource),
        "DeleteQueuedResource": (delete, tpu.DeleteQueuedResourceRequest, None),
    }
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            verb,
            request_deserializer=asked.deserialize,
            response_serializer=(gives.serialize if gives else operations_pb2.Operation.SerializeToString),
        )
        for name, (verb, asked, gives) in verbs.items()
    }
    made = grpc.server(futures.ThreadPoolExecutor(2))
    made.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("google.cloud.tpu.v2alpha1.Tpu", handlers),))
    port = made.add_insecure_port("127.0.0.1:0")
    made.start()
    yield f"127.0.0.1:{port}", kept
    made.stop(None).wait()


def one(endpoint: str, **options: Any) -> Job:
    return job("gcp_tpu", "tpu-v5p-256", "fsdp=128", {**GCP, "setup": "mount /runs", "endpoint": endpoint, **options})


def test_submitted_described_cancelled(server: tuple[str, dict[str, Any]]) -> None:
    from google.cloud import tpu_v2alpha1 as tpu

    endpoint, kept = server
    launcher, made = GcpTpuLauncher(), one(endpoint)
    launcher.check(made)
    made = replace(made, id=launcher.submit(made))
    ((name, stored),) = kept.items()
    assert name == f"projects/my-project/locations/us-east5-a/queuedResources/{made.name}"
    assert stored.tpu.node_spec[0].node.accelerator_config.topology == "4x4x8"
    assert stored.tpu.node_spec[0].node.metadata["startup-script"] == script(made)
    assert launcher.describe(made).state == "pending"
    for state, said in (("ACTIVE", "running"), ("SUSPENDED", "gone"), ("FAILED", "gone")):
        stored.state.state = tpu.QueuedResourceState.State[state]
        assert launcher.describe(made).state == said
    with pytest.raises(UserError, match=r"409.*exists"):
        launcher.submit(made)
    launcher.cancel(made)
    assert not kept and launcher.describe(made).state == "gone"
    launcher.cancel(made)


def test_mistakes() -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"project": None}, "option project"),
        ({"zone": None}, "option zone"),
        ({"sopt": 1}, "spot"),
        ({"setup": None}, "the cluster's machines can access"),
    )
    launcher = GcpTpuLauncher()
    for options, hint in cases:
        with pytest.raises(UserError, match=hint):
            launcher.check_settings(one("127.0.0.1:1", **options))
            launcher.check(one("127.0.0.1:1", **options))
    wrong = job("gcp_tpu", "h100-64", "fsdp=64", {**GCP, "endpoint": "127.0.0.1:1"})
    with pytest.raises(UserError, match="tpu-v5p"):
        launcher.check_settings(wrong)
