"""Recipes: validation, overrides by type, JSON and back, loading files."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portatrain import config
from portatrain.data import Digits, Stdlib, TextFiles
from portatrain.errors import UserError
from portatrain.optim import SGD, AdamW, Lion, Muon
from portatrain.optim.schedules import WSD, Constant, Cosine
from portatrain.recipe import Recipe, apply_overrides, load_recipe, shipped_recipes
from tests.support.recipe_files import BAD_FILES, GOOD
from tests.support.small_recipe import Inner, Sizes, make, named_hook

INVALID = [
    ({"steps": 0}, "steps", "at least 1"),
    ({"steps": 2.5}, "steps", "an integer"),
    ({"steps": True}, "steps", "an integer"),
    ({"batch": -1}, "batch", "at least 1"),
    ({"batch": 10, "accumulation": 4}, "batch=8 or batch=12", "multiple of accumulation=4"),
    ({"batch": 3, "accumulation": 4}, "batch=4", "multiple of accumulation=4"),
    ({"accumulation": 0}, "accumulation", "at least 1"),
    ({"seed": -1}, "seed", "at least 0"),
    ({"seed": 2**63}, "seed", "below 2**63"),
    ({"precision": "fp64"}, "precision", "fp32, bf16"),
    ({"clip_norm": 0.0}, "clip_norm", "positive"),
    ({"clip_norm": float("nan")}, "clip_norm", "a number"),
    ({"ema_decay": 1.0}, "ema_decay", "between 0 and 1"),
    ({"max_skips": -1}, "max_skips", "at least 0"),
    ({"eval_every": 0}, "eval_every", "at least 1"),
    ({"name": "Big Run"}, "name", "lower-case letters"),
    ({"name": "a" * 64}, "name", "1 to 63"),
    ({"frozen": ["a"]}, "frozen", "comma-separated"),
    ({"optimizer": "adamw"}, "optimizer", "Rule"),
    ({"data": None}, "data", "DataSpec"),
    ({"model": frozenset()}, "model", "frozen dataclass"),
    ({"schedule": Constant(warmup=11)}, "warmup", "10 steps"),
    ({"params": {"embed": 3}}, "params", "mapping"),
]


@pytest.mark.parametrize(("changes", "named", "wanted"), INVALID, ids=lambda value: str(value)[:40])
def test_invalid_recipe_is_refused(changes: dict[str, Any], named: str, wanted: str) -> None:
    with pytest.raises(UserError) as caught:
        make(**changes)
    assert named in str(caught.value)
    assert wanted in str(caught.value)


OVERRIDES = [
    ("steps=20", lambda r: r.steps, 20),
    ("steps=2_000", lambda r: r.steps, 2000),
    ("steps=1e3", lambda r: r.steps, 1000),
    ("model.layers=8", lambda r: r.model.layers, 8),
    ("model.rate=3", lambda r: r.model.rate, 3.0),
    ("model.rate=1e-3", lambda r: r.model.rate, 1e-3),
    ("model.tied=true", lambda r: r.model.tied, True),
    ("model.kind=moe", lambda r: r.model.kind, "moe"),
    ("model.window=16", lambda r: r.model.window, 16),
    ("model.window=none", lambda r: r.model.window, None),
    ("model.note=none", lambda r: r.model.note, None),
    ("model.note=a=b", lambda r: r.model.note, "a=b"),
    ("model.widths=3,4,5", lambda r: r.model.widths, (3, 4, 5)),
    ("model.widths=(3,)", lambda r: r.model.widths, (3,)),
    ("model.widths=", lambda r: r.model.widths, ()),
    ("model.pair=2,b", lambda r: r.model.pair, (2, "b")),
    ("model.inner.depth=5", lambda r: r.model.inner.depth, 5),
    ("frozen=blocks/*,head/*", lambda r: r.frozen, ("blocks/*", "head/*")),
    ("clip_norm=none", lambda r: r.clip_norm, None),
    ("optimizer.lr=1e-2", lambda r: r.optimizer.lr, 1e-2),
    ("optimizer=Lion", lambda r: r.optimizer, Lion(lr=1e-3)),
    ("schedule=Cosine", lambda r: type(r.schedule), Cosine),
    ("params.embed=tensor", lambda r: r.params, {"embed": "tensor"}),
    ("params.embed=fsdp,tensor", lambda r: r.params, {"embed": ("fsdp", "tensor")}),
    ("params.embed=", lambda r: r.params, {"embed": ()}),
    ("compute={'seq': ['context', 'tensor']}", lambda r: r.compute, {"seq": ("context", "tensor")}),
]


@pytest.mark.parametrize(("text", "read", "value"), OVERRIDES, ids=[case[0] for case in OVERRIDES])
def test_override_is_typed_by_its_field(text: str, read: Any, value: object) -> None:
    found = read(apply_overrides(make(), [text]))
    assert found == value
    assert type(found) is type(value)


def test_overrides_apply_in_order_and_together() -> None:
    # 6 divides by 3 and 8 does not: neither alone would be accepted in every order.
    changed = apply_overrides(make(), ["batch=6", "accumulation=3", "optimizer=Muon", "optimizer.lr=0.5", "steps=3"])
    assert (changed.batch, changed.accumulation, changed.steps) == (6, 3, 3)
    assert changed.optimizer == Muon(lr=0.5)
    assert apply_overrides(make(), ["optimizer.lr=0.5", "optimizer=SGD"]).optimizer == SGD(lr=0.5)
    assert apply_overrides(make(), []) == make()


def test_another_source_is_chosen_by_its_class_whatever_the_order() -> None:
    recipe = make(data=Stdlib(seq_len=8, validation=0.03))
    words = ["data=TextFiles", "data.paths=corpus,more", "data.seq_len=16"]
    for order in itertools.permutations(words):
        data = apply_overrides(recipe, order).data
        assert data == TextFiles(paths=("corpus", "more"), seq_len=16, validation=0.03)
    assert apply_overrides(recipe, words[:2]).data.seq_len == 8  # both have it
    assert apply_overrides(recipe, ["data=Digits"]).data == Digits()  # its own default of `validation` is another


def test_what_two_rules_share_is_kept_and_what_means_something_else_is_not() -> None:
    recipe = make(optimizer=AdamW(lr=3e-3, b1=0.8, b2=0.95, weight_decay=0.1), schedule=Cosine(warmup=3))
    changed = apply_overrides(recipe, ["optimizer=Lion", "schedule=WSD"])
    assert changed.optimizer == Lion(lr=3e-3, b1=0.8, weight_decay=0.1)  # b2 has another default there
    assert changed.schedule == WSD(warmup=3)
    assert apply_overrides(recipe, ["optimizer=Muon"]).optimizer == Muon(lr=3e-3, weight_decay=0.1)


def test_a_class_that_needs_more_says_how_it_is_given() -> None:
    with pytest.raises(UserError, match=r"none for paths.*--set data\.paths=VALUE"):
        apply_overrides(make(), ["data=TextFiles"])
    with pytest.raises(UserError, match=r"TextFiles.*TokenMemmap|Did you mean TextFiles"):
        apply_overrides(make(), ["data=TextFile"])
    with pytest.raises(UserError, match="none for seq_len, paths"):
        apply_overrides(make(), ["data=Mixture", "data.weights=1", "data.sources=TextFiles"])


def test_a_field_of_another_class_says_which() -> None:
    with pytest.raises(UserError, match=r"field 'paths' of Stdlib.*TextFiles, .*have it: add --set data=TextFiles\."):
        apply_overrides(make(), ["data.paths=corpus"])
    with pytest.raises(UserError, match=r"Adafactor has it: add --set optimizer=Adafactor\."):
        apply_overrides(make(), ["optimizer.decay_rate=0.7"])
    with pytest.raises(UserError) as caught:
        apply_overrides(make(), ["optimizer.nothing=3"])
    assert "have it" not in str(caught.value)


def test_a_class_of_the_recipes_own_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "own_rule.py"
    path.write_text(
        GOOD
        + """
