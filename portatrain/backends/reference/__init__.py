"""The oracle: every operation in NumPy float64, forward only, written for clarity from the docstrings of `Ops`.

What other backends compute is compared with it; gradients are compared with its differences. It imports NumPy and
portatrain's core, no framework.
"""

from portatrain.backends.reference.backend import ReferenceBackend as ReferenceBackend
from portatrain.backends.reference.differences import directional_derivative as directional_derivative
from portatrain.backends.reference.ops import ReferenceOps as ReferenceOps
from portatrain.backends.reference.run import Forward as Forward
from portatrain.backends.reference.run import after_step as after_step
from portatrain.backends.reference.run import forward as forward
from portatrain.backends.reference.run import initial as initial
from portatrain.backends.reference.run import initial_states as initial_states
