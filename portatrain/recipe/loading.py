"""Load a recipe by name or from a file, and override its fields.

A recipe file is a Python file with a function ``recipe()`` that returns a ``Recipe``.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from portatrain.errors import UserError, choice
from portatrain.errors.users_code import explained, line_of, shown, with_trace
from portatrain.recipe import overrides
from portatrain.recipe.recipe import Recipe


def apply_overrides(recipe: Recipe, assignments: Iterable[str]) -> Recipe:
    """Return `recipe` with overrides such as `model.layers=8`, `optimizer=Lion`, `data=TextFiles`, `steps=20`.

    A class is looked for beside the one that the field holds, and in the files that recipes were loaded from.
    """
    return overrides.override(recipe, assignments, modules=tuple(_LOADED))


_LOADED: dict[str, None] = {}
"""The modules that recipes of this process were loaded from, in order: overrides may name their classes."""


def loaded_modules() -> list[ModuleType]:
    """Return the modules that recipes of this process were loaded from."""
    return [sys.modules[name] for name in _LOADED if name in sys.modules]


def shipped_recipes() -> dict[str, str]:
    """Return the recipes that come with portatrain, name -> module, without importing any of them.

    A module of ``recipes/`` with a function ``recipe()`` ships one recipe under the name of its file. With a
    dictionary ``RECIPES`` as well, written out at the top level, it ships one for every key, made by ``recipe(key)``.
    """
    spec = importlib.util.find_spec("recipes")
    found: dict[str, str] = {}
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.py")):
            text = path.read_text(encoding="utf-8")
            if re.search(r"^def recipe\(", text, re.MULTILINE):
                names = _named_in(text) or [path.stem.replace("_", "-")]
                found |= dict.fromkeys(names, f"recipes.{path.stem}")
    return found


def _named_in(source: str) -> list[str]:
    """Return the keys of the dictionary ``RECIPES`` that a module defines; none if it defines no such dictionary."""
    for statement in ast.parse(source).body if "RECIPES" in source else ():
        if not (isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict)):
            continue
        if any(isinstance(target, ast.Name) and target.id == "RECIPES" for target in statement.targets):
            keys = [key.value for key in statement.value.keys if isinstance(key, ast.Constant)]
            return [key for key in keys if isinstance(key, str)]
    return []


def load_recipe(name_or_path: str, *, cwd: Path | None = None) -> Recipe:
    """Return the recipe of a file (``my/recipe.py``, relative to ``cwd``) or a shipped recipe (``tiny-lm``).

    Raises:
        UserError: there is no such file or name, the file does not import or defines no ``recipe()``, that function
            raises, or it does not return a Recipe.
    """
    shipped = shipped_recipes()
    if name_or_path.endswith(".py") or "/" in name_or_path:
        path = ((cwd or Path.cwd()) / name_or_path).resolve()
        if not path.is_file():
            raise UserError(
                f"recipe {name_or_path!r}",
                expected="a Python file, or the name of a shipped recipe",
                got="a folder" if path.is_dir() else "no such file",
                do=f"Shipped recipes: {', '.join(shipped)}.",
            )
        module = _import_file(path, shipped, what=f"recipe file {name_or_path}")
    elif name_or_path in shipped:
        module = _run(f"recipe {name_or_path}", lambda: importlib.import_module(shipped[name_or_path]))
    else:
        raise choice(f"recipe {name_or_path!r} (a file ends in .py)", name_or_path, shipped)

    what = f"recipe file {module.__file__}"
    function = getattr(module, "recipe", None)
    if not callable(function):
        raise UserError(
            what,
            expected="a function recipe() that returns a Recipe",
            got="no function of that name",
            do="Add one; the files in recipes/ are examples.",
        )
    if name_or_path in shipped and name_or_path in getattr(module, "RECIPES", ()):
        function = partial(function, name_or_path)
    made = _run(what, function)
    _LOADED[module.__name__] = None
    if not isinstance(made, Recipe):
        raise UserError(
            what,
            expected="recipe() to return a portatrain.Recipe",
            got=f"a {type(made).__name__}{line_of(function)}",
            do="End the function with: return Recipe(...).",
        )
    return made


def import_file(path: Path, *, what: str) -> ModuleType:
    """Import a Python file as a module, once. Like a script, it can import the files beside it.

    Raises:
        UserError: there is no such file, or its code raises. `what` is the file in the message.
    """
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no such file"
        raise UserError(what, expected=f"a Python file at {path}", got=got, do="Correct the path.")
    return _import_file(path, {}, what=what)


def _import_file(path: Path, shipped: Mapping[str, str], *, what: str) -> ModuleType:
    for module_name in shipped.values():
        spec = importlib.util.find_spec(module_name)
        if spec and spec.origin and Path(spec.origin).resolve() == path:
            return _run(what, partial(importlib.import_module, module_name))
    # The module is named after the file, so that JSON and worker processes use the same names for its classes. The
    # prefix prevents my_recipes/json.py from becoming `json`.
    module_name = f"recipe_file_{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}"
    previous = sys.modules.get(module_name)
    source = _run(what, path.read_bytes)
    if previous is not None and (previous.__file__, getattr(previous, "__source__", None)) == (str(path), source):
        return previous  # as with any import, a second import returns the same classes
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    module = ModuleType(module_name)
    module.__dict__.update(__file__=str(path), __source__=source)
    sys.modules.pop(module_name, None)  # so that the modules stand in the order in which they were loaded
    sys.modules[module_name] = module  # dataclasses look up their module while it runs
    try:
        # An import loader would leave a __pycache__ beside the user's file.
        _run(what, lambda: exec(compile(source, str(path), "exec"), module.__dict__))
    except UserError:
        del sys.modules[module_name]
        if previous is not None:
            sys.modules[module_name] = previous
        raise
    return module


def _run(what: str, function: Any) -> Any:
    """Call the user's code; report an exception from it as one UserError with file and line."""
    try:
        return function()
    except SyntaxError as error:
        line = f", {shown(error.filename)}, line {error.lineno}" if error.filename else ""
        raise with_trace(
            UserError(
                f"{what}{line}",
                expected="valid Python",
                got=f"{type(error).__name__}: {error.msg}",
                do="Correct that line, or the one before it.",
            ),
            error,
        ) from error
    except SystemExit as error:
        raise UserError(
            what, expected="a file that runs", got=f"SystemExit: {error}", do="Remove the call that ends the program."
        ) from error
    except Exception as error:
        mistake = explained(error) or explained(error, what)
        if mistake is None:
            raise
        raise mistake from error
