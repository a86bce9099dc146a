"""Planning: what a recipe needs and what it costs on a cluster, from nominal figures; plain Python, no framework.

``names.resolve`` finds a cluster, ``recipes.shape_of`` what a recipe needs, ``search.plan`` the best ways to run it.
May be imported by launchers and commands; imports the core (errors, layout, module, recipe) only.
"""
