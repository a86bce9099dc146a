"""`Referee`: how often steps are computed a second time, and by what, to find devices that compute wrong numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from portatrain.config import check_types
from portatrain.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Referee:
    """Compute the gradient of every ``every``-th step a second time, and end the attempt if a device disagrees.

    The last step of a run, and the step after one that was skipped, are computed again too. It does not change a run's
    curve. The program for one device must fit on each device: the parameters whole, and a gradient.

    Raises:
        UserError: a number is out of range.
    """

    every: int = 100
    """Steps between two checks, at least 1."""
    by: Literal["devices", "cpu", "backend"] = "devices"
    """What computes again. devices: another device of the mesh, where the same program must give the same bits. cpu:
    the processor of each host, in the same framework. backend: the same in the other framework, jax or torch. These two
    must agree within rounding."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.every < 1:
            raise UserError(
                "Referee.every",
                expected="at least 1 step",
                got=str(self.every),
                do="A usual number is 100; leave referee out (referee=none) for no checks.",
            )
