"""The parts of `portatrain data` that are about packed stores: pack, show and stats."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from portatrain.commands.options import add_recipe, resolved_recipe
from portatrain.errors import UserError
from portatrain.system.paths import expand, place
from portatrain.system.text import counted
from portatrain.system.urls import is_remote

if TYPE_CHECKING:
    from portatrain.data import DataSpec
    from portatrain.data.store.layout import Manifest, SplitFacts
    from portatrain.data.store.places import Bucket, Folder
    from portatrain.runs.claim import ClaimHandle

SHARD_MIB = 1024

PACK = """Tokenise the data of a recipe once, in parallel, into a packed store: a folder, or below a URL.

The store is the same whatever the number of workers. It is whole, or it is not there: a command that was killed, or
that found no space, is given again and goes on. The sources of a mixture become one store each, below OUT.

examples:
  portatrain data pack my_text.py stores/text
  portatrain data pack tiny-lm stores/pages --set data=Jsonl --set data.paths=pages/*.jsonl --workers 8
  portatrain data pack my_text.py s3://bucket/stores/text
"""


def add_pack(commands: Any) -> None:
    about = "tokenise the data of a recipe once, into a packed store"
    made = commands.add_parser(
        "pack", help=about, description=PACK, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_recipe(made)
    made.add_argument("out", metavar="OUT", type=place, help="the folder or URL of the store")
    made.add_argument(
        "--workers", type=int, metavar="N", default=None, help="processes that tokenise (default: one for each core)"
    )
    made.add_argument(
        "--shard-mib", type=int, metavar="N", default=SHARD_MIB, help=f"size of a shard in MiB (default: {SHARD_MIB})"
    )
    made.add_argument("--json", action="store_true", help="print JSON")


def add_show(commands: Any) -> None:
    for name, about in (
        ("show", "show what a packed store holds, and the line that reads it"),
        ("stats", "show documents, tokens, bytes a token and lengths of packed stores, by store and split"),
    ):
        made = commands.add_parser(name, help=about, description=f"{about.capitalize()}.", allow_abbrev=False)
        made.add_argument("path", metavar="STORE", type=place, help="the folder or URL of a store, or of several")
        made.add_argument("--json", action="store_true", help="print JSON")


def pack(args: argparse.Namespace) -> int:
    from portatrain.data import Mixture, PackedTokens

    workers = args.workers if args.workers is not None else len(os.sched_getaffinity(0))
    for what, value in (("--workers", workers), ("--shard-mib", args.shard_mib)):
        if value < 1:
            raise UserError(what, expected="at least 1", got=str(value), do="Give a whole number of them.")
    spec: DataSpec = resolved_recipe(args).data
    if not isinstance(spec, Mixture):
        packed: DataSpec = _pack_one(spec, args.out, workers, args)
    else:
        sources = tuple(
            one if isinstance(one, PackedTokens) else _pack_one(one, f"{args.out}/source-{i}", workers, args)
            for i, one in enumerate(spec.sources)
        )
        packed = dataclasses.replace(spec, sources=sources)
    if args.json:
        print(json.dumps({"data": type(packed).__name__, **dataclasses.asdict(packed)}, indent=1))
    else:
        print(f"Read it with: data={_written(packed)}")
    return 0


def _pack_one(spec: DataSpec, out: str, workers: int, args: argparse.Namespace) -> DataSpec:
    from portatrain.data import PackedTokens
    from portatrain.data.open import is_packable
    from portatrain.data.store import packing
    from portatrain.data.store.places import place as place_of

    if not is_packable(spec):
        raise UserError(
            f"data spec {type(spec).__name__}",
            expected="documents of text or token ids that are not packed yet",
            got="a packed store" if isinstance(spec, PackedTokens) else "images or arrays, or pairs of chats",
            do="Copy the store as it is." if isinstance(spec, PackedTokens) else "Train on them as they are.",
        )
    at = place_of(out)
    with _claimed(at) as claim:
        made = packing.pack(
            spec,
            at,
            workers=workers,
            shard_bytes=args.shard_mib << 20,
            tell=lambda line: print(f"{out}: {line}", file=sys.stderr, flush=True),
            guard=claim.guard,
            fence=claim.fence,
        )
    if not args.json:
        for line in _lines(out, made):
            print(line)
    length = spec.tokens_per_sample()
    assert length is not None
    return PackedTokens(path=at.where, seq_len=length, fingerprint=made.fingerprint)


def _written(spec: DataSpec) -> str:
    """Return a spec as code, without the fields that have their defaults."""
    from portatrain.data import Mixture

    given = []
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if field.default is dataclasses.MISSING or value != field.default:
            several = isinstance(spec, Mixture) and field.name == "sources"
            text = f"({', '.join(map(_written, value))},)" if several else repr(value)
            given.append(f"{field.name}={text}")
    return f"{type(spec).__name__}({', '.join(given)})"


@contextlib.contextmanager
def _claimed(at: Folder | Bucket) -> Iterator[ClaimHandle]:
    """Hold the claim on a store that is being packed. Raises UserError if another process packs it."""
    from portatrain.data.store.layout import MANIFEST
    from portatrain.data.store.places import UNFINISHED, Folder
    from portatrain.runs.claim import Claim
    from portatrain.runs.remote_claim import RemoteClaim
    from portatrain.system.object_store import Objects

    claim: ClaimHandle
    try:
        if isinstance(at, Folder):
            inside = at.path / UNFINISHED
            begun = inside.is_dir() or (at.path / MANIFEST).is_file()
            if at.path.exists() and not begun and (not at.path.is_dir() or any(at.path.iterdir())):
                raise UserError(
                    f"packed store {at.where}",
                    expected="a folder that is empty or not there, or a store",
                    got="something else",
                    do="Name another folder; nothing was changed in this one.",
                )
            made = [p for p in (inside, *inside.parents) if not p.exists()]
            inside.mkdir(parents=True, exist_ok=True)
            claim = Claim.acquire(inside / "claim")
        else:
            made = []
            claim = RemoteClaim.acquire(Objects(f"{at.where}/{UNFINISHED}"), lambda: None)
    except OSError as error:
        raise UserError(
            f"packed store {at.where}",
            expected="a folder that can be written",
            got=error.strerror or str(error),
            do="Correct its permissions, or name another one.",
        ) from error
    try:
        yield claim
    finally:
        claim.release()
        if isinstance(at, Folder):
            # Nothing is left of a command that ended before it wrote anything, nor of the claim on a whole store.
            if (at.path / MANIFEST).is_file() or {p.name for p in inside.iterdir()} <= {".lock"}:
                shutil.rmtree(inside, ignore_errors=True)
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        elif at.objects.exists(MANIFEST):
            at.objects.delete(f"{UNFINISHED}/claim")


def stores(where: str) -> list[tuple[str, Manifest]]:
    """Return (place, manifest) of the store at a path or URL, or of the stores below it. UserError if there is none."""
    from portatrain.data.store.layout import MANIFEST
    from portatrain.data.store.places import Bucket, manifest, required
    from portatrain.data.store.places import place as place_of

    at = place_of(where)
    found = manifest(at)
    if found is not None:
        return [(at.where, found)]
    if isinstance(at, Bucket):
        names = [one.name for one in at.objects.below("") if one.name.endswith(f"/{MANIFEST}")]
        below = [f"{at.where}/{name.removesuffix(f'/{MANIFEST}')}" for name in sorted(names)]
    else:
        below = [str(path.parent) for path in sorted(at.path.glob(f"*/{MANIFEST}"))]
    if not below:
        required(at)
    return [(one, required(place_of(one))) for one in below]


