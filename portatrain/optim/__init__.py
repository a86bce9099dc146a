"""Optimizers as data: each rule is one pure function of one logical tensor, written once.

A backend wraps a rule (an optax GradientTransformation, a torch Optimizer); nothing here knows
which. May import portatrain.errors, portatrain.config and the standard library: no NumPy, no framework.
"""

from portatrain.optim.base import Array as Array
from portatrain.optim.base import Info as Info
from portatrain.optim.base import Rule as Rule
from portatrain.optim.base import Slot as Slot
from portatrain.optim.base import Xp as Xp
from portatrain.optim.base import decays_by_default as decays_by_default
from portatrain.optim.clip import clip_scale as clip_scale
from portatrain.optim.clip import global_norm as global_norm
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
