"""`Recipe`: everything that decides what a run computes, as one frozen dataclass. Load one by name or file, override
its fields, and hash it. This room imports definitions only: no framework."""

from portatrain.config import added_later as added_later
from portatrain.recipe.loading import apply_overrides as apply_overrides
from portatrain.recipe.loading import load_recipe as load_recipe
from portatrain.recipe.loading import shipped_recipes as shipped_recipes
from portatrain.recipe.origin import Origin as Origin
from portatrain.recipe.recipe import ModelSpec as ModelSpec
from portatrain.recipe.recipe import Recipe as Recipe
from portatrain.recipe.referee import Referee as Referee
from portatrain.recipe.spikes import Spikes as Spikes
