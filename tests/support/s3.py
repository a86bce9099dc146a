"""An S3 on loopback: moto's server, and in front of it a proxy that fails or delays requests as a test says."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

Fault = Callable[[str, str, int], "int | float | None"]
"""(method, path, number of the request) -> a status to answer with, seconds to wait, -1.0 to lose the answer, None."""

OURS = ("content-length", "transfer-encoding", "connection", "date", "server")


class Proxy:
    """`port` forwards to `target`; `fault` decides about each request; `seen` lists (method, path)."""

    def __init__(self, target: int) -> None:
        self.fault: Fault = lambda method, path, n: None
        self.seen: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def carry(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with outer._lock:
                    outer.seen.append((self.command, self.path))
                    number = len(outer.seen)
                fault = outer.fault(self.command, self.path, number)
                if isinstance(fault, int):
                    self.answer(fault, b"<Error><Code>InternalError</Code></Error>", [])
                    return
                if fault is not None and fault > 0:
                    time.sleep(fault)
                there = http.client.HTTPConnection("127.0.0.1", target, timeout=30)
                there.request(self.command, self.path, body, dict(self.headers.items()))  # its Host, as it was signed
                came = there.getresponse()
                data = came.read()
                there.close()
                if fault is not None and fault < 0:  # done, but nobody is told
                    self.answer(500, b"<Error><Code>InternalError</Code></Error>", [])
                    return
                kept = [(k, v) for k, v in came.getheaders() if k.lower() not in OURS]
                self.answer(came.status, data, kept, came.getheader("Content-Length"))

            def answer(self, status: int, data: bytes, headers: list, length: str | None = None) -> None:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.send_response(status)
                    for key, value in headers:
                        self.send_header(key, value)
                    shown = length if self.command == "HEAD" and length else str(len(data))
                    self.send_header("Content-Length", shown)
                    self.end_headers()
                    if self.command != "HEAD":
                        self.wfile.write(data)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = carry

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Proxy]]:
    """(URL of an empty bucket, the proxy in front of it); the environment names it."""
    server = pytest.importorskip("moto.server", reason="`make test-s3` has it").ThreadedMotoServer(
        ip_address="127.0.0.1", port=0, verbose=False
    )
    server.start()
    proxy = Proxy(server.get_host_and_port()[1])
    for key, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(key, value)
    there = http.client.HTTPConnection("127.0.0.1", proxy.port)
    for method, path in (("POST", "/moto-api/reset"), ("PUT", "/runs")):  # what moto holds is its process's
        there.request(method, path)
        answer = there.getresponse()
        answer.read()
        assert answer.status == 200
    there.close()
    proxy.seen.clear()
    try:
        yield "s3://runs/one", proxy
    finally:
        proxy.close()
        server.stop()
