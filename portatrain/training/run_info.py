"""What is known of an attempt before its first step, and of this process."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from portatrain.training.metrics import RunInfo
from portatrain.training.metrics.flops import measured_cpu_peak

if TYPE_CHECKING:
    from portatrain.training.trainer import Trainer


def run_info(trainer: Trainer, attempt: int, about: Mapping[str, Any]) -> RunInfo:
    """What does not change during an attempt; `about` is the backend's description of its device."""
    recipe = trainer.recipe
    seq_len = getattr(recipe.data, "seq_len", None)
    counted = getattr(recipe.model, "flops_per_sample", None)
    per_sample = None if counted is None else counted(seq_len) if seq_len else counted()
    peak = measured_cpu_peak() if str(about["device"]).startswith("cpu") and per_sample else None
    return RunInfo(
        run=trainer.run_dir.path.name,
        run_dir=str(trainer.run_dir.path),
        attempt=attempt,
        steps=recipe.steps,
        first_step=trainer.step + 1,
        backend=trainer.backend.name,
        device=f"{about['devices']} x {about['device']}",
        mesh=str(trainer.mesh),
        precision=recipe.precision,
        parameters=trainer.definition.parameters,
        trainable=sum(t.size for n, t in trainer.definition.params.items() if recipe.trains(n)),
        tokens_per_step=recipe.batch * (seq_len or 1),
        unit="tokens" if seq_len else "images",
        flops_per_step=None if per_sample is None else per_sample * recipe.batch,
        peak_flops=peak.flops_per_s if peak else None,
        peak_source=peak.source if peak else "",
        recipe=recipe.to_json(),
    )


def peak_rss_bytes() -> int:
    """The most host memory that this process has had."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
