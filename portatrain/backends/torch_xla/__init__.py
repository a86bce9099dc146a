"""Run the torch backend's module on XLA devices, sharded over all of them by SPMD annotations.

May import the core, the torch backend and torch_xla.
"""

from portatrain.backends.torch_xla.backend import XlaBackend as XlaBackend
