"""Surgery: transforms of a checkpoint that make the tensors of another model, each with a rule for optimizer slots.

A surgery is a function `(before, after) -> Surgery` of the two models' definitions: it says how every tensor that
differs is made, and whether the function of the model stays. `operate` carries it out, `proof` measures it.
"""

from portatrain.checkpoint.surgery.edits import INITIAL as INITIAL
from portatrain.checkpoint.surgery.edits import Edit as Edit
from portatrain.checkpoint.surgery.edits import Surgery as Surgery
from portatrain.checkpoint.surgery.names import NAMES as NAMES
from portatrain.checkpoint.surgery.names import chosen as chosen
from portatrain.checkpoint.surgery.operate import Operated as Operated
from portatrain.checkpoint.surgery.proof import Proof as Proof
from portatrain.checkpoint.surgery.proof import prove as prove
