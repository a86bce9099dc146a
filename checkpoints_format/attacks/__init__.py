"""Damaged and hostile checkpoints, each of which must be refused. Imports the package itself only."""
