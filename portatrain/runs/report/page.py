"""The page: one file, no script, no network."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from portatrain.errors import visible
from portatrain.runs import profiles, trust
from portatrain.runs.history import AttemptHistory, History
from portatrain.runs.report import changed
from portatrain.runs.report.by_source import by_source
from portatrain.runs.report.by_task import by_task
from portatrain.runs.report.changed import Fork
from portatrain.runs.report.charts import VERDICTS, Band, Mark, chart
from portatrain.runs.report.layers import layers
from portatrain.runs.report.tables import section as _section
from portatrain.runs.report.tables import table as _table
from portatrain.runs.report.watched import watched
from portatrain.runs.verdict import in_words
from portatrain.system.text import counted, duration

STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1080px; padding: 0 1em; color: #222;
  background: #fff }
h1 { font-size: 1.5em; margin-bottom: 0 } h2 { font-size: 1.1em; margin: 1.8em 0 .4em }
table { border-collapse: collapse; width: 100% } th, td { text-align: left; padding: .25em .7em .25em 0;
  border-bottom: 1px solid #ddd; vertical-align: top } th { font-weight: 600; color: #555 }
td.n { text-align: right; font-variant-numeric: tabular-nums } svg { width: 100%; height: auto; display: block }
svg text { font: 11px system-ui, sans-serif; fill: #555 } svg text.title { font-weight: 600; fill: #222 }
.grid { stroke: #ddd; stroke-width: .6 } .curve { fill: none; stroke: #1b3a57; stroke-width: 1.4 }
.range { fill: #1b3a57; fill-opacity: .18 } .dot { fill: #d62728 } .none { color: #888 }
.key { display: inline-block; width: 1em; height: 1em; vertical-align: -.15em; margin-right: .4em; opacity: .55 }
summary { font-weight: 600; cursor: pointer; margin: .6em 0 } .wide { overflow-x: auto }
svg.sample { display: inline; width: 2.2em; height: .7em; margin-right: .4em }
.line { fill: none; stroke-width: 1.6 } .line:hover { stroke-width: 4 }
code { background: #f4f4f4; padding: 0 .25em } .sub { color: #666; margin-top: .2em }
"""


def page(run: History, checkpoints: Sequence[Mapping[str, Any]], forks: Sequence[Fork] = ()) -> str:
    """Return the whole document, with the results of `history.kept_checkpoints` and `changes.family`."""
    lines = "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f"<title>{escape(run.run)}</title>",
            f"<style>{STYLE}</style></head><body>",
            _head(run),
            _charts(run),
            by_source(run),
            by_task(run),
            _attempts(run),
            _resume_points(run),
            changed.forks(run, forks),
            changed.changes(run),
            layers(run),
            watched(run),
            _first_steps(run),
            _plans(run),
            _profiles(run),
            _checkpoints(checkpoints),
            _recipe(run),
            "</body></html>",
            "",
        ]
    )
    return visible(lines)


def _head(run: History) -> str:
    reached = run.curve[-1]["step"] if run.curve else 0
    trained_s = sum(float(row.get("step_s", 0.0)) for row in run.curve)
    facts = [run.state, f"step {reached} of {run.steps}", counted(len(run.attempts), "attempts")]
    if trained_s:
        waited = sum(float(row.get("data_wait_s") or 0.0) for row in run.curve) / trained_s
        facts.append(
            f"{duration(trained_s)} of training" + (f", {waited:.0%} waiting for data" if waited >= 0.01 else "")
        )
    if run.resume_points:
        facts.append(f"{duration(run.lost_s)} lost to restarts")
    last = next((e for e in reversed(run.evals) if e.get("loss") is not None), None)
    if last:
        whole = {k: v for k, v in (last.get("metrics") or {}).items() if "/" not in k}  # those of sources: a table
        more = "".join(f", {k.replace('_', ' ')} {v:.4g}" for k, v in whole.items())
        facts.append(f"validation loss {last['loss']:.4f} at step {last.get('step', '?')}{more}")
    if rewinds := [change for change in run.changes if change.rewound_from is not None]:
        facts.append(counted(len(rewinds), "times back before a spike"))
    if run.skipped:
        spikes = len(run.spikes)
        if odd := len(run.skipped) - spikes:
            facts.append(counted(odd, "steps skipped: not finite"))
        if spikes:
            facts.append(counted(spikes, "steps skipped: spikes"))
    facts += [f"attempt {event['attempt']}: {trust.in_words(event)}" for event in run.disagreements]
    if run.doubted:
        facts.append(f"not trusted: the checkpoints of steps {', '.join(map(str, run.doubted))}")
    return f"<h1>{escape(run.run)}</h1><p class=sub>{' · '.join(escape(str(fact)) for fact in facts)}</p>"


def _charts(run: History) -> str:
    bands = []
    for attempt in run.attempts:
        mine = [row["step"] for row in run.curve if row["attempt"] == attempt.number]
        if mine:
            bands.append(
                Band(
                    number=attempt.number,
                    first=mine[0],
                    last=mine[-1],
                    text=f"attempt {attempt.number}: {attempt.runs_on}, steps {mine[0]} to {mine[-1]}",
                )
            )
    marks = [
        Mark(step=s.step, verdict=str(s.event.get("verdict")), text=f"step {s.step}: {in_words(s.event)}")
        for s in run.resume_points
    ]
    steps = max(run.steps, run.curve[-1]["step"] if run.curve else 0)
    figures = (
        ("loss", "loss"),
        ("grad_norm", "gradient norm, before clipping"),
        ("tokens_per_s", f"{run.unit} a second"),
        ("lr", "learning rate"),
    )
    out = []
    for key, title in figures:
        points = [(row["step"], row[key]) for row in run.curve if row.get(key) is not None]
        dots = (
            [(e["step"], e["loss"]) for e in run.evals if e.get("loss") is not None and e.get("step") is not None]
            if key == "loss"
            else []
        )
        named = f"{title} (dots: validation)" if dots else title
        out.append(chart(named, points, steps=steps, bands=bands, marks=marks, dots=dots, dots_are="validation loss"))
    keys = "".join(
        f'<span style="margin-right:1.4em"><i class="key" style="background:{b.colour}"></i>{escape(b.text)}</span>'
        for b in bands
    )
    return f"<p>{keys}</p>{''.join(out)}"


