"""Run programs in JAX: flax.nnx modules, one compiled step, NamedSharding from the Layout, optax for the optimizer.

May import the core, jax, flax and optax; no other backend.
"""

from portatrain.backends.jax.backend import JaxBackend as JaxBackend
from portatrain.backends.jax.lower import lower as lower
from portatrain.backends.jax.ops import JaxOps as JaxOps
