"""Launchers: each submits jobs to one kind of scheduler, in one file; ``base.py`` has their protocol.

May import portatrain's run directory and commands; no framework, no NumPy.
"""
