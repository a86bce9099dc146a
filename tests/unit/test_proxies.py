"""What goes to this machine and to the run's other processes takes no proxy; everything else still does."""

from __future__ import annotations

import http.server
import itertools
import os
import threading
import urllib.request
from collections.abc import Iterator

import pytest

from portatrain.system import proxies
from portatrain.system.cloud_notices import noticed

PROXIES = ("grpc_proxy", "http_proxy", "https_proxy", "all_proxy")
EXEMPT = ("no_proxy", "NO_PROXY", "no_grpc_proxy")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PROXIES, *EXEMPT):
        for spelling in {name, name.lower(), name.upper()}:
            monkeypatch.setenv(spelling, "")  # restored at the end, whatever is set in the meantime
            monkeypatch.delenv(spelling)


@pytest.mark.parametrize("proxy", [*PROXIES, *(name.upper() for name in PROXIES[1:])])
@pytest.mark.parametrize("before", [c for n in range(4) for c in itertools.combinations(EXEMPT, n)], ids=str)
def test_loopback_and_the_head_are_exempt_and_what_was_exempt_stays(proxy: str, before: tuple[str, ...]) -> None:
    env = {proxy: "http://proxy:3128", **{name: f"{name}.example, .internal" for name in before}}
    proxies.bypass("head-0", env=env)
    proxies.bypass("head-0", env=env)
    for name in ("no_proxy", "NO_PROXY", *({"no_grpc_proxy"} & {*before})):
        hosts = env[name].split(",")
        assert {"localhost", "127.0.0.1", "::1", "head-0"} <= {*hosts} and len({*hosts}) == len(hosts)
    for name in before:
        assert {f"{name}.example", ".internal"} <= {*env[name].split(",")}
    assert env[proxy] == "http://proxy:3128" and ("no_grpc_proxy" in env) == ("no_grpc_proxy" in before)


def test_without_a_proxy_nothing_changes() -> None:
    env = {"PATH": "/bin", "http_proxy": ""}
    proxies.bypass("head-0", env=env)
    assert env == {"PATH": "/bin", "http_proxy": ""}


def test_a_tracker_still_takes_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    proxies.bypass("head-0")
    assert not urllib.request.proxy_bypass("api.wandb.ai") and not urllib.request.proxy_bypass("storage.googleapis.com")
    assert all(urllib.request.proxy_bypass(host) for host in ("head-0", "127.0.0.1", "localhost"))


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"TRUE" if self.path.endswith("/preempted") else b"")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_clouds_metadata_server_is_asked_without_the_proxy(metadata: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens there
    assert noticed("gcp", metadata)


def test_every_command_exempts_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from portatrain.cli import launch_main, main

    for call in (main, launch_main):
        monkeypatch.setenv("http_proxy", "http://proxy:3128")
        for name in EXEMPT[:2]:
            monkeypatch.setenv(name, "internal")
        assert call(["clusters"]) == 0
        assert os.environ["no_proxy"] == "internal,localhost,127.0.0.1,::1"
