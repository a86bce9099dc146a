"""Packed stores in a simulated S3: packed by two machines, read with a cache, through errors, stalls and damage."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from portatrain.cli import main
from portatrain.data import Mixture, PackedTokens, Split, TextFiles, batch_hash, open_data, prefetch, read_ahead
from portatrain.data.left_out import LeftOut
from portatrain.data.store import packing, reading, stream_writer
from portatrain.data.store.cache import Cache
from portatrain.errors import StorageError, UserError
from portatrain.optim import AdamW, Constant
from portatrain.recipe import Recipe
from portatrain.runs.events import Kind
from portatrain.runs.run_dir import RunDir
from portatrain.system import environment
from portatrain.system.object_store import Objects
from portatrain.training.hooks import Hook
from portatrain.training.metrics import StepRecord
from portatrain.training.trainer import train
from portatrain.training.view import TrainingView
from recipes.models.decoder import DecoderConfig
from tests.support.packed import RECIPE, contents, corpus, packed, tokenizer
from tests.support.s3 import Proxy, s3

pytest.importorskip("obstore")


TRAINED: list[int] = []


@dataclass(frozen=True, kw_only=True)
class Slow(Hook):
    """Every step takes 0.2 s more, and is noted in TRAINED."""

    def on_step(self, run: TrainingView, record: StepRecord) -> None:
        TRAINED.append(record.step)
        time.sleep(0.2)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[str, Proxy]]:
    monkeypatch.setattr(reading, "AGAIN_AFTER_S", (0.01, 0.01))
    monkeypatch.setattr(packing, "GROUP_DOCUMENTS", 15)
    monkeypatch.setattr(packing, "SAVE_S", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    reading._cache.cache_clear()
    with s3(monkeypatch) as found:
        yield found
    reading._cache.cache_clear()


def text(at: Path) -> TextFiles:
    return TextFiles(paths=str(corpus(at / "corpus")), seq_len=16, validation=0.2)


def objects(url: str) -> dict[str, bytes]:
    store = Objects(url)
    return {one.name: store.get(one.name)[0] for one in store.below("")}  # type: ignore[index]


def test_a_store_in_s3_is_the_store_of_a_folder(
    there: tuple[str, Proxy], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, _ = there
    corpus(tmp_path / "corpus")
    made = tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "r.py").write_text(RECIPE.format(paths=str(tmp_path / "corpus"), tokenizer=str(made)))
    for out in (url, str(tmp_path / "store")):
        assert main(["data", "pack", str(tmp_path / "r.py"), out, "--workers", "1", "--shard-mib", "1"]) == 0
    found = objects(url)
    assert found == {p.name: p.read_bytes() for p in (tmp_path / "store").iterdir()}
    assert main(["data", "verify", url]) == 0 and main(["data", "stats", url]) == 0 and main(["data", "show", url]) == 0
    assert main(["data", "pack", str(tmp_path / "r.py"), url]) == 0  # it is there
    capsys.readouterr()
    name = "train-00000.tokens"
    Objects(url).put(name, found[name][:70] + bytes([found[name][70] ^ 2]) + found[name][71:])
    assert main(["data", "verify", url]) == 1
    assert f"shard {name}" in capsys.readouterr().out


def test_packing_goes_on_on_another_machine(
    there: tuple[str, Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = there
    spec = text(tmp_path)
    monkeypatch.setattr(packing, "GROUP_DOCUMENTS", 4)
    packed(spec, tmp_path / "whole")
    write, machines = stream_writer.StreamWriter._write, 2
    for machine in range(machines):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"machine-{machine}"))
        left = 8

        def dying(self, blocks):
            nonlocal left
            left -= 1
            if not left:
                raise KeyboardInterrupt
            write(self, blocks)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(stream_writer.StreamWriter, "_write", dying)
            packed(spec, url)
    # The first machine again, with an old state of its own.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine-0"))
    packed(spec, url)
    assert objects(url) == {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir() if p.is_file()}
    assert not contents(tmp_path / "machine-0")
    # A store that was deleted is packed anew, whatever this machine remembers.
    for name in objects(url):
        Objects(url).delete(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine-1"))
    packed(spec, url)
    assert objects(url) == {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir() if p.is_file()}


def test_windows_from_s3_with_a_cache_errors_and_damage(
    there: tuple[str, Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url, proxy = there
    spec = text(tmp_path)
    made = packed(spec, url)
    want = open_data(spec, seed=2)
    packed(spec, tmp_path / "folder")
    same = open_data(PackedTokens(path=str(tmp_path / "folder"), seq_len=16), seed=2)
    proxy.seen.clear()
    data = open_data(PackedTokens(path=url, seq_len=16, fingerprint=made.fingerprint), seed=2)
    assert [p for _, p in proxy.seen] == ["/runs/one/store.json"]  # the manifest, and nothing else
    assert data.fingerprint == same.fingerprint and data.bytes_per_target == want.bytes_per_target
    assert batch_hash(data.train.batch(3, 64)) == batch_hash(same.train.batch(3, 64))
    proxy.seen.clear()
    assert batch_hash(data.train.batch(3, 64)) == batch_hash(same.train.batch(3, 64))
    assert proxy.seen == []  # the pieces are on the local disk
    # A piece that the local disk spoiled is fetched again.
    for piece in (tmp_path / "cache").rglob("*.tokens/*"):
        piece.write_bytes(piece.read_bytes()[::-1])
    assert batch_hash(data.train.batch(3, 64)) == batch_hash(same.train.batch(3, 64))
    assert proxy.seen and "CRC-32" in capsys.readouterr().err
    # Several reads are in flight, and a store that fails now and then is asked again.
    monkeypatch.setenv(environment.DATA_CACHE_GIB.name, "0")
    flying, most, lock = 0, 0, threading.Lock()

    def fault(method: str, path: str, number: int) -> int | None:
        nonlocal flying, most
        with lock:
            flying += 1
            most = max(most, flying)
        time.sleep(0.05)
        with lock:
            flying -= 1
        return 503 if number % 5 == 0 else None

    bare = open_data(PackedTokens(path=url, seq_len=16), seed=2)
    proxy.fault = fault
    assert batch_hash(bare.train.batch(0, 64)) == batch_hash(same.train.batch(0, 64)) and most > 1
    proxy.fault = lambda method, path, number: None
    Objects(url).delete("train-00000.tokens")
    with pytest.raises(StorageError, match=r"train-00000\.tokens cannot be read"):
        bare.train.once(200).__next__()
    with pytest.raises(UserError, match="none there"):
        open_data(PackedTokens(path=f"{url}/elsewhere", seq_len=16), seed=2)


def test_a_stall_is_told(
    there: tuple[str, Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url, proxy = there
    packed(text(tmp_path), url)
    data = open_data(PackedTokens(path=url, seq_len=16), seed=2)
    monkeypatch.setattr(reading, "SAY_AFTER_S", 0.2)
    proxy.fault = lambda method, path, number: 1.0
    assert data.train.batch(0, 1)["tokens"].shape == (1, 16)
    assert "waiting for shard train-" in capsys.readouterr().err


@pytest.mark.parametrize("mixed", [False, True])
def test_the_requests_of_two_batches_are_in_flight(
    mixed: bool, there: tuple[str, Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read ahead are the pieces of the batch that follows, each once; batches are the same."""
    url, proxy = there
    monkeypatch.setenv(environment.DATA_CACHE_GIB.name, "0")
    spec = text(tmp_path)
    packed(spec, url)
    packed(spec, tmp_path / "folder")

    def opened(path: str) -> Split:
        one = PackedTokens(path=path, seq_len=16)
        data = open_data(Mixture(sources=(one, one), weights=(0.5, 0.5)) if mixed else one, seed=2)
        return LeftOut(data.train, ((5, 7),))

    flying, most, lock = 0, 0, threading.Lock()

    def late(method: str, path: str, number: int) -> None:
        nonlocal flying, most
        with lock:
            flying += 1
            most = max(most, flying)
        time.sleep(0.2)
        with lock:
            flying -= 1

    split, same = opened(url), opened(str(tmp_path / "folder"))
    rows = np.array([True, False])
    proxy.fault = late
    with prefetch(split, 3, 2, rows=lambda count: rows) as batches:
        for n in range(8):
            assert batch_hash(next(batches)) == batch_hash(same.part(3 + 2 * n, 2, rows))
    assert most >= 2  # one row of each batch is of this process, and has one piece or two


