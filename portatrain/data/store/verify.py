"""Read every byte of a packed store, and name what is damaged."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np

from portatrain.data.store.layout import Manifest, shard_name, sums
from portatrain.data.store.places import Place
from portatrain.data.store.progress import EVERY_S, duration
from portatrain.errors import StorageError, UserError
from portatrain.system.text import counted

READ_BYTES = 8 << 20
SHARDS_AT_ONCE = 4


def problems(at: Place, manifest: Manifest, tell: Callable[[str], None] = lambda line: None) -> Iterator[str]:
    """Yield a sentence for each shard of a store that is not what was packed."""
    shards, done, began_s = manifest.shards(), 0, time.monotonic()
    told_s = began_s
    with ThreadPoolExecutor(SHARDS_AT_ONCE, thread_name_prefix="portatrain-verify") as threads:
        todo = iter(shards)
        # A few at a time: the list may have 10,000 shards, and the first problem should be told at once.
        while some := list(islice(todo, SHARDS_AT_ONCE)):
            for problem in threads.map(lambda shard: _problem(at, manifest, *shard), some):
                if problem:
                    yield problem
            done += len(some)
            if time.monotonic() >= told_s + EVERY_S:
                told_s = time.monotonic()
                left_s = (told_s - began_s) * (len(shards) - done) / done
                tell(f"{done:,} of {counted(len(shards), 'shards')} read, {duration(left_s)} left")


def _problem(at: Place, manifest: Manifest, split: str, number: int) -> str:
    """Return what is wrong with a shard, or ''."""
    name, kind = shard_name(split, number), manifest.block()
    digest, size = hashlib.sha256(), manifest.blocks_in(split, number) * kind.itemsize
    step = max(1, READ_BYTES // kind.itemsize) * kind.itemsize
    try:
        if (there := at.size(name)) != size:
            return f"shard {name}: {there:,} bytes instead of {size:,}"
        for start in range(0, size, step):
            length = min(step, size - start)
            data = at.read(name, start, length)
            if len(data) != length:
                return f"shard {name}: it became shorter while it was read"
            blocks = np.frombuffer(data, kind)
            bad = np.flatnonzero(sums(blocks) != blocks["crc"])
            if len(bad):
                block = start // kind.itemsize + int(bad[0])
                first = block * kind.itemsize
                return f"shard {name}: another CRC-32 than was written, in bytes {first:,} to {first + kind.itemsize:,}"
            digest.update(data)
    except StorageError:  # no damage: another try may read it
        raise
    except (OSError, UserError) as error:
        return f"shard {name}: it cannot be read: {error}"
    if digest.hexdigest() != manifest.splits[split].sha256[number]:
        return f"shard {name}: another SHA-256 than was written"
    return ""
