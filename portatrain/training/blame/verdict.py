"""Say which samples of a step are to blame, with their documents and the layers that carry the gradient; or that none
is.

The band is that of `recipe.Spikes`: over the samples of the step and those that follow, let m be the median and d the
median of abs(x - m); a value is (x - m) / max(1.4826 d, 0.01 abs(m)) deviations away. A sample stands out if its loss
is more than WIDTH deviations above or below, if its gradient is more than WIDTH above, or if one is not finite.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from portatrain.data.in_sample import Part
from portatrain.data.ranges import in_words, merged
from portatrain.recipe.spikes import FLOOR, SIGMA
from portatrain.system import json_files
from portatrain.system.text import counted
from portatrain.training.blame.measure import InDocument, Measured, MeasuredStep

WIDTH = 6.0
LAYERS = 3
DOCUMENTS = 3
EXCERPT = 72
Text = Callable[[Part], str]
"""Returns the text of a part, '' if it has none."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A sample of a step with its distances from the band, in deviations; infinite for what is not finite."""

    sample: Measured
    loss_off: float
    norm_off: float
    documents: Sequence[InDocument] = ()
    parts: Sequence[Part] = ()

    @property
    def off(self) -> float:
        """The distance by which it is ranked."""
        return max(abs(self.loss_off), self.norm_off)

    def stands_out(self, width: float) -> bool:
        return self.off > width

    def why(self, width: float) -> str:
        """Why it stands out, in words."""
        if not math.isfinite(self.off):
            return "its loss or gradient is not finite"
        said = []
        if abs(self.loss_off) > width:
            said.append(f"a loss {abs(self.loss_off):.1f} deviations {'above' if self.loss_off > 0 else 'below'}")
        if self.norm_off > width:
            said.append(f"a gradient {self.norm_off:.1f} deviations above")
        return " and ".join(said) + " the median"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A tensor, in one layer: its share of the squared gradient of the samples to blame, and of the others'."""

    name: str
    share: float
    others: float | None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The samples of some steps, judged. blamed: those that stand out, the farthest first."""

    steps: Sequence[MeasuredStep]
    judged: Sequence[Judged]
    blamed: Sequence[Judged]
    layers: Sequence[Layer]
    width: float
    notes: Sequence[str] = field(default_factory=list)

    @property
    def words(self) -> list[str]:
        """The words that leave the samples to blame out."""
        return in_words(merged((one.sample.number, one.sample.number + 1) for one in self.blamed))

    def documents(self) -> list[tuple[Part, list[int], float]]:
        """Return the documents to blame: a part of each, the samples it is in, and the sum of its shares of steps."""
        found: dict[tuple[str, int], tuple[Part, list[int], float]] = {}
        for one in self.blamed:
            for inside in one.documents[:1]:
                part, numbers, share = found.get(inside.part.key, (inside.part, [], 0.0))
                mine = (one.sample.share or 0.0) * (inside.share if inside.share is not None else 1.0)
                found[inside.part.key] = part, [*numbers, one.sample.number], share + mine
        return sorted(found.values(), key=lambda row: (-len(row[1]), -row[2]))

    def sentence(self) -> str:
        """Say in one sentence who is to blame."""
        if not self.blamed:
            far = self.judged[0]
            return (
                f"no sample stands out: the farthest is sample {far.sample.number} of step {far.sample.step}, "
                f"{far.off:.1f} deviations from the median, and {self.width:g} are needed, so single samples do not "
                "explain this step"
            )
        numbers = ", ".join(in_words(merged((o.sample.number, o.sample.number + 1) for o in self.blamed)))
        one = len(self.blamed) == 1
        shares = [o.sample.share for o in self.blamed]
        said = f"{'sample' if one else 'samples'} {numbers} {'is' if one else 'are'} to blame"
        if len(self.steps) == 1 and None not in shares:
            said += (
                f", with {_percent(math.fsum(s or 0.0 for s in shares))} of the gradient of step {self.steps[0].step}"
            )
        documents = self.documents()
        named = [part.name for part, _, _ in documents[:DOCUMENTS]]
        if named:
            more = f" and {len(documents) - len(named)} more" if len(documents) > len(named) else ""
            said += f", from {', '.join(named)}{more}"
        if self.layers:
            layer = self.layers[0]
            said += f"; {_percent(layer.share)} of {'its' if one else 'their'} gradient is in {layer.name}"
        return said

    def lines(self, text: Text, most: int) -> list[str]:
        """Return the verdict for a person; `most` samples of each step that do not stand out."""
        out = []
        for step in self.steps:
            compared = f" and {counted(len(step.others), 'samples')} that follow" if step.others else ""
            out.append(
                f"step {step.step}: loss {step.loss:.6g}, norm of the gradient {step.norm:.6g}; "
                f"{counted(len(step.samples), 'samples')}{compared}"
            )
            mine = [one for one in self.judged if one.sample.step == step.step]
            shown = [one for one in mine if one in self.blamed] or mine[:most]
            for one in shown:
                out += self._of_sample(one, text)
            if len(mine) > len(shown):
                out.append(f"  and {counted(len(mine) - len(shown), 'samples')} within the band")
        if self.blamed:
            out += [f"  {layer.name}: {_layer(layer)}" for layer in self.layers]
        return [*out, *(f"note: {note}" for note in self.notes), "", self.sentence()]

    def _of_sample(self, one: Judged, text: Text) -> list[str]:
        sample = one.sample
        share = "" if sample.share is None else f", {_percent(sample.share)} of the gradient"
        out = [
            f"  sample {sample.number}: loss {sample.loss:.5g} ({one.loss_off:+.1f} deviations), gradient "
            f"{sample.norm:.4g} ({one.norm_off:+.1f}){share}"
        ]
        rows = one.documents or [InDocument(part=p, weight=0.0, loss=math.nan, share=None) for p in one.parts]
        for inside in rows[:DOCUMENTS]:
            out.append(f"    {_of_part(inside, alone=len(rows) == 1)}")
            if said := text(inside.part):
                out.append(f"      {excerpt(said)}")
        if len(rows) > DOCUMENTS:
            out.append(f"    and {counted(len(rows) - DOCUMENTS, 'documents')} more")
        return out

    def as_json(self, text: Text) -> dict[str, Any]:
        """Return the verdict as plain data."""
        judged = [self._row(one, text) for one in self.judged]
        found = {
            "steps": [{"step": s.step, "loss": s.loss, "grad_norm": s.norm} for s in self.steps],
            "samples": judged,
            "blamed": [one.sample.number for one in self.blamed],
            "documents": [
                {"document": _json_of(part), "samples": numbers, "share": share}
                for part, numbers, share in self.documents()
            ],
            "layers": [vars(layer) for layer in self.layers],
            "without": self.words,
            "width": self.width,
            "notes": list(self.notes),
            "sentence": self.sentence(),
        }
        return json_files.strict(found)

    def _row(self, one: Judged, text: Text) -> dict[str, Any]:
        inside = one.documents or [InDocument(part=p, weight=math.nan, loss=math.nan, share=None) for p in one.parts]
        row = {k: v for k, v in vars(one.sample).items() if k not in ("squares", "place")}
        return {
            **row,
            "loss_deviations": one.loss_off,
            "norm_deviations": one.norm_off,
            "blamed": one in self.blamed,
            "why": one.why(self.width) if one in self.blamed else "",
            "parts": [
                {**_json_of(d.part), "loss": d.loss, "share_of_sample": d.share, "text": text(d.part)} for d in inside
            ],
        }


def judge(steps: Sequence[MeasuredStep], width: float = WIDTH) -> list[Judged]:
    """Return the samples of steps with their distances from the band of their step, the farthest first."""
    out = []
    for step in steps:
        band = [one for one in (*step.samples, *step.others) if one.weight]
        losses, norms = ([getattr(one, name) for one in band] for name in ("loss", "norm"))
        for one in step.samples:
            if one.weight:
                out.append(
                    Judged(sample=one, loss_off=deviations(one.loss, losses), norm_off=deviations(one.norm, norms))
                )
    return sorted(out, key=lambda one: (-one.off, one.sample.step, one.sample.number))


def by_blame(one: Judged, documents: Sequence[InDocument], step: MeasuredStep) -> list[InDocument]:
    """Return the documents of a sample, the one first that takes it farthest out: with a loss that stands out, the one
    of the largest excess over the median, times its targets; else the one of the largest share of the gradient."""
    if abs(one.loss_off) < one.norm_off and all(d.share is not None for d in documents):
        return sorted(documents, key=lambda d: -(d.share or 0.0))
    middle = _middle([s.loss for s in (*step.samples, *step.others) if s.weight])

    def excess(d: InDocument) -> float:
        return d.weight * (d.loss - middle) * math.copysign(1, one.loss_off) if math.isfinite(d.loss) else math.inf

    return sorted(documents, key=lambda d: -excess(d))


def _middle(values: Sequence[float]) -> float:
    """Return the median of the finite ones of some values; 0 if none is."""
    return statistics.median([x for x in values if math.isfinite(x)] or [0.0])


def deviations(value: float, values: Sequence[float]) -> float:
    """Return how far a value is from the median of some, of which those that are not finite do not count."""
    if not math.isfinite(value):
        return math.inf
    middle = _middle(values)
    spread = _middle([abs(x - middle) for x in values])
    band = max(SIGMA * spread, FLOOR * abs(middle))
    return (value - middle) / band if band else (0.0 if value == middle else math.copysign(math.inf, value - middle))


def layers_of(blamed: Sequence[Judged], steps: Sequence[MeasuredStep]) -> list[Layer]:
    """Return the tensors that carry most of the squared gradient of the samples to blame."""
    ids = {(one.sample.step, one.sample.number) for one in blamed}
    everyone = [one for step in steps for one in (*step.samples, *step.others)]
    mine = _shares([one.squares for one in everyone if (one.step, one.number) in ids])
    rest = _shares([one.squares for one in everyone if (one.step, one.number) not in ids])
    ranked = sorted(mine.items(), key=lambda row: -row[1])[:LAYERS]
    return [Layer(name=name, share=share, others=rest.get(name)) for name, share in ranked]


def _shares(squares: Sequence[Mapping[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for one in squares:
        whole = math.fsum(one.values())
        if math.isfinite(whole) and whole:
            for name, value in one.items():
                sums[name] = sums.get(name, 0.0) + value / whole
    total = math.fsum(sums.values())
    return {name: value / total for name, value in sums.items()} if total else {}


def excerpt(text: str) -> str:
    """Return the beginning of a text in one line of quoted characters, which no terminal acts on."""
    shown = ascii(text[:EXCERPT])
    return (shown[:EXCERPT] if len(shown) > EXCERPT else shown) + ("..." if len(text) > EXCERPT else "")


def _of_part(inside: InDocument, *, alone: bool) -> str:
    part = inside.part
    said = part.name
    if part.tokens is not None:
        where = "" if part.file is None else f" (document {part.document} of {part.source})"
        said += f"{where}, tokens {part.first} to {part.first + len(part.tokens) - 1}"
    elif part.values:
        said += ": " + ", ".join(f"{k} {v}" for k, v in part.values.items())
    if not alone and not math.isnan(inside.loss):
        share = "" if inside.share is None else f", {_percent(inside.share)} of the sample's gradient"
        said += f": loss {inside.loss:.5g}{share}"
    return said + (f"; its name is not known: {part.why}" if part.why else "")


def _json_of(part: Part) -> dict[str, Any]:
    row: dict[str, Any] = {"source": part.source, "document": part.document, "file": part.file, "index": part.index}
    if part.tokens is None:
        return {**row, "values": part.values}
    return {**row, "first_token": part.first, "tokens": len(part.tokens), "why_unnamed": part.why}


def _layer(layer: Layer) -> str:
    rest = "" if layer.others is None else f" ({_percent(layer.others)} of that of the others)"
    return f"{_percent(layer.share)} of the squared gradient{rest}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if abs(share) >= 0.095 or not share else f"{100 * share:.1f} %"
