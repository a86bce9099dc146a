"""`Origin`: where the count of samples of a changed run begins."""

from __future__ import annotations

from dataclasses import dataclass

from portatrain.config import check_types


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The step at which a run came to its present batch or window, with all that it had trained on until then."""

    step: int
    """The last step before the change."""
    samples: int
    """The samples of steps 1 to ``step``: the number of the next sample."""
    tokens: int
    """The tokens of these samples; the samples themselves if they are no sequences of tokens."""

    def __post_init__(self) -> None:
        check_types(self)
