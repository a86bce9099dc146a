"""Recipe files as text: one that loads, and one for every way in which a file can fail."""

from __future__ import annotations

HEADER = """
from dataclasses import dataclass
from portatrain import Recipe
from portatrain.data import Stdlib
from portatrain.optim import SGD
from portatrain.optim.schedules import Constant

@dataclass(frozen=True, kw_only=True)
class Model:
    width: int = 4
    def build(self):
        return None
"""
GOOD = (
    HEADER
    + """
def recipe():
    return Recipe(name="mine", model=Model(), data=Stdlib(seq_len=8), optimizer=SGD(lr=0.1), schedule=Constant(),
                  steps=5, batch=2)
"""
)
BAD_FILES = {
    "raises": ("raise ValueError('not today')", "ValueError: not today"),
    "exits": ("import sys; sys.exit(3)", "SystemExit"),
    "syntax": ("def recipe(:", "SyntaxError"),
    "imports": ("import nothing_of_that_name", "ModuleNotFoundError"),
    "no function": ("x = 1", "no function of that name"),
    "no call": ("recipe = 3", "no function of that name"),
    "wrong type": ("def recipe():\n    return {'steps': 3}", "a dict"),
    "raises late": ("def recipe():\n    return 1 / 0", "line 2"),
    "arguments": ("def recipe(size):\n    return size", "TypeError"),
    "bad recipe": (GOOD.replace("steps=5", "steps=0"), "at least 1"),
    "null byte": ("x = '\0'", "SyntaxError"),
}
