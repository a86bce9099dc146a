"""Reading compiled programs: loops count as often as they run, collectives by the mesh axes of their groups."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from portatrain.plan.compilers import hlo

MESH = {"replica": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 2}

MODULE = """
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8,16]{1,0})->f32[8,16]{1,0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%fused (p: f32[8,16], q: f32[16,16]) -> f32[8,16] {
  %p = f32[8,16]{1,0} parameter(0)
  %q = f32[16,16]{1,0:T(8,128)} parameter(1)
  ROOT %d = f32[8,16]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (t: (s32[], f32[8,16], f32[4,16])) -> (s32[], f32[8,16], f32[4,16]) {
  %t = (s32[], f32[8,16]{1,0}, f32[4,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%t), index=1
  %w = f32[4,16]{1,0} get-tuple-element(%t), index=2
  %g = f32[16,16]{1,0} all-gather(%w), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, use_global_device_ids=true
  %y = f32[8,16]{1,0} fusion(%x, %g), kind=kOutput, calls=%fused
  ROOT %r = (s32[], f32[8,16]{1,0}, f32[4,16]{1,0}) tuple(%i, %y, %w)
}

%condition (t: (s32[], f32[8,16], f32[4,16])) -> pred[] {
  %t = (s32[], f32[8,16]{1,0}, f32[4,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant(6)
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8,16], w: f32[4,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %w = f32[4,16]{1,0} parameter(1)
  %z = s32[] constant(0)
  %t = (s32[], f32[8,16]{1,0}, f32[4,16]{1,0}) tuple(%z, %x, %w)
  %l = (s32[], f32[8,16]{1,0}, f32[4,16]{1,0}) while(%t), condition=%condition, body=%bodyTRIPS
  %o = f32[8,16]{1,0} get-tuple-element(%l), index=1
  %s = f32[8,16]{1,0} all-reduce(%o), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %k = f32[2,16]{1,0} reduce-scatter(%s), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
  ROOT %p = f32[8,16]{1,0} collective-permute(%s), source_target_pairs={{0,2},{2,4}}
}
"""


@pytest.mark.parametrize("trips", [', backend_config={"known_trip_count":{"n":"6"}}', ""])
def test_a_loop_counts_as_often_as_it_runs(trips: str) -> None:
    found = hlo.measure(MODULE.replace("TRIPS", trips), MESH)
    assert found.flops == 6 * 2 * 8 * 16 * 16
    assert found.calls == {"fsdp": 6 + 1, "tensor": 1, "fsdp+tensor": 1}
    array = 8 * 16 * 4
    assert found.bytes == {"fsdp": 6 * 16 * 16 * 4 + array, "tensor": 2 * array, "fsdp+tensor": array}
    assert found.kinds["fsdp"] == {"all-gather": 6 * 16 * 16 * 4, "collective-permute": array}


INLINE = "  %one = s32[] constant(2)\n  %copied = s32[] copy(%i)\n  %next = s32[] add(%copied, %one)\n"
FUSED = "  %next = s32[] fusion(%i), kind=kLoop, calls=%plus\n"
PLUS = """
%plus (n: s32[]) -> s32[] {
  %n = s32[] parameter(0)
  %one = s32[] constant(2)
  ROOT %next = s32[] add(%one, %n)
}
"""


@pytest.mark.parametrize(("counted", "more"), [(INLINE, ""), (FUSED, PLUS)], ids=["inline", "fused"])
@pytest.mark.parametrize(("start", "trips"), [(0, 3), (1, 3), (3, 2)])
def test_a_loop_that_counts_by_two_runs_half_as_often(counted: str, more: str, start: int, trips: int) -> None:
    """As a TPU's compiler writes the loops of its windowed matmuls: bound 6, step 2."""
    text = MODULE.replace("TRIPS", "").replace("tuple(%i, %y, %w)", "tuple(%next, %y, %w)")
    text = text.replace("  ROOT %r = (s32[]", counted + "  ROOT %r = (s32[]")
    text = text.replace("\n%body", more + "\n%body").replace("%z = s32[] constant(0)", f"%z = s32[] constant({start})")
    assert hlo.measure(text, MESH).flops == trips * 2 * 8 * 16 * 16


def test_a_collective_in_pieces_counts_once() -> None:
    """A TPU's: the gather of the loop's body stands in a second fusion too, and in one of the entry, on channel 7."""
    config = ', channel_id=7, backend_config={"async_collective_fusion_config":{"flag_end":"-1"}}'
    gather = "%g = f32[16,16]{1,0} all-gather(%w), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}"
    piece = f"""
%piece (w: f32[4,16]) -> f32[16,16] {{
  %w = f32[4,16]{{1,0}} parameter(0)
  ROOT {gather}{config}
}}
"""
    text = MODULE.replace("TRIPS", "").replace("\n%condition", piece + "\n%condition")
    text = text.replace("dimensions={0}, use_global_device_ids=true\n", f"dimensions={{0}}{config}\n")
    text = text.replace("  %y = f32", "  %h = f32[16,16]{1,0} fusion(%w), kind=kCustom, calls=%piece\n  %y = f32")
    assert text.count("channel_id=7") == 2
    assert hlo.measure(text, MESH) == hlo.measure(MODULE.replace("TRIPS", ""), MESH)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,1,2,3,4,5,6,7}}", "fsdp+tensor"),
        ("replica_groups=[4,2]<=[8]", "tensor"),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", "fsdp"),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", "fsdp"),
        ("replica_groups={}", "fsdp+tensor"),
        ("source_target_pairs={{0,1},{2,3}}", "tensor"),
        ("replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={0}", "fsdp+tensor"),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}", "fsdp"),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, dimensions={0}", "tensor"),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}, dimensions={0}", "fsdp+tensor"),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(1)4}, dimensions={0}", "fsdp"),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(4)2}, dimensions={0}", "tensor"),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}, dimensions={0}", "tensor"),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, dimensions={0}", "fsdp"),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'b'}, dimensions={0}", "fsdp"),
    ],
)
def test_axes_of_groups(groups: str, axes: str) -> None:
    assert "+".join(hlo._axes(groups, MESH)) == axes


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        # A plain matmul as TPUs have it, one over a batch, and a convolution of 3 taps with padding.
        ("convolution(%p, %q), dim_labels=bf_io->bf", 2 * 8 * 16 * 32),
        ("convolution(%b, %c), window={size=4 pad=0_0 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf", None),
        ("convolution(%b, %d), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * 4 * 32 * 16 * (3 * 8 - 2)),
    ],
)
def test_flops_of_convolutions(line: str, flops: float | None) -> None:
    out = {"bf_io": "f32[8,32]", "0bf": "f32[4,8,32]", "b0f": "f32[4,8,32]"}
    kind = next(v for k, v in out.items() if f"dim_labels={k}" in line)
    text = f"""
ENTRY %main (p: f32[8,16]) -> {kind} {{
  %p = f32[8,16]{{1,0}} parameter(0)
  %q = f32[16,32]{{1,0}} parameter(1)
  %b = f32[4,8,16]{{2,1,0}} parameter(2)
  %c = f32[4,16,32]{{2,1,0}} parameter(3)
  %d = f32[3,16,32]{{2,1,0}} parameter(4)
  ROOT %r = {kind}{{1,0}} {line}
}}
"""
    # Of a batch as a dilated window: each of 4 outputs meets one of the 4 elements.
    assert hlo.measure(text, MESH).flops == (flops if flops is not None else 4 * 2 * 8 * 16 * 32)


