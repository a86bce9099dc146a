"""The portatrain checkpoint format: logical tensors as checksummed tiles in safetensors files.

SPEC.md defines the format. This package reads and writes it with NumPy and small codecs only. It does not import
portatrain or a framework.


    layout = SaveLayout(tensors=(Tensor(name="params/w", dtype="float32", shape=(8, 4),
                                    placement=Sharded(spec=(("fsdp",), ()))),),
                    meshes=(SaveMesh(axes=(("fsdp", 2),)),), writers=2)
    Writer(store, layout, save="a0", writer=rank).write({"params/w": my_rows})      # every process
    commit(store, layout, save="a0", meta={"step": 10})                             # one process
    Reader(store).read("params/w", Box((0, 1), (8, 2)))                             # anyone, any box
"""

from .boxes import Box as Box
from .boxes import flat_range_boxes as flat_range_boxes
from .errors import AlreadyCommittedError as AlreadyCommittedError
from .errors import FormatError as FormatError
from .errors import MissingFileError as MissingFileError
from .errors import NewerFormatError as NewerFormatError
from .errors import NoBucketError as NoBucketError
from .errors import NotCommittedError as NotCommittedError
from .errors import StoreError as StoreError
from .layout import Explicit as Explicit
from .layout import SaveLayout as SaveLayout
from .layout import Sharded as Sharded
from .layout import Tensor as Tensor
from .reader import Reader as Reader
from .reader import ReadPlan as ReadPlan
from .reader import Want as Want
from .rule import SaveMesh as SaveMesh
from .store import LocalStore as LocalStore
from .store import Store as Store
from .tiles import tile_shape as tile_shape
from .write_plan import Planner as Planner
from .writer import Writer as Writer
from .writer import commit as commit
