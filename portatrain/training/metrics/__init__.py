"""The metrics of a run: records, the sinks and trackers that receive them, FLOPs, plots.

These files import no framework; NumPy and rich are imported when they are used.
"""

from portatrain.training.metrics.record import EvalRecord as EvalRecord
from portatrain.training.metrics.record import RunInfo as RunInfo
from portatrain.training.metrics.record import Sink as Sink
from portatrain.training.metrics.record import StepRecord as StepRecord
