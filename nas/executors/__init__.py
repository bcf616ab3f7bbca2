"""Where architectures are evaluated: in this process, or in lanes of a Ray cluster, behind one interface."""

from moesaic.nas.executors.executor import Executor, Outcome, Work, evaluate_all
from moesaic.nas.executors.local import LocalExecutor

__all__ = ["Executor", "LocalExecutor", "Outcome", "Work", "evaluate_all"]
