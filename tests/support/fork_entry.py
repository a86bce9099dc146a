"""Functions that the processes of a group run, for the tests of `forks`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from portatrain.system.processes import rank, world_size


def note(args: argparse.Namespace) -> int:
    """Write the number of processes into a file named after the rank."""
    Path(args.folder, str(rank())).write_text(str(world_size()))
    print(f"rank {rank()}")
    return 0


def fail(args: argparse.Namespace) -> int:
    """Fail on rank 1; rank 0 waits for it."""
    if rank() == 1:
        raise ZeroDivisionError
    time.sleep(60)
    return 0
