"""Portable layers: plain `Module`s over `Ops`, from which models are put together.

They import portatrain's core only; a model of your own may use, subclass or ignore them.
"""

from portatrain.layers._attention import Attention as Attention
from portatrain.layers._basic import Dropout as Dropout
from portatrain.layers._basic import Embedding as Embedding
from portatrain.layers._basic import Linear as Linear
from portatrain.layers._basic import PatchEmbedding as PatchEmbedding
from portatrain.layers._mlp import MLP as MLP
from portatrain.layers._mlp import GatedMLP as GatedMLP
from portatrain.layers._norm import LayerNorm as LayerNorm
from portatrain.layers._norm import RMSNorm as RMSNorm
