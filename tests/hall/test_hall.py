"""The hall of real bugs: each is built again in small, is seen by the audit, and is gone once it is mended."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from portatrain.testing import audit
from tests.hall import ranks

torch = pytest.importorskip("torch")
HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in ("ranks", "test_hall"))
FAULTS = {name: importlib.import_module(f"tests.hall.{name}") for name in NAMES}
ALONE = [name for name, fault in FAULTS.items() if not hasattr(fault, "RANKS")]
GROUPS = [name for name in NAMES if name not in ALONE]


@pytest.mark.parametrize("name", ALONE)
def test_a_fault_is_seen_and_gone_once_mended(name: str) -> None:
    fault = FAULTS[name]
    wrong, mended = fault.fault(True), fault.fault(False)
    assert wrong.kinds == fault.KINDS and fault.SAYS in str(wrong), wrong
    assert mended, mended


HONEST = [
    f"{model},{optimizer},cosine,{how}"
    for model in ("mlp", "tied")
    for optimizer in ("AdamW", "SGD", "NAdam")
    for how in ("sharded", "whole")
]
PLANTED = {
    "shard": ({"changed"}, "in rows 8 to 15 of 16 only"),
    "moments": ({"changed"}, "changed: m of 2.weight"),
    "rate": ({"setting"}, "rank 1 lr=0.5"),
    "rows": ({"data", "data-repeated"}, "ranks 0 and 1 have 4 of 4 rows in common"),
}


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What two ranks found, and their folder: starting them takes longer than most cases."""
    folder = tmp_path_factory.mktemp("group")
    calls = [f"tests.hall.{name}:fault:{wrong}" for name in GROUPS for wrong in "10"]
    calls += [f"tests.support.fsdp_audits:honest:{case}" for case in HONEST]
    calls += [f"tests.support.fsdp_audits:planted:{fault}" for fault in PLANTED]
    return folder, ranks.run(folder, [*calls, f"tests.support.fsdp_audits:moved:{folder}"])


@pytest.mark.full
@pytest.mark.parametrize("name", GROUPS)
def test_a_fault_of_two_ranks(name: str, group: tuple[Path, dict[str, Any]]) -> None:
    wrong, mended = (group[1][f"tests.hall.{name}:fault:{w}"] for w in "10")
    assert set(wrong["kinds"]) == FAULTS[name].KINDS and FAULTS[name].SAYS in wrong["text"], wrong
    assert mended["kinds"] == [], mended


@pytest.mark.full
def test_honest_saves_of_an_fsdp2_trainer(group: tuple[Path, dict[str, Any]]) -> None:
    found = [group[1][f"tests.support.fsdp_audits:honest:{case}"] for case in HONEST]
    assert [one["text"] for one in found if one["kinds"]] == [] and len(found) == 12


@pytest.mark.full
@pytest.mark.parametrize("fault", PLANTED)
def test_a_fault_of_one_rank_of_an_fsdp2_trainer(fault: str, group: tuple[Path, dict[str, Any]]) -> None:
    found, (kinds, says) = group[1][f"tests.support.fsdp_audits:planted:{fault}"], PLANTED[fault]
    assert set(found["kinds"]) == kinds and says in found["text"], found


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # DCP says so when one process loads
def test_from_two_ranks_to_one_process(group: tuple[Path, dict[str, Any]]) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as sd

    from tests.support.audited import Torch, rows

    folder, found = group
    assert found[f"tests.support.fsdp_audits:moved:{folder}"]["kinds"] == []
    one = Torch(seed=5)
    model, optimizer = sd.get_state_dict(one.model, one.optimizer)
    dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder / "dcp", no_dist=True)
    sd.set_state_dict(one.model, one.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    before = audit.load(folder / "before.json")
    verdict = audit.check(before, one.model, one.optimizer, batch=rows(2), step=2)
    assert verdict, verdict
    one.model[0].weight.data[3] += 1
    assert audit.check(before, one.model, one.optimizer).kinds == {"changed"}


@pytest.mark.parametrize("name", NAMES)
def test_a_fault_is_small_and_has_its_source(name: str) -> None:
    fault = FAULTS[name]
    code = [line for line in Path(str(fault.__file__)).read_text().split("\n") if line.strip()]
    assert len(code) < 60 and fault.LINK.startswith("https://")


def test_the_table_of_the_page_has_every_fault() -> None:
    page = (HERE.parents[1] / "docs" / "understand" / "hall.md").read_text(encoding="utf-8")
    rows = [f"| [{f.WHO}]({f.LINK}) | {f.WHAT} | {f.COST} | " for f in FAULTS.values()]
    assert [row for row in rows if row not in page] == [] and len(FAULTS) >= 14
