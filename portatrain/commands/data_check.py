"""`portatrain data check`: documents that are twice, and what evaluation sets share with what is trained on."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from portatrain.commands.packed import stores
from portatrain.errors import UserError
from portatrain.system.paths import place
from portatrain.system.text import counted

if TYPE_CHECKING:
    from portatrain.data.store.layout import Manifest
    from portatrain.data.store.overlap import Copies, Part, Shared

GRAM = 13
"""Tokens of a run, as GPT-3 counts overlap in words (Brown et al. 2020, appendix C)."""

CHECK = f"""Look for documents that are twice, and for text of evaluation sets in what is trained on.

The split `train` of each STORE is trained on. Its other splits, and every split of a store that --against names, are
evaluation sets. Documents are equal if all their tokens are. An evaluation set shares text if a run of {GRAM} tokens
is trained on, too. All stores must be of one tokenizer.

Exit codes: 0 no evaluation set shares anything, 1 one does, 2 a user's mistake, 75 storage failed.

examples:
  portatrain data check stores/text
  portatrain data check stores/web stores/books --against stores/questions
  portatrain data check s3://bucket/stores/text --json
"""


def add_check(commands: Any) -> None:
    about = "find documents that are twice, and text of evaluation sets in what is trained on"
    made = commands.add_parser(
        "check", help=about, description=CHECK, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("paths", metavar="STORE", nargs="+", type=place, help="the folder or URL of one store or several")
    made.add_argument(
        "--against", metavar="STORE", action="append", default=[], type=place, help="a store that nothing is trained on"
    )
    made.add_argument("--gram", type=int, metavar="N", default=GRAM, help=f"tokens of a run (default: {GRAM})")
    made.add_argument("--json", action="store_true", help="print JSON")


def check(args: argparse.Namespace) -> int:
    from portatrain.data.store import overlap

    if args.gram < 2:
        raise UserError("--gram", expected="at least 2 tokens", got=str(args.gram), do=f"Leave it out for {GRAM}.")
    parts = _parts(args)
    tell = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    copies = overlap.copies(parts, tell)
    shared = overlap.shared(parts, args.gram, tell)
    leaks = any(found.seen for found in shared.values()) or any(one.part.trained != one.other.trained for one in copies)
    if args.json:
        print(json.dumps(_rows(parts, copies, shared), indent=1))
    else:
        for part in parts:
            use = "trained on" if part.trained else "an evaluation set"
            print(
                f"{part.name}: {counted(part.stream.documents, 'documents')}, "
                f"{counted(part.stream.size, 'tokens')}, {use}"
            )
        for line in [*map(_copied, copies), *(_shares(part, one, args.gram) for part, one in shared.items())]:
            print(line)
        if not copies:
            print("no document is twice")
    return int(leaks)


def _parts(args: argparse.Namespace) -> list[Part]:
    from portatrain.data import PackedTokens
    from portatrain.data.store.overlap import parts_of
    from portatrain.data.store.reading import streams_of

    parts: list[Part] = []
    first: tuple[str, Manifest] | None = None
    for given, evaluated in [*((path, False) for path in args.paths), *((path, True) for path in args.against)]:
        for where, manifest in stores(given):
            if first is None:
                first = (where, manifest)
            elif _ids(manifest) != _ids(first[1]):
                raise UserError(
                    f"packed store {where}",
                    expected=f"the tokenizer of {first[0]}, since token ids are compared",
                    got=_tokenizer(manifest) + f" instead of {_tokenizer(first[1])}",
                    do="Pack both with the same tokenizer, or check them one by one.",
                )
            if any(part.where == where for part in parts):
                raise UserError(f"packed store {where}", expected="each store once", got="it twice", do="Name it once.")
            parts += parts_of(where, manifest, streams_of(PackedTokens(path=where, seq_len=1)), evaluated=evaluated)
    return parts


def _ids(manifest: Manifest) -> tuple[Any, ...]:
    return manifest.vocab, manifest.bos, manifest.made_from.get("tokenizer_sha256")


def _tokenizer(manifest: Manifest) -> str:
    return f"{manifest.made_from.get('tokenizer') or 'no tokenizer'} ({manifest.vocab:,} ids)"


def _copied(one: Copies) -> str:
    where = "twice in it" if one.part is one.other else f"in {one.other.name}, too"
    pairs = ", ".join(f"{a} as {b}" for a, b in one.examples)
    are = "is" if one.documents == 1 else "are"
    return (
        f"{one.part.name}: {counted(one.documents, 'documents')} {are} {where} (document {pairs}{', ...' * _more(one)})"
    )


def _more(one: Copies) -> bool:
    return one.documents > len(one.examples)


def _shares(part: Part, one: Shared, gram: int) -> str:
    share = 100 * one.seen / one.grams if one.grams else 0.0
    short = (
        f"; {counted(one.short, 'documents')} {'is' if one.short == 1 else 'are'} too short to compare"
        if one.short
        else ""
    )
    if not one.seen:
        return f"{part.name}: none of its {one.grams:,} runs of {gram} tokens is trained on{short}"
    return (
        f"{part.name}: {one.seen:,} of {one.grams:,} runs of {gram} tokens are trained on ({share:.2f} %), in "
        f"{one.documents:,} of its documents and {one.trained:,} of those that are trained on{short}"
    )


def _rows(parts: list[Part], copies: list[Copies], shared: dict[Part, Shared]) -> dict[str, Any]:
    return {
        "parts": [
            {
                "path": part.where,
                "split": part.split,
                "trained": part.trained,
                "documents": part.stream.documents,
                "tokens": part.stream.size,
                **({"shared": vars(shared[part])} if part in shared else {}),
            }
            for part in parts
        ],
        "copies": [
            {
                "path": one.part.where,
                "split": one.part.split,
                "other": {"path": one.other.where, "split": one.other.split},
                "documents": one.documents,
                "examples": one.examples,
            }
            for one in copies
        ],
    }
