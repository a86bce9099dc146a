"""Golden checkpoints of every released version, and what makes them. Imports the package itself only."""
