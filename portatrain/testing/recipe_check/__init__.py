"""Check a recipe before a run: its model at small size through the oracle, jax and torch.

`check_recipe(recipe)` returns a `Report`. The command is `portatrain check`; docs/start/check.md says what is checked.
The files: `small` makes the recipe small and its batches, `oracle` has the checks that need no framework, `watch`
looks into a forward pass, `special` tries operations at their kinks, `measured` and `processes` run a backend,
`compare` compares, and `run` is the order of it all.
"""
