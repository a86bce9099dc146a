"""Write the pages of docs/reference from the code's signatures, annotations and docstrings.

    python -m docs.tools.reference             # exit code 1 if a page is old
    python -m docs.tools.reference --write

What the code says is not written a second time by hand; the examples are in docs/tools/examples.py.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from docs.tools import examples
from docs.tools.reference_parts import (
    cell,
    code,
    docstring,
    exported,
    field_docs,
    fields_table,
    listed,
    methods_of,
    page,
    signature,
    subclasses,
)
from portatrain.model.module import Module

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "reference"

PUBLIC = {
    "portatrain": "What a recipe and a model are written with.",
    "portatrain.data": "Data specs, and opening them.",
    "portatrain.optim": "Optimizer rules and schedules.",
    "portatrain.model.layers": "Layers to put a model together from.",
    "portatrain.recipe": "Recipes: load one, change one.",
    "portatrain.training.metrics": "Records of a run, and the sinks that take them.",
    "portatrain.testing.audit": "The continuity check for trainers that are not portatrain's.",
}
"""Modules whose exported names are the public surface."""
TOML_TYPES = {str: "string", int: "integer", float: "float", bool: "boolean", list: "array", dict: "table"}


def recipe_page() -> str:
    from portatrain.recipe import Recipe

    def example(name: str) -> str:
        if name in examples.RECIPE_PYTHON:
            return f"`{examples.RECIPE_PYTHON[name]}`"
        return " ".join(f"`--set '{word}'`" for word in examples.RECIPE[name].split())

    return page(
        "Recipe",
        "A recipe file has a function `recipe()` that returns `portatrain.Recipe(...)`. Every field can be changed on "
        "the command line by `--set FIELD=VALUE`, fields of a part by a path such as `model.layers`. Mappings and "
        "tuples of objects (`compute`, `params`, `hooks`) are set in the file.",
        docstring(Recipe),
        "\n".join(fields_table(Recipe, example)),
        "## Methods and properties",
        *methods_of(Recipe),
    )


def ops_page() -> str:
    from portatrain.model import ops, ops_arrays, ops_experts, ops_structure

    docs = field_docs(ops.Ops)
    attributes = ["| attribute | shape and type |", "|---|---|"]
    attributes += [f"| `ops.{name}` | {cell(docs[name])} |" for name in ops.Ops.__annotations__]

    def methods(cls: type, shown: dict[str, str]) -> Iterator[str]:
        for name, member in vars(cls).items():
            if name.startswith("_") or not callable(member):
                continue
            yield f"### `{name}`"
            yield code(f"ops.{signature(member)}", "text")
            yield docstring(member)
            yield code(shown[name])

    return page(
        "Ops: the operations that models are written in",
        docstring(ops),
        "## Attributes",
        "\n".join(attributes),
        "## Methods",
        "Every example runs after these lines, on the backend of NumPy in float64; in a model `ops` is the argument:",
        code(examples.OPS_SETUP.strip()),
        *methods(ops.Ops, examples.OPS),
        *methods(ops_experts.ExpertOps, examples.OPS),
        *methods(ops_structure.StructureOps, examples.OPS),
        "## Operations on arrays",
        docstring(ops_arrays),
        *methods(ops_arrays.ArrayOps, examples.ARRAY_OPS),
        "## What a model returns",
        f"### `Loss`\n\n{docstring(ops.Loss)}",
    )


def optimizers_page() -> str:
    from portatrain.model.module import Normal, TensorInfo
    from portatrain.optim import Rule, Schedule, base, rules, schedules

    def info(name: str, fan_in_axes: int, **axes: int) -> TensorInfo:
        return TensorInfo(
            name=name,
            role="params",
            shape=tuple(axes.values()),
            axes=tuple(axes),
            batch_dims=int("layers" in axes),
            fan_in_axes=fan_in_axes,
            init=Normal(std=1.0),
        )

    tensors = [
        ("a stacked weight", info("blocks/mlp/up", 1, layers=4, embed=128, mlp=384)),
        ("an embedding", info("embed/table", 0, vocab=256, embed=128)),
        ("a norm's scale", info("final_norm/scale", 0, embed=128)),
    ]
    parts = [
        "## Rules",
        docstring(Rule),
        "### `Rule.slots`",
        code(signature(Rule.slots), "text"),
        docstring(Rule.slots),
    ]
    for method in (Rule.step, Rule.update, Rule.rule_for, Rule.meaning):
        parts += [f"### `Rule.{method.__name__}`", code(signature(method), "text"), docstring(method)]
    for cls in subclasses(Rule, rules):
        rule = eval(examples.RULES[cls.__name__], vars(rules))
        parts += [f"### `{cls.__name__}`", docstring(cls), "\n".join(fields_table(cls))]
        table = ["| tensor | slot | axes | shape | dtype |", "|---|---|---|---|---|"]
        for what, about in tensors:
            for slot, made in rule.slots(about).items():
                axes = ", ".join(made.axes) or "none"
                table.append(f"| {what} | `{slot}` | {axes} | `{made.shape}` | {made.dtype} |")
        parts += [f"Slots of `{examples.RULES[cls.__name__]}`:", "\n".join(table)]
        imports = "AdamW, Muon" if cls.__name__ == "Muon" else cls.__name__
        parts.append(code(f"from portatrain.optim import {imports}\n\noptimizer = {examples.RULES[cls.__name__]}"))
    parts += ["## What a rule may know of a tensor", docstring(base.Info)]
    rows = ["| attribute | type | meaning |", "|---|---|---|"]
    for name, member in vars(base.Info).items():
        if isinstance(member, property):
            result = inspect.signature(member.fget).return_annotation if member.fget else ""
            rows.append(f"| `info.{name}` | `{result}` | {cell(docstring(member))} |")
    parts += ["\n".join(rows), "## A slot", docstring(base.Slot), "\n".join(fields_table(base.Slot))]
    parts += ["## The functions that a rule may call", docstring(base.ArrayNamespace)]
    parts += [
        code("\n".join(f"xp.{signature(m)}" for n, m in vars(base.ArrayNamespace).items() if n[0] != "_"), "text")
    ]
    parts += ["## Schedules", docstring(schedules)]
    for cls in subclasses(Schedule, schedules):
        example = examples.RULES[cls.__name__]
        parts += [f"### `{cls.__name__}`", docstring(cls), "\n".join(fields_table(cls))]
        parts.append(code(f"from portatrain.optim import {cls.__name__}\n\nschedule = {example}"))
    return page("Optimizers and schedules", *parts)


def data_page() -> str:
    from portatrain.data import DataSpec, own, spec

    parts = [docstring(spec)]
    for cls in (c for c in subclasses(DataSpec, spec) if not c.__name__.startswith("_")):
        imports = "Mixture, Stdlib, TextFiles" if cls.__name__ == "Mixture" else cls.__name__
        shared = listed(spec.__doc__ or "")
        parts += [f"## `{cls.__name__}`", docstring(cls), "\n".join(fields_table(cls, shared=shared))]
        parts.append(code(f"from portatrain.data import {imports}\n\ndata = {examples.DATA[cls.__name__]}"))
    parts += ["## A source of your own", docstring(own)]
    for contract in (own.DocumentSource, own.ArraySource):
        parts += [f"### `{contract.__name__}`", docstring(contract)]
        for name, member in vars(contract).items():
            if isinstance(member, property):
                parts.append(f"- `{name}`: {docstring(member)}")
            elif name in ("__len__", "documents", "sample"):
                parts.append(f"- `{signature(member)}`: {docstring(member)}")
    return page("Data specs", *parts)


def hooks_page() -> str:
    from portatrain.training import hooks
    from portatrain.training.metrics import EvalRecord, RunInfo, Sink, StepRecord

    parts = ["## Hook", docstring(hooks.Hook)]
    for name, member in vars(hooks.Hook).items():
        if inspect.isfunction(member) and not name.startswith("_"):
            parts += [f"### `{name}`", code(signature(member), "text"), docstring(member)]
    for cls in subclasses(hooks.Hook, hooks):
        parts += [f"## `{cls.__name__}`", docstring(cls), "\n".join(fields_table(cls))]
    parts += ["## Sink", docstring(Sink)]
    parts += [code("\n".join(signature(m) for n, m in vars(Sink).items() if n[0] != "_"), "text")]
    for cls in (RunInfo, StepRecord, EvalRecord):
        parts += [f"## `{cls.__name__}`", docstring(cls), "\n".join(fields_table(cls))]
    return page("Hooks, sinks and records", *parts)


def commands_page() -> str:
    from portatrain import cli

    parts = [
        "Exit codes: 0 done, 2 a mistake that the message explains, 75 storage that failed while it was used, "
        "85 stopped and resumable, 130 interrupted by Ctrl-C."
    ]
    for program, module in commands():
        parser = parser_of(program, module)
        parts += [f"## `{program}`", *command_parts(parser)]
        for subparser in subparsers(parser):
            parts += [f"### `{subparser.prog}`", *command_parts(subparser)]
    parts += ["## `portatrain`", code(cli.HELP_TEXT.format(commands=cli._listing(cli.PORTATRAIN)).strip(), "text")]
    return page("Commands", *parts)


def commands() -> list[tuple[str, str]]:
    """Return every command with the module that carries it out."""
    from portatrain import cli

    found = [(f"portatrain {name}", module) for name, (module, _) in cli.PORTATRAIN.items()]
    found.append(("launch", cli.SUBMIT[0]))
    return [*found, *((f"launch {name}", module) for name, (module, _) in cli.LAUNCH.items())]


def parser_of(program: str, module_name: str) -> argparse.ArgumentParser:
    """Return the parser of a command, as the command line makes it."""
    from portatrain import cli

    module = importlib.import_module(module_name)
    parser = cli.Parser(prog=program, description=module.__doc__, allow_abbrev=False)
    module.add_arguments(parser)
    return parser


def subparsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Return the parsers of a command's own commands."""
    found = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return [made for action in found for made in action.choices.values()]


