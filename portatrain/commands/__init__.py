"""The commands, one file each, with ``add_arguments(parser)`` and ``run(args) -> exit code``.

The docstring of a module is the help text of its command. ``portatrain/cli.py`` has the table; it imports a command
only when it is called. Only backends import frameworks, after everything has been checked.
"""
