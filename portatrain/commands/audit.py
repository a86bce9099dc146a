"""Compare two records of a trainer that is not portatrain's, or look at one.

A trainer in torch or jax writes a record with `portatrain.audit.record(model, optimizer, ...).save(FILE)`: one before a
save, one after the restore, the conversion or the upgrade. This command says what differs: the tensor, its layer and
the kind of fault. With one record it says what is wrong within it, such as copies of a tensor that differ between
ranks. docs/run/audit.md shows the two calls. Exit code 1: a fault was found.

examples:
  portatrain audit before.json after.json
  portatrain audit before.json after.json --allow rounded --precision bfloat16
  portatrain audit before.json after.json --names names.json --json
  portatrain audit first-step.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from portatrain.errors import UserError
from portatrain.system import json_files
from portatrain.system.exit_codes import FOUND


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", metavar="BEFORE", type=Path, help="a record")
    parser.add_argument("after", metavar="AFTER", type=Path, nargs="?", help="a later record of the same trainer")
    parser.add_argument(
        "--allow", metavar="KIND", nargs="+", default=[], help="kinds of faults that are only noted, such as rounded"
    )
    parser.add_argument("--precision", default="float32", help="the dtype that it computes in (default: float32)")
    parser.add_argument(
        "--names", metavar="FILE", type=Path, help="a JSON object: names of parameters in AFTER, to those in BEFORE"
    )
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")


def run(args: argparse.Namespace) -> int:
    from portatrain.testing import audit

    before = audit.load(args.before)
    if args.after is None:
        verdict = audit.look(before)
    else:
        names = _names(args.names) if args.names else None
        verdict = audit.compare(before, audit.load(args.after), names=names, allow=args.allow, precision=args.precision)
    print(json.dumps(verdict.as_json(), indent=1) if args.json else verdict)
    return 0 if verdict else FOUND


def _names(path: Path) -> dict[str, str]:
    try:
        names = json_files.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        names = str(error)
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(
            f"--names {path}",
            expected='a file with a JSON object of names, such as {"up.kernel": "0.weight"}',
            got=names if isinstance(names, str) else "other JSON",
            do="Write the later record's names, each with the name in the earlier one.",
        )
    return names
