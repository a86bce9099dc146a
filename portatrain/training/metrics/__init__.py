"""What a run measures and where it goes: records, sinks, FLOPs, plots.

Nothing here imports a framework; NumPy and rich are imported where they are used.
"""

from portatrain.training.metrics.record import EvalRecord as EvalRecord
from portatrain.training.metrics.record import RunInfo as RunInfo
from portatrain.training.metrics.record import Sink as Sink
from portatrain.training.metrics.record import StepRecord as StepRecord
