"""Save and restore the checkpoints of a run, find the newest valid one, and convert other formats (interop)."""
