"""Where architectures are evaluated: in this process, or in the lanes of a Ray cluster, behind one interface."""

from moesaic.nas.executors.executor import Executor, Outcome, evaluate_all
from moesaic.nas.executors.local import LocalExecutor

__all__ = ["Executor", "LocalExecutor", "Outcome", "evaluate_all"]