def _attempts(run: History) -> str:
    rows = [
        (
            _key(a),
            a.runs_on,
            a.framework,
            f"{a.steps[0]} to {a.steps[1]}" if a.steps else "none",
            str(a.again or ""),
            _when(a.began_unix_s),
            duration(max(0.0, a.ended_unix_s - a.began_unix_s)),
            a.ended or "running",
        )
        for a in run.attempts
    ]
    head = ("attempt", "where", "framework", "steps trained", "trained again later", "began", "lasted", "ended")
    return _section("Attempts", _table(head, rows, raw=(0,)))


def _key(attempt: AttemptHistory) -> str:
    colour = Band(number=attempt.number, first=1, last=1, text="").colour
    return f'<i class="key" style="background:{colour}"></i>{attempt.number}'


def _resume_points(run: History) -> str:
    if not run.resume_points:
        return ""
    rows = []
    for s in run.resume_points:
        verdict = str(s.event.get("verdict"))
        colour = VERDICTS.get(verdict, "#555")
        shown = f'<b style="color:{colour}">{escape(verdict)}</b>{escape(in_words(s.event)[len(verdict) :])}'
        rows.append(
            (
                str(s.step),
                f"{s.earlier or '?'} to {s.attempt}",
                shown,
                f"{counted(s.retrained, 'steps')}, {s.retrained_s:.1f} s" if s.retrained else "none",
                "" if s.gap_s is None else f"{s.gap_s:.1f} s",
            )
        )
    head = ("after step", "attempts", "continuity", "trained again", "from the last step there to the first here")
    total = f"<p>Lost to restarts: {run.lost_s:.1f} s.</p>"
    return _section("Resume points", _table(head, rows, raw=(2,)) + total)


def _plans(run: History) -> str:
    rows = []
    for a in run.attempts:
        if a.plan is None:
            continue
        made = a.plan.get("plan") if a.plan.get("planned") else None
        planned_s, planned_bytes = (
            (_number(made.get(k)) for k in ("step_s", "memory_total_bytes")) if isinstance(made, dict) else (None, None)
        )
        if planned_s is None:
            rows.append((str(a.number), f"not planned: {a.plan.get('why', '')}", "", "", ""))
            continue
        measured_s = a.step_s
        rows.append(
            (
                str(a.number),
                f"{planned_s:.4g} s",
                "" if measured_s is None else f"{measured_s:.4g} s",
                _gib(planned_bytes),
                _gib(a.memory_bytes),
            )
        )
    if not rows:
        return ""
    head = ("attempt", "planned step", "measured step (median)", "planned memory a device", "measured peak")
    return _section("Planned beside measured", _table(head, rows))


def _first_steps(run: History) -> str:
    found = [(a.number, a.first_step) for a in run.attempts if a.first_step is not None]
    if not found:
        return ""
    names = list(dict.fromkeys(name for _, one in found for name in one.parts))
    rows = [
        (
            str(n),
            f"{one.total_s:.1f} s",
            *(f"{one.parts[p]:.1f}" if p in one.parts else "" for p in names),
            one.compiled,
        )
        for n, one in found
    ]
    head = ("attempt", "first step after", *(name.replace("_", " ") for name in names), "programs")
    return _section("From the start of the process to the first step", _table(head, rows))


def _profiles(run: History) -> str:
    out = []
    for attempt in run.attempts:
        for one in attempt.profiles:
            files = ", ".join(f"<code>attempts/{attempt.number}/{escape(file)}</code>" for file in one.files)
            out.append(f"<p>Attempt {attempt.number}, {escape(one.steps)}: {files}</p>")
            out.append(_table(profiles.COLUMNS, one.operations))
    return _section("Profiles", "".join(out)) if out else ""


def _checkpoints(checkpoints: Sequence[Mapping[str, Any]]) -> str:
    def state(one: Mapping[str, Any]) -> str:
        return "not committed" if not one["committed"] else "not trusted" if one.get("doubted") else "committed"

    rows = [(str(c["step"]), state(c), _mib(c["bytes"]), str(c.get("save", ""))) for c in checkpoints]
    if not rows:
        return ""
    return _section("Checkpoints that are kept", _table(("step", "state", "bytes", "save"), rows))


def _recipe(run: History) -> str:
    rows = [(f"<code>{escape(k)}</code>", escape(v)) for k, v in _flat(run.recipe)]
    about = f"<p class=sub>SHA-256 {escape(run.recipe_sha256)}</p>"
    return _section("Resolved recipe", about + _table(("field", "value"), rows, raw=(0, 1)))


def _flat(value: Any, path: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(v, Mapping) for v in value):
        for i, inner in enumerate(value):
            yield from _flat(inner, f"{path}[{i}]")
    else:
        yield path, str(value)


def _when(unix_s: float) -> str:
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if unix_s else ""


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e30 else None


def _gib(nbytes: Any) -> str:
    return "" if nbytes is None else f"{float(nbytes) / 2**30:.3g} GiB"


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:.1f} MiB"