def show(args: argparse.Namespace) -> int:
    found = stores(args.path)
    if args.json:
        print(json.dumps([{"path": where, **json.loads(one.as_bytes())} for where, one in found], indent=1))
        return 0
    for where, one in found:
        for line in _lines(where, one):
            print(line)
        made = ", ".join(f"{k}={v!r}" for k, v in one.made_from.items() if v not in (None, "", []))
        print(f"  packed from {made}")
        for sentence in one.passed_over:
            print(f"  {sentence}")
    return 0


def _lines(where: str, made: Manifest) -> Iterator[str]:
    ids = f"{made.vocab:,} token ids of {made.dtype}, {made.bos} begins a document"
    yield f"{where}: {ids}, fingerprint {made.fingerprint}"
    for split, facts in made.splits.items():
        shards = counted(len(facts.sha256), "shards")
        yield f"  {split}: {counted(facts.documents, 'documents')}, {counted(facts.tokens, 'tokens')}, in {shards}"


def stats(args: argparse.Namespace) -> int:
    rows = [
        {"path": where, "split": split, **_stats(facts)}
        for where, one in stores(args.path)
        for split, facts in one.splits.items()
    ]
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        a_token = row["bytes_a_token"]
        print(f"{row['path']} {row['split']}")
        print(f"  documents {row['documents']:,}, tokens {row['tokens']:,}, bytes {row['bytes'] or 'unknown'}")
        print(f"  bytes a token {'unknown' if a_token is None else f'{a_token:.3f}'}")
        print(f"  tokens a document: mean {row['mean_length']:.1f}, longest {row['longest']:,}")
        for least, most, documents in row["lengths"]:
            share = documents / row["documents"]
            print(f"    {least:>11,} to {most:>11,}: {documents:>11,}  {'#' * max(1, round(40 * share))}")
    return 0


def _stats(facts: SplitFacts) -> dict[str, Any]:
    counted = facts.tokens - facts.documents  # without the ids that begin the documents
    return {
        "documents": facts.documents,
        "tokens": facts.tokens,
        "bytes": facts.bytes,
        "bytes_a_token": None if facts.bytes is None or not counted else facts.bytes / counted,
        "mean_length": counted / max(1, facts.documents),
        "longest": facts.longest,
        "lengths": [(2**i, 2 ** (i + 1) - 1, n) for i, n in enumerate(facts.lengths) if n],
    }


def verify_rows(given: str) -> list[dict[str, Any]]:
    """Return a row for each store at a path or URL, as `portatrain data verify` prints them."""
    from portatrain.data.store.places import place as place_of
    from portatrain.data.store.verify import problems

    rows = []
    for where, one in stores(given):
        tell = lambda line, where=where: print(f"{where}: {line}", file=sys.stderr, flush=True)  # noqa: E731
        found = list(problems(place_of(where), one, tell))
        blocks = sum(one.blocks_in(*shard) for shard in one.shards())
        row: dict[str, Any] = {"path": where, "bytes": blocks * one.block().itemsize}
        rows.append(row | {"passed_over": list(one.passed_over)} | ({"problem": "\n  ".join(found)} if found else {}))
    return rows


def is_store(given: str) -> bool:
    """Return whether there is a packed store, or one that is not whole yet, or several, at a path or URL."""
    from portatrain.data.store.layout import MANIFEST
    from portatrain.data.store.places import UNFINISHED
    from portatrain.system.object_store import Objects

    if is_remote(given):
        return any(one.name.split("/")[-1] == MANIFEST for one in Objects(given).below(""))
    folder = expand(given)
    return (folder / UNFINISHED).is_dir() or any(folder.glob(MANIFEST)) or any(folder.glob(f"*/{MANIFEST}"))
