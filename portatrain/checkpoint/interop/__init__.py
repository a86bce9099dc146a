"""Convert checkpoints from and to other formats, for `portatrain ckpt import` and `export`, one file a format.

Every format is a pair of functions over logical tensors by their names in our checkpoints. May import NumPy,
checkpoints_format and portatrain's core; each file imports the library of its format where it is used.
"""

from portatrain.checkpoint.interop.hub_fields import Fields as Fields
from portatrain.checkpoint.interop.hub_rope import rope_fields as rope_fields
from portatrain.checkpoint.interop.hub_rope import rope_type as rope_type
from portatrain.checkpoint.interop.hub_table import Hub as Hub
from portatrain.checkpoint.interop.hub_table import Row as Row
from portatrain.checkpoint.interop.plain_table import Entry as Entry
from portatrain.checkpoint.interop.plain_table import Table as Table
