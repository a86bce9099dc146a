"""Check a plan with real compilers, without an accelerator: `portatrain plan --compile`.

``targets`` chooses the compiler for a cluster and its options, ``job`` runs it in a process of its own and caches the
answer, ``xla`` and ``fsdp2`` run in that process, and ``hlo`` reads compiled programs. Only those two import a
framework, and nothing but ``worker`` imports them.
"""
