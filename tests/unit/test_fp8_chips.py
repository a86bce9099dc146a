"""Which chips run precision fp8, and what is said on the others: every chip of the catalog, by the table of kernels."""

from __future__ import annotations

import json
from typing import Any

import pytest

from portatrain.backends import fp8_chips
from portatrain.backends.choose_kernel import check_fp8, choose
from portatrain.backends.kernels import Case, Site
from portatrain.cli import main
from portatrain.errors import UserError
from portatrain.plan.attending import formats_of, refusal
from portatrain.plan.clusters.catalog import CHIPS
from portatrain.plan.cost.policy import PRECISIONS, TUNING, tuning_of
from tests.support.running import BACKENDS

OCP = "h100-sxm h200 b200 gb200 b300 gb300 rubin mi350x mi355x tpu-7x tpu-8t tpu-8i"
FNUZ = "mi300x mi325x"
NONE = (
    "a100-40 a100-80 mi250x tpu-v4 tpu-v5e tpu-v5p tpu-v6e trn1 trn2 trn2u trn3 gaudi2 gaudi3 ascend910b ascend910c "
    "apple-m2-ultra apple-m4-max"
)
EXPECTED = (
    dict.fromkeys(OCP.split(), "ocp")
    | dict.fromkeys(FNUZ.split(), "fnuz")
    | dict.fromkeys(NONE.split(), "")
    | {"cpu": ""}
)
PLANNED = [name for name, chip in CHIPS.items() if not chip.unplanned and chip.stack in TUNING]


def test_every_chip_that_can_be_planned_is_in_the_table() -> None:
    assert set(PLANNED) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_plan_in_fp8_is_made_or_refused_by_the_table_of_kernels(name: str) -> None:
    chip, fp8 = CHIPS[name], PRECISIONS["fp8"]
    tuning = tuning_of(chip.stack)
    error = refusal(chip, fp8, tuning)
    assert refusal(chip, PRECISIONS["bf16"], tuning) is None
    if name == "cpu" or EXPECTED[name]:
        assert error is None
        site = Site(backend=tuning.backend, device=tuning.device, formats=formats_of(chip))
        kernel = choose("fp8_matmul", Case(site=site, dtype="bfloat16", shape=(64, 64, 64))).kernel
        assert kernel.name == ("emulated" if name == "cpu" else "float8" if tuning.backend == "jax" else "scaled_mm")
        assert formats_of(chip) == EXPECTED[name]
        return
    assert error is not None and "\n" not in str(error)
    said = f"precision fp8 on {name}: expected a chip with 8-bit matmuls (H100, "
    assert str(error).startswith(said) and "MI300X" in error.expected and "TPU 7x" in error.expected
    assert "precision=bf16" in error.do and "no kernel for it" in error.got


def test_the_message_names_the_chips_on_offer_that_have_8_bit_matmuls() -> None:
    named = {part.strip().lower() for part in fp8_chips.CHIPS.replace("(", ",").replace(")", ",").split(",")}
    offered = {name for name, formats in EXPECTED.items() if formats and CHIPS[name].offered}
    for name in offered:
        assert name.partition("-sxm")[0].replace("tpu-", "tpu ") in named, name


def test_devices_are_known_by_capability_architecture_and_kind() -> None:
    capabilities = ("8.0", "8.6", "8.9", "9.0", "10.0", "<unknown compute-capability>", "")
    assert [fp8_chips.of_nvidia(c) for c in capabilities] == ["", "", *["ocp"] * 3, "", ""]
    assert [fp8_chips.of_amd(c) for c in ("gfx90a", "gfx942:sramecc+:xnack-", "gfx950")] == ["", "fnuz", "ocp"]
    assert [fp8_chips.of_tpu(k) for k in ("TPU v4", "TPU v5p", "TPU v6 lite", "TPU7x")] == [""] * 3 + ["ocp"]
    # XLA's compiler does not tell the architecture of an AMD GPU that is absent.
    unknown = "<unknown compute-capability>"
    assert fp8_chips.of_gpu(unknown, "AMD Instinct MI300X") == "fnuz"
    assert fp8_chips.of_gpu(unknown, "AMD Instinct MI355X") == "ocp"
    assert fp8_chips.of_gpu(unknown, "AMD Instinct MI250X") == ""


@pytest.mark.parametrize(("backend", "device"), [("jax", "gpu"), ("jax", "tpu"), ("torch", "cuda"), ("torch", "hpu")])
def test_a_device_without_8_bit_matmuls_is_refused_unless_the_emulation_is_named(backend: str, device: str) -> None:
    with pytest.raises(UserError, match=r"precision fp8 on some chip: expected .* got no kernel for it .*emulated: "):
        check_fp8(Site(backend=backend, device=device), "some chip")
    named = Site(backend=backend, device=device, named=(("fp8_matmul", "emulated"),))
    check_fp8(named, "some chip")
    assert choose("fp8_matmul", Case(site=named, dtype="bfloat16", shape=(8, 8, 8))).kernel.name == "emulated"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kernel_that_does_not_cover_a_cpu_is_refused_with_what_runs_instead(backend: str) -> None:
    name = {"jax": "float8", "torch": "scaled_mm"}[backend]
    site = Site(backend=backend, named=(("fp8_matmul", name),))
    with pytest.raises(UserError, match=rf"kernel fp8_matmul={name}: .*not programmed for cpu.*emulated runs then"):
        choose("fp8_matmul", Case(site=site, dtype="bfloat16", shape=(8, 8, 8)))


def plan_of(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[dict[str, Any]], str]:
    code = main(["plan", "llama3-1b", "--json", *words])
    found = capsys.readouterr()
    return code, json.loads(found.out or "[]"), found.err


def test_the_command_refuses_or_leaves_out_what_a_chip_does_not_compute(capsys: pytest.CaptureFixture[str]) -> None:
    fp8 = ("--set", "precision=fp8")
    code, plans, said = plan_of(capsys, "--cluster", "a100-8", *fp8)
    assert (code, plans) == (2, []) and said.count("\n") == 1 and "precision fp8 on a100-80: expected a chip" in said
    code, plans, _ = plan_of(capsys, "--cluster", "a100-8,h100-8", *fp8)
    assert code == 0 and [plan["status"] for plan in plans] == ["not-planned", "fits"]
    assert "precision fp8 on a100-80" in plans[0]["would_fit"][0]
    code, plans, _ = plan_of(capsys, "--cluster", "tpu-v6e-8", "--precision", "bf16,fp8")
    assert code == 0 and plans[0]["status"] == "fits"
    assert any("precision fp8 on tpu-v6e is left out" in note for note in plans[0]["notes"])
