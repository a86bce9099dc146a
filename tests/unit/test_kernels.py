"""The table of kernels: every case has one, the reasons are given, and a kernel that is named runs or is refused."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterator
from typing import Any

import pytest

from portatrain.backends import choose_kernel, kernels
from portatrain.backends.choose_kernel import choose
from portatrain.backends.kernels import Case, Kernel, Site
from portatrain.errors import UserError
from portatrain.system import plugins

BACKENDS = ("jax", "torch", "torch-xla")


def case(backend: str, *traits: str, shape: tuple[int, ...] = (2, 64, 64, 4, 2, 16), **site: object) -> Case:
    return Case(site=Site(backend=backend, **site), dtype="float32", shape=shape, traits=frozenset(traits))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_row_is_written_out_and_covers_every_case(backend: str) -> None:
    *_, last = kernels.rows("attention", backend)
    assert last.name == "written-out"
    every = ("causal", "window", "segments", "positions", "prefix", "alibi", "softcap", "sinks", "value-size", "uneven")
    assert last.refuses(case(backend, *every, shape=(3, 5, 7, 4, 1, 6))) is None
    names = [k.name for k in kernels.rows("attention", backend)]
    assert len(names) == len(set(names))


def gpu(*traits: str, shape: tuple[int, ...] = (2, 64, 64, 4, 2, 16), dtype: str = "bfloat16") -> Case:
    return dataclasses.replace(case("torch", *traits, shape=shape, device="cuda"), dtype=dtype)


LONG = (1, 32768, 32768, 32, 8, 128)


@pytest.mark.parametrize(
    ("given", "name", "against"),
    [
        (case("jax", "causal"), "written-out", {"chunked": "fit in 256 MiB"}),
        (case("jax", "causal", shape=LONG), "chunked", {"written-out": "chunked comes first"}),
        (case("jax", "causal", "uneven", shape=LONG), "written-out", {"chunked": "do not divide"}),
        (case("jax", "causal", shape=LONG, device="tpu"), "splash", {"chunked": "comes first"}),
        (case("torch", "causal"), "sdpa-causal", {"sdpa-masked": "comes first", "written-out": "comes first"}),
        (case("torch"), "sdpa-masked", {"sdpa-causal": "not causal"}),
        (case("torch", "causal", "segments"), "sdpa-masked", {"sdpa-causal": "knows no segments"}),
        (case("torch", "causal", shape=(2, 1, 64, 4, 2, 16)), "sdpa-masked", {"sdpa-causal": "1 queries and 64 keys"}),
        (case("torch", "causal", "sinks"), "written-out", {"sdpa-causal": "no sinks", "sdpa-masked": "no sinks"}),
        (case("torch", "causal", "value-size"), "sdpa-causal", {}),
        (case("torch", "causal", "segments", "value-size"), "sdpa-masked", {}),
        (case("jax", "causal", "sinks", "value-size", shape=LONG), "chunked", {}),
        (
            case("torch", "causal", "softcap"),
            "written-out",
            {"sdpa-causal": "soft-cap", "sdpa-masked": "soft-cap", "flex": "no backward pass on a CPU"},
        ),
        (case("torch", "causal", device="npu"), "sdpa-causal", {"flex": "on cuda and xpu, not on npu"}),
        (case("torch", "causal", "segments", device="npu"), "sdpa-masked", {}),
        (gpu("causal"), "sdpa-causal", {"flex": "comes first"}),
        (gpu(), "sdpa-masked", {"sdpa-causal": "not causal"}),
        (gpu("causal", "segments"), "flex", {"sdpa-masked": "64 x 64 elements", "sdpa-causal": "no segments"}),
        (gpu("causal", "softcap"), "flex", {"sdpa-causal": "soft-cap", "written-out": "flex comes first"}),
        (gpu("causal", dtype="float32"), "flex", {"sdpa-causal": "one head of keys for each head, not 2 for 4"}),
        (gpu(shape=(2, 64, 64, 4, 2, 512)), "flex", {"sdpa-causal": "not causal", "sdpa-masked": "not 512"}),
        (gpu("causal", shape=(2, 64, 64, 4, 4, 18), dtype="float32"), "flex", {"sdpa-causal": "multiple of 4"}),
        (gpu("causal", "window", shape=(2, 64, 64, 4, 2, 8)), "written-out", {"flex": "at least 16, not 8"}),
        (gpu("causal", "positions", shape=(2, 1, 64, 4, 2, 16)), "sdpa-masked", {"flex": "one query"}),
        (case("torch-xla", "causal"), "written-out", {}),
    ],
)
def test_what_runs_and_why_not_the_others(given: Case, name: str, against: dict[str, str]) -> None:
    found = choose("attention", given)
    assert found.kernel.name == name
    reasons = dict(found.against)
    assert set(reasons) == {k.name for k in kernels.rows("attention", given.site.backend)} - {name}
    assert all(part in reasons[other] for other, part in against.items())


PACKED = ("causal", "window", "segments", "softcap", "sinks", "value-size")


@pytest.mark.parametrize(
    ("traits", "changed", "reason"),
    [
        (PACKED, {}, None),
        ((), {}, None),
        (("cross",), {"shape": (1, 256, 4096, 32, 8, 128)}, None),
        (("causal",), {"dtype": "bfloat16", "shape": (1, 1000, 1000, 3, 1, 80)}, None),
        (PACKED, {"device": "cpu"}, "a kernel for TPUs"),
        (PACKED, {"device": "gpu"}, "a kernel for TPUs"),
        (("positions",), {}, "knows no positions"),
        (("causal", "prefix", "alibi"), {}, "knows no alibi or prefix"),
        (("segments", "segment-pair"), {}, "segments of their own"),
        (("window", "cross"), {}, "a query may see no key"),
        (("causal", "uneven"), {}, "the queries do not divide"),
        (("causal", "uneven-batch"), {}, "the samples do not divide"),
        (("causal", "uneven-heads"), {}, "the heads do not divide"),
        (("causal",), {"shape": (1, 64, 64, 32, 8, 128)}, "fewer than a block of 128"),
        (("causal", "cross"), {"shape": (1, 1, 4096, 32, 8, 128)}, "1 queries and 4096 keys"),
        (("causal",), {"shape": (1, 4096, 4096, 4, 4, 1024)}, "at most 256 in float32"),
        (("causal",), {"shape": (1, 4096, 4096, 4, 4, 512), "dtype": "bfloat16"}, None),
        (("causal",), {"dtype": "float16"}, "not in float16"),
    ],
)
def test_what_splash_covers(traits: tuple[str, ...], changed: dict[str, Any], reason: str | None) -> None:
    device = changed.pop("device", "tpu")
    given = dataclasses.replace(case("jax", *traits, shape=LONG, device=device), **changed)
    (splash,) = kernels.rows("attention", "jax", "splash")
    said = splash.refuses(given)
    assert said is None if reason is None else said is not None and reason in said
    assert (choose("attention", given).kernel is splash) == (reason is None)


def test_splash_runs_on_another_device_if_it_is_named() -> None:
    named = {"named": (("attention", "splash"),)}
    assert choose("attention", case("jax", *PACKED, shape=LONG, device="cpu", **named)).kernel.name == "splash"
    with pytest.raises(UserError, match=r"attention=splash.*knows no prefix.*chunked runs then"):
        choose("attention", case("jax", "causal", "prefix", shape=LONG, device="cpu", **named))


def test_a_kernel_that_is_named_runs_and_the_others_say_so() -> None:
    found = choose("attention", case("torch", "causal", named=(("attention", "written-out"),)))
    assert found.kernel.name == "written-out"
    named = dict.fromkeys(("sdpa-causal", "sdpa-masked"), "written-out was named")
    assert dict(found.against) == {**named, "flex": "FlexAttention has no backward pass on a CPU"}
    assert found.as_json()["named"] is True


def test_a_kernel_that_is_named_and_does_not_apply_is_refused_with_its_reason() -> None:
    with pytest.raises(UserError, match=r"attention=sdpa-causal.*knows no window.*sdpa-masked runs then"):
        choose("attention", case("torch", "causal", "window", named=(("attention", "sdpa-causal"),)))


def test_flex_is_refused_on_a_cpu_with_its_reason() -> None:
    with pytest.raises(UserError, match=r"attention=flex.*no backward pass on a CPU.*sdpa-masked runs then"):
        choose("attention", case("torch", "causal", "window", named=(("attention", "flex"),)))


def test_names_are_checked_before_anything_runs() -> None:
    with pytest.raises(UserError, match=r"sdpa-casual.*sdpa-causal"):
        kernels.rows("attention", "torch", "sdpa-casual")
    with pytest.raises(UserError, match="chunked, splash, written-out"):
        kernels.rows("attention", "jax", "sdpa-causal")
    with pytest.raises(UserError, match="attention"):
        kernels.rows("atention", "jax")


@pytest.mark.parametrize("text", ["attention", "attention=", "norm=fused", "=x"])
def test_texts_that_name_no_kernel(text: str) -> None:
    with pytest.raises(UserError, match="--kernel"):
        choose_kernel.parse([text])


def test_texts() -> None:
    assert choose_kernel.parse([]) == ()
    assert choose_kernel.parse(["attention=written-out"]) == (("attention", "written-out"),)
    with pytest.raises(UserError, match="each operation once"):
        choose_kernel.parse(["attention=a", "attention=b"])


def test_choices_are_taken_once_a_case() -> None:
    choose_kernel.taken()
    for _ in range(3):
        choose("attention", case("torch", "causal"))
    choose("attention", case("torch"))
    found = choose_kernel.taken()
    assert [(c["kernel"], c["traits"]) for c in found] == [("sdpa-causal", ["causal"]), ("sdpa-masked", [])]
    assert choose_kernel.taken() == []


LAB = Kernel(
    operation="attention",
    name="lab-flash",
    backends=("torch",),
    where=f"{__name__}:lab_attention",
    refuses=lambda case: "it needs head sizes of 16" if case.shape[-1] != 16 else None,
)


def lab_attention() -> None: ...


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    point = importlib.metadata.EntryPoint("lab", f"{__name__}:{request.param}", kernels.GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == kernels.GROUP else [])
    kernels.others.cache_clear()
    yield
    kernels.others.cache_clear()


@pytest.mark.parametrize("lab", ["LAB"], indirect=True)
@pytest.mark.usefixtures("lab")
def test_a_laboratorys_kernel_comes_first_where_it_applies() -> None:
    found = choose("attention", case("torch", "causal"))
    assert found.kernel is LAB and found.kernel.load() is lab_attention
    wide = choose("attention", case("torch", "causal", shape=(2, 64, 64, 4, 2, 32)))
    assert wide.kernel.name == "sdpa-causal" and dict(wide.against)["lab-flash"] == "it needs head sizes of 16"
    assert choose("attention", case("jax", "causal")).kernel.name == "written-out"


@pytest.mark.parametrize("lab", ["BACKENDS", "nothing_there"], indirect=True)
@pytest.mark.usefixtures("lab")
def test_a_package_that_registers_no_kernel_is_named() -> None:
    with pytest.raises(UserError, match="kernel lab"):
        choose("attention", case("torch", "causal"))


def test_a_site_refuses_a_kernel_that_its_backend_lacks() -> None:
    @dataclasses.dataclass
    class Named:
        kernels: tuple[tuple[str, str], ...]

    with pytest.raises(UserError, match="kernel of attention on jax"):
        Site.of(Named((("attention", "sdpa-causal"),)), backend="jax", device="cpu")
