"""`portatrain data pack` with small groups and a state after each, for tests that kill it at any moment."""

from __future__ import annotations

import sys

from portatrain.cli import main
from portatrain.data.store import packing

if __name__ == "__main__":
    packing.GROUP_DOCUMENTS, packing.CHUNK_DOCUMENTS, packing.SAVE_S = 7, 3, 0.0
    sys.exit(main(["data", "pack", *sys.argv[1:]]))
