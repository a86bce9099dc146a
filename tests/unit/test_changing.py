"""Which fields may change in a run: every field is in the table, and a change that keeps the past is proved to."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import numpy as np
import pytest

from portatrain import data, optim
from portatrain.data import Mixture, Stdlib, TextFiles
from portatrain.errors import UserError
from portatrain.model.lora import LoRA
from portatrain.model.widths import MuP
from portatrain.optim import SGD, WSD, AdamW, Constant, Cosine, Rule, Schedule
from portatrain.recipe import Origin, Recipe, Referee, Spikes, apply_overrides, load_recipe
from portatrain.recipe.changing import ROWS, Kind, changed, difference, kind_of, merged, with_origin
from tests.support.small_recipe import make

BASES = (data.DataSpec, Rule, Schedule)
FOUND = [getattr(data, name) for name in data.__all__] + list(vars(optim).values())
PARTS = [Recipe, Origin, LoRA, MuP, Spikes, Referee]
PARTS += [cls for cls in FOUND if inspect.isclass(cls) and issubclass(cls, BASES) and cls not in BASES]


@pytest.mark.parametrize("cls", PARTS, ids=lambda cls: cls.__name__)
def test_every_field_of_a_recipe_and_its_parts_is_in_the_table_once(cls: type) -> None:
    """A new field fails here until a row of the table says what a change of it does."""
    named = [name for row in ROWS if row.owner == cls.__name__ for name in row.fields.split()]
    assert sorted(named) == sorted(field.name for field in dataclasses.fields(cls))


def test_the_table_names_no_other_class() -> None:
    assert {row.owner for row in ROWS} == {cls.__name__ for cls in PARTS}
    assert {"AdamW", "Muon", "WSD", "Mixture", "TextFiles"} <= {cls.__name__ for cls in PARTS}


def recipe(**changes: Any) -> Recipe:
    return dataclasses.replace(make(), **{"schedule": Constant(warmup=2), "steps": 20, "batch": 8} | changes)


FIELDS = {
    "eval_every": Kind.FREE,
    "steps": Kind.LATER,
    "schedule.min_ratio": Kind.LATER,
    "schedule.class": Kind.LATER,
    "optimizer.lr": Kind.TRAJECTORY,
    "optimizer.class": Kind.TRAJECTORY,
    "model.layers": Kind.TRAJECTORY,
    "data.seq_len": Kind.TRAJECTORY,
    "data.class": Kind.CORPUS,
    "data.validation": Kind.CORPUS,
}


@pytest.mark.parametrize("path", FIELDS)
def test_the_kind_of_a_field(path: str) -> None:
    assert kind_of(path, recipe()) is FIELDS[path]


def test_a_part_of_another_package_has_the_kind_of_its_place() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Own(TextFiles):
        speed: int = 1

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Bent(Schedule):
        at: int = 1

    there = recipe(data=Own(paths="x", seq_len=8), schedule=Bent())
    assert kind_of("data.speed", there) is Kind.CORPUS
    assert kind_of("schedule.at", there) is Kind.LATER


LATER = [
    # (before, after, step, is the past kept?)
    ({}, {"steps": 40}, 20, True),
    ({}, {"steps": 10}, 10, True),
    ({"schedule": Cosine(warmup=2)}, {"schedule": Cosine(warmup=2), "steps": 40}, 20, False),
    ({"schedule": Cosine(warmup=2)}, {"schedule": Cosine(warmup=2), "steps": 40}, 2, True),
    ({"schedule": Constant()}, {"schedule": WSD(decay=5)}, 15, True),
    ({"schedule": Constant()}, {"schedule": WSD(decay=5)}, 16, False),
    ({"schedule": WSD(decay=10), "steps": 30}, {"schedule": WSD(decay=10), "steps": 60}, 20, True),
    ({"schedule": WSD(decay=10), "steps": 30}, {"schedule": WSD(decay=10), "steps": 60}, 21, False),
    ({}, {"accumulation": 2}, 10, True),
    ({}, {"batch": 16}, 10, False),
    (
        {"batch_start": 4, "batch_ramp": 8, "accumulation": 2},
        {"batch_start": 4, "batch_ramp": 9, "accumulation": 2},
        3,
        True,
    ),
    (
        {"batch_start": 4, "batch_ramp": 8, "accumulation": 2},
        {"batch_start": 4, "batch_ramp": 9, "accumulation": 2},
        9,
        False,
    ),
]


@pytest.mark.parametrize(("before", "after", "step", "kept"), LATER)
def test_the_past_is_compared_value_by_value(before: dict, after: dict, step: int, kept: bool) -> None:
    old, new = recipe(**before), recipe(**(before | after))
    found = difference(old, new, step)
    assert (not found.unproved, found.decides) == (kept, not kept)
    past = range(1, step + 1)
    same = [old.lr_scale(s) for s in past] == [new.lr_scale(s) for s in past]
    assert kept == (same and [old.samples_after(s) for s in past] == [new.samples_after(s) for s in past])


def mixture(*schedule: tuple[int, tuple[float, ...]], block: int = 4) -> Mixture:
    return Mixture(
        sources=(Stdlib(seq_len=8), TextFiles(paths="x", seq_len=8)), weights=(3, 1), block=block, schedule=schedule
    )


@pytest.mark.parametrize(("first", "kept"), [(20, True), (19, False), (3, False), (40, True)])
def test_a_later_piece_of_a_mixture_keeps_the_order_of_past_samples(first: int, kept: bool) -> None:
    """After 10 steps of 8 samples, blocks 0 to 19 of 4 samples are used up. The oracle is the order of the samples."""
    from portatrain.data.mixture import Mixed

    old, new = (
        recipe(data=mixture((30, (1, 1)))),
        recipe(data=mixture((first, (1, 3)), *([(30, (1, 1))] if first < 30 else []))),
    )
    if first == 40:
        new = recipe(data=mixture((30, (1, 1)), (40, (1, 3))))
    found = difference(old, new, 10)
    assert (not found.unproved) == kept and found.decides != kept

    def order(spec: Mixture) -> tuple[np.ndarray, np.ndarray]:
        mixed = object.__new__(Mixed)
        pieces = [(0, spec.weights), *spec.schedule]
        from portatrain.data.mixture_fields import counts

        mixed._seed, mixed._block = 0, spec.block
        mixed._first = np.array([at for at, _ in pieces])
        mixed._counts = np.stack([counts(w, spec.block) for _, w in pieces])
        given = mixed._counts[:-1] * np.diff(mixed._first)[:, None]
        mixed._before = np.concatenate((np.zeros((1, 2), np.int64), np.cumsum(given, axis=0)))
        return mixed.locate(np.arange(80))

    same = all((a == b).all() for a, b in zip(order(old.data), order(new.data), strict=True))
    assert same == kept


def test_the_strongest_kind_decides() -> None:
    old = recipe()
    free = difference(old, dataclasses.replace(old, eval_every=5), 10)
    assert (free.kind, free.decides) == (Kind.FREE, False)
    both = difference(old, dataclasses.replace(old, eval_every=5, clip_norm=0.5, steps=30), 10)
    assert both.kind is Kind.TRAJECTORY and both.named(Kind.FREE) == ["eval_every"]
    assert both.as_json()["clip_norm"] == [1.0, 0.5]


def test_fewer_steps_than_trained_are_refused() -> None:
    with pytest.raises(UserError, match="at least the 10 steps that the run has trained"):
        difference(recipe(), recipe(steps=9), 10)


def test_a_changed_batch_goes_on_with_the_next_sample() -> None:
    """The count of samples goes on, over two changes, and so does that of tokens."""
    old = recipe(data=Stdlib(seq_len=8))
    wide = with_origin(old, dataclasses.replace(old, batch=16), 10)
    assert [wide.samples_after(s) for s in (10, 11, 12)] == [80, 96, 112]
    long = with_origin(wide, dataclasses.replace(wide, data=Stdlib(seq_len=32), batch=4), 12)
    assert [long.samples_after(s) for s in (12, 13)] == [112, 116]
    assert [long.tokens_after(s, 32) for s in (12, 13)] == [112 * 8, 112 * 8 + 4 * 32]
    assert with_origin(long, dataclasses.replace(long, clip_norm=0.1), 13).origin == long.origin
    assert with_origin(old, dataclasses.replace(old, seed=3), 13).origin is None
    assert recipe().sha256 == Recipe.from_json(recipe().to_json()).sha256 and "origin" not in recipe().to_json()


def tiny(*words: str) -> Recipe:
    return apply_overrides(load_recipe("tiny-lm"), words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.embed=64"], "other shapes: embed"),
        (["model.layers=5"], "other shapes"),
        (["optimizer.rate=3"], "field 'rate' of AdamW"),
        (["origin=none"], "one that portatrain sets"),
        (["steps=600"], "the values that it has"),
    ],
)
def test_bad_changes_end_in_one_paragraph(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as told:
        changed(tiny(), words, 10)
    assert "\n" not in str(told.value)


def test_lora_may_be_added_and_dropout_changed() -> None:
    assert changed(tiny(), ["model.dropout=0.2"], 10).model.dropout == 0.2
    assert changed(tiny(), ["lora=LoRA", "lora.rank=2"], 10).lora.rank == 2


MERGES = [
    # (given at the beginning, asked now, current, the recipe that the run has then)
    ([], [], ["optimizer.lr=1e-4"], ["optimizer.lr=1e-4"]),
    ([], ["eval_every=5"], ["optimizer.lr=1e-4"], ["optimizer.lr=1e-4", "eval_every=5"]),
    (["eval_every=5"], [], ["eval_every=5", "steps=900"], ["steps=900"]),
    ([], ["optimizer.lr=1e-4"], ["optimizer.lr=1e-4", "steps=900"], ["optimizer.lr=1e-4", "steps=900"]),
    (["checkpoint_every_s=none"], [], ["checkpoint_every_s=none", "steps=900"], ["steps=900"]),
    ([], ["schedule.warmup=9"], ["schedule=WSD"], ["schedule.warmup=9"]),
    ([], ["fp8_matmuls=('*',)"], ["optimizer=Lion"], ["optimizer=Lion", "fp8_matmuls=('*',)"]),
]


@pytest.mark.parametrize(("given", "asked", "now", "then"), MERGES)
def test_the_words_of_a_command_are_compared_with_those_that_began_the_run(
    given: list[str], asked: list[str], now: list[str], then: list[str]
) -> None:
    first, words, current = (tiny(*words).to_json() for words in (given, asked, now))
    found = Recipe.from_json(merged([first], words, current))
    assert found.to_json() == tiny(*then).to_json()


def test_a_value_that_the_run_had_once_is_no_new_wish() -> None:
    """Begun with 600 steps, trained on with the words steps=700, then changed to 800: the old words follow."""
    before = [tiny().to_json(), tiny("steps=700").to_json()]
    now = tiny("steps=800", "eval_every=9").to_json()
    for words in ([], ["steps=700"], ["steps=800"]):
        assert merged(before, tiny(*words).to_json(), now) == now
    assert merged(before, tiny("steps=900").to_json(), now) == tiny("steps=900", "eval_every=9").to_json()


def test_the_slots_that_mean_something_are_slots_of_the_rules() -> None:
    """Every slot of a rule of ours has a meaning or is known to have none: the factored moments of Adafactor."""
    for cls in PARTS:
        if issubclass(cls, Rule):
            rule = SGD(lr=1.0, momentum=0.75) if cls is SGD else cls(lr=1.0)
            for info in tiny().describe().params.values():
                mine = rule.rule_for(info)
                without = {slot for slot in mine.slots(info) if mine.meaning(slot) is None}
                assert without <= {"v_row", "v_col"} and mine.meaning("other") is None
    assert SGD(lr=1.0, momentum=0.75).meaning("m") == (AdamW(lr=1.0).meaning("m")[0], 0.25)


def test_what_was_trained_on_cannot_be_left_out() -> None:
    """Step 4 is the last one trained: samples 0 to 31, or up to 33 without two of them."""
    old, out = recipe(), recipe(leave_out=("3", "5"))
    assert old.numbers_of(4) == (24, 32) and out.numbers_of(1) == (0, 10) and out.numbers_of(4) == (26, 34)
    found = difference(old, recipe(leave_out=("32:34", "90")), 4)
    assert found.decides and found.named() == ["leave_out"]
    assert difference(out, recipe(leave_out=("3", "5", "34")), 4).decides
    assert difference(old, out, 0).decides  # nothing is trained yet
    for was, now in ((old, recipe(leave_out=("31:33",))), (out, old), (out, recipe(leave_out=("3", "5", "33")))):
        with pytest.raises(UserError, match="Fork the run at a checkpoint before"):
            difference(was, now, 4)
