"""What the meta of a run's checkpoints keeps of the import from which the run began."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

IMPORTED = "imported"
"""In the meta of the import itself, which has no record to compare a restored state with."""
BEGAN = "began_from"
"""The same in the meta of all later checkpoints."""


def begun(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the format and the path of the import from which the run of this checkpoint began; {} if there was none.

    An import from transformers also has `generation`, the contents of its generation_config.json.
    """
    found = meta.get(IMPORTED, meta.get(BEGAN))
    return found if isinstance(found, Mapping) else {}
