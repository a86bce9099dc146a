"""Pictures of two coloured shapes with what is said of them, such as "red disc above blue cross", for tiny-siglip.

A picture is a pure function of its number, so nothing is downloaded or stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from portatrain.config import require
from portatrain.data import DataSpec

if TYPE_CHECKING:
    import numpy as np

SIZE = 16
"""Rows and columns of a picture."""
CELL = 6
"""Rows and columns of a shape."""
VOCAB = 128
"""The token ids of a text: its ASCII bytes; 0 pads it."""
LENGTH = 36
"""Tokens of a text with its padding."""
COLOURS = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.8, 0.2),
    "blue": (0.2, 0.3, 1.0),
    "yellow": (0.9, 0.9, 0.1),
    "white": (1.0, 1.0, 1.0),
    "pink": (1.0, 0.4, 0.8),
}
RELATIONS = ("above", "left of")


def shapes() -> dict[str, np.ndarray]:
    """Return what each shape covers of its cell, (CELL, CELL) bool."""
    import numpy as np

    row, column = np.indices((CELL, CELL)) - (CELL - 1) / 2
    far = np.hypot(row, column)
    return {
        "disc": far < CELL / 2,
        "square": np.ones((CELL, CELL), bool),
        "ring": (far < CELL / 2) & (far > CELL / 4),
        "cross": (abs(row) < 1) | (abs(column) < 1),
    }


@dataclass(frozen=True, kw_only=True)
class Pictures(DataSpec):
    """Pictures and texts. A batch has image, (B, SIZE, SIZE, 3) float32 in -1 to 1, and tokens, (B, LENGTH) int32."""

    count: int = 6000
    """The number of pictures."""
    validation: float = 0.1
    """Fraction of the pictures to hold out for validation, selected by a hash of the picture's number."""
    version: ClassVar[str] = "1"
    vocab: ClassVar[int] = VOCAB

    def check_fields(self) -> None:
        """Raise UserError for a field whose value is out of range."""
        super().check_fields()
        require(self, "count", self.count >= 1, "the number of pictures, at least 1")

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> Mapping[str, Any]:
        """Return picture ``index``."""
        import numpy as np

        rng = np.random.default_rng(index)
        image = rng.uniform(-1.0, -0.7, (SIZE, SIZE, 3)).astype(np.float32)
        below = bool(rng.integers(2))
        covered, said = shapes(), []
        for half in range(2):
            kind, colour = (str(rng.choice(list(names))) for names in (covered, COLOURS))
            apart = half * SIZE // 2 + int(rng.integers(SIZE // 2 - CELL + 1))
            beside = int(rng.integers(SIZE - CELL + 1))
            row, column = (apart, beside) if below else (beside, apart)
            cell = image[row : row + CELL, column : column + CELL]
            cell[covered[kind]] = np.array(COLOURS[colour], np.float32) * 2 - 1
            said.append(f"{colour} {kind}")
        tokens = np.zeros(LENGTH, np.int32)
        text = f"{said[0]} {RELATIONS[0 if below else 1]} {said[1]}".encode()
        tokens[: len(text)] = list(text)
        return {"image": image, "tokens": tokens}
