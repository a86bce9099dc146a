"""The process of one compilation: ``python -m portatrain.plan.compilers.worker REQUEST.json ANSWER.json``.

It writes a line to standard output at every stage. The answer is written whole, at the end.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

RUNS = {
    "tpu": "portatrain.plan.compilers.xla",
    "cuda": "portatrain.plan.compilers.xla",
    "rocm": "portatrain.plan.compilers.xla",
    "fsdp2": "portatrain.plan.compilers.fsdp2",
}


def main(request: Path, answer: Path) -> None:
    began_s = time.perf_counter()
    asked: dict[str, Any] = json.loads(request.read_text(encoding="utf-8"))

    def stage(text: str) -> None:
        print(text, flush=True)

    found = importlib.import_module(RUNS[asked["compiler"]]).run(asked, stage)
    found["seconds"] = time.perf_counter() - began_s
    part = answer.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1), encoding="utf-8")
    part.replace(answer)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
