"""Models that are not ours: a plain torch module with a torch.optim optimizer, a plain flax/optax train state. A table
of names and axes says which tensor there is which logical tensor; then they are saved and restored as any run's are, on
any mesh, and across frameworks.

    table = Table(rows=(
        Entry(name="up/kernel", axes=("embed", "mlp"), torch="up.weight", jax="up/kernel", transposed=True),
        ...
    ))
    from portatrain.foreign.torch import restore, save      # or portatrain.foreign.jax

table    the table, the names of slots; the core: no framework
torch    modules and optimizers, FSDP2's DTensors included; jax: trees of arrays, sharded or not
"""

from portatrain.foreign.table import Entry as Entry
from portatrain.foreign.table import Table as Table
