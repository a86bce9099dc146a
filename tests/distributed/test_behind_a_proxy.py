"""Processes of one run meet although the environment names a proxy, which none of their traffic may take."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from portatrain.system.processes import run_processes
from tests.support.running import BACKENDS

pytestmark = pytest.mark.meshes


@pytest.fixture
def proxy() -> Iterator[tuple[str, list[bytes]]]:
    """The address of a proxy that takes what comes and answers nothing, and what came."""
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        over = threading.Event()

        def serve() -> None:
            while not over.is_set():
                try:
                    caller, _ = server.accept()
                except TimeoutError:
                    continue
                with caller:
                    caller.settimeout(5)
                    seen.append(caller.recv(4096))

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", seen
        over.set()
        thread.join()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.timeout(100)
def test_processes_meet_behind_a_proxy(
    backend: str, proxy: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, seen = proxy
    for name in ("grpc_proxy", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, url)
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    began_s = time.monotonic()
    assert run_processes(2, "tests.support.proxy_worker:main", {"backend": backend}) == 0
    assert seen == [] and time.monotonic() - began_s < 60