KERNEL = """
%entry (q: bf16[2,8,2048,128], k: bf16[2,2,2048,128]) -> bf16[2,2,2048,128] {
  %next = s8[1,4,4]{2,1,0} constant({...})
  %mask = s8[1,4,4]{2,1,0} constant({...})
  %q = bf16[2,8,2048,128]{3,2,1,0} parameter(0)
  %k = bf16[2,2,2048,128]{3,2,1,0} parameter(1)
  %kernel.1 = (bf16[2,2,2048,128]{3,2,1,0}) custom-call(%next, %mask, %q, %k, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(f)/transpose(jvp(attention_of_10_blocks_of_512x512_and_sizes_64_96))/splash_mha_dkv_segmented_no_residuals/pallas_call"}
  ROOT %w = bf16[2048,2048]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %x = bf16[2048,128]{1,0} bitcast(%q)
  %y = bf16[128,2048]{1,0} bitcast(%k)
}
"""  # noqa: E501


def test_a_kernel_says_its_flops_and_does_not_end_its_computation() -> None:
    text = KERNEL.replace("%entry", "ENTRY %entry")
    kernel = 2 * 2 * 8 * 10 * 512 * 512 * (2 * 64 + 2 * 96)  # keys again and their gradient, values' and weights'
    assert hlo.measure(text, MESH).flops == kernel + 2 * 2048 * 2048 * 128
    assert hlo.measure(text.replace("attention_of_10", "attention"), MESH).flops == 2 * 2048 * 2048 * 128


