"""The training loop: steps, evaluation, saves, hooks and records; the continuity check and stop requests."""