@dataclass(frozen=True, kw_only=True)
class Gentle(SGD):
    softness: float = 0.5

@dataclass(frozen=True, kw_only=True)
class Wide:
    width: int = 9
    depth: int = 3
    def build(self):
        return None
"""
    )
    recipe = load_recipe(str(path))
    changed = apply_overrides(recipe, ["optimizer.softness=0.25", "optimizer=Gentle", "model=Wide", "model.depth=5"])
    assert (type(changed.optimizer).__name__, changed.optimizer.lr) == ("Gentle", 0.1)
    assert changed.optimizer.softness == 0.25
    assert (changed.model.width, changed.model.depth) == (9, 5)
    with pytest.raises(UserError, match=r"Model\b.*\bWide\b"):
        apply_overrides(recipe, ["model=Other"])


@given(micro=st.integers(1, 5), stages=st.integers(0, 6), first=st.integers(1, 4), more=st.integers(0, 9))
def test_a_batch_that_grows(micro: int, stages: int, first: int, more: int) -> None:
    ramp = stages + more
    recipe = make(
        batch=micro * (first + stages),
        accumulation=first + stages,
        batch_start=micro * first,
        batch_ramp=ramp,
        steps=ramp + 3,
        schedule=Constant(),
    )
    sizes = [recipe.batch_at(step) for step in range(1, ramp + 4)]
    assert sizes[-3:] == [recipe.batch] * 3
    assert sizes[0] == (recipe.batch_start if ramp else recipe.batch)
    assert all(b - a in (0, micro) for a, b in itertools.pairwise(sizes))
    if stages:  # every size below the full one for as many steps as every other, to one
        taken = [sizes[:ramp].count(micro * (first + j)) for j in range(stages)]
        assert sum(taken) == ramp and max(taken) - min(taken) <= 1
    assert [recipe.samples_after(step) for step in range(ramp + 4)] == [0, *itertools.accumulate(sizes)]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"batch_ramp": 3}, "Set batch_start"),
        ({"batch": 8, "batch_start": 4, "batch_ramp": 9}, "accumulation=2"),
        ({"batch": 8, "accumulation": 2, "batch_start": 3, "batch_ramp": 9}, "accumulation=8"),
        ({"batch": 8, "accumulation": 2, "batch_start": 0, "batch_ramp": 9}, "Use batch_start=4."),
        ({"batch": 8, "accumulation": 2, "batch_start": 12, "batch_ramp": 9}, "up to 8"),
        ({"batch": 8, "accumulation": 4, "batch_start": 2, "batch_ramp": 2}, "at least 3 steps"),
    ],
)
def test_a_batch_that_cannot_grow_so(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make(**fields)


BAD_OVERRIDES = [
    ("modle.layers=3", "Did you mean model"),
    ("model.layer=3", "Did you mean layers"),
    ("model.layer=3", "window"),  # all valid names are listed
    ("model.layers=three", "an integer"),
    ("model.layers=2.5", "an integer"),
    ("model.layers=true", "an integer"),
    ("model.tied=2", "true or false"),
    ("model.kind=sparse", "dense, moe"),
    ("model.window=x", "an integer or none"),
    ("model.widths=1,x", "comma-separated list"),
    ("model.pair=1", "2 comma-separated values"),
    ("model.rate=inf", "a number"),
    ("steps", "field=value"),
    ("=3", "no field name"),
    ("steps.more=3", "steps alone"),
    ("optimizer=Adam", "AdamW"),
    ("optimizer=Rule", "Lion"),
    ("optimizer=Slot", "Lion"),
    ("hooks=3", "hooks"),
    ("compute=seq", "mapping"),
]


@pytest.mark.parametrize(("text", "hint"), BAD_OVERRIDES)
def test_bad_override_says_what_to_do(text: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        apply_overrides(make(), [text])
    assert hint in str(caught.value)


@given(st.text(max_size=30))
def test_any_override_text_is_taken_or_refused(text: str) -> None:
    """No text ends in anything but a recipe or a UserError."""
    for field in ("", "model.layers=", "model.widths=", "compute=", "optimizer=", "precision=", "clip_norm="):
        with contextlib.suppress(UserError):
            assert isinstance(apply_overrides(make(), [field + text]), Recipe)


sizes = st.builds(
    Sizes,
    layers=st.integers(1, 2**60),
    rate=st.floats(allow_nan=False, allow_infinity=False) | st.integers(-5, 5),
    tied=st.booleans(),
    kind=st.sampled_from(["dense", "moe"]),
    window=st.none() | st.integers(),
    note=st.none() | st.text(),
    widths=st.lists(st.integers(), max_size=4).map(tuple),
    inner=st.builds(Inner, depth=st.integers()),
)
rules = st.sampled_from([AdamW(lr=1e-3), Lion(lr=0.1), Muon(lr=0.02), SGD(lr=1.0)])


@given(model=sizes, optimizer=rules, clip=st.none() | st.floats(0.1, 10), hooks=st.sampled_from([(), (named_hook,)]))
def test_json_gives_an_equal_recipe_back(model: Sizes, optimizer: Any, clip: Any, hooks: Any) -> None:
    recipe = make(model=model, optimizer=optimizer, clip_norm=clip, hooks=hooks, compute={"seq": ("context",)})
    text = json.dumps(recipe.to_json())
    again = Recipe.from_json(json.loads(text))
    assert again == recipe
    assert again.sha256 == recipe.sha256
    assert json.dumps(again.to_json()) == text


def test_hash_tells_recipes_apart_and_ints_from_nothing() -> None:
    assert make(seed=1).sha256 != make().sha256
    assert make(model=Sizes(rate=1)).sha256 == make(model=Sizes(rate=1.0)).sha256
    # A golden value: the same recipe must hash alike in every version of Python and of this package.
    assert config.sha256(SGD(lr=0.5)) == config.sha256(SGD(lr=0.5, momentum=SGD(lr=1.0).momentum))


def test_json_names_classes_by_their_public_place() -> None:
    assert make().to_json()["optimizer"]["class"] == "portatrain.optim:AdamW"
    assert make().to_json()["class"] == "portatrain:Recipe"


@pytest.mark.parametrize("value", [lambda: 0, [1], {1, 2}, object(), float("nan"), {"class": 1}, {1: 2}, b"x"])
def test_values_that_are_no_data_are_refused(value: object) -> None:
    with pytest.raises(UserError, match="plain data"):
        config.to_json((value,))


@pytest.mark.parametrize(
    "data",
    [
        {"class": "os:system", "command": "true"},
        {"class": "portatrain.nowhere:X"},
        {"class": "portatrain.optim:Nothing"},
        {"class": "portatrain.optim:SGD", "lr": 1.0, "momentun": 0.9},
        {"class": ""},
        [],
    ],
)
def test_json_of_something_else_is_refused(data: Any) -> None:
    with pytest.raises(UserError):
        Recipe.from_json({"class": "portatrain:Recipe", "model": data})
    with pytest.raises(UserError):
        Recipe.from_json(data if isinstance(data, dict) else {})


def test_rules_by_name() -> None:
    names = ["embed/table", "blocks/attn/wq", "blocks/norm/scale"]
    recipe = make(frozen=("embed/*",), no_decay=("*/wq",), ema_decay=0.9, ema=("blocks/*",))
    assert [recipe.trains(name) for name in names] == [False, True, True]
    assert [recipe.averages(name) for name in names] == [False, True, True]
    recipe.check_names(names)

    wq = SimpleNamespace(name=names[1], shape=(2, 4, 4), axes=("layers", "embed", "heads"), batch_dims=1, fan_in_axes=1)
    norm = SimpleNamespace(name=names[2], shape=(2, 4), axes=("layers", "embed"), batch_dims=1, fan_in_axes=0)
    assert not recipe.decays(wq)
    assert make().decays(wq)
    assert not make().decays(norm)
    assert make(decay=("*norm*",)).decays(norm)

    with pytest.raises(UserError, match=r"got 'blocks/attn/wk', which matches none.*Did you mean blocks/attn/wq"):
        make(frozen=("blocks/attn/wk",)).check_names(names)
    with pytest.raises(UserError, match="at least one parameter"):
        make(frozen=("*",)).check_names(names)


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_one_paragraph(case: str, tmp_path: Path) -> None:
    source, hint = BAD_FILES[case]
    (tmp_path / "bad.py").write_text(source)
    with pytest.raises(UserError) as caught:
        load_recipe("bad.py", cwd=tmp_path)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.py", "folder/missing.py", ".", "./", "no-such-recipe", ""])
def test_missing_recipe(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="recipe"):
        load_recipe(name, cwd=tmp_path)


def test_file_loads_with_its_neighbours_and_round_trips(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_mine.py").write_text("STEPS = 7\n")
    (tmp_path / "json.py").write_text("from neighbour_of_mine import STEPS\n" + GOOD.replace("steps=5", "steps=STEPS"))
    recipe = load_recipe("json.py", cwd=tmp_path)
    assert recipe.steps == 7
    assert json.loads("1") == 1  # the file's name has not replaced the standard module
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert load_recipe(str(tmp_path / "json.py")).sha256 == recipe.sha256


def test_shipped_recipes_load_by_name_and_by_file_alike() -> None:
    shipped = shipped_recipes()
    assert list(shipped) == [
        "deepseek-v3",
        *(f"gemma{size}" for size in ("2-2b", "2-9b", "2-27b", "3-1b", "3-4b", "3-12b", "3-27b")),
        *("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"),
        *("gpt-oss-20b", "gpt-oss-120b"),
        *("llama3-1b", "llama3-8b", "llama3-70b", "llama3-405b"),
        "mistral-7b",
        *("mixtral-8x7b", "mixtral-8x22b"),
        *("olmo2-7b", "olmo2-13b", "olmo2-32b", "olmo3-7b"),
        *("phi3-mini", "phi3-medium"),
        "qwen2-7b",
        *(f"qwen3-{size}" for size in ("4b", "8b", "14b", "32b", "30b-a3b", "235b-a22b")),
        "smollm3-3b",
        *("tiny-chat", "tiny-dit", "tiny-dpo", "tiny-lm", "tiny-siglip", "tiny-vit"),
    ]
    for name, module in shipped.items():
        by_name = load_recipe(name)
        file = Path(__file__).parents[2] / f"{module.replace('.', '/')}.py"
        by_file = load_recipe(str(file))
        assert by_file == (by_name if list(shipped.values()).count(module) == 1 else load_recipe(by_file.name))
        assert shipped[by_file.name] == module
        assert Recipe.from_json(json.loads(json.dumps(by_name.to_json()))) == by_name


def test_a_file_of_several_recipes_ships_each_under_its_name() -> None:
    from recipes import llama3

    shipped = shipped_recipes()
    assert [name for name, module in shipped.items() if module == "recipes.llama3"] == list(llama3.RECIPES)
    assert [load_recipe(name).name for name in llama3.RECIPES] == list(llama3.RECIPES)
    with pytest.raises(UserError, match="llama3-8b"):
        llama3.recipe("llama3-9b")
