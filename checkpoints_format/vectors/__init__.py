"""Hold golden checkpoints of every released version, and their generator. Imports the package itself only."""
