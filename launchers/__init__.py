"""Launchers: each carries a job to one kind of place. One file a kind; ``base.py`` is their common shape.

May import portatrain's run directory and commands; no framework, no NumPy.
"""
