"""Optimizer rules, learning-rate schedules and gradient clipping, as frozen dataclasses with pure functions.

A rule updates one logical tensor. Backends wrap it as an optax GradientTransformation or a torch Optimizer. This room
imports portatrain.errors, portatrain.config and the standard library only: no NumPy, no framework.
"""

from portatrain.optim.base import Array as Array
from portatrain.optim.base import ArrayNamespace as ArrayNamespace
from portatrain.optim.base import Info as Info
from portatrain.optim.base import Rule as Rule
from portatrain.optim.base import Slot as Slot
from portatrain.optim.base import decays_by_default as decays_by_default
from portatrain.optim.base import lr_factor as lr_factor
from portatrain.optim.clip import clip_scale as clip_scale
from portatrain.optim.clip import global_norm as global_norm
from portatrain.optim.declared import declared_slots as declared_slots
from portatrain.optim.rules import SGD as SGD
from portatrain.optim.rules import Adafactor as Adafactor
from portatrain.optim.rules import AdamW as AdamW
from portatrain.optim.rules import Lion as Lion
from portatrain.optim.rules import Muon as Muon
from portatrain.optim.schedules import WSD as WSD
from portatrain.optim.schedules import Constant as Constant
from portatrain.optim.schedules import Cosine as Cosine
from portatrain.optim.schedules import Linear as Linear
from portatrain.optim.schedules import Schedule as Schedule
