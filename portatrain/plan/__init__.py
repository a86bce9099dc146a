"""Plan what a recipe needs and costs on a cluster, by arithmetic on nominal figures: no framework, no accelerator.

``clusters/`` describes chips and clusters, ``cost/`` computes what a step takes there, ``search.plan`` chooses the best
ways to run it, and ``compilers/`` checks a plan with real compilers. Imports point in that order, never back.
"""
