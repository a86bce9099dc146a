"""Recipes: one file each, with a function `recipe()` that returns a `portatrain.Recipe`.

`recipes/models` has the models. Recipes import portatrain; portatrain does not import recipes.
"""
