"""Launchers: each submits jobs to one kind of scheduler, in one file (Slurm in three).

``base.py`` has their Protocol and their table. A new launcher is a file here, or a package of its own;
``clusters.toml`` names it by ``engine``. ``supervisor.py`` runs a job on its first host, and ``rank_entry.py`` starts
each process of an attempt. May import portatrain's rooms below it; no framework, no NumPy.
"""
