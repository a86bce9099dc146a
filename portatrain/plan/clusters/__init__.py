"""What there is to run on: chips, slices, clusters by name, the user's clusters.toml."""
