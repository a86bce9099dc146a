"""Define what the step benchmark trains, the same for every contender: sizes, one fixed batch, and the optimizer.

B batch, S seq, E embed, V vocab, N layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from portatrain.backends.base import Backend, backend_class
from portatrain.backends.program import Program, make_program
from portatrain.data import Stdlib
from portatrain.optim import AdamW
from portatrain.optim.schedules import Constant
from portatrain.recipe import Recipe
from recipes.models.decoder import DecoderConfig

ADAMW = AdamW(lr=1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
CLIP_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama-like decoder with tied embeddings, and its batch.

    `packed`: documents share a window, so attention takes a mask from segment ids and positions start anew in each.
    """

    name: str
    vocab: int
    embed: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    seq: int
    batch: int
    packed: bool = False
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.embed // self.heads

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def config(self) -> DecoderConfig:
        return DecoderConfig(
            vocab=self.vocab,
            embed=self.embed,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            mlp=self.mlp,
            rope_theta=self.rope_theta,
            norm_eps=self.norm_eps,
        )

    @property
    def matmul_flops(self) -> float:
        """Return the FLOPs of forward and backward: 6 a token for every weight of a matmul, the tied output table's
        included.

        Attention is not counted, as implementations differ in what they compute of the masked half and what they
        recompute.
        """
        layer = self.embed * self.head_dim * 2 * (self.heads + self.kv_heads) + 3 * self.embed * self.mlp
        return 6.0 * self.tokens * (self.layers * layer + self.vocab * self.embed)

    @property
    def about(self) -> str:
        packed = ", packed documents" if self.packed else ""
        return (
            f"{self.layers} layers, embed {self.embed}, {self.heads} heads over {self.kv_heads}, mlp {self.mlp}, "
            f"vocab {self.vocab}, {self.batch} x {self.seq} tokens{packed}"
        )


SHAPES = {
    s.name: s
    for s in (
        Shape(name="22m", vocab=4096, embed=512, layers=7, heads=8, kv_heads=4, mlp=1408, seq=256, batch=4),
        Shape(name="tiny-lm", vocab=256, embed=128, layers=6, heads=4, kv_heads=2, mlp=384, seq=256, batch=16),
        Shape(
            name="tiny-lm-packed",
            vocab=256,
            embed=128,
            layers=6,
            heads=4,
            kv_heads=2,
            mlp=384,
            seq=256,
            batch=16,
            packed=True,
        ),
        # Seconds to compile and to run: for tests, and to try the benchmark itself.
        Shape(name="toy", vocab=64, embed=32, layers=2, heads=4, kv_heads=2, mlp=96, seq=16, batch=2),
    )
}


def batch_of(shape: Shape) -> dict[str, np.ndarray]:
    """Return tokens and targets (B, S) int32, sample (B,); packed: segment_ids and positions too."""
    rng = np.random.default_rng(0)
    b, s = shape.batch, shape.seq
    ids = rng.integers(0, shape.vocab, (b, s + 1), dtype=np.int32)
    batch = {"tokens": ids[:, :-1].copy(), "targets": ids[:, 1:].copy(), "sample": np.arange(b, dtype=np.int64)}
    if shape.packed:
        # Three documents a window, cut at random places.
        starts = np.sort(rng.integers(1, s, (b, 2)), axis=1)
        at = np.arange(s)
        segment = 1 + (at[None, :, None] >= starts[:, None, :]).sum(-1)
        begin = np.where(segment == 1, 0, np.take_along_axis(starts, np.maximum(segment - 2, 0), axis=1))
        batch |= {"segment_ids": segment.astype(np.int32), "positions": (at - begin).astype(np.int32)}
    return batch


def program_of(shape: Shape, *, compile: bool | None = None, mesh: str = "") -> Program:
    recipe = Recipe(
        name="benchmark",
        model=shape.config,
        data=Stdlib(seq_len=shape.seq),
        optimizer=ADAMW,
        schedule=Constant(),
        steps=1000,
        batch=shape.batch,
        clip_norm=CLIP_NORM,
    )
    return replace(make_program(recipe, mesh=mesh), compile=compile)


def parameters_of(backend: Backend, state: object) -> dict[str, np.ndarray]:
    """Return a copy of the logical parameters by name, layers stacked, from which the others start."""
    infos = backend.program.definition.params  # type: ignore[attr-defined]
    found = {name: np.zeros(info.shape, np.float32) for name, info in infos.items()}
    for box in backend.local_boxes(state):
        if box.role == "params":
            found[box.name][tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))] = box.fetch()
    return found


def open_ours(name: str, shape: Shape, *, compile: bool | None = None) -> Backend:
    """Return backend `name` with the shape's program; torch compiles if `compile`."""
    return backend_class(name)(program_of(shape, compile=compile))
