"""Write the proof as a page in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Found = dict[str, Any]
WIDEST = 160
"""Characters of an error in a table."""


def page(found: Found) -> str:
    """Return the page of a proof: one section a part, with a sentence that says whether it is good."""
    about = found["about"]
    device = about.get("torch", {}).get("name") or about.get("jax", {}).get("name") or found["device"]
    packages = ", ".join(f"{name} {v}" for name, v in about.get("packages", {}).items())
    out = [f"# Proof on {device}", "", f"{about.get('system', '')}, Python {about.get('python', '')}; {packages}."]
    out += [f"`python -m benchmarks.gpu_proof --device {found['device']}` took {found['seconds']:.0f} s."]
    for name, write in SECTIONS.items():
        if name in found:
            good = "good" if found[name]["good"] else "NOT GOOD"
            out += ["", f"## {name.capitalize()}: {good}", "", *write(found[name], found)]
    return "\n".join(out) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]


def _error(row: Found) -> str:
    return " ".join(str(row.get("error", "")).replace("|", "/").split())[-WIDEST:]


def _parity(part: Found, found: Found) -> list[str]:
    head = ("who", "beside", "loss", "gradient", "norm", "failures")
    rows = [
        (
            r["who"],
            r["beside"],
            *(f"{r[k]:.1e}" for k in ("loss", "gradient", "norm")),
            "; ".join(r["failures"]) or "none",
        )
        if "loss" in r
        else (r["who"], "", "", "", "", _error(r))
        for r in part["rows"]
    ]
    bound = f"The largest relative differences over {part['steps']} steps in fp32; the bound is {part['bound']:.1e}."
    return [bound, "", *_table(head, rows)]


def _move(part: Found, found: Found) -> list[str]:
    if "error" in part:
        return [_error(part)]
    resumes = ", ".join(f"after step {r['step']} {r['verdict']}" for r in part["resumes"])
    apart = f"{part['steps']} steps, the losses at most {part['loss_apart']:.1e} from those of an undisturbed run"
    return [f"{', then '.join(part['legs'])}: {resumes}; {apart}."]


def _court(part: Found, found: Found) -> list[str]:
    head = ("operation", "kernel", "backend", "verdict", "cases passed", "refused", "largest error over its bound")
    rows = [
        (r["operation"], r["kernel"], r["backend"], r["verdict"], r["passed"], r["refused"], f"{r['largest']:.2f}")
        if "verdict" in r
        else (r["operation"], r["kernel"], r["backend"], _error(r), "", "", "")
        for r in part["rows"]
    ]
    return _table(head, rows)


def _rates(part: Found, found: Found) -> list[str]:
    rows = [(k, f"{v / 1e12:.4g}" if isinstance(v, float) else v) for k, v in part["flops_per_s"].items()]
    return [f"A product of two {part['n']} x {part['n']} matrices.", "", *_table(("matrices", "TFLOP/s"), rows)]


def _speed(part: Found, found: Found) -> list[str]:
    head = ("shape", "layers", "tokens", "precision", "who", "tokens/s", "planned", "of the product's rate", "peak GB")
    rate = {k: v for k, v in found.get("rates", {}).get("flops_per_s", {}).items() if isinstance(v, float)}
    best = max(rate.values(), default=None)
    rows = []
    for r in part["rows"]:
        first = (r["shape"], r["layers"], r["seq"], r["precision"], r["who"])
        if "step_s" not in r:
            rows.append((*first, _error(r), "", "", ""))
            continue
        planned = f"{r['seq'] / r['planned_s']:.4g}" if r.get("planned_s") else "-"
        share = f"{r['matmul_flops_per_s'] / best:.2f}" if best else "-"
        peak = f"{r['peak_bytes'] / 1e9:.2f}" if r.get("peak_bytes") else "-"
        rows.append((*first, f"{r['tokens_per_s']:.4g}", planned, share, peak))
    return _table(head, rows)


SECTIONS = {"parity": _parity, "move": _move, "court": _court, "rates": _rates, "speed": _speed}
