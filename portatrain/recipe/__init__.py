"""A recipe is everything that decides a run, as one frozen dataclass. Load one by name or file; override fields."""

from portatrain.recipe.recipe import ModelSpec as ModelSpec
from portatrain.recipe.recipe import Recipe as Recipe
from portatrain.recipe.recipe import apply_overrides as apply_overrides
from portatrain.recipe.recipe import load_recipe as load_recipe
from portatrain.recipe.recipe import shipped_recipes as shipped_recipes
