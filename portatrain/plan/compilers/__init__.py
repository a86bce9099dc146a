"""A plan checked by the real compilers, with no accelerator there: `portatrain plan --compile`.

``targets`` says which compiler a cluster has and what it must be told, ``job`` runs one in a process of its own and
keeps what it found, ``xla`` and ``fsdp2`` are what runs there, ``hlo`` reads compiled programs. Only those two import a
framework, and nothing but ``worker`` imports them.
"""
