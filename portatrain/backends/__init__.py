"""Lower a model and run its steps: one Protocol, one folder for each framework.

Only these folders import a framework.
"""
