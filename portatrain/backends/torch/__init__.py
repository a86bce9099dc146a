"""Run programs in torch: nn.Module, one module a layer, torch.compile per block.

May import the core and torch; no other backend.
"""

from portatrain.backends.torch.backend import TorchBackend as TorchBackend
from portatrain.backends.torch.lower import lower as lower
from portatrain.backends.torch.ops import TorchOps as TorchOps
