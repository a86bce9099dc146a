"""Damage checkpoints in ways that a reader must refuse. Imports the package itself only."""
