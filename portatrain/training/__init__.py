"""The loop: data in, steps, evaluation, saves, records out; the continuity check; what may stop it."""