def command_parts(parser: argparse.ArgumentParser) -> list[str]:
    about, _, shown = (parser.description or "").partition("\nexamples:\n")
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for action in parser._actions:
        if isinstance(action, (argparse._HelpAction, argparse._SubParsersAction)):
            continue
        value = "" if action.nargs == 0 else f" {action.metavar or (action.dest.upper())}"
        name = ", ".join(f"`{option}{value}`" for option in action.option_strings) or f"`{value.strip()}`"
        default = "" if action.default in (None, [], False, argparse.SUPPRESS) else f"`{action.default}`"
        text = (action.help or "") % {"default": action.default, "prog": parser.prog}
        rows.append(f"| {name} | {cell(default)} | {cell(text)} |")
    parts = [cell(about)]
    if len(rows) > 2:
        parts.append("\n".join(rows))
    if shown:
        parts.append(code(inspect.cleandoc(shown), "shell"))
    return parts


def changes_page() -> str:
    from portatrain.recipe import changing

    rows = ["| class | fields | kind | why |", "|---|---|---|---|"]
    for row in changing.ROWS:
        fields = ", ".join(f"`{name}`" for name in row.fields.split())
        rows.append(f"| `{row.owner}` | {fields} | {row.kind} | {cell(row.why)} |")
    docs = field_docs(changing.Kind)
    kinds = ["| kind | a change of such a field |", "|---|---|"]
    kinds += [f"| {kind} | {cell(docs[kind.name])} |" for kind in changing.Kind]
    return page(
        "What may change in a run",
        "Every field of a recipe and of its parts has a kind, which says how a run may get another value of it: by an "
        "attempt (`portatrain train`, `launch resume`), by a change with a reason (`portatrain resume --set ... "
        "--reason ...`), or by a fork. [Fork a run, or change it](../run/fork.md) shows how.",
        "\n".join(kinds),
        "A field of a class of your own has the kind of the field of `Recipe` that holds it; one of a data spec of "
        "your own is of the kind corpus.",
        "## Fields",
        "\n".join(rows),
    )


