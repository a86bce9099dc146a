"""The table of devices: what is found on which build of torch, by simulation. Nothing here has run on a chip."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from portatrain.backends.torch import devices
from portatrain.backends.torch.devices import DEVICES, check_device, detect, local_device, process_group_backend
from portatrain.errors import UserError
from portatrain.model.precision import PRECISIONS


def build(*there: str, hip: str | None = None, mps: bool = False) -> Any:
    """A torch that sees devices of the types `there`; its other modules say that they have none."""

    def module(name: str) -> Any:
        return SimpleNamespace(is_available=lambda: name in there, device_count=lambda: 2, set_device=lambda i: None)

    backends = SimpleNamespace(mps=SimpleNamespace(is_available=lambda: mps))
    names = {name: module(name) for name in ("cuda", "xpu", *there)}
    return SimpleNamespace(version=SimpleNamespace(hip=hip), backends=backends, **names)


@pytest.mark.parametrize(
    ("torch", "found"),
    [
        (build("cuda"), "cuda"),
        (build("cuda", hip="7.0.51831"), "rocm"),
        (build(hip="7.0.51831"), "cpu"),  # a ROCm build on a machine with no GPU
        (build("xpu"), "xpu"),
        (build("hpu"), "hpu"),
        (build("npu"), "npu"),
        (build(mps=True), "mps"),
        (build(), "cpu"),
        (build("cuda", "xpu"), "cuda"),
        (SimpleNamespace(version=SimpleNamespace(), backends=SimpleNamespace()), "cpu"),  # an older torch
    ],
)
def test_what_is_found(torch: Any, found: str) -> None:
    assert detect(torch).name == found


def test_a_plugin_is_imported_where_it_is_installed(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch_npu.py").write_text("imported = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    detect(build("npu"))
    import sys

    assert sys.modules.pop("torch_npu").imported


def test_every_row_is_complete() -> None:
    for name, row in DEVICES.items():
        assert row.name == name and row.ran and row.attention
        assert set(row.precisions) <= set(PRECISIONS) and "fp32" in row.precisions
        assert all("=" in setting and why for setting, why in row.environment.items())
    assert [r.name for r in DEVICES.values() if not r.ran.startswith("never")] == ["cpu"]


def test_collectives() -> None:
    said = {name: process_group_backend(row) for name, row in DEVICES.items() if row.collectives}
    assert said == {
        "cuda": "cpu:gloo,cuda:nccl",
        "rocm": "cpu:gloo,cuda:nccl",
        "xpu": "cpu:gloo,xpu:xccl",
        "hpu": "cpu:gloo,hpu:hccl",
        "npu": "cpu:gloo,npu:hccl",
        "cpu": "gloo",
    }


def test_the_device_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch, "xpu", build("xpu").xpu)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(local_device(DEVICES["xpu"], "mesh fsdp=2")) == "xpu:1"
    assert str(local_device(DEVICES["cpu"], "mesh fsdp=2")) == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        UserError, match=r"mesh fsdp=4: expected a device for every process.*got 2 xpu device\(s\) for process 2"
    ):
        local_device(DEVICES["xpu"], "mesh fsdp=4")
    with pytest.raises(UserError, match=r"collectives between processes, got mps"):
        local_device(DEVICES["mps"], "mesh fsdp=2")


def test_a_precision_that_a_device_lacks() -> None:
    import dataclasses

    old = dataclasses.replace(DEVICES["cuda"], name="old", precisions=("fp32",))
    check_device(old, "fp32")
    with pytest.raises(UserError, match="precision bf16 on old: expected one of fp32"):
        check_device(old, "bf16")


def test_this_machine() -> None:
    row = detect()
    device = devices.pick_device()
    assert device.type == row.type and devices.row_of(device) is row
    assert devices.device_name(device)
    assert (devices.peak_bytes(device) is None) == (row.type == "cpu")
