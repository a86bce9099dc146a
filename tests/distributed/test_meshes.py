"""The torch backend on meshes of gloo processes against one process: gradients, curves, all state, evaluation.

One group of processes runs all cells of its size. A gradient's scale is the largest magnitude in it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portatrain.backends import rounding
from portatrain.backends.reference import fp8 as oracle
from portatrain.model.context_chunks import computed, dealt, imbalance, in_order
from portatrain.system.processes import run_processes
from tests.support import fp8_rows
from tests.support.as_on_a_gpu import FLEX
from tests.support.mesh_cases import CASES, ROWS, SEQ
from tests.support.mesh_compare import alone, differences
from tests.support.mesh_measure import Measured
from tests.support.mesh_mutants import MUTANTS, ZERO

__all__ = ["alone"]  # a fixture

pytestmark = pytest.mark.meshes

PLAIN = ("lm, accumulation, dropout", "vit, accumulation, dropout")

CELLS: dict[int, list[tuple[str, str]]] = {
    2: [
        *((mesh, case) for mesh in ("fsdp=2", "replica=2", "tensor=2", "context=2") for case in PLAIN),
        ("fsdp=2", "lm, a step that is not finite"),
        ("fsdp=2", "lm, clipping, averages, frozen"),
        ("fsdp=2", "routed"),
        ("expert=2", "routed"),
        ("expert=2", "mixture"),
        ("expert=2", "mixture, LoRA"),
        ("expert=2", "mixture, bf16"),
        ("fsdp=2", "lm, LoRA"),
        ("tensor=2", "lm, muP"),
        ("tensor=2", "lm, growing batch, averages"),
        ("fsdp=2", "lm, remat"),
        ("tensor=2", "lm, remat by name"),
        ("context=2", "lm, remat of dots"),
        ("fsdp=2", "lm, remat but attention"),
        ("tensor=2", "lm, untied, all options"),
        ("tensor=2", "routed"),
        ("context=2", "lm, untied, all options"),
        ("context=2", "lm, norms of queries and keys"),
        ("context=2", "nested"),
        ("tensor=2", "attention by rule"),
        ("tensor=2", "latent"),
        ("fsdp=2", "hybrid"),
        ("tensor=2", "hybrid"),
        ("fsdp=2", "routed, further tokens"),
        ("context=2", "routed, further tokens"),
        ("context=2", "attention by rule"),
        ("fsdp=2", "towers"),
        ("fsdp=2", "towers, groups in a microbatch"),
        ("tensor=2", "towers"),
        ("context=2", "towers"),
        ("fsdp=2", "lm, bf16"),
        ("fsdp=2", "lm, bf16 state"),
        ("fsdp=2", "lm, fp8"),
        ("tensor=2", "lm, fp8"),
        ("fsdp=2", "lm, fp8, a scale for a tensor"),
        ("tensor=2", "lm, fp8, a scale for a tensor"),
        ("context=2", "lm, fp8, a scale for a tensor"),
    ],
    4: [
        *((mesh, PLAIN[0]) for mesh in ("replica=2,fsdp=2", "fsdp=2,tensor=2", "context=2,tensor=2")),
        ("fsdp=2,tensor=2", PLAIN[1]),
        ("fsdp=2,context=2", PLAIN[0]),
        ("fsdp=2,tensor=2", "lm, clipping, averages, frozen"),
        ("fsdp=2,tensor=2", "lm, tensor and fsdp on one axis"),
        ("fsdp=2,tensor=2", "towers"),
        ("fsdp=2,context=2", "latent"),
        ("replica=2,fsdp=2", "towers, groups in a device's rows"),
        ("fsdp=2,tensor=2", "hybrid"),
        ("fsdp=2,tensor=2", "lm, Muon"),
        ("fsdp=2,tensor=2", "lm, Adafactor"),
        ("fsdp=2,tensor=2", "lm, LoRA"),
        ("fsdp=2,context=2", "lm, muP"),
        ("replica=2,fsdp=2", "lm, growing batch, averages"),
        ("fsdp=2,tensor=2", "lm, bf16 state"),
        ("replica=2,fsdp=2", "lm, bf16 state"),
        ("context=2,tensor=2", "lm, LoRA"),
        ("context=4", "lm, untied, all options"),
        *((f"{other},expert=2", "routed") for other in ("replica=2", "fsdp=2", "context=2", "tensor=2")),
        ("expert=4", "routed"),
        ("fsdp=2,expert=2", "mixture"),
        ("expert=2,tensor=2", "mixture, bf16"),
        ("expert=2,tensor=2", "routed, further tokens"),
        ("fsdp=2,expert=2", "routed, Muon"),
        ("fsdp=2,expert=2", "routed, bf16"),
    ],
}
MESHES = {
    2: ["fsdp=2", "replica=2", "expert=2", "tensor=2", "context=2"],
    4: [
        "expert=4",
        "replica=2,expert=2",
        "fsdp=2,expert=2",
        "expert=2,context=2",
        "expert=2,tensor=2",
        "fsdp=4",
        "replica=2,fsdp=2",
        "replica=2,tensor=2",
        "replica=2,context=2",
        "fsdp=2,tensor=2",
        "fsdp=2,context=2",
        "context=2,tensor=2",
        "tensor=4",
        "context=4",
    ],
}

MIXTURES = {
    "mixture": ("context=2", "expert=4", "expert=2,context=2"),
    "mixture, clamped with biases": ("tensor=2", "expert=2,tensor=2"),
    "mixture, bf16": ("expert=4", "fsdp=2,expert=2", "expert=2,context=2", "tensor=2", "expert=2,tensor=2"),
    "mixture, LoRA": ("tensor=2", "expert=2,tensor=2", "fsdp=2,expert=2"),
}
"""The meshes on which the long tests try mixtures of experts."""
HALVES = {(mesh, "mixture, bf16"): "mixture in halves, bf16" for mesh in ("tensor=2", "expert=2,tensor=2")}
"""The case that one process runs in place of the case on a mesh. Over tensor, parts of a sum are rounded to bfloat16
before they are added. This model amplifies that: the gradient of its router is 2.9e-2 off float64 on one process, and
3.4e-2 off one process on such a mesh. If one process rounds the same parts, it is 3.0e-3."""


def _applies(mesh: str, case: str) -> bool:
    if "mixture" in case:
        return mesh in MIXTURES.get(case, ())
    if "expert" in mesh:
        return "routed" in case
    if "one axis" in case:  # which two by two divide
        return "=4" not in mesh
    if "compiled" in case:  # minutes on a CPU; with tensor or context blocks are not compiled
        return mesh == "fsdp=2"
    if "context" in mesh and case == "hybrid":  # which is refused
        return False
    return not ("tensor" in mesh and "norms of" in case)


FULL: dict[int, list[tuple[str, str]]] = {
    **{n: [(m, c) for m in meshes for c in CASES if _applies(m, c)] for n, meshes in MESHES.items()},
    8: [
        (mesh, case) for mesh in ("fsdp=2,context=2,tensor=2", "replica=2,fsdp=2,tensor=2", "fsdp=8") for case in PLAIN
    ],
}

# A mutant is seen on one mesh, on a case where it matters.
SEEN: dict[int, list[tuple[str, str, str]]] = {
    2: [
        ("fsdp=2", PLAIN[0], "rows: loss and weight of this process alone"),
        ("fsdp=2", PLAIN[0], "rows: every process trains on the first rows"),
        ("fsdp=2", PLAIN[0], "fsdp: gradients averaged"),
        ("fsdp=2", PLAIN[1], "whole parameters: gradients not summed"),
        ("replica=2", PLAIN[0], "replicas: gradients not summed"),
        ("replica=2", PLAIN[0], "replicas: the last microbatch is not told"),
        ("replica=2", PLAIN[0], "norm: copies counted"),
        ("context=2", PLAIN[0], "replicas: gradients not summed"),
        ("context=2", PLAIN[0], "tensor, context: an operand that is whole has a gradient that is not a sum"),
        ("context=2", PLAIN[0], "dropout: offsets within this process's part"),
        ("tensor=2", PLAIN[0], "whole parameters: gradients not summed"),
        ("tensor=2", PLAIN[0], "tensor: logits of this process alone"),
        ("tensor=2", PLAIN[0], "tensor, context: an operand that is whole has a gradient that is not a sum"),
        ("tensor=2", PLAIN[0], "norm: copies counted"),
        ("expert=2", "routed", "whole parameters: gradients not summed"),
        ("expert=2", "routed", "expert: gradients not summed"),
        ("expert=2", "routed", "norm: copies counted"),
    ]
}
# Attention as on a GPU: FlexAttention, by the reference of its operator.
ON_GPUS: dict[int, list[tuple[str, str]]] = {
    2: [(mesh, "lm, untied, all options") for mesh in ("tensor=2", "context=2")] + [("fsdp=2", "lm, remat of dots")],
    4: [("context=2,tensor=2", "lm, untied, all options")],
}
MOVED = [
    ("lm, clipping, averages, frozen", "fsdp=2,tensor=2", "replica=2,fsdp=2"),
    ("lm, Adafactor", "context=2,tensor=2", "fsdp=4"),
    ("lm, bf16 state", "fsdp=2,tensor=2", "replica=2,fsdp=2"),
    ("routed", "fsdp=2,expert=2", "expert=2,tensor=2"),
]

TRAFFIC = {**dict.fromkeys(("fsdp=2", "replica=2", "tensor=2", "context=2"), PLAIN[0]), "expert=2": "routed"}

Found = dict[str, tuple[Any, float]]


def _run(n: int, cells: list[tuple[str, str, tuple]], folder: Path) -> Found:
    out = folder / f"found-{n}"
    code = run_processes(n, "tests.support.torch_worker:main", {"cells": cells, "out": str(out)})
    assert code == 0
    found: Found = {}
    with out.open("rb") as stream:
        for _ in cells:
            name, value, seconds = pickle.load(stream)
            found[name] = (value, seconds)
    return found


def _cells(pairs: list[tuple[str, str]]) -> list[tuple[str, str, tuple]]:
    return [(f"{mesh}: {case}", "case", (case, mesh, "")) for mesh, case in pairs]


@pytest.fixture(scope="session")
def group(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Found]:
    """Everything of the fast tests for a world size, run once."""
    done: dict[int, Found] = {}

    def run(n: int) -> Found:
        if n not in done:
            cells = _cells(CELLS[n])
            cells += [(f"{mesh}: {m}", "case", (case, mesh, m)) for mesh, case, m in SEEN.get(n, [])]
            cells += [(f"{mesh}: {FLEX}: {case}", "case", (case, mesh, FLEX)) for mesh, case in ON_GPUS.get(n, [])]
            cells += [(f"traffic {m}", "traffic", (case, m)) for m, case in TRAFFIC.items() if n == 2]
            cells += [(f"{a} to {b}", "moved", (case, a, b)) for case, a, b in MOVED if n == 4]
            cells += [("rows in fp8", "rows in fp8", ())] if n == 2 else []
            cells += [("pairs", "pairs", ("lm", "context=4"))] if n == 4 else []
            done[n] = _run(n, cells, tmp_path_factory.mktemp("group"))
        return done[n]

    return run


def _check(found: Any, alone: Callable[[str], Measured], case: str) -> None:
    assert isinstance(found, Measured), found
    failures = differences(alone(case), found, case)
    assert not failures, "\n".join(failures)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("mesh", "case"), [(m, c) for n in CELLS for m, c in CELLS[n]])
def test_a_mesh_follows_one_process(mesh: str, case: str, group: Any, alone: Any) -> None:
    n = next(n for n in CELLS if (mesh, case) in CELLS[n])
    found, seconds = group(n)[f"{mesh}: {case}"]
    case = HALVES.get((mesh, case), case)
    _check(found, alone, case)
    one = alone(case)
    worst = _worst(found, one)
    loss = np.nanmax(np.abs(np.array(found.losses) / np.array(one.losses) - 1))
    print(f"{mesh}, {case}: gradient {worst:.1e}, loss {loss:.1e}, {seconds:.1f} s")


@pytest.mark.timeout(300)
def test_in_bf16_a_sum_over_tensor_is_the_sum_of_its_rounded_parts(group: Any, alone: Any) -> None:
    mesh, case = "expert=2,tensor=2", "mixture, bf16"
    found, _ = group(4)[f"{mesh}: {case}"]
    definition, batch = CASES[case].program("").definition, CASES[case].batches()[0]
    bound = rounding.bound(definition, rounding.positions_in(definition, batch, microbatches=True), "bf16")
    halves, whole = (_worst(found, alone(c)) for c in (HALVES[mesh, case], case))
    print(f"{halves:.1e} from one process with the same parts, {whole:.1e} from one with whole sums, bound {bound:.1e}")
    assert halves <= bound < whole


def _worst(many: Measured, one: Measured) -> float:
    return max(np.abs(many.gradients[k] - g).max() / (np.abs(g).max() or 1.0) for k, g in one.gradients.items())


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("mesh", "case", "mutant"), [s for n in SEEN for s in SEEN[n]])
def test_a_wrong_reduction_is_seen(mesh: str, case: str, mutant: str, group: Any, alone: Any) -> None:
    n = next(n for n in SEEN if (mesh, case, mutant) in SEEN[n])
    found, _ = group(n)[f"{mesh}: {mutant}"]
    if isinstance(found, Measured):  # else processes came to disagree, which is noticed too
        assert differences(alone(case), found, case)
    else:
        assert "disagree" in found or "different values" in found, found


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("mesh", "case"), [pair for pairs in ON_GPUS.values() for pair in pairs])
def test_attention_as_on_a_gpu_follows_one_process(mesh: str, case: str, group: Any, alone: Any) -> None:
    n = next(n for n in ON_GPUS if (mesh, case) in ON_GPUS[n])
    found, _ = group(n)[f"{mesh}: {FLEX}: {case}"]
    _check(found, alone, case)


def test_every_mutant_is_tried() -> None:
    assert {m for n in SEEN for *_, m in SEEN[n]} == set(MUTANTS) - {"", *ZERO}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("cut", ["contracted", "kept"])
@pytest.mark.parametrize("scaling", fp8_rows.FORMS)
def test_what_shares_a_scale_has_one_however_it_is_sharded(scaling: str, cut: str, group: Any) -> None:
    """Numbers of one shard are so small beside those of the other that a scale of their own would show."""
    found, _ = group(2)["rows in fp8"]
    assert isinstance(found, dict), found
    form, (x, w, g) = fp8_rows.FORMS[scaling], fp8_rows.arrays(scaling)
    y, dx = found[scaling, cut]
    np.testing.assert_allclose(y, oracle.product(form, x, w), rtol=2.0**-7, atol=0)
    np.testing.assert_allclose(dx, oracle.gradients(form, x, w, g)[0], rtol=2.0**-7, atol=0)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("case", "start", "end"), MOVED)
def test_a_state_moves_between_meshes_bit_for_bit(case: str, start: str, end: str, group: Any) -> None:
    found, _ = group(4)[f"{start} to {end}"]
    assert found is True, found


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("mesh", "case"), [("fsdp=2,tensor=2", "lm, Muon"), ("replica=2,fsdp=2", PLAIN[0])])
def test_a_process_holds_what_the_layout_says(mesh: str, case: str, group: Any) -> None:
    found, _ = group(4)[f"{mesh}: {case}"]
    program = CASES[case].program(mesh)
    at = program.layout.mesh.coordinates(0)
    boxes = [program.layout.box(t, at)[1] for t in program.definition.params.values()]
    assert found.bytes["params"] == 4 * sum(int(np.prod(b)) for b in boxes)
    # AdamW's two slots, Muon's one; torch's own count of steps for each tensor of AdamW's.
    assert found.bytes["params"] <= found.bytes["opt"] <= 2 * found.bytes["params"] + 4 * 100


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mesh", TRAFFIC)
def test_nothing_moves_that_need_not(mesh: str, group: Any) -> None:
    """Bytes between processes in one step of two microbatches, to the last one."""
    found, _ = group(2)[f"traffic {mesh}"]
    assert isinstance(found, dict), found
    definition = CASES[TRAFFIC[mesh]].program(mesh).definition
    n, layers, e, kv = 2, 2, 32, 2 * 8
    params = 4 * definition.parameters
    root = 4 * sum(t.size for t in definition.params.values() if not t.stack_dims)
    tokens = ROWS // n * SEQ
    gathered, scattered = sum(found.get("all_gather", [])), sum(found.get("reduce_scatter", []))
    reduced = sum(found.get("all_reduce", []))
    scalars = 16  # loss, weight and norm
    if mesh == "fsdp=2":
        # All parameters for the forward pass, the blocks' again for the backward pass; gradients once a microbatch.
        assert (gathered, scattered) == (n * (2 * params - root), n * params)
        assert reduced <= scalars
    elif mesh == "replica=2":
        assert (gathered, scattered) == (0, 0)
        assert params <= reduced <= params + scalars  # once a step, not once a microbatch
    elif mesh == "tensor=2":
        # In and out of attention and MLP of every layer, the embedding and the loss; in both directions.
        assert gathered == scattered == n * 2 * (2 * layers + 1) * tokens * e * 4
        assert max(found["all_reduce"]) <= tokens * 2 * 4  # two numbers a token: never logits
    elif mesh == "expert=2":
        # What experts have, each microbatch; all that is whole, and statistics of the routing, once a step.
        experts = 4 * sum(t.size for t in definition.params.values() if "experts" in t.axes)
        assert gathered == scattered == n * experts
        assert params - experts <= reduced <= params - experts + 100
    else:
        # Keys and values, and who may see whom (a segment id a token), once; gradients of keys and values.
        pairs = n * layers * 2 * tokens * kv * 4
        assert scattered == pairs
        assert pairs <= gathered <= pairs + n * tokens * 4
        # Half of a process's queries and of their results, and of the gradients of both.
        assert sum(found["all_to_all"]) == n * layers * 4 * (tokens // 2) * e * 4 // 2
        assert params <= reduced <= params + 2 * n * tokens


@pytest.mark.timeout(300)
def test_attention_is_as_much_work_on_every_process(group: Any) -> None:
    """Of 4 heads and 2 layers: the pairs that a kernel computes if it leaves out keys after a chunk."""
    found, _ = group(4)["pairs"]
    share = dealt(4, SEQ, causal=True, window=None)[0]
    assert found == [ROWS * 4 * 2 * computed(share, SEQ, causal=True, window=None)] * 4
    before = [computed(c, SEQ, causal=True, window=None) for c in in_order(4, SEQ)]
    assert imbalance(found) == 1 < 1.5 < imbalance(before)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("n", FULL)
def test_all_cells(n: int, alone: Any, tmp_path: Path) -> None:
    found = _run(n, _cells(FULL[n]), tmp_path)
    failures = []
    for mesh, case in FULL[n]:
        value, _ = found[f"{mesh}: {case}"]
        known = HALVES.get((mesh, case), case)
        wrong = differences(alone(known), value, known) if isinstance(value, Measured) else [value]
        failures += [f"{mesh}, {case}: {w}" for w in wrong]
    assert not failures, "\n".join(failures)
