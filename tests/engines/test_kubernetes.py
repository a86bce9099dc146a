"""Manifests against the typed models of JobSet and the strict schema of the embedded Job; the client against an API of
loopback that keeps what it is given."""

from __future__ import annotations

import json
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from launchers.base import Job
from launchers.kubernetes import KubernetesLauncher, manifest
from portatrain.errors import UserError
from tests.support.jobs import CASES, POD, job

pytestmark = pytest.mark.engines

MINE = [name for name in CASES if name.startswith("kubernetes")]


@pytest.mark.parametrize("name", MINE)
def test_the_typed_models_read_all_of_it(name: str) -> None:
    from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

    made = manifest(job(*CASES[name]))
    read = JobsetV1alpha2JobSet.from_dict(made)
    assert read is not None
    back = read.to_dict()
    back["metadata"] = {k: v for k, v in back["metadata"].items() if v}
    assert _without_empty(back) == _without_empty(made)  # nothing was an unknown field, nothing changed its type


@pytest.mark.parametrize("name", MINE)
def test_the_embedded_job_is_valid(name: str) -> None:
    import kubernetes_validate

    for replicated in manifest(job(*CASES[name]))["spec"]["replicatedJobs"]:
        embedded = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **replicated["template"]}
        kubernetes_validate.validate(embedded, kubernetes_validate.latest_version(), strict=True)


def _without_empty(data: Any) -> Any:
    if isinstance(data, dict):
        return {k: _without_empty(v) for k, v in data.items() if v not in (None, {}, [])}
    return [_without_empty(v) for v in data] if isinstance(data, list) else data


class Api(BaseHTTPRequestHandler):
    """Keeps objects by their path; answers as the real one does for what a launcher asks."""

    objects: dict[str, Any]
    asked: list[tuple[str, str]]

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, code: int, data: Any) -> None:
        body = json.dumps(data).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> Any:
        return json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")

    @property
    def _path(self) -> str:
        self.asked.append((self.command, self.path))
        return self.path.partition("?")[0]

    def do_POST(self) -> None:
        path, made = self._path, self._body()
        name = f"{path}/{made['metadata']['name']}"
        if name in self.objects:
            self._answer(409, {"reason": "AlreadyExists", "message": f"{name} exists"})
            return
        made["metadata"]["uid"] = "uid-1"
        self.objects[name] = made
        self._answer(201, made)

    def do_GET(self) -> None:
        path = self._path
        if path in self.objects:
            self._answer(200, self.objects[path])
        elif path.endswith(("/workloads", "/jobsets")):
            items = [o for p, o in self.objects.items() if p.startswith(f"{path}/")]
            self._answer(200, {"items": items})
        else:
            self._answer(404, {"reason": "NotFound", "message": f"{path} not found"})

    def do_PATCH(self) -> None:
        path, change = self._path, self._body()
        if path not in self.objects:
            self._answer(404, {"reason": "NotFound"})
            return
        _merge(self.objects[path], change)
        self._answer(200, self.objects[path])

    def do_DELETE(self) -> None:
        path = self._path
        self._body()
        self._answer(200 if self.objects.pop(path, None) else 404, {"status": "Success"})


def _merge(into: dict[str, Any], change: dict[str, Any]) -> None:
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Api]]:
    handler = type("Handler", (Api,), {"objects": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    cluster = {"server": f"http://127.0.0.1:{server.server_port}"}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "here", "cluster": cluster}],
        "users": [{"name": "me", "user": {}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
    }
    path = tmp_path / "kubeconfig"
    path.write_text(json.dumps(config))
    monkeypatch.setenv("KUBECONFIG", str(path))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


def one(**changes: Any) -> Job:
    return replace(job("kubernetes", "tpu-v5p-256", "fsdp=128", POD), **changes)


def test_submitted_described_held_released_cancelled(api: type[Api]) -> None:
    launcher, made = KubernetesLauncher(), one(options={k: v for k, v in POD.items() if k != "queue"})
    launcher.check(made)
    made = replace(made, id=launcher.submit(made))
    ((path, stored),) = api.objects.items()
    assert path == f"/apis/jobset.x-k8s.io/v1alpha2/namespaces/default/jobsets/{made.name}"
    assert {**stored, "metadata": None} == {**manifest(made), "metadata": None}
    assert launcher.describe(made).state == "pending"
    stored["status"] = {"replicatedJobsStatus": [{"name": "slice", "active": 1, "ready": 0}]}
    assert launcher.describe(made).state == "running"
    launcher.hold(made)
    assert stored["spec"]["suspend"] is True and launcher.describe(made).state == "held"
    launcher.release(made)
    assert stored["spec"]["suspend"] is False and launcher.describe(made).state == "running"
    stored["status"]["conditions"] = [{"type": "Completed", "status": "True", "reason": "AllJobsCompleted"}]
    assert launcher.describe(made).state == "gone"
    launcher.cancel(made)
    assert not api.objects and launcher.describe(made).state == "gone"
    launcher.cancel(made)  # what is gone stays gone


def test_in_a_queue_kueue_decides_and_a_hold_is_on_its_workload(api: type[Api]) -> None:
    launcher, made = KubernetesLauncher(), one()
    made = replace(made, id=launcher.submit(made))
    (stored,) = api.objects.values()
    assert stored["spec"]["suspend"] is True
    assert stored["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    workload = {"metadata": {"name": "w"}, "spec": {"active": True}}
    api.objects["/apis/kueue.x-k8s.io/v1beta1/namespaces/default/workloads/w"] = workload
    launcher.hold(made)
    assert workload["spec"]["active"] is False and launcher.describe(made).state == "held"
    asked = [urllib.parse.parse_qs(urllib.parse.urlsplit(path).query) for _, path in api.asked]
    assert {"labelSelector": ["kueue.x-k8s.io/job-uid=uid-1"]} in asked
    launcher.release(made)
    assert workload["spec"]["active"] is True and stored["spec"]["suspend"] is True


def test_what_the_api_refuses_is_said(api: type[Api]) -> None:
    launcher, made = KubernetesLauncher(), one()
    launcher.submit(made)
    with pytest.raises(UserError, match=r"409.*AlreadyExists"):
        launcher.submit(made)
    for options, hint in (
        ({}, "option image"),
        ({"image": "x"}, "option volume"),
        ({"image": "x", "volume": {"claim": "c", "path": "/elsewhere"}}, "/elsewhere"),
        ({**POD, "context": "other"}, "context 'other'"),
        ({**POD, "qeue": "x"}, "Did you mean queue"),
    ):
        with pytest.raises(UserError, match=hint):
            launcher.check_settings(one(options=options))
            launcher.check(one(options=options))


def test_no_cluster_is_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    with pytest.raises(UserError, match="kubeconfig"):
        KubernetesLauncher().check(one())
