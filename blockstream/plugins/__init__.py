"""What plugins may add and how they are found. All that a plugin's author imports is listed here.

In: entry points and names; out: choices, blamed by name when they fail.
"""

from blockstream.checkpoint.formats import Format
from blockstream.checkpoint.read.entries import Coded, TensorEntry, Tensors
from blockstream.engine.spans import Span
from blockstream.plan.retention import RetentionPolicy
from blockstream.plan.segments import Segment, Stage, Visit

from .choices import Choice, ModelFamily
from .hookspecs import hookimpl
from .manager import Plugins
from .network import Network
from .observer import Observer
from .protocols import Backend, Flow, FullSampler, Pipeline, Run, Sampler
from .run_context import RunContext, current_run, new_run
from .schedulers import Ended, Needs, Scheduler
from .transforms import AttentionKernel, AttentionKind, AttentionLayer, Merge

__all__ = [
    "AttentionKernel",
    "AttentionKind",
    "AttentionLayer",
    "Backend",
    "Choice",
    "Coded",
    "Ended",
    "Flow",
    "Format",
    "FullSampler",
    "Merge",
    "ModelFamily",
    "Needs",
    "Network",
    "Observer",
    "Pipeline",
    "Plugins",
    "RetentionPolicy",
    "Run",
    "RunContext",
    "Sampler",
    "Scheduler",
    "Segment",
    "Span",
    "Stage",
    "TensorEntry",
    "Tensors",
    "Visit",
    "current_run",
    "hookimpl",
    "new_run",
]
