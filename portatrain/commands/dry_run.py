"""``launch --cluster NAME RECIPE --dry-run`` for a cluster that is not this machine: what would run there, planned."""

from __future__ import annotations

from collections.abc import Sequence

from portatrain.plan.clusters import clusters_toml, names
from portatrain.plan.clusters.cluster import Cluster
from portatrain.plan.cost import recipes
from portatrain.plan.result import Plan
from portatrain.plan.search import plan
from portatrain.recipe import Recipe


def clusters(wanted: Sequence[str], recipe: str, others: Sequence[str] = ()) -> list[Cluster]:
    """The clusters of these names, from clusters.toml beside the recipe or from the catalog (``others``: also valid).

    Raises:
      UserError: there is none of a name; the nearest are in the message.
    """
    files = clusters_toml.files(recipe)
    return [names.resolve(name, files=files, others=others) for name in wanted]


def show(recipe: Recipe, wanted: Sequence[Cluster]) -> list[Plan]:
    """Print the plan of ``recipe`` for every cluster, in the order of preference; the plans."""
    from rich.console import Console

    from portatrain.plan import render

    shape = recipes.shape_of(recipe)
    plans = [plan(shape, cluster) for cluster in wanted]
    console = Console() if Console().is_terminal else Console(width=180)
    render.show(plans, console, details=len(plans) == 1)
    return plans
