"""Measure packed stores: the rate of packing beside `tokenizers`' own batch encoding, and the opening of a huge store.

Run: python benchmarks/packed_store.py pack [--mb 100] [--workers 1]
     python benchmarks/packed_store.py open [--shards 10000]
     python benchmarks/packed_store.py cache
     python benchmarks/packed_store.py wait [--latency-ms 50] [--steps 60]    (needs moto: the extra s3-test)

`pack` makes a corpus from the sources of Python's library, repeated with seeded edits, trains a tokenizer of 8192 ids
on a part of it, and packs it; before and after, the tokenizer encodes the same documents by `encode_batch` on one
thread. Rates are a CPU second, of all processes together, so the ratio holds on a machine with other jobs, too.
`open` opens a simulated manifest of 10^13 tokens in a new process, and computes a batch's position at step 10^7.
`cache` opens the source code of Python's library with a tokenizer for three runs, with an empty cache of packed corpora
and without one.
`wait` trains from a store in a simulated S3 whose every request takes some milliseconds more, without a cache on the
disk, and prints the part of a step in which training waited for its batch.
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


def cache(args: argparse.Namespace) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from portatrain.data import Stdlib, open_data
    from portatrain.data.sources import stdlib_files

    with tempfile.TemporaryDirectory() as folder:
        made, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(vocab_size=8192, show_progress=False, initial_alphabet=alphabet)
        made.train_from_iterator([p.read_text(errors="replace") for _, p in stdlib_files()[:200]], trainer)
        made.save(str(Path(folder) / "tokenizer.json"))
        spec = Stdlib(seq_len=128, tokenizer=str(Path(folder) / "tokenizer.json"))
        for where in (str(Path(folder) / "cache"), "off"):
            os.environ["PORTATRAIN_PACK_CACHE"] = where
            spent = []
            for n in range(3):
                begin = time.perf_counter()
                open_data(spec, seed=0, pack_dir=Path(folder) / f"{Path(where).name}-{n}")
                spent.append(time.perf_counter() - begin)
            with_it = "without a cache" if where == "off" else "with a cache"
            print(f"{with_it}: three runs open their data in {', '.join(f'{s:.2f} s' for s in spent)}")


SERVER = """
import threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
threading.Event().wait()
"""


def wait(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from portatrain.data import PackedTokens, Stdlib
    from portatrain.data.store import places
    from portatrain.data.store.packing import pack as pack_store
    from portatrain.recipe import apply_overrides, load_recipe
    from portatrain.runs.run_dir import RunDir
    from portatrain.system.object_store import Objects
    from portatrain.training.trainer import train

    # In a process of its own, so that the server's work is not the trainer's.
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        for key, value in {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_EC2_METADATA_DISABLED": "true",
            "PORTATRAIN_DATA_CACHE_GIB": "0",
        }.items():
            os.environ[key] = value
        import urllib.request

        urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/stores", method="PUT")).close()
        read, requests = Objects.range, 0

        def late(self: Objects, name: str, start: int, length: int) -> bytes:
            nonlocal requests
            requests += 1
            time.sleep(args.latency_ms / 1000)
            return read(self, name, start, length)

        Objects.range = late  # type: ignore[method-assign]
        url = "s3://stores/stdlib"
        pack_store(Stdlib(seq_len=args.seq_len), places.place(url), workers=1, shard_bytes=8 << 20)
        for layers in args.layers:
            given = ["hooks=()", f"steps={args.steps}", "eval_final_batches=1", "eval_batches=1"]
            recipe = apply_overrides(
                load_recipe("tiny-lm"), [*given, f"model.layers={layers}", "checkpoint_every_s=none"]
            )
            recipe = replace(recipe, data=PackedTokens(path=url, seq_len=args.seq_len), batch=args.batch)
            with tempfile.TemporaryDirectory() as folder:
                requests, run = 0, RunDir(Path(folder) / "run")
                assert train(recipe, run, backend=args.backend) == 0
                asked = requests / args.steps
                rows = run.curve()[2:]  # the first compiles, and two batches were read meanwhile
            begin, count = time.perf_counter(), 20
            for n in range(count):
                Objects(url).range("train-00000.tokens", n * 80_000, 80_000)
            alone_ms = (time.perf_counter() - begin) / count * 1e3
            waited, spent = (sum(row[key] for row in rows) for key in ("data_wait_s", "step_s"))
            print(
                f"{args.backend}, {layers} layers, {args.batch} x {args.seq_len} tokens, {args.latency_ms:g} ms late: "
                f"a step {spent / len(rows) * 1e3:.0f} ms, data wait {waited / len(rows) * 1e3:.2f} ms = "
                f"{waited / spent:.2%}; {asked:.1f} requests a step, each {alone_ms:.0f} ms; {platform.machine()}, "
                f"{os.cpu_count()} cores"
            )
    finally:
        server.kill()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("--mb", type=int, default=100)
    packing.add_argument("--workers", type=int, default=1)
    opening = commands.add_parser("open")
    opening.add_argument("--shards", type=int, default=10_000)
    commands.add_parser("cache")
    waiting = commands.add_parser("wait")
    waiting.add_argument("--latency-ms", type=float, default=50.0)
    waiting.add_argument("--steps", type=int, default=60)
    waiting.add_argument("--batch", type=int, default=8)
    waiting.add_argument("--seq-len", type=int, default=128)
    waiting.add_argument("--layers", type=int, nargs="+", default=[1, 4])
    waiting.add_argument("--backend", default="torch")
    args = parser.parse_args()
    {"pack": pack, "open": open_, "cache": cache, "wait": wait}[args.what](args)


if __name__ == "__main__":
    main()