def names_page() -> str:
    """List every public name with its signature and its first sentence; docs/tools/site.py adds the whole docstring."""
    parts = [
        "This page lists every public name below the module from which it is imported. A name that is not on this page "
        "may change at any time. On the site (`make docs`) each name also has its whole docstring and its members."
    ]
    seen: dict[int, str] = {}
    for module_name, about in PUBLIC.items():
        parts += [f"## `{module_name}`", about]
        for name in exported(module_name):
            thing = getattr(importlib.import_module(module_name), name)
            where = f"{module_name}.{name}"
            parts.append(f"### `{where}`")
            if id(thing) in seen:
                parts.append(f"The same as `{seen[id(thing)]}`.")
                continue
            seen[id(thing)] = where
            if inspect.ismodule(thing):
                parts.append(f"The module `{thing.__name__}`: its names are below.")
                continue
            documented = inspect.isclass(thing) or inspect.isroutine(thing)
            if not documented or not getattr(thing, "__module__", "").startswith("portatrain"):
                parts.append(f"`{thing}`")
                continue
            if not inspect.isclass(thing) or not getattr(thing, "_is_protocol", False):
                parts.append(code(signature(thing), "text"))
            if (
                inspect.isclass(thing)
                and issubclass(thing, Module)
                and "__call__" in vars(thing)
                and thing is not Module
            ):
                parts += ["Call it as", code(signature(thing.__call__, "layer"), "text")]
            first = (inspect.getdoc(thing) or "").split("\n\n")[0]
            parts += [first.replace("``", "`").rstrip(":"), f"<!-- whole: {thing.__module__}.{thing.__qualname__} -->"]
    return page("Public names", *parts)


