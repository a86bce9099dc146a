"""The part of `Ops` that is no function of arrays: losses, shardings, Stacks, and the values that a model records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from portatrain.model.ops_results import Array, Loss


class StructureOps(Protocol):
    """See the top of `portatrain.model.ops`; `Ops` inherits from it."""

    # ---- losses

    def cross_entropy(
        self,
        x: Array,
        table_VE: Array,
        targets: Array,
        *,
        mask: Array | None = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ) -> Loss:
        """Return the softmax cross-entropy of the logits z = x . table^T against integer targets.

        x: (B, E) or (B, S, E); table_VE: (V, E), an embedding's own table when tied; targets: (B,) or (B, S) integers
        in [0, V); mask: float, the shape of `targets`, the weight of each target (default 1, without gradient).
        The loss of a target is logsumexp(z) - z[target] + z_loss * logsumexp(z)^2 (Chowdhery et al. 2022, section 5).
        softcap: z becomes softcap * tanh(z / softcap) first.
        Logits exist for one chunk of tokens at a time, never all at once, and the same pass forms the gradient.
        bf16: the contraction takes bfloat16 and accumulates in float32; the rest is float32, and so is the `Loss`.
        Example: `return ops.cross_entropy(x_BSE, self.embedding.table, batch["targets"], mask=batch["mask"])`
        """
        ...

    def loss(self, loss_B: Array, weight_B: Array) -> Loss:
        """Return a `Loss` of your own from per-sample losses and weights.

        loss_B: (B,), differentiable; weight_B: (B,), the weight of each sample. bf16: both are cast to float32.
        Example: `return ops.loss((y_B - target_B) ** 2, weight_B)`
        """
        ...

    def across_samples(self, fn: Callable[..., Any], *xs: Array, group: int | None = None) -> Loss:
        """Return the `Loss` of a comparison of samples with each other, such as a contrastive loss with the other
        samples of the batch as negatives. Everything else in a model sees one sample at a time.

        xs: arrays (B, ...), one row a sample. group: the number of consecutive samples that are compared with each
        other; None: all samples of the step's batch, over all microbatches and devices. In an evaluation the batch is
        that of the evaluation.
        fn: called as fn(*xs, there_GN) with arrays (G, N, ...): G groups of N samples. there_GN is False for the blank
        rows that fill up the last batch of an evaluation: give them no weight, and leave them out as negatives. It
        returns (loss_GN, weight_GN) or (loss_GN, weight_GN, metrics); metrics, arrays (G, N) by name, are recorded as
        by `ops.aux`. fn may use operations and parameters, but no `ops.aux` and no `ops.tally`.
        The result is the same on any mesh and for any microbatch. If the samples of a group are not all on one device
        in one microbatch, backends gather the rows of xs, and with several microbatches they run the model once more,
        without gradients; a group that divides the rows of each device in each microbatch costs neither.
        bf16: xs keep their dtypes; losses, weights and metrics are cast to float32.
        Raises UserError in the block of a Stack, for a group that does not divide the batch, or for other results.
        Example: `loss = ops.across_samples(self.contrast, images_BE, texts_BE)`
        """
        ...

    # ---- structure

    def shard(self, x: Array, *axes: str | None) -> Array:
        """Return x, sharded over the mesh as the layout maps these logical axes.

        axes: one logical axis per dimension of x, None for a dimension that is not sharded. Values, shape and dtype do
        not change, also under bf16. Raises UserError for an axis that the layout does not know.
        Example: `x_BSE = ops.shard(x_BSE, "batch", "seq", None)`
        """
        ...

    def stack(self, stack: Any, carry: Any, shared: Sequence[Any], per_layer: Any) -> tuple[Any, Any]:
        """Run the blocks of a `Stack` in order and return (carry, stacked outs). Models call the Stack itself.

        Arguments and shapes: see `portatrain.model.module.Stack`. bf16: carry and outs keep their dtypes.
        Example: `x_BSE, _ = self.blocks(ops, x_BSE, table)`, which calls `ops.stack`
        """
        ...

    def name(self, x: Array, name: str) -> Array:
        """Return x, with a name by which a remat policy can keep or recompute it (`portatrain.model.remat`).

        Values, shape and dtype do not change, also under bf16.
        Example: `routes_BSX = ops.name(routes_BSX, "routes")`
        """
        ...

    def aux(self, name: str, value_B: Array, *, reduce: str = "mean", loss: float = 0.0) -> None:
        """Record a statistic of each sample for the step's metrics, and optionally add it to the training loss.

        value_B: (B,). Calls under one name (layers, modules) are combined first, then the samples of the global batch:
        reduce='mean', 'sum' or 'max'. With loss=c the training loss grows by c times the sum of value_B over the calls,
        each sample weighted by its loss weight. Recomputed activations are counted once.
        reduce='layers' keeps the calls apart: value_B may be (B, ...), and the metric is (layers, ...), the mean over
        samples for each call in the order of the model. It is recorded in training only, and is no loss.
        bf16: values are cast to float32. Raises UserError for another `reduce`, another shape, or calls under one name
        that disagree.
        Example: `ops.aux("router_entropy", entropy_B, loss=1e-3)`
        """
        ...

    def tally(self, module: Any, **values: Array) -> None:
        """Add to States of `module`, summed over all microbatches of a step. Does nothing when not training.

        values: one array per State, by attribute name, in the State's shape. They must be global already (use `sum`
        with `over=`); no gradient flows through them. bf16: values are cast to the State's dtype.
        Example: `ops.tally(self, load=load_X)`
        """
        ...

    def update(self, module: Any, **values: Array) -> None:
        """Set States of `module` to new values; valid in `Module.after_step` only.

        values: one array per State, by attribute name, in the State's shape. bf16: States keep their own dtypes.
        Raises UserError for an unknown State, another shape, or a call from the forward pass.
        Example: `ops.update(self, bias=self.bias + 0.001 * error_X)`
        """
        ...
