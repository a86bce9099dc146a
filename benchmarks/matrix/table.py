"""Write the matrix as Markdown, and list the cells that are out of bounds."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.matrix.cells import BACKENDS, MESHES, ROWS, STEPS
from benchmarks.matrix.run import Found


def problem(found: Found) -> str | None:
    """Return what is wrong with a cell; None if it is within bounds, or was refused with an error of ours."""
    if "failed" in found:
        return f"failed: {found['failed'].strip().splitlines()[-1][:200]}"
    if "refused" in found:
        return None if "expected" in found["refused"] else f"refused without saying why: {found['refused'][:200]}"
    for what in ("gradient", "loss"):
        if not found[what] <= found["bound"]:
            of = " of its scale" if what == "gradient" else ""
            return f"{what} off by {found[what]:.2e}{of}, bound {found['bound']:.1e}"
    return None


def problems(results: Mapping[str, Found]) -> list[str]:
    """Return a line for every cell that is out of bounds."""
    found = []
    for key, result in results.items():
        why = problem(result)
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
        "divided by the largest value of that gradient. Its second number is the largest relative difference of a loss "
        f"over {STEPS} steps. Neither may exceed the bound of the row, which is [derived](../understand/rounding.md) "
        "from the lengths of the sums and the depth of the model. A number in brackets refers to the list of errors "
        "below: this combination ends in that error. An empty cell has not run.",
        "",
        "The recipes are the shipped ones; overrides set their sizes, the same for all cells of a table "
        "(`benchmarks/matrix/cells.py`). The machine was a 2-core x86-64 VM with no accelerator. The devices are "
        "simulated: XLA's simulated devices, or processes connected by gloo.",
        "",
    ]
    for row, (recipe, overrides) in ROWS.items():
        lines += [f"## {row}", "", f"{recipe} with {', '.join(overrides)}", ""]
        lines += ["| mesh | bound | " + " | ".join(BACKENDS) + " |", "|---" * (len(BACKENDS) + 2) + "|"]
        for mesh in MESHES:
            found = [results.get(f"{b} | {mesh} | {row}") for b in BACKENDS]
            bound = next((f"{f['bound']:.1e}" for f in found if f and "bound" in f), "")
            lines.append(f"| {mesh} | {bound} | " + " | ".join(_cell(f, notes) for f in found) + " |")
        lines.append("")
    lines += ["## Errors", ""] + [f"{n}. {_one_line(text)}" for text, n in notes.items()]
    commits = sorted({r["commit"] for r in results.values()})
    lines += ["", f"{len(results)} cells, of commits {', '.join(commits)}."]
    return "\n".join(lines) + "\n"


def _cell(found: Found | None, notes: dict[str, int]) -> str:
    if found is None:
        return ""
    if "refused" in found:
        return f"[{notes.setdefault(found['refused'], len(notes) + 1)}]"
    if "failed" in found:
        return "**FAILED**"
    text = f"{found['gradient']:.1e}, {found['loss']:.1e}"
    return f"**{text}**" if problem(found) else text


def _one_line(text: str) -> str:
    return " ".join(text.removeprefix("error: ").split())
