"""Keep what inductor compiles in its cache, and count what is compiled.

inductor's own key has the graph, its settings, the code of torch and the GPU. The folder's name has the version of
torch too, and the instructions of the CPU, because inductor compiles C++ for the CPU that it runs on.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch._dynamo.callback import CallbackArgs, on_compile_end, on_compile_start
from torch._dynamo.utils import counters

from portatrain.backends.compiling import Compiled, CompileTime, cpu_key, made_writable

FOLDER = "TORCHINDUCTOR_CACHE_DIR"
_time = CompileTime()
_began_s: list[float] = []
_ours: str | None = None
"""The folder that `use` has set."""


@on_compile_start
def _begun(args: CallbackArgs) -> None:
    _began_s.append(time.perf_counter())


@on_compile_end
def _ended(args: CallbackArgs) -> None:
    if _began_s:
        _time.add(time.perf_counter() - _began_s.pop())


def compiled() -> Compiled:
    """Return what this process has compiled so far."""
    inductor = counters["inductor"]
    graphs = inductor["fxgraph_cache_miss"] + inductor["fxgraph_cache_bypass"]
    return Compiled(compile_s=_time.total_s, programs=graphs, reused=inductor["fxgraph_cache_hit"])


def use(folder: Path) -> Path:
    """Keep compiled graphs below `folder`, and return where; a folder that the user has set is kept.

    Raises OSError if the folder cannot be written to.
    """
    global _ours
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    given = os.environ.get(FOLDER)
    if given and given not in (_ours, default_cache_dir()):  # inductor itself sets its default one
        return made_writable(Path(given))
    mine = made_writable(folder / f"torch-{torch.__version__}-{cpu_key()}")
    os.environ[FOLDER] = _ours = str(mine)
    return mine
