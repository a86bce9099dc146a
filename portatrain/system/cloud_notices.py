"""Cloud notices: a cloud's metadata server says that it will take this machine away (spot preemption, maintenance).

`environment.NOTICES` names the cloud, `gcp` or `aws`; `gcp=URL` replaces the usual address of its metadata server. A
notice has the effect of SIGTERM: the run saves and exits with code 85.
"""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from types import TracebackType

from portatrain.errors import UserError, choice
from portatrain.system import environment

EVERY_S = 5.0
TIMEOUT_S = 3.0
SOURCES = {"gcp": "http://metadata.google.internal", "aws": "http://169.254.169.254"}


class Notices:
    """Polls the metadata server from a thread while entered, and calls `ask` once at the first notice."""

    def __init__(self, ask: Callable[[], None], *, every_s: float = EVERY_S) -> None:
        self.ask, self.every_s = ask, every_s
        self.cloud, self.url = source(environment.NOTICES.get())
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Notices:
        if self.cloud:
            self._thread = threading.Thread(target=self._poll, name="portatrain-notices", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()

    def _poll(self) -> None:
        while not self._stop.wait(self.every_s):
            if noticed(self.cloud, self.url):
                self.ask()
                return


def source(text: str) -> tuple[str, str]:
    """Return (cloud, URL) for the value of the variable, or ('', '') if it is empty.

    Raises:
        UserError: an unknown cloud, or an address that is not http.
    """
    if not text:
        return "", ""
    cloud, _, url = text.partition("=")
    if cloud not in SOURCES:
        raise choice(f"{environment.NOTICES.name}={text}", cloud, SOURCES)
    if url and not url.startswith("http"):
        raise UserError(
            f"{environment.NOTICES.name}={text}", expected="an http:// address", got=url, do="Leave it out."
        )
    return cloud, url or SOURCES[cloud]


def noticed(cloud: str, url: str) -> bool:
    """Return True if the cloud has announced that it will take the machine away; False if it does not answer."""

    if cloud == "gcp":
        base = f"{url}/computeMetadata/v1/instance"
        if _get(f"{base}/preempted", {"Metadata-Flavor": "Google"}) == "TRUE":
            return True
        return _get(f"{base}/maintenance-event", {"Metadata-Flavor": "Google"}).startswith("TERMINATE")
    token = _get(f"{url}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, method="PUT")
    headers = {"X-aws-ec2-metadata-token": token} if token else {}
    return bool(_get(f"{url}/latest/meta-data/spot/instance-action", headers))


def _get(url: str, headers: dict[str, str], method: str = "GET") -> str:
    try:
        request = urllib.request.Request(url, headers=headers, method=method)
        # Without a proxy: the address is this machine's own, and another machine would get another answer.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=TIMEOUT_S) as answer:
            return answer.read(4096).decode(errors="replace").strip()
    except (urllib.error.URLError, OSError, ValueError):
        return ""
