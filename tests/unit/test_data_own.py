"""Data sources of one's own: what they give, what changes their fingerprint, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from portatrain.data import DataSpec, Mixture, TextFiles, batch_hash, open_data
from portatrain.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Pages(DataSpec):
    seq_len: int = 8
    validation: float = 0.3
    backwards: bool = False
    texts: ClassVar[dict[str, Any]] = {f"{n}.txt": f"page {n} says {n * n}. " * 3 for n in range(20)}

    def documents(self) -> Iterable[Any]:
        found = list(self.texts.items())
        return reversed(found) if self.backwards else found


@dataclass(frozen=True, kw_only=True)
class Pairs(DataSpec):
    size: int = 40
    version: str = "1"
    validation: float = 0.25

    def __len__(self) -> int:
        return self.size

    def sample(self, index: int) -> dict[str, Any]:
        return {"x": np.full((2, 3), index / 2), "label": index, "small": np.uint8(index)}


def test_documents_are_packed_as_the_same_files_are(tmp_path: Path) -> None:
    for name, text in Pages.texts.items():
        (tmp_path / name).write_text(text)
    files = open_data(TextFiles(paths=str(tmp_path), seq_len=8, validation=0.3), seed=3)
    for own in (Pages(), Pages(backwards=True)):
        found = open_data(own, seed=3)
        assert found.fingerprint == files.fingerprint and found.vocab == 256
        assert batch_hash(found.train.batch(5, 7)) == batch_hash(files.train.batch(5, 7))
        assert found.bytes_per_target == files.bytes_per_target


def test_documents_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_data(Pages(), seed=0, pack_dir=tmp_path / "pack")
    monkeypatch.setattr(Pages, "texts", {})
    assert open_data(Pages(), seed=0, pack_dir=tmp_path / "pack").fingerprint == first.fingerprint


def test_documents_in_a_mixture() -> None:
    spec = Mixture(sources=(Pages(), Pages(backwards=True)), weights=(3.0, 1.0), block=4)
    assert spec.tokens_per_sample() == 8
    data = open_data(spec, seed=0)
    assert np.bincount(data.train.batch(0, 40)["source"]).tolist() == [30, 10]
    assert data.validation is not None
    for count in (2, 4, 6):  # evaluation on the first windows reads both sources, here of equal length
        assert np.bincount(data.validation.batch(0, count)["source"]).tolist() == [count // 2, count // 2]
    with pytest.raises(UserError, match="images and mixtures cannot be sources"):
        open_data(Mixture(sources=(Pairs(),), weights=(1.0,)), seed=0)


def test_arrays_keep_their_keys() -> None:
    data = open_data(Pairs(), seed=1)
    assert data.validation is not None and data.train.windows + data.validation.windows == 40
    epoch = data.train.batch(0, data.train.windows)
    held = data.validation.batch(0, data.validation.windows)
    assert sorted([*epoch["label"].tolist(), *held["label"].tolist()]) == list(range(40))
    assert epoch["label"].tolist() != sorted(epoch["label"].tolist()) and held["label"].tolist() == sorted(
        held["label"]
    )
    assert {k: (v.dtype.name, v.shape[1:]) for k, v in epoch.items()} == {
        "x": ("float32", (2, 3)),
        "label": ("int32", ()),
        "small": ("uint8", ()),
        "mask": ("float32", ()),
        "sample": ("int64", ()),
    }
    assert (epoch["x"][:, 1, 2] == epoch["label"] / 2).all() and epoch["mask"].all()
    (*_, last) = data.validation.once(data.validation.windows - 1)
    assert last["mask"].sum() == 1 and last["sample"].tolist().count(-1) == data.validation.windows - 2


def test_what_the_fingerprint_of_arrays_has() -> None:
    first = open_data(Pairs(), seed=0).fingerprint
    assert open_data(Pairs(), seed=9).fingerprint == first
    for change in ({"version": "2"}, {"size": 41}, {"validation": 0.3}):
        assert open_data(dataclasses.replace(Pairs(), **change), seed=0).fingerprint != first  # type: ignore[arg-type]


def wrong(cls: type, name: str, value: Any) -> DataSpec:
    """Return a spec of a class derived from `cls` with one member changed."""
    made = dataclass(frozen=True, kw_only=True)(type(cls.__name__, (cls,), {name: value}))
    spec: DataSpec = made()
    return spec


def fails(*_: object) -> Any:
    raise RuntimeError("the disk is gone")


@dataclass(frozen=True, kw_only=True)
class Nothing(DataSpec):
    seq_len: int = 8


CALLS = itertools.count()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (Nothing(), r"data spec Nothing: expected documents\(\) and seq_len, or"),
        (wrong(Pages, "texts", {"a": 7}), r"Pages.documents\(\): expected a text of document 'a'.*got a int"),
        (wrong(Pages, "documents", lambda self: [("a", "b"), ("a", "c")]), "got two of the name 'a'"),
        (wrong(Pages, "documents", lambda self: ["a"]), r"expected pairs \(name, text\).*got a str"),
        (wrong(Pages, "documents", fails), r"Pages.documents\(\) .*line \d+, in fails.*RuntimeError: the disk is gone"),
        (wrong(Pages, "texts", {}), "at least one document with content in the train split"),
        (wrong(Pairs, "sample", fails), r"Pairs.sample\(\d+\).*the disk is gone"),
        (wrong(Pairs, "sample", lambda self, i: {"x": "text"}), "expected an array of numbers"),
        (wrong(Pairs, "sample", lambda self, i: {"x": 2**40}), "integers that fit into 32 bits"),
        (
            wrong(Pairs, "sample", lambda self, i: {"x": np.zeros(1 + i)}),
            r"key 'x': expected what the first sample has",
        ),
        (wrong(Pairs, "sample", lambda self, i: (1.0, 2.0)), r"Pairs.sample\(\d+\): expected a dictionary.*got tuple"),
        (
            wrong(Pairs, "sample", lambda self, i: {"x": np.random.default_rng().normal()}),
            r"Pairs.sample\(\d+\), key 'x': expected the same values at every call.*default_rng\(index\)",
        ),
        (
            wrong(Pairs, "sample", lambda self, i: {"x": 1, "y": np.float32(next(CALLS))}),
            "key 'y': expected the same values",
        ),
        (Pairs(version=""), "Pairs.version: expected a text"),
        (Pairs(size=0), "at least one sample in the train split"),
    ],
)
def test_what_is_refused(spec: DataSpec, said: str) -> None:
    with pytest.raises(UserError, match=said):
        open_data(spec, seed=0).train.batch(0, 8)
