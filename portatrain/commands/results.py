"""Print the results of a run that was trained in the foreground."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from portatrain.errors import UserError


def show(run_dir: str) -> None:
    """Draw the loss curve and print the results of a run on standard output."""
    from portatrain.runs.open import open_run
    from portatrain.training.metrics.plot import plot_run

    run = open_run(run_dir)
    if not run.curve():
        return
    summary = run.summary()
    print(f"\nrun directory    {run_dir}")
    try:
        print(f"loss curve       {run.where}/{plot_run(run).name}")
    except UserError as error:
        print(f"no loss curve: {error}", file=sys.stderr)
    _print(summary)


def _print(summary: Mapping[str, object]) -> None:
    """Print the results, one per line: single values first, then tables, then texts such as a generated sample."""
    texts = {k: v for k, v in summary.items() if isinstance(v, str) and ("\n" in v or len(v) > 60)}
    for name, value in summary.items():
        if isinstance(value, Mapping):
            for key, item in value.items():
                _row(f"{name}: {key}", item)
        elif name not in texts:
            _row(name, value)
    for name, text in texts.items():
        print(f"\n{name.replace('_', ' ')}:\n{text}")


def _row(name: str, value: object) -> None:
    shown = f"{value:.4f}" if isinstance(value, float) and 1e-3 <= abs(value) < 1e5 else str(value)
    print(f"{name.replace('_', ' '):<16} {shown}")
