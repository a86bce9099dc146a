"""The audit on transformers: a plain loop with its own save, and its Trainer where accelerate is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from portatrain import audit

pytestmark = pytest.mark.full  # importing transformers takes longer than all the rest
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(4 * 12).reshape(4, 12) * 7 % 32


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def parts(net: Any, optimizer: Any) -> dict[str, Any]:
    net.zero_grad()
    loss = net(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    return {"model": net, "optimizer": optimizer, "batch": TOKENS, "loss": loss, "gradients": True}


def test_a_plain_loop_with_save_pretrained(tmp_path: Path) -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    parts(net, optimizer)
    optimizer.step()
    before = audit.record(**parts(net, optimizer))
    assert before.data["ties"] == [["lm_head.weight", "transformer.wte.weight"]]
    net.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer")

    def restored(**options: Any) -> dict[str, Any]:
        other = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, **options)
        again = torch.optim.AdamW(other.parameters(), lr=1e-3)
        again.load_state_dict(torch.load(tmp_path / "optimizer", weights_only=True))
        other.train()
        return parts(other, again)

    verdict = audit.check(before, **restored())
    assert verdict and verdict.compared > 70, verdict
    half = audit.check(before, **restored(dtype=torch.bfloat16), precision="bfloat16")
    assert "rounded" in half.kinds and not half.kinds & {"loss", "data", "untied", "swapped"}, half
    split = restored()
    split["model"].transformer.h[1].attn.c_attn.weight.data.mul_(-1)
    names = {fault.name: fault for fault in audit.check(before, **split).faults if fault.kind == "sign"}
    assert names["transformer.h.1.attn.c_attn.weight"].layer == "transformer.h.1"


def test_the_trainer_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")

    class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg, misc, name-defined]
        def __len__(self) -> int:
            return 64

        def __getitem__(self, at: int) -> dict[str, Any]:
            row = (torch.arange(12) * 7 + at) % 32
            return {"input_ids": row, "labels": row}

    found: dict[str, Any] = {}

    class Recorder(transformers.TrainerCallback):  # type: ignore[misc]
        """Record what the Trainer saves, and check it when the Trainer has restored it."""

        def __init__(self, before: Any = None) -> None:
            self.before = before

        def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if self.before is None:
                found["before"] = self.recorded(state, more)

        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if self.before is not None and "after" not in found:
                found["after"] = self.recorded(state, more)

        def recorded(self, state: Any, more: dict[str, Any]) -> Any:
            named = {"optimizer": more["optimizer"], "schedule": more["lr_scheduler"]}
            return audit.record(more["model"], step=state.global_step, **named)

    def trainer(before: Any = None) -> Any:
        options = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=6,
            save_steps=3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            save_total_limit=4,
            logging_steps=100,
        )
        recorder = Recorder(before)
        return transformers.Trainer(model=model(seed=3), args=options, train_dataset=Rows(), callbacks=[recorder])

    class Stop(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            control.should_training_stop = state.global_step == 3

    first = trainer()
    first.add_callback(Stop())
    first.train()
    checkpoint = tmp_path / "checkpoint-3"
    trainer(found["before"]).train(resume_from_checkpoint=str(checkpoint))
    verdict = audit.compare(found["before"], found["after"])
    assert verdict and verdict.compared > 70, verdict
    # The fault of a checkpoint without its optimizer: the Trainer goes on, with a fresh one.
    (checkpoint / "optimizer.pt").unlink()
    del found["after"]
    trainer(found["before"]).train(resume_from_checkpoint=str(checkpoint))
    verdict = audit.compare(found["before"], found["after"])
    assert {"missing", "counter"} <= verdict.kinds, verdict
