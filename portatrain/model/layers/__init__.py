"""Portable layers: `Module`s over `Ops` from which models are built.

Your own model may use them, subclass them or do without them.
"""

from portatrain.model.layers._alternating import Group as Group
from portatrain.model.layers._alternating import layers_of as layers_of
from portatrain.model.layers._alternating import places_of as places_of
from portatrain.model.layers._attention import Attention as Attention
from portatrain.model.layers._basic import Dropout as Dropout
from portatrain.model.layers._basic import Embedding as Embedding
from portatrain.model.layers._basic import Linear as Linear
from portatrain.model.layers._basic import PatchEmbedding as PatchEmbedding
from portatrain.model.layers._delta import GatedDeltaNet as GatedDeltaNet
from portatrain.model.layers._delta import documents_of as documents_of
from portatrain.model.layers._experts import Experts as Experts
from portatrain.model.layers._experts import MixtureMLP as MixtureMLP
from portatrain.model.layers._experts import Router as Router
from portatrain.model.layers._latent import LatentAttention as LatentAttention
from portatrain.model.layers._mlp import MLP as MLP
from portatrain.model.layers._mlp import GatedMLP as GatedMLP
from portatrain.model.layers._norm import HeadsRMSNorm as HeadsRMSNorm
from portatrain.model.layers._norm import LayerNorm as LayerNorm
from portatrain.model.layers._norm import OneRMSNorm as OneRMSNorm
from portatrain.model.layers._norm import RMSNorm as RMSNorm
