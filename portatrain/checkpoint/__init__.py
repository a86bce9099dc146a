"""A run's checkpoints: what is saved, where, by whom; the newest that is whole; other people's formats (interop)."""
