"""Measure packed stores: the rate of packing beside `tokenizers`' own batch encoding, and the opening of a huge store.

Run: python benchmarks/packed_store.py pack [--mb 100] [--workers 1]
     python benchmarks/packed_store.py open [--shards 10000]

`pack` makes a corpus from the sources of Python's library, repeated with seeded edits, trains a tokenizer of 8192 ids
on a part of it, and packs it; before and after, the tokenizer encodes the same documents by `encode_batch` on one
thread. Rates are a CPU second, of all processes together, so the ratio holds on a machine with other jobs, too.
`open` opens a simulated manifest of 10^13 tokens in a new process, and computes a batch's position at step 10^7.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def corpus(path: Path, size_bytes: int) -> int:
    """Write JSON lines of about `size_bytes`; return the documents."""
    from portatrain.data.sources import stdlib_files

    texts = [p.read_text(encoding="utf-8", errors="replace") for _, p in stdlib_files()]
    rng, written, count = np.random.default_rng(0), 0, 0
    with path.open("w") as file:
        while written < size_bytes:
            text = texts[int(rng.integers(len(texts)))]
            # A stretch of a file, with a word of its own every 500 characters.
            begin = int(rng.integers(max(1, len(text) // 2)))
            text = text[begin : begin + int(rng.integers(200, 12_000))]
            text = f" v{count} ".join(text[i : i + 500] for i in range(0, len(text), 500))
            written += file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            count += 1
    return count


def cpu_s() -> float:
    return sum(
        one.ru_utime + one.ru_stime for one in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def encode(lines: Path, tokenizer: Path) -> tuple[int, float]:
    """Return (bytes of text, CPU seconds) of `encode_batch` on one thread, 1000 documents a call."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    made, size, spent = Tokenizer.from_file(str(tokenizer)), 0, 0.0
    batch: list[str] = []
    with lines.open() as file:
        for line in [*file, ""]:
            if line:
                batch.append(json.loads(line)["text"])
            if len(batch) == 1000 or not line:
                begin = time.process_time()
                made.encode_batch(batch, add_special_tokens=False)
                spent += time.process_time() - begin
                size += sum(len(text.encode()) for text in batch)
                batch = []
    return size, spent


def pack(args: argparse.Namespace) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from portatrain.data import Jsonl
    from portatrain.data.store.packing import pack as pack_store
    from portatrain.data.store.places import place

    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        documents = corpus(at / "lines.jsonl", args.mb * 10**6)
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=8192, show_progress=False, initial_alphabet=alphabet)
        with (at / "lines.jsonl").open() as file:
            made.train_from_iterator([json.loads(next(file))["text"] for _ in range(min(documents, 2000))], trainer)
        made.save(str(at / "tokenizer.json"))
        spec = Jsonl(paths=str(at / "lines.jsonl"), seq_len=1024, validation=0.01, tokenizer=str(at / "tokenizer.json"))
        size, before_s = encode(at / "lines.jsonl", at / "tokenizer.json")
        begin, begin_cpu = time.perf_counter(), cpu_s()
        found = pack_store(
            spec, place(str(at / "store")), workers=args.workers, shard_bytes=1 << 30, tell=lambda line: print(line)
        )
        wall, spent = time.perf_counter() - begin, cpu_s() - begin_cpu
        _, after_s = encode(at / "lines.jsonl", at / "tokenizer.json")
        theirs = size / ((before_s + after_s) / 2)
        peak = {
            who: resource.getrusage(kind).ru_maxrss / 1024
            for who, kind in (("this process", resource.RUSAGE_SELF), ("a worker", resource.RUSAGE_CHILDREN))
        }
        tokens = sum(one.tokens for one in found.splits.values())
        print(f"{documents:,} documents, {size / 1e6:.0f} MB of text, {tokens:,} tokens; {platform.machine()}")
        print(f"encode_batch: {theirs / 1e6:.2f} MB a CPU second (before {size / before_s / 1e6:.2f},", end=" ")
        print(f"after {size / after_s / 1e6:.2f})")
        print(
            f"packing with {args.workers} workers: {size / spent / 1e6:.2f} MB a CPU second of all processes,", end=" "
        )
        print(f"{size / wall / 1e6:.2f} MB a second")
        print(
            f"ratio {size / spent / theirs:.2f}; peak memory " + ", ".join(f"{k} {v:.0f} MiB" for k, v in peak.items())
        )


OPEN = """
import resource, sys, time
import numpy as np
from portatrain.data import PackedTokens, open_data
import portatrain.data.open
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begin = time.perf_counter()
data = open_data(PackedTokens(path=sys.argv[1], seq_len=4096), seed=0)
opened = time.perf_counter() - begin
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
first = data.train._order
first(np.arange(1))  # so that no import is measured
sample = 10**7 * 1024 + np.arange(1)
begin = time.perf_counter()
window = first(sample)
once = time.perf_counter() - begin
begin = time.perf_counter()
window = first(sample + 5)
again = time.perf_counter() - begin
print(f"{data.streams['train'].size:.2e} tokens, {data.train.windows:,} windows: opened in {opened * 1e3:.0f} ms")
print(f"memory: {(after - before) / 1024:.0f} MiB more, {after / 1024:.0f} MiB in all")
print(f"position of sample {sample[0]:,}: {once * 1e3:.2f} ms for the first of an epoch, then {again * 1e3:.2f} ms")
"""


def open_(args: argparse.Namespace) -> None:
    import hashlib

    from portatrain.data.store.layout import MANIFEST, TOKENS, Manifest, SplitFacts

    blocks = 10**13 // args.shards // TOKENS
    facts = SplitFacts(
        tokens=args.shards * blocks * TOKENS,
        documents=10**10,
        bytes=4 * 10**13,
        longest=10**6,
        groups=10**6,
        lengths=(0,) * 40,
        sha256=tuple(hashlib.sha256(str(n).encode()).hexdigest() for n in range(args.shards)),
    )
    made = Manifest(
        dtype="uint32", vocab=128_256, bos=128_000, shard_blocks=blocks, made_from={}, splits={"train": facts}
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / MANIFEST).write_bytes(made.as_bytes())
        print(f"a manifest of {args.shards:,} shards, {len(made.as_bytes()) / 1e6:.1f} MB", flush=True)
        subprocess.run([sys.executable, "-c", OPEN, folder], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("--mb", type=int, default=100)
    packing.add_argument("--workers", type=int, default=1)
    opening = commands.add_parser("open")
    opening.add_argument("--shards", type=int, default=10_000)
    args = parser.parse_args()
    {"pack": pack, "open": open_}[args.what](args)


if __name__ == "__main__":
    main()
