"""Describe the hardware that a recipe can run on: chips, slices, clusters by name, and the user's clusters.toml."""
