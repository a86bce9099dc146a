"""Ids that no row of the model's table has, from every source and on every backend, are refused before they train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portatrain.backends.base import backend_class, missing
from portatrain.backends.program import make_program
from portatrain.backends.reference.run import forward, initial
from portatrain.data import DataSpec, Mixture, TextFiles, TokenMemmap
from portatrain.errors import UserError
from portatrain.model.module import Module, Param
from portatrain.model.ops import Loss, Ops
from portatrain.optim import AdamW, Constant
from portatrain.recipe import Recipe
from portatrain.runs.run_dir import RunDir
from portatrain.training.trainer import train
from recipes.models.decoder import DecoderConfig
from tests.support.running import Running

BACKENDS = [b for b in ("jax", "torch") if not missing(b)]


class Pairs(Module):
    """Two tables of unequal sizes, whose ids have keys of their own."""

    def __init__(self) -> None:
        self.words, self.classes = Param(vocab=40, embed=8, fan_in_axes=0), Param(kinds=10, embed=8, fan_in_axes=0)

    def __call__(self, ops: Ops, batch: Mapping[str, Any]) -> Loss:
        return ops.cross_entropy(ops.embed(self.words, batch["word"]), self.classes, batch["kind"], mask=batch["mask"])


class Translates(Module):
    """Tokens and targets with tables of their own. `axes`: the axis of the table of each, of size 10 if it is `vocab`,
    else of size 40. `part`: the model looks up a part of each array, which is not the array of the batch."""

    def __init__(self, axes: Mapping[str, str], *, part: bool = False) -> None:
        self.first, self.second = (
            Param(**{axes[key]: 10 if axes[key] == "vocab" else 40, "embed": 8}, fan_in_axes=0)
            for key in ("tokens", "targets")
        )
        self.part = part

    def __call__(self, ops: Ops, batch: Mapping[str, Any]) -> Loss:
        ids, targets, mask = (batch[k] for k in ("tokens", "targets", "mask"))
        if self.part:
            ids, targets, mask = ids[:, 1:], targets[:, 1:], mask[:, 1:]
        return ops.cross_entropy(ops.embed(self.first, ids), self.second, targets, mask=mask)

    def predict(self, ops: Ops, batch: Mapping[str, Any]) -> Any:
        return ops.embed(self.first, batch["tokens"])


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    def build(self) -> Pairs:
        return Pairs()


@dataclass(frozen=True, kw_only=True)
class PairData(DataSpec):
    """Samples of which the last one has the ids `word` and `kind`."""

    word: int = 1
    kind: int = 1
    version: str = "1"

    def __len__(self) -> int:
        return 8

    def sample(self, index: int) -> dict[str, Any]:
        return {"word": np.int32(self.word if index == 7 else 1), "kind": np.int32(self.kind if index == 7 else 1)}


def recipe(model: Any, data: DataSpec) -> Recipe:
    return Recipe(name="ids", model=model, data=data, optimizer=AdamW(lr=1e-3), schedule=Constant(), steps=8, batch=4)


DECODER = DecoderConfig(vocab=40, embed=8, layers=1, heads=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_refuses_a_batch_of_tokens(backend: str) -> None:
    made = backend_class(backend)(make_program(recipe(DECODER, TextFiles(paths="unread", seq_len=4))))
    zeros = np.zeros((1, 2, 4), np.int32)
    batch = {"tokens": zeros, "targets": zeros, "mask": np.ones((1, 2, 4), np.float32), "sample": np.zeros((1, 2), int)}
    batch |= {"segment_ids": zeros + 1, "positions": zeros}
    for key in ("tokens", "targets"):
        for at in (40, 41, -1, 2**31 - 1):
            bad = zeros.copy()
            bad[0, 1, 3] = at
            for call in (
                lambda b: made.step(made.init_state(), b, step=1, scale=1.0),
                lambda b: made.gradients(made.init_state(), b, step=1),
                lambda b: made.eval(made.init_state(), {k: v[0] for k, v in b.items()}),
            ):
                with pytest.raises(UserError, match=f"'{key}' of a batch: expected ids from 0 to 39.*got {at}"):
                    call(batch | {key: bad})


def _batch(**at: int) -> dict[str, np.ndarray]:
    ids = {key: np.full((1, 2, 4), at.get(key, 0), np.int32) for key in ("tokens", "targets")}
    return ids | {"mask": np.ones((1, 2, 4), np.float32), "sample": np.zeros((1, 2), int)}


@pytest.mark.parametrize(("wide", "narrow"), [("tokens", "targets"), ("targets", "tokens")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_array_is_held_to_its_own_table(backend: str, wide: str, narrow: str) -> None:
    """The axis `vocab` of the narrow table says nothing of the wide one."""
    largest = _batch(**{wide: 39, narrow: 9})
    rows = {k: v[0] for k, v in largest.items()}

    def run() -> Running:
        return Running(backend, Translates({wide: "other_vocab", narrow: "vocab"}))

    for first in ("step", "eval", "predict"):
        made = run()
        if first != "step":
            getattr(made.backend, first)(made.state, rows)
        made.state, _ = made.backend.step(made.state, largest, step=1, scale=1.0)
        made.backend.eval(made.state, rows)
        made.backend.predict(made.state, rows)
        for key, at in ((wide, 40), (narrow, 10)):
            for fresh in (made, run()):
                with pytest.raises(UserError, match=f"'{key}' of a batch: expected ids from 0 to {at - 1}.*got {at}"):
                    fresh.backend.step(fresh.state, largest | {key: _batch(**{key: at})[key]}, step=1, scale=1.0)


@pytest.mark.parametrize("key", ["tokens", "targets"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_array_that_is_looked_up_in_part_is_held_to_the_vocabulary(backend: str, key: str) -> None:
    for begun in (False, True):
        made = Running(backend, Translates(dict.fromkeys(("tokens", "targets"), "vocab"), part=True))
        if begun:
            made.state, _ = made.backend.step(made.state, _batch(), step=1, scale=1.0)
        for at in (10, -1):
            with pytest.raises(UserError, match=f"'{key}' of a batch: expected ids from 0 to 9.*got {at}"):
                made.backend.step(made.state, _batch(**{key: at}), step=1, scale=1.0)
            with pytest.raises(UserError, match=f"'{key}' of a batch: expected ids from 0 to 9.*got {at}"):
                made.backend.eval(made.state, {k: v[0] for k, v in _batch(**{key: at}).items()})


@pytest.mark.parametrize(("word", "kind"), [(40, 1), (1, 10), (-1, 1), (1, -1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_under_any_key_are_refused_in_a_run(tmp_path: Path, backend: str, word: int, kind: int) -> None:
    run = RunDir(tmp_path / "run")
    with pytest.raises(UserError, match=f"'{'kind' if word == 1 else 'word'}' of a batch: expected ids from 0 to"):
        train(recipe(PairsConfig(), PairData(word=word, kind=kind)), run, backend=backend)
    assert not list(run.path.rglob("COMMIT"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_largest_ids_train(tmp_path: Path, backend: str) -> None:
    run = RunDir(tmp_path / "run")
    assert train(recipe(PairsConfig(), PairData(word=39, kind=9)), run, backend=backend) == 0


@pytest.mark.parametrize("at", [40, -1])
def test_the_oracle_refuses_them(at: int) -> None:
    definition = recipe(PairsConfig(), PairData()).describe()
    batch = {"word": np.array([1, at]), "kind": np.array([1, 2]), "mask": np.ones(2)}
    with pytest.raises(UserError, match=r"ops.embed: expected ids from 0 to 39"):
        forward(definition, initial(definition), batch)


def sources(at: Path) -> dict[str, DataSpec]:
    """Sources with ids up to 44, and one of bytes."""
    ids = np.tile(np.arange(45, dtype="<u2"), 4)
    ids.tofile(at / "raw.bin")
    np.save(at / "saved.npy", ids)
    (at / "text.txt").write_bytes(b"abc " * 40)
    of: dict[str, Any] = {"seq_len": 4, "vocab": 45, "validation": 0}
    raw, saved = (TokenMemmap(paths=str(at / name), **of) for name in ("raw.bin", "saved.npy"))
    text = TextFiles(paths=str(at / "text.txt"), seq_len=4, validation=0)
    return {"raw": raw, "saved": saved, "mixture": Mixture(sources=(raw, saved), weights=(1.0, 1.0)), "text": text}


@pytest.mark.parametrize("source", ["raw", "saved", "mixture", "text"])
def test_every_source_of_tokens_is_refused_before_step_1(tmp_path: Path, source: str) -> None:
    run = RunDir(tmp_path / "run")
    with pytest.raises(UserError, match="a vocabulary of at least the data's"):
        train(recipe(DECODER, sources(tmp_path)[source]), run, backend=BACKENDS[0])
    assert not (run.path / "attempts").exists() and not (run.path / "data").exists()
