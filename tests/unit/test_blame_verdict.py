"""How far a sample is from the band, and what is said of those that stand out."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from portatrain.data.in_sample import Part
from portatrain.recipe.spikes import limit
from portatrain.training.blame.measure import InDocument, Measured, MeasuredStep
from portatrain.training.blame.verdict import Judged, Verdict, deviations, excerpt, judge, layers_of


def sample(number: int, loss: float = 2.0, norm: float = 1.0, **more: Any) -> Measured:
    given: dict[str, Any] = {"place": number, "step": 3, "weight": 8.0, "share": 0.25, "squares": {"a": 0.0, "b": 1.0}}
    return Measured(number=number, loss=loss, norm=norm, **{**given, **more})


def step(*samples: Measured) -> MeasuredStep:
    spread = [sample(100 + i, 2.0 + 0.1 * (i % 5), 1.0 + 0.1 * (i % 5), step=0, share=None) for i in range(20)]
    return MeasuredStep(step=3, loss=2.0, norm=1.0, samples=samples, others=spread)


def test_the_band_is_that_of_spikes() -> None:
    values = np.random.default_rng(0).normal(5, 1, 33).tolist()
    edge = limit(values, 6.0)
    assert deviations(edge, values) == pytest.approx(6)
    assert deviations(2.2, [2.0] * 9) == pytest.approx(10)  # a band is never narrower than 1 % of the median
    assert deviations(math.nan, values) == deviations(math.inf, values) == math.inf
    assert deviations(5.0, [5.0, math.nan, math.inf]) == 0
    assert deviations(1.0, [0.0, 0.0, 0.0]) == math.inf and deviations(0.0, [0.0] * 3) == 0


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (sample(7, loss=9.0), "a loss 46.0 deviations above the median"),
        (sample(7, loss=0.1), "a loss 14.0 deviations below the median"),
        (sample(7, norm=9.0), "a gradient 52.6 deviations above the median"),
        (sample(7, loss=math.nan, norm=math.nan), "its loss or gradient is not finite"),
    ],
)
def test_a_sample_that_stands_out(odd: Measured, why: str) -> None:
    first, *rest = judge([step(sample(5), odd, sample(6))])
    assert first.sample == odd and first.stands_out(6.0) and not any(one.stands_out(6.0) for one in rest)
    assert first.why(6.0).split()[:2] == why.split()[:2] and first.why(6.0).endswith(why.split("deviations")[-1])


def test_a_small_gradient_and_a_sample_without_targets_do_not_stand_out() -> None:
    found = judge([step(sample(5, norm=1e-9), sample(6, weight=0.0, loss=math.nan, norm=0.0))])
    assert [one.sample.number for one in found] == [5] and not found[0].stands_out(6.0)


def verdict(*samples: Measured, parts: tuple[Part, ...] = ()) -> Verdict:
    steps = [step(*samples)]
    rows = [InDocument(part=part, weight=4.0, loss=9.0, share=0.9 - 0.8 * i) for i, part in enumerate(parts)]
    judged = [
        Judged(sample=one.sample, loss_off=one.loss_off, norm_off=one.norm_off, documents=rows) for one in judge(steps)
    ]
    blamed = [one for one in judged if one.stands_out(6.0)]
    return Verdict(
        steps=steps, judged=judged, blamed=blamed, layers=layers_of(blamed, steps) if blamed else [], width=6.0
    )


HOSTILE = Part(source="TextFiles", document=4, file="bad\x1b[2J.txt", tokens=np.arange(5), first=10, count=5)


def test_the_sentence_names_samples_documents_and_layers() -> None:
    odd = sample(7, loss=9.0, share=0.6, squares={"a": 3.0, "b": 1.0})
    found = verdict(sample(5), odd, sample(8, loss=9.5, share=0.3, squares={"a": 3.0, "b": 1.0}), parts=(HOSTILE,))
    assert found.words == ["7:9"]
    assert found.sentence() == (
        "samples 7:9 are to blame, with 90 % of the gradient of step 3, from bad\x1b[2J.txt; 75 % of their gradient is "
        "in a"
    )
    assert [(layer.name, layer.share, layer.others) for layer in found.layers] == [("a", 0.75, 0.0), ("b", 0.25, 1.0)]
    ((part, numbers, share),) = found.documents()
    assert (part, sorted(numbers), share) == (HOSTILE, [7, 8], pytest.approx(0.81))
    rows = json.loads(json.dumps(found.as_json(lambda part: "\x1b]0;title\x07")))
    assert rows["without"] == ["7:9"] and rows["samples"][0]["parts"][0]["first_token"] == 10
    text = "\n".join(found.lines(lambda part: "\x1b]0;title\x07", 3))
    assert "\\x1b]0;title\\x07" in text and "tokens 10 to 14" in text and "and 1 sample within the band" in text


def test_none_stands_out() -> None:
    found = verdict(sample(5), sample(6, loss=2.5), sample(7))
    assert found.sentence().startswith("no sample stands out: the farthest is sample 6 of step 3, ")
    assert found.words == [] and found.documents() == []


def test_an_excerpt_is_one_line_of_ascii() -> None:
    said = excerpt("a\nb\x1b[31m\u202e\ud83d" + "x" * 100)
    assert said.isascii() and "\n" not in said and said.endswith("...") and len(said) < 80
    assert excerpt("short") == "'short'"
