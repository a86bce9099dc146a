"""Pairs of chats of which one was preferred: read from records, packed, and put one into a sample.

A packed pair is two documents of a stream, the chosen chat and then the rejected one; each begins with the token
``bos``, and some of its tokens are targets, as of any packed chat.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from portatrain.data import pack as packs
from portatrain.data.chat import chat_template
from portatrain.data.corpus import SPLITS, Stream, identity, streams_in
from portatrain.data.documents import check_ids_of
from portatrain.data.encode import encoding
from portatrain.data.record_text import Pair
from portatrain.data.records import RecordDocuments, ids_of
from portatrain.data.sources import both
from portatrain.data.spec import Arrow, Jsonl, Parquet, Preferences
from portatrain.data.split import Batch, Order, Split, samples
from portatrain.data.text_batches import blank
from portatrain.errors import UserError, choice
from portatrain.system.text import counted

FORMATS = {"jsonl": Jsonl, "parquet": Parquet, "arrow": Arrow}
Side = tuple[np.ndarray, np.ndarray]
"""The ids of a chat, and (n,) bool, those that are targets."""


class Pairs(Split):
    """The pairs of one stream, one a sample.

    The arrays of a batch are those of `TokenSplit`; the chosen chat is segment 1, the rejected one segment 2. A pair
    of more than ``seq_len`` inputs is in no sample.
    """

    def __init__(self, stream: Stream, seq_len: int, *, name: str, seed: int) -> None:
        self.name, self.stream, self.seq_len = name, stream, seq_len
        sizes = np.diff(stream.starts, append=len(stream.tokens)).reshape(-1, 2).sum(1) - 2
        self._fitting = np.flatnonzero(sizes <= seq_len)
        self.windows, self.longer = len(self._fitting), len(sizes) - len(self._fitting)
        if not self.windows:
            raise UserError(
                f"{name} data",
                expected=f"a pair of at most seq_len={seq_len} targets, both sides together",
                got=f"{counted(len(sizes), 'pairs')}, the shortest of {int(sizes.min())}",
                do="Use a larger seq_len.",
            )
        about = f"portatrain.pairs.1\0{stream.fingerprint}\0{seq_len}"
        self.fingerprint = hashlib.sha256(about.encode()).hexdigest()
        self._order = Order(self.windows, seed, f"data/{name}", permuted=name == "train")

    def batch(self, start: int, count: int) -> Batch:
        sample = samples(start, count)
        out = self.blank(count) | {"sample": sample}
        for row, pair in enumerate(self._fitting[self._order(sample)].tolist()):
            at = 0
            for side in (0, 1):
                first, stop = self._bounds(2 * pair + side)
                here, ids = slice(at, at + stop - first - 1), self.stream.read(first, stop)
                counted = self.stream.are_targets(first, stop)
                assert counted is not None  # a pack of pairs has targets
                out["tokens"][row, here], out["targets"][row, here] = ids[:-1], ids[1:]
                out["mask"][row, here] = counted[1:]
                out["segment_ids"][row, here] = side + 1
                out["positions"][row, here] = np.arange(stop - first - 1)
                at += stop - first - 1
        return out

    def _bounds(self, document: int) -> tuple[int, int]:
        starts = self.stream.starts
        stop = starts[document + 1] if document + 1 < len(starts) else len(self.stream.tokens)
        return int(starts[document]), int(stop)

    def index_of(self, sample: int) -> int:
        """Return the number, in the packed stream, of the pair in the sample of that number."""
        return int(self._fitting[self._order(np.array([sample]))[0]])

    def blank(self, count: int) -> Batch:
        return blank(count, self.seq_len)


def open_pairs(spec: Preferences, seed: int, pack_dir: Path | None) -> dict[str, Pairs]:
    """Return the splits of the pairs, by name. Raises UserError for a record that is no pair of chats."""
    if spec.format not in FORMATS:
        raise choice("Preferences format", spec.format, FORMATS)
    pack = packs.make(identity(spec), SPLITS, lambda writer: _produce(spec, writer), pack_dir)
    return {name: Pairs(stream, spec.seq_len, name=name, seed=seed) for name, stream in streams_in(pack).items()}


def _produce(spec: Preferences, writer: packs.Writer) -> packs.Meta:
    make = Pair(spec.chosen, spec.rejected, spec.prompt, chat_template(spec.tokenizer, spec.chat_template))
    encode = encoding(spec.tokenizer, spec.bos)
    read = FORMATS[spec.format](
        paths=spec.paths, seq_len=spec.seq_len, field=spec.chosen, tokenizer=spec.tokenizer, bos=spec.bos
    )
    with closing(RecordDocuments(*both(spec), read, make.fields)) as source:
        held = source.held_out(spec.validation)

        def sides_of(mine: np.ndarray) -> Iterator[tuple[Side, Side]]:
            for number in range(len(source)):  # in order, as compressed files are read
                where, record = source.record(number)
                if not mine[number]:
                    continue
                found = [ids_of(made, encode, where) for made in make(record, where)]
                if all(mask.any() for _, mask in found):
                    for ids, _ in found:
                        check_ids_of(source, number, ids)
                    yield found[0], found[1]
                else:
                    what = "pairs whose sides are the same" if not any(mask.any() for _, mask in found) else NO_ANSWER
                    source.passed.add(what, f"{source.files[int(source.file[number])][0]}, record {number}")

        for split, mine in zip(SPLITS, (~held, held), strict=True):
            written = _write(sides_of(mine) if mine.any() else iter(()), split, encode.bos, encode.vocab, writer)
            if not written and (split == "train" or spec.validation or spec.validation_paths):
                raise UserError(
                    "Preferences data",
                    expected=f"at least one pair with an answer on each side in the {split} split",
                    got=f"{int(mine.sum())} of {counted(len(source), 'pairs')}, none with answers that differ"
                    if mine.any()
                    else "none",
                    do="Add pairs, change validation (the fraction held out), or name validation_paths.",
                )
        return {
            "meaning": {"vocab": encode.vocab, "bos": encode.bos},
            **{f"{split}_bytes": None for split in SPLITS},
            "passed_over": source.passed.sentences("Preferences"),
        }


NO_ANSWER = "pairs without an answer on one side"


def _write(pairs: Iterator[tuple[Side, Side]], split: str, bos: int, vocab: int, writer: packs.Writer) -> int:
    """Write pairs as documents, two for each; return their number."""
    dtype = np.min_scalar_type(vocab - 1)
    starts: list[int] = []
    targets = bytearray()

    def pieces(write: Callable[[np.ndarray], None]) -> None:
        for pair in pairs:
            for ids, mask in pair:
                starts.append(len(targets))
                targets.append(0)  # the token that opens the document
                targets.extend(mask.tobytes())
                write(np.concatenate((np.array([bos], dtype), ids), dtype=dtype, casting="same_kind"))

    writer.array(f"{split}-tokens", dtype, pieces)
    writer.whole(f"{split}-starts", np.array(starts, np.int64))
    writer.whole(f"{split}-targets", np.frombuffer(bytes(targets), np.uint8))
    return len(starts) // 2
