"""Order devices as a placement lays them out, so that a backend can build its mesh from them.

The runtime reports the position of a device: on a TPU its slice, its coordinates and its core; elsewhere its
number. Works on any objects with those attributes, and imports no framework.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Places = Sequence[tuple[int, Sequence[int]]]
"""(slice or domain, position inside it) of every device of the mesh, row-major, as ``placement.coordinates`` gives
it."""


def ordered(devices: Sequence[Any], places: Places | None) -> list[Any]:
    """Return ``devices`` in the order of ``places``; unchanged if ``places`` is None or gives only their numbers.

    Raises:
      ValueError: no device, or more than one, is at a position in ``places``.
    """
    if places is None:
        return list(devices)
    numbered = all(len(inside) == 1 for _, inside in places)
    if numbered or not all(hasattr(device, "coords") for device in devices):
        # Ranks are numbered along hosts and domains already: a domain's devices follow one another. So are GPUs that
        # XLA describes, though they have coordinates too: domain, host and number.
        per_domain = len(devices) // (max(domain for domain, _ in places) + 1)
        return [devices[domain * per_domain + inside[0]] for domain, inside in places]
    dies = max(getattr(device, "core_on_chip", 0) for device in devices) + 1
    there: dict[tuple[int, tuple[int, ...]], Any] = {}
    for device in devices:
        at = tuple(device.coords)
        key = (device.core_on_chip, *at) if dies > 1 else at
        there[(getattr(device, "slice_index", 0) or 0, key)] = device
    if len(there) != len(devices):
        raise ValueError("several devices have one place")
    found = []
    for domain, inside in places:
        rank = 3 + (dies > 1)
        place = (*inside, *(0,) * (rank - len(inside)))  # two-dimensional slices have z = 0
        if (domain, place) not in there:
            raise ValueError(f"no device at {place} of slice {domain}")
        found.append(there[(domain, place)])
    return found
