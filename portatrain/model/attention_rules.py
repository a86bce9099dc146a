"""Rules of attention that every backend shares: the slopes of ALiBi, and the kv heads of a device."""

from __future__ import annotations

import math
from collections.abc import Sequence

from portatrain.errors import UserError


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """Return the slope of each head (Press, Smith and Lewis 2022, arXiv:2108.12409, section 3).

    For n heads, n a power of two, they are 2^(-8/n), 2^(-16/n), ..., 2^-8. For other numbers, the slopes of the power
    of two below come first, then every other slope of twice that power, as in the authors' code.
    """
    power = 2 ** math.floor(math.log2(heads))
    first = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    between = [2.0 ** (-8 * (i + 1) / (2 * power)) for i in range(0, 2 * power, 2)]
    return tuple((first + between)[:heads])


def slopes_of(alibi: bool | Sequence[float] | None, heads: int) -> tuple[float, ...] | None:
    """Return the slopes that the option `alibi` of `Ops.attention` means; None for no bias.

    Raises:
        UserError: another number of slopes than heads.
    """
    if alibi is None or alibi is False:
        return None
    slopes = alibi_slopes(heads) if alibi is True else tuple(float(s) for s in alibi)
    if len(slopes) != heads:
        raise UserError(
            "ops.attention, alibi",
            expected=f"True, or one slope for each of the {heads} heads",
            got=f"{len(slopes)} slopes",
            do="Use alibi=True for the slopes of the paper.",
        )
    return slopes


def head_share(heads: int, kv_heads: int, shards: int) -> int:
    """Return how many kv heads the query heads of one device use, if `shards` devices share `heads`; 0 if that is not
    the same number on all devices."""
    if heads % shards:
        return 0
    mine, group = heads // shards, heads // kv_heads
    if mine % group == 0:
        return mine // group
    return 1 if group % mine == 0 else 0
