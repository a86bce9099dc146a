"""Measure which poisoned samples `portatrain blame` finds in a small tiny-lm: counts by kind of poison.

Run: python -m benchmarks.blame [--steps 100:125] [--backend torch]

The corpus is files of Python's standard library, among which are four of 4 KiB: one letter repeated, random bytes, the
bytes of a file moved by 128, and the bytes of a file in random order.
"""

from __future__ import annotations

import argparse
import platform
import random
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path

from portatrain.data.in_sample import parts_of
from portatrain.runs.run_dir import RunDir
from portatrain.training.blame.run import blame
from portatrain.training.blame.verdict import WIDTH
from portatrain.training.open_data import data_of

CORPUS_BYTES, POISON_BYTES = 200_000, 4096
MOSTLY = 64
"""Tokens of a poisoned file, of 128, from which on a sample counts as poisoned."""
RUN = (
    "model.layers=2 model.embed=64 model.mlp=128 data=TextFiles data.seq_len=128 batch=8 steps=200 hooks=() "
    "optimizer.lr=0.003 schedule.warmup=10 checkpoint_every=20 checkpoint_keep=20 eval_every=none eval_final_batches=1"
)


def corpus(folder: Path) -> None:
    """Write the files, the same on each machine with this version of Python."""
    draw = random.Random(1)
    files = [f for f in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")) if 6000 < f.stat().st_size < 60_000]
    draw.shuffle(files)
    size, taken = 0, []
    for file in files:
        if size < CORPUS_BYTES:
            taken.append(file.read_bytes())
            (folder / file.name).write_bytes(taken[-1])
            size += len(taken[-1])
    text = taken[3][:POISON_BYTES]
    poison = {
        "one letter": b"Q" * POISON_BYTES,
        "random bytes": bytes(draw.randrange(1, 256) for _ in range(POISON_BYTES)),
        "moved by 128": bytes((byte + 128) % 256 or 1 for byte in text),
        "shuffled": bytes(draw.sample(text, len(text))),
    }
    for name, content in poison.items():
        (folder / f"poison: {name}").write_bytes(content)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default="100:125", metavar="A:B", help="the steps that are measured")
    parser.add_argument("--backend", default="torch", choices=("jax", "torch"))
    options = parser.parse_args()
    first, last = map(int, options.steps.split(":"))
    with tempfile.TemporaryDirectory() as scratch:
        folder, where = Path(scratch) / "texts", Path(scratch) / "run"
        folder.mkdir()
        corpus(folder)
        words = [part for word in [*RUN.split(), f"data.paths={folder}"] for part in ("--set", word)]
        train = [sys.executable, "-m", "portatrain", "train", "tiny-lm", "--run-dir", str(where), *words]
        subprocess.run([*train, "--backend", options.backend], check=True)
        run = RunDir(where)
        verdict, recipe = blame(run, first, last, most=100, tell=lambda line: print(line, file=sys.stderr))
        data = data_of(recipe, recipe.describe(), run.data())
        parts = parts_of(recipe.data, data, [one.sample.number for one in verdict.judged])
    there, found, named = Counter[str](), Counter[str](), 0
    for one in verdict.judged:
        bad = [p for p in parts[one.sample.number] if p.name.startswith("poison") and len(p.tokens) >= MOSTLY]
        kind = bad[0].name if bad else "clean"
        out = one.stands_out(WIDTH)
        there[kind] += 1
        found[kind] += out
        named += bool(bad and out and one.documents and one.documents[0].part.name == kind)
    print(f"{platform.machine()}, {options.backend}, steps {options.steps}: samples that stand out, of those there are")
    for kind in sorted(there):
        print(f"  {kind:24}{found[kind]:>6} of {there[kind]}")
    print(f"  the poisoned file named first: {named} of {sum(found.values()) - found['clean']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
