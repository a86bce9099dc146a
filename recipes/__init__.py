"""Recipes: one readable file each, with a function `recipe()` that returns a `portatrain.Recipe`.

Models lie in `recipes/models`. Recipes import portatrain's public names only; nothing imports recipes.
"""
