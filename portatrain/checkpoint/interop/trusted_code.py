"""The modules that a checkpoint's recipe may name. A checkpoint is untrusted input, and an import runs code."""

from __future__ import annotations

import sys
from pathlib import Path

from portatrain.recipe.loading import loaded_modules
from portatrain.system import plugins


def is_trusted(module: str) -> bool:
    """Return whether the recipe of a checkpoint may name classes and functions of a module.

    It may name those of portatrain, of the shipped recipes, and of packages that register a plug-in; and of the recipe
    files that this process has loaded, of the modules beside these files, and of the packages from which these files
    have taken classes and functions.
    """
    top = module.partition(".")[0]
    if top in ("portatrain", "recipes"):
        return True
    if top in sys.stdlib_module_names:
        return False
    if any(top == point.value.partition(":")[0].partition(".")[0] for point in plugins.entry_points()):
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    for loaded in loaded_modules():
        taken = {str(getattr(value, "__module__", "")).partition(".")[0] for value in vars(loaded).values()}
        beside = Path(str(loaded.__file__)).resolve().parent
        if module == loaded.__name__ or top in taken or (file and Path(file).resolve().is_relative_to(beside)):
            return True
    return False
