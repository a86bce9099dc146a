"""Check a plan with real compilers, without an accelerator: `portatrain plan --compile`.

``targets`` chooses the compiler for a cluster and its options. ``job`` runs it in a separate process and caches the
answer. ``xla`` and ``fsdp2`` run in that process, and ``hlo`` reads compiled programs. Only ``xla`` and ``fsdp2``
import a framework, and only ``worker`` imports them.
"""
