"""The commands, one file each: ``add_arguments(parser)`` and ``run(args) -> exit code``.

The module's docstring is its help. ``portatrain/cli.py`` has the table; a command is imported only
when it is called. Frameworks are imported by the backends alone, once everything has been checked.
"""
