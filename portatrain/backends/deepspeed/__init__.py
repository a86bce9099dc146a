"""Run DeepSpeed's ZeRO stages 1, 2 and 3 on the module that the torch backend lowers.

May import the core, the torch backend and deepspeed.
"""

from portatrain.backends.deepspeed.backend import Zero1 as Zero1
from portatrain.backends.deepspeed.backend import Zero2 as Zero2
from portatrain.backends.deepspeed.backend import Zero3 as Zero3
