"""Blame samples of the steps of a run: replay, measure, judge, and find the documents of those that stand out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from portatrain.data.in_sample import Part, parts_of
from portatrain.data.texts import texts_of
from portatrain.errors import UserError
from portatrain.recipe import Recipe
from portatrain.runs.run_dir import RunDir
from portatrain.training.blame.measure import Meter
from portatrain.training.blame.replayed import replay_to
from portatrain.training.blame.verdict import WIDTH, Judged, Verdict, by_blame, judge, layers_of

SHOWN = 3
"""Samples that are shown for a step of which none stands out."""
CUT = 8
"""Samples to blame of which each document is measured, at most."""


def blame(
    run: RunDir,
    first: int,
    last: int,
    *,
    most: int,
    width: float = WIDTH,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[Verdict, Recipe]:
    """Return the verdict on steps `first` to `last` of a run, and the recipe that they had.

    most: the number of steps to replay before the first one. width: how many deviations stand out.

    Raises:
        UserError: the run has not trained these steps, or cannot be replayed (`replay_to`).
    """
    replay = replay_to(run, first, last, most=most, tell=tell)
    recipe, data = replay.recipe, replay.data
    steps, judged, notes = [], [], replay.notes
    for step in range(first, last + 1):
        meter = Meter(replay.backend, recipe, replay.state, step)
        measured = meter.measured(data.train, tell)
        replay.compare(step, measured.loss)
        found = judge([measured], width)
        out = [one for one in found if one.stands_out(width)]
        shown = out or found[:SHOWN]
        tell(f"step {step}: naming the documents of {len(shown)} samples")
        parts = parts_of(recipe.data, data, [one.sample.number for one in shown], tell)
        by_number: dict[int, Judged] = {}
        for i, one in enumerate(shown):
            mine = parts[one.sample.number]
            inside = meter.documents(data.train, one.sample, mine) if out and i < CUT else []
            ranked = by_blame(one, inside, measured)
            by_number[one.sample.number] = replace(one, parts=mine, documents=ranked)
        steps.append(measured)
        judged += [by_number.get(one.sample.number, one) for one in found]
        notes += measured.notes
        if step < last:
            replay.advance()
    judged.sort(key=lambda one: (-one.off, one.sample.step, one.sample.number))
    blamed = [one for one in judged if one.stands_out(width)]
    layers = layers_of(blamed, steps) if blamed else []
    notes = list(dict.fromkeys(notes))
    return Verdict(steps=steps, judged=judged, blamed=blamed, layers=layers, width=width, notes=notes), recipe


def text_of(recipe: Recipe) -> Callable[[Part], str]:
    """Return the function from a part of a sample to its text; to its ids if no text of them is known."""
    try:
        encoding = texts_of(recipe.data).encoding if recipe.data.tokens_per_sample() else None
    except UserError:
        encoding = None

    def text(part: Part) -> str:
        if part.tokens is None:
            return ""
        ids = part.tokens.tolist()
        return encoding.text(ids) if encoding is not None else f"ids {', '.join(map(str, ids[:24]))}"

    return text
