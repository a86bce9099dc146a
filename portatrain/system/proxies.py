"""Keep traffic between the processes of a run, and to this machine itself, out of HTTP proxies.

A cluster's login profile may set http_proxy for downloads and trackers. gRPC, which carries JAX's coordination, would
send what is meant for the next process to that proxy too, and wait for minutes.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PROXIES = ("grpc_proxy", "http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def bypass(*hosts: str, env: MutableMapping[str, str] | None = None) -> None:
    """Exempt loopback and `hosts` from the proxies that `env` names; all other hosts keep them.

    `env`: the environment to change, by default that of this process. It does not change if it names no proxy.
    """
    env = os.environ if env is None else env
    if not any(env.get(name) for name in _PROXIES):
        return
    # Some libraries read one spelling only, and those that read both prefer the first.
    exempt = [*_listed(env, "no_proxy"), *_listed(env, "NO_PROXY")]
    wanted = dict.fromkeys([*exempt, *LOOPBACK, *(host.strip("[]") for host in hosts if host)])
    for name in ("no_proxy", "NO_PROXY"):
        env[name] = ",".join(wanted)
    if "no_grpc_proxy" in env:  # in its presence gRPC does not read the others
        env["no_grpc_proxy"] = ",".join(dict.fromkeys([*_listed(env, "no_grpc_proxy"), *wanted]))


def _listed(env: MutableMapping[str, str], name: str) -> list[str]:
    return [host for part in env.get(name, "").split(",") if (host := part.strip())]
