"""Keep compiled programs in jax's persistent compilation cache, and count what is compiled.

jax's own key has the program, the versions of jaxlib and of the platform, the compiler's options and flags, and the
topology of the devices. The folder's name has the version of jax and the platform too, and on a CPU its instructions:
an executable for a CPU is machine code.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental.compilation_cache import compilation_cache

from portatrain.backends.compiling import Compiled, CompileTime, cpu_key, made_writable

_time = CompileTime()
_counts = {"compiled": 0, "reused": 0}
_ours: str | None = None
"""The folder that `use` has set."""


def _on_duration(event: str, duration_secs: float, **_: str | int) -> None:
    if event.startswith("/jax/core/compile/"):
        _time.add(duration_secs)
    if event == "/jax/core/compile/backend_compile_duration":  # also for a program that comes from the cache
        _counts["compiled"] += 1


def _on_event(event: str, **_: str | int) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _counts["reused"] += 1


jax.monitoring.register_event_duration_secs_listener(_on_duration)
jax.monitoring.register_event_listener(_on_event)


def compiled() -> Compiled:
    """Return what this process has compiled so far."""
    reused = _counts["reused"]
    return Compiled(compile_s=_time.total_s, programs=_counts["compiled"] - reused, reused=reused)


def use(folder: Path, platform: str) -> Path:
    """Keep the programs of `platform` below `folder`, and return where; a folder that the user has set is kept.

    Raises OSError if the folder cannot be written to.
    """
    global _ours
    config: Any = jax.config
    given = config.jax_compilation_cache_dir  # of JAX_COMPILATION_CACHE_DIR, or of code of the user
    if given and given != _ours:
        return Path(given) if "://" in given else made_writable(Path(given))
    machine = f"-{cpu_key()}" if platform == "cpu" else ""
    mine = made_writable(folder / f"jax-{jax.__version__}-jaxlib-{jaxlib.__version__}-{platform}{machine}")
    if str(mine) != given:
        jax.config.update("jax_compilation_cache_dir", _ours := str(mine))
        compilation_cache.reset_cache()  # it looks for a folder only once
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # by default, only slow ones are kept
    return mine