def test_a_program_that_was_really_compiled() -> None:
    pytest.importorskip("jax")
    code = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from portatrain.plan.compilers import hlo
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
def f(x, w):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0]
put = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
text = jax.jit(f).lower(put((64, 32), "fsdp"), put((5, 32, 32), None, "fsdp")).compile().as_text()
found = hlo.measure(text, {"fsdp": 4, "tensor": 2})
print(found.flops, found.bytes)
"""
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **env}
    )
    flops, found = done.stdout.strip().split(" ", 1)
    assert float(flops) == 5 * 2 * 16 * 32 * 32  # a quarter of the rows, on both tensor ranks
    # XLA on CPUs may write a gather as an all-reduce, in which each adds its own part to zeros.
    moved, weights = json.loads(found.replace("'", '"')), 5 * 32 * 32 * 4
    assert all("fsdp" in axes for axes in moved) and sum(moved.values()) in (weights, 2 * weights)


RAGGED = """
HloModule jit_f, is_scheduled=true

ENTRY %main (x: f32[8,1,16], out: f32[32,1,16], n: s32[4]) -> f32[8,1,16] {
  %x = f32[8,1,16]{2,1,0} parameter(0)
  %out = f32[32,1,16]{2,1,0} parameter(1)
  %n = s32[4]{0} parameter(2)
  %there = f32[32,1,16]{2,1,0} ragged-all-to-all(%x, %out, %n, %n, %n, %n), replica_groups={{0,1,2,3}}
  ROOT %back = f32[8,1,16]{2,1,0} ragged-all-to-all(%there, %x, %n, %n, %n, %n), replica_groups={{0,1,2,3}}
}
"""


def test_a_ragged_exchange_counts_the_rows_of_all_devices_once() -> None:
    """Eight rows of 16 numbers on each of four devices, there and back, whichever side has the buffer."""
    mesh = {"replica": 1, "fsdp": 1, "expert": 4, "context": 1, "tensor": 1}
    found = hlo.measure(RAGGED, mesh)
    assert (found.bytes, found.calls) == ({"expert": 2 * 4 * 8 * 16 * 4}, {"expert": 2})


def test_matmuls_count_by_the_types_of_their_operands() -> None:
    """A product counts as one of 8 bits if both of its operands are, not if they were before a conversion."""
    text = MODULE.replace("TRIPS", "").replace(
        "%fused (p: f32[8,16], q: f32[16,16]) -> f32[8,16] {",
        """%low (p: f8e5m2[8,16], q: f8e4m3fn[16,16], r: bf16[16,16]) -> f32[8,16] {
  %p = f8e5m2[8,16]{1,0} parameter(0)
  %q = f8e4m3fn[16,16]{1,0} parameter(1)
  %c = f16[8,16]{1,0} convert(%p)
  %h = f16[16,16]{1,0} convert(%q)
  %d = f32[8,16]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %e = f32[8,16]{1,0} dot(%c, %h), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %s = f32[8,16]{1,0} add(%d, %e)
}

%fused (p: f32[8,16], q: f32[16,16]) -> f32[8,16] {""",
    )
    text = text.replace(
        "  ROOT %p = f32[8,16]{1,0} collective-permute",
        "  %f = f32[8,16]{1,0} fusion(%x, %w, %w), kind=kOutput, calls=%low\n"
        "  ROOT %p = f32[8,16]{1,0} collective-permute",
    )
    found = hlo.measure(text, MESH)
    assert found.dots == {"f32 x f32": 6, "f8e5m2 x f8e4m3fn": 1, "f16 x f16": 1}
    assert (found.flops, found.flops_fp8) == (8 * 2 * 8 * 16 * 16, 2 * 8 * 16 * 16)


def test_a_matmul_of_a_library_counts() -> None:
    """As XLA writes a call of cuBLASLt for 8-bit operands, and of hipBLASLt by the same name."""
    call = (
        "%u = (f32[8,16]{1,0}, s8[64]{0}) custom-call(%a, %b, %one, %one), "
        'custom_call_target="__cublas$lt$matmul$f8", backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
        '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}'
    )
    text = f"""
ENTRY %main (a: f8e5m2[8,32], b: f8e4m3fn[16,32]) -> f32[8,16] {{
  %a = f8e5m2[8,32]{{1,0}} parameter(0)
  %b = f8e4m3fn[16,32]{{1,0}} parameter(1)
  %one = f32[] constant(1)
  {call}
  ROOT %y = f32[8,16]{{1,0}} get-tuple-element(%u), index=0
}}
"""
    found = hlo.measure(text, MESH)
    assert found.dots == {"f8e5m2 x f8e4m3fn": 1} and found.flops == found.flops_fp8 == 2 * 8 * 16 * 32
    plain = hlo.measure(
        text.replace("$matmul$f8", "$matmul").replace("f8e5m2", "bf16").replace("f8e4m3fn", "bf16"), MESH
    )
    assert (plain.flops, plain.flops_fp8, plain.dots) == (found.flops, 0, {"bf16 x bf16": 1})
