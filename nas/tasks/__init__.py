"""What models learn and how they are judged: one module per task, and a line here that registers it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesaic.nas.tasks.language import LanguageModelling
from moesaic.nas.tasks.task import Metric, Task

TASKS: dict[str, type[Task]] = {"language": LanguageModelling}
"""Task classes by the name in ``Task.plain``."""


def task_of(plain: Mapping[str, Any]) -> Task:
    """The task that ``Task.plain`` described. Raises MoesaicError where its data are gone."""
    return TASKS[plain["task"]].of(plain)


__all__ = ["TASKS", "LanguageModelling", "Metric", "Task", "task_of"]
