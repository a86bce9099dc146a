"""Check a recipe before a run: its model at small size through the oracle, jax and torch.

`check_recipe(recipe)` in `run` returns a `Report`. The command is `portatrain check`; docs/start/check.md says what is
checked. The files: `small` makes the recipe small and its batches; `oracle` and `properties` have the checks that need
no framework, on a `subject`; `watch` looks into a forward pass and `blame` finds the operation at fault; `special`
tries operations at their kinks; `measured` and `processes` run a backend; `compare` compares; `run` has the order of it
all.
"""
