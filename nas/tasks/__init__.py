"""What models learn and how they are judged: one module per task, and a line here that registers it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesaic.nas.data import Corpus
from moesaic.nas.data.tokenizer import read_tokenizer
from moesaic.nas.tasks.language import LanguageModelling
from moesaic.nas.tasks.masked import MASKS, MaskedTokens
from moesaic.nas.tasks.states import SameStates
from moesaic.nas.tasks.task import Metric, Task
from moesaic.nas.tasks.text import Frame, special_id
from moesaic.search_spaces import MoesaicError
from moesaic.supernet.convert import Checkpoint

TASKS: dict[str, type[Task]] = {task.name: task for task in (LanguageModelling, MaskedTokens, SameStates)}
"""Task classes by the name in ``Task.plain``."""


def task_of(plain: Mapping[str, Any]) -> Task:
    """The task that ``Task.plain`` described. Raises MoesaicError where its data are gone."""
    return TASKS[plain["task"]].of(plain)


def task_for(head: str, corpus: Corpus, source: Checkpoint | None, where: str) -> Task:
    """The task that models with this ``head`` (that of their backbone) are for, on ``corpus``.

    Raises
    ------
    MoesaicError : there is no ``source`` for a model without a head; the tokenizer, which is that of ``where``, has not
        the special tokens of an encoder.
    """
    if head == "linear":
        return LanguageModelling(corpus)
    tokenizer = read_tokenizer(corpus.tokenizer_path)
    Frame.of(tokenizer, where)
    if head == "masked":
        special_id(tokenizer, MASKS, where)
        return MaskedTokens(corpus)
    if source is None:
        raise MoesaicError(
            "a model without a head is judged by the states of a trained model",
            where=where,
            found="no such model",
            allowed="source: DIR in retrain.yaml",
        )
    return SameStates(corpus, source)


__all__ = ["TASKS", "LanguageModelling", "MaskedTokens", "Metric", "SameStates", "Task", "task_for", "task_of"]
