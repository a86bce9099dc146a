"""Write the matrix as Markdown, and list the cells that are out of bounds."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.matrix.cells import BACKENDS, MESHES, REASONS, ROWS, STEPS
from benchmarks.matrix.run import Found
from portatrain.testing.parity import GRADIENT_BOUND, LOSS_BOUND

MOST = 1e-5
"""The largest difference of a gradient or loss that has a reason."""


def problem(backend: str, mesh: str, row: str, found: Found) -> str | None:
    """Return what is wrong with a cell; None if it is within bounds, or was refused with an error of ours."""
    if "failed" in found:
        return f"failed: {found['failed'].strip().splitlines()[-1][:200]}"
    if "refused" in found:
        return None if "expected" in found["refused"] else f"refused without saying why: {found['refused'][:200]}"
    reason = (backend, mesh, row) in REASONS
    for what, bound in (("gradient", GRADIENT_BOUND), ("loss", LOSS_BOUND)):
        bound = MOST if reason else bound
        if not found[what] <= bound:
            of = " of its scale" if what == "gradient" else ""
            return f"{what} off by {found[what]:.2e}{of}, bound {bound:.0e}"
    return None


def problems(results: Mapping[str, Found]) -> list[str]:
    """Return a line for every cell that is out of bounds."""
    found = []
    for key, result in results.items():
        backend, mesh, row = key.split(" | ")
        why = problem(backend, mesh, row, result)
        found += [f"matrix: {key}: {why}"] if why else []
    return found


def table(results: Mapping[str, Found]) -> str:
    """Return the text of docs/measured/parity.md."""
    notes: dict[str, int] = {}
    lines = [
        "# Parity",
        "",
        "`make matrix` writes this page from docs/measured/parity.json. Each cell compares a run with the baseline, "
        "the same run on one jax device in fp32. Its first number is the largest difference of a gradient in step 1, "
        f"divided by the largest value of that gradient (bound {GRADIENT_BOUND:.0e}). Its second number is the largest "
        f"relative difference of a loss over {STEPS} steps (bound {LOSS_BOUND:.0e}). A number in brackets refers to "
        "the list of errors below: this combination ends in that error. An empty cell has not run.",
        "",
        "The recipes are the shipped ones; overrides set their sizes, the same for all cells of a table "
        "(`benchmarks/matrix/cells.py`). The machine was a 2-core x86-64 VM with no accelerator. The devices are "
        "simulated: XLA's simulated devices, or processes connected by gloo.",
        "",
    ]
    for row, (recipe, overrides) in ROWS.items():
        lines += [f"## {row}", "", f"{recipe} with {', '.join(overrides)}", ""]
        lines += ["| mesh | " + " | ".join(BACKENDS) + " |", "|---" * (len(BACKENDS) + 1) + "|"]
        for mesh in MESHES:
            cells = [_cell(results.get(f"{b} | {mesh} | {row}"), b, mesh, row, notes) for b in BACKENDS]
            lines.append(f"| {mesh} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["## Errors", ""] + [f"{n}. {_one_line(text)}" for text, n in notes.items()]
    if REASONS:
        lines += ["", "## Reasons", ""] + [f"- {', '.join(key)}: {why}" for key, why in REASONS.items()]
    commits = sorted({r["commit"] for r in results.values()})
    lines += ["", f"{len(results)} cells, of commits {', '.join(commits)}."]
    return "\n".join(lines) + "\n"


def _cell(found: Found | None, backend: str, mesh: str, row: str, notes: dict[str, int]) -> str:
    if found is None:
        return ""
    if "refused" in found:
        return f"[{notes.setdefault(found['refused'], len(notes) + 1)}]"
    if "failed" in found:
        return "**FAILED**"
    text = f"{found['gradient']:.1e}, {found['loss']:.1e}"
    return f"**{text}**" if problem(backend, mesh, row, found) else text


def _one_line(text: str) -> str:
    return " ".join(text.removeprefix("error: ").split())