def test_the_cache_keeps_within_its_budget(tmp_path: Path) -> None:
    budget = 1 << 20
    caches = [Cache(tmp_path, budget) for _ in range(3)]  # as many processes
    for n in range(600):
        caches[n % 3].put(f"shard/{n}", bytes([n % 256]) * 8000)
        if n % 50 == 49:
            assert sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) <= budget
    assert caches[0].get("shard/599") == bytes([599 % 256]) * 8000 and caches[0].get("shard/0") is None
    caches[1].drop("shard/599")
    assert caches[0].get("shard/599") is None
    caches[0].put("shard/large", bytes(budget // 32))
    assert caches[0].get("shard/large") is None


def test_two_packers_on_one_url(there: tuple[str, Proxy], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from portatrain.runs.remote_claim import RemoteClaim

    url, _ = there
    corpus(tmp_path / "corpus", documents=20)
    (tmp_path / "r.py").write_text(RECIPE.format(paths=str(tmp_path / "corpus"), tokenizer=None))
    claim = RemoteClaim.acquire(Objects(f"{url}/unfinished"), lambda: None)
    assert main(["data", "pack", str(tmp_path / "r.py"), url]) == 2
    assert "a claim of process" in capsys.readouterr().err
    claim.release()
    assert main(["data", "pack", str(tmp_path / "r.py"), url]) == 0
    assert "unfinished" not in " ".join(objects(url))


def test_a_run_hides_the_latency_waits_out_a_stall_and_names_a_flipped_bit(
    there: tuple[str, Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every request takes 50 ms, and steps take longer than that, as those that a store is for."""
    url, proxy = there
    monkeypatch.setenv(environment.DATA_CACHE_GIB.name, "0")
    monkeypatch.setattr(read_ahead, "SAY_AFTER_S", 0.3)
    monkeypatch.setattr(reading, "SAY_AFTER_S", 0.3)
    packed(text(tmp_path), url)
    recipe = Recipe(
        name="packed",
        model=DecoderConfig(vocab=256, embed=16, layers=1, heads=2),
        data=PackedTokens(path=url, seq_len=16),
        optimizer=AdamW(lr=1e-3),
        schedule=Constant(),
        steps=12,
        batch=4,
        hooks=(Slow(),),
    )
    proxy.fault = lambda method, path, number: 0.05 if ".tokens" in path else None
    run = RunDir(tmp_path / "run")
    assert train(recipe, run, backend="jax") == 0
    rows = run.curve()[3:]  # the first compiles, and two batches are read meanwhile
    share = sum(row["data_wait_s"] for row in rows) / sum(row["step_s"] for row in rows)
    with capsys.disabled():
        print(f"50 ms a request: data wait is {share:.2%} of a step")
    assert share < 0.01 and not run.events(Kind.DATA_WAIT)

    TRAINED.clear()
    stalled, stalls = RunDir(tmp_path / "stalled"), [True]

    def stalling(method: str, path: str, number: int) -> None:
        """One request, when four steps are trained, is answered only when the run has said that it waits."""
        if ".tokens" in path and len(TRAINED) >= 4 and stalls:
            stalls.clear()
            end_s = time.monotonic() + 50
            while not stalled.events(Kind.DATA_WAIT) and time.monotonic() < end_s:
                time.sleep(0.1)

    proxy.fault = stalling
    assert train(recipe, stalled, backend="jax") == 0
    assert stalled.events(Kind.DATA_WAIT) and "waiting for shard train-" in capsys.readouterr().err
    assert [row["loss"] for row in stalled.curve()] == [row["loss"] for row in run.curve()]

    proxy.fault = lambda method, path, number: None
    name = "train-00000.tokens"
    whole = Objects(url).get(name)[0]  # type: ignore[index]
    Objects(url).put(name, whole[:70] + bytes([whole[70] ^ 16]) + whole[71:])
    damaged = RunDir(tmp_path / "damaged")
    with pytest.raises(
        StorageError, match=r"shard train-00000\.tokens has another CRC-32 than was written, in block 0"
    ):
        train(recipe, damaged, backend="jax")
    Objects(url).put(name, whole)
    assert train(recipe, damaged, backend="jax") == 0  # once it is repaired, the run goes on
    assert [row["loss"] for row in damaged.curve()] == [row["loss"] for row in run.curve()]