def clusters_page() -> str:
    from launchers.base import LAUNCHERS, Option, launcher
    from launchers.cluster_options import GENERAL, SHARED

    def table(options: Mapping[str, Option | str]) -> str:
        rows = ["| option | type | default | meaning |", "|---|---|---|---|"]
        for name, one in options.items():
            assert isinstance(one, Option), name
            default = "none: it must be given" if one.example else str(one.default) or "none"
            kinds = " or ".join(TOML_TYPES[kind] for kind in one.kinds)
            rows.append(f"| `{name}` | {kinds} | {cell(default)} | {cell(one.meaning)} |")
        return "\n".join(rows)

    parts = [
        "The table `options` of a cluster in [clusters.toml](../run/launching.md#describe-your-clusters) takes these "
        "options. `launch`, `launch --dry-run` and `launch doctor` refuse any other one, and a value of another type.",
        "## Every engine",
        "These options replace parts of the plan:",
        table(GENERAL),
        "This option is for the job:",
        table(SHARED),
    ]
    for name in LAUNCHERS.ours:
        found = launcher(name)
        parts += [f"## `{name}`", table(found.options)]
        if found.example_options.strip("{ }"):
            parts += ["To begin with:", code(f"options = {found.example_options}", "toml")]
    return page("Options of clusters", *parts)


WRITTEN: dict[str, Callable[[], str]] = {
    "names.md": names_page,
    "recipe.md": recipe_page,
    "ops.md": ops_page,
    "optimizers.md": optimizers_page,
    "data.md": data_page,
    "hooks.md": hooks_page,
    "changes.md": changes_page,
    "clusters.md": clusters_page,
    "commands.md": commands_page,
}


def main(argv: list[str] | None = None) -> int:
    """Write or compare the pages; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m docs.tools.reference", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write docs/reference")
    args = parser.parse_args(argv)
    old = []
    for name, made in WRITTEN.items():
        path, text = PAGES / name, made()
        if args.write:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            old.append(f"docs/reference/{name}")
    if old:
        print(f"{', '.join(old)}: old. Run python -m docs.tools.reference --write", file=sys.stderr)
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main())
