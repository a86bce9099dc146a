"""The oracle: every operation of `Ops` in NumPy float64, forward only, written for clarity.

Tests compare the results of other backends with it, and their gradients with its finite differences. It imports NumPy
and the rooms below, no framework.
"""

from portatrain.backends.reference.backend import ReferenceBackend as ReferenceBackend
from portatrain.backends.reference.differences import directional_derivative as directional_derivative
from portatrain.backends.reference.ops import ReferenceOps as ReferenceOps
from portatrain.backends.reference.run import Forward as Forward
from portatrain.backends.reference.run import after_step as after_step
from portatrain.backends.reference.run import forward as forward
from portatrain.backends.reference.run import initial as initial
from portatrain.backends.reference.run import initial_states as initial_states
