"""The pages and the drawing that commands write are current, and nothing public is missing from the reference."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from docs.tools import draw_rooms, examples, reference
from portatrain.model.ops import Ops
from portatrain.model.ops_arrays import ArrayOps
from portatrain.model.ops_experts import ExpertOps
from portatrain.model.ops_structure import StructureOps
from portatrain.optim import Rule, Schedule, rules, schedules
from portatrain.recipe import Origin, Recipe, apply_overrides, load_recipe
from tests.docs.pages import ROOT

PAGES = ROOT / "docs" / "reference"
PROTOCOLS = {"Ops", "ArrayNamespace", "Info", "ModelSpec", "Sink"}
"""Public names that are only implemented, never called, and so have no signature."""


def text(name: str) -> str:
    return (PAGES / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", reference.WRITTEN)
def test_a_reference_page_is_current(name: str) -> None:
    assert text(name) == reference.WRITTEN[name](), "run python -m docs.tools.reference --write"


@pytest.mark.parametrize("name", [name for name in reference.WRITTEN if name != "commands.md"])
def test_every_field_has_a_meaning(name: str) -> None:
    assert [row for row in text(name).split("\n") if row.startswith("| `") and row.endswith("|  |")] == []


def test_every_public_function_and_class_has_a_signature() -> None:
    sections = re.split(r"^### ", text("names.md"), flags=re.MULTILINE)[1:]
    whole = [section for section in sections if "<!-- whole:" in section]
    bare = [section.split("\n")[0] for section in whole if "```text" not in section]
    assert len(whole) > 50 and all(name.strip("`").split(".")[-1] in PROTOCOLS for name in bare), bare


@pytest.mark.parametrize("module", reference.PUBLIC)
def test_every_public_name_is_in_the_reference(module: str) -> None:
    page = text("names.md")
    assert [n for n in reference.exported(module) if f"### `{module}.{n}`" not in page] == []


def test_every_field_of_a_recipe_is_in_the_reference() -> None:
    page = text("recipe.md")
    fields = [field.name for field in dataclasses.fields(Recipe)]
    assert [name for name in fields if f"| `{name}` |" not in page] == []
    assert set(fields) == set(examples.RECIPE) | set(examples.RECIPE_PYTHON)


@pytest.mark.parametrize("field", examples.RECIPE)
def test_the_example_of_a_field_changes_it(field: str) -> None:
    recipe = load_recipe("tiny-lm")
    changed = apply_overrides(recipe, examples.RECIPE[field].split())
    assert getattr(changed, field) != getattr(recipe, field)


@pytest.mark.parametrize("field", examples.RECIPE_PYTHON)
def test_the_example_of_a_field_that_is_set_in_the_file(field: str) -> None:
    from portatrain import TextSample

    changes = eval(f"dict({examples.RECIPE_PYTHON[field]})", {"TextSample": TextSample, "Origin": Origin})
    recipe = load_recipe("tiny-lm")
    assert getattr(dataclasses.replace(recipe, **changes), field) != getattr(recipe, field)


def test_every_operation_is_in_the_reference() -> None:
    page = text("ops.md")
    methods = [
        n
        for cls in (Ops, ExpertOps, StructureOps, ArrayOps)
        for n, m in vars(cls).items()
        if callable(m) and not n.startswith("_")
    ]
    assert len(methods) > 70 and [n for n in methods if f"### `{n}`" not in page] == []
    assert [n for n in Ops.__annotations__ if f"`ops.{n}`" not in page] == []
    assert set(methods) == set(examples.OPS) | set(examples.ARRAY_OPS)


def test_every_rule_and_schedule_is_in_the_reference() -> None:
    page = text("optimizers.md")
    classes = [*reference.subclasses(Rule, rules), *reference.subclasses(Schedule, schedules)]
    assert [c.__name__ for c in classes if f"### `{c.__name__}`" not in page] == []
    for cls in classes:
        section = page.split(f"### `{cls.__name__}`")[1].split("\n### ")[0]
        assert [f.name for f in dataclasses.fields(cls) if f"| `{f.name}` |" not in section] == []


def test_every_option_is_in_the_reference() -> None:
    page = text("commands.md")
    for program, module in reference.commands():
        parser = reference.parser_of(program, module)
        section = page.split(f"## `{program}`\n")[1].split("\n## ")[0]
        for made in (parser, *reference.subparsers(parser)):
            options = [o for a in made._actions for o in a.option_strings if o not in ("-h", "--help")]
            assert [o for o in options if f"`{o}" not in section] == [], made.prog


def test_the_drawing_of_rooms_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert draw_rooms.main([]) == 0, "run python -m docs.tools.draw_rooms --write"
    found = re.search(r"rooms (\d+), arrows (\d+)", capsys.readouterr().out)
    assert found and int(found[1]) <= 20 and int(found[2]) <= 110


def test_the_drawing_changes_with_the_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted import that points up is counted, drawn, and makes the committed drawing old."""
    for room in ("optim", "plan"):
        (tmp_path / "portatrain" / room).mkdir(parents=True)
    (tmp_path / "portatrain" / "plan" / "search.py").write_text("from portatrain.optim.rules import AdamW\n")
    rules_file = tmp_path / "portatrain" / "optim" / "rules.py"
    rules_file.write_text("")
    monkeypatch.setattr(draw_rooms, "ROOT", tmp_path)
    rooms, arrows = draw_rooms.arrows_of(tmp_path)
    assert rooms == ["optim", "plan"] and list(arrows) == [("plan", "optim")]
    before = draw_rooms.draw(rooms, arrows)
    rules_file.write_text("def f():\n    from portatrain.plan import search\n")
    rooms, arrows = draw_rooms.arrows_of(tmp_path)
    assert ("optim", "plan") in arrows and "url(#up)" in draw_rooms.draw(rooms, arrows)
    assert "url(#up)" not in before


def test_every_field_of_the_shipped_decoder_is_on_a_page() -> None:
    import dataclasses

    from recipes.models.decoder import DecoderConfig

    page = (ROOT / "docs" / "start" / "model.md").read_text()
    assert [f.name for f in dataclasses.fields(DecoderConfig) if f"| `{f.name}` |" not in page] == []
