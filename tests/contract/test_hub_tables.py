"""Tables to and from transformers: rotary parameters, parts of a file's tensor, where layers of several kinds are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from checkpoints_format import Box
from portatrain.checkpoint.interop import Row, hub_rope
from portatrain.model.layers import layers_of, places_of
from portatrain.model.module import Module, Param, describe
from portatrain.model.rope import rotary
from portatrain.testing.tolerance import UNIT_ROUNDOFF
from tests.support.hub_models import random_rope


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "yarn", "longrope"])
def test_rotary_frequencies_are_transformers(kind: str) -> None:
    """It computes them in float32: a power, a division and one or two products, each within a unit of its result."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rng = np.random.default_rng(3)
    for _ in range(20):
        rope = {"rope_type": "", "rope_theta": float(rng.choice([50.0, 1e4, 5e5]))}
        while rope["rope_type"] != kind:
            rope |= random_rope(16, rng)
        rope = {k: v for k, v in rope.items() if k in KEYS[kind] or k in ("rope_type", "rope_theta")}
        sizes = {"hidden_size": 32, "num_attention_heads": 2, "head_dim": 16, "max_position_embeddings": 16}
        config = transformers.LlamaConfig(**sizes, rope_parameters=dict(rope))
        found = hub_rope.read_rope({**sizes, "rope_parameters": rope}, "it", theta=1e4, longest=16)
        for length in (12, 40):
            theirs, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
            frequencies, ours = rotary(16, found[0], found[1], length)
            assert np.allclose(theirs.numpy(), frequencies, rtol=8 * UNIT_ROUNDOFF["fp32"] * np.log(found[0]), atol=0)
            assert factor == pytest.approx(ours, rel=1e-12)
            assert (
                hub_rope.read_rope({**sizes, **hub_rope.rope_fields(found[0], found[1])}, "it", theta=1e4, longest=16)
                == found
            )


KEYS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "truncate", "beta_fast", "beta_slow", "original_max_position_embeddings"),
    "longrope": ("factor", "short_factor", "long_factor", "original_max_position_embeddings"),
}


@pytest.mark.parametrize("shape", [(4, 3, 6), (5, 2)])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("part", [None, (2, None), (1, None, 2)])
def test_a_box_reads_its_own_part_of_a_file(rows: int, transposed: bool, part: Any, shape: tuple[int, ...]) -> None:
    """Any box of ours, from a tensor of theirs that may hold more beside it; what is read holds the box and no more
    than the rectangle around it."""
    if rows > len(shape) - 1:
        return
    rng = np.random.default_rng(0)
    array = rng.normal(size=shape).astype(np.float32)
    plain = Row(theirs="x", ours="x", rows=rows, transposed=transposed)
    piece, axis = plain.out(array), plain.axis
    if part is not None:
        start, step = part[0], 1 if len(part) == 2 else part[2]
        stop = start + step * piece.shape[axis]
        plain = Row(theirs="x", ours="x", rows=rows, transposed=transposed, part=(start, stop, step))
    whole = np.full(plain.whole_shape(piece.shape), np.nan, np.float32)
    whole[plain.cut(piece.shape)] = piece
    file = Counting(whole)
    for _ in range(20):
        ends = [sorted(rng.choice(n + 1, 2, replace=False)) for n in shape]
        box = Box(tuple(int(a) for a, _ in ends), tuple(int(b - a) for a, b in ends))
        assert (plain.taken(file, box, shape) == array[box.slices()]).all()
    file.elements = 0
    plain.taken(file, Box((1,) * len(shape), (1,) * len(shape)), shape)
    assert file.elements == 1


@pytest.mark.parametrize(
    ("axes", "shape"), [((3, 2, 0, 1), (2, 3, 4, 5)), ((None, 0, 1), (4, 3)), ((None, None, 0), (5,)), ((None,), ())]
)
def test_a_row_may_order_axes_and_add_axes_of_size_one(axes: tuple[int | None, ...], shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    array = rng.normal(size=shape).astype(np.float32)
    row = Row(theirs="x", ours="x", axes=axes)
    theirs = row.out(array)
    named = array.transpose([axis for axis in axes if axis is not None])
    assert theirs.flags.c_contiguous and theirs.shape == row.their_shape(shape) == row.whole_shape(theirs.shape)
    assert (theirs == np.expand_dims(named, tuple(n for n, axis in enumerate(axes) if axis is None))).all()
    for _ in range(20):
        ends = [sorted(rng.choice(n + 1, 2, replace=False)) for n in shape]
        box = Box(tuple(int(a) for a, _ in ends), tuple(int(b - a) for a, b in ends))
        file = Counting(theirs)
        assert (row.taken(file, box, shape) == array[box.slices()]).all()
        assert file.elements == np.prod(box.shape)


class Counting:
    """A file's tensor that counts the elements that are read of it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.elements = array, 0

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        self.elements += self.array[index].size
        return self.array[index]


def test_layers_of_several_kinds_are_few_stacks() -> None:
    """Every layer is where `places_of` says, once; a pattern becomes a Stack of periods, runs a Stack each."""
    counted = {"aaaa": 1, "abababa": 3, "aaaaaabbbb": 2, "aaaaab" * 4 + "aa": 8, "abcabc": 3, "abca": 4}
    for kinds, most in counted.items():
        made_layers = layers_of(list(kinds), lambda kind: Named(kind))
        places = places_of(list(kinds), "blocks")
        definition = describe(Holder(made_layers))
        assert len(definition.params) == most
        assert len(set(places)) == len(kinds)
        for kind, (path, index) in zip(kinds, places, strict=True):
            info = definition.params[f"{path}/{kind}"]
            assert index < info.shape[0] and info.axes[0] == "layers"
        assert sum(info.shape[0] for info in definition.params.values()) == len(kinds)


class Named(Module):
    def __init__(self, kind: str) -> None:
        setattr(self, kind, Param(embed=2))


class Holder(Module):
    def __init__(self, blocks: Module) -> None:
        self.blocks = blocks
