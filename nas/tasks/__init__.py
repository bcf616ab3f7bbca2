"""What models learn and how they are judged: one module per task, and a line here that registers it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from moesaic.nas.config import DataConfig
from moesaic.nas.data import Corpus, load_corpus, load_parallel
from moesaic.nas.data.tokenizer import Vocabulary, read_tokenizer
from moesaic.nas.tasks.language import LanguageModelling
from moesaic.nas.tasks.masked import MASKS, MaskedTokens
from moesaic.nas.tasks.states import SameStates
from moesaic.nas.tasks.task import Metric, Task
from moesaic.nas.tasks.text import Frame, special_id
from moesaic.nas.tasks.translation import Translation
from moesaic.search_spaces import MoesaicError
from moesaic.supernet.convert import Checkpoint

TASKS: dict[str, type[Task]] = {task.name: task for task in (LanguageModelling, MaskedTokens, SameStates, Translation)}
"""Task classes by the name in ``Task.plain``."""


def task_of(plain: Mapping[str, Any]) -> Task:
    """The task that ``Task.plain`` described. Raises MoesaicError where its data are gone."""
    return TASKS[plain["task"]].of(plain)


def load_task(
    data: DataConfig,
    head: str,
    where: str,
    say: Callable[[str], None] = lambda text: None,
    vocabulary: Vocabulary | None = None,
    source: Checkpoint | None = None,
    own: Iterable[Path] = (),
) -> Task:
    """The task that models with this ``head`` (that of their backbone) are for, on the corpus of ``data``.

    ``vocabulary`` is that of a model to go on with. ``own`` files are no part of a corpus; ``where`` names ``data``.

    Raises
    ------
    MoesaicError : as ``load_corpus``, ``load_parallel`` and ``task_for``.
    """
    if data.kind == "parallel":
        return Translation(load_parallel(data, where, say, vocabulary))
    given, size = (None, None) if vocabulary is None else (vocabulary.tokenizer, vocabulary.size)
    corpus = load_corpus(data, where, say, given, own, size)
    return task_for(head, corpus, source, str(given or corpus.tokenizer_path))


def task_for(head: str, corpus: Corpus, source: Checkpoint | None, where: str) -> Task:
    """The task on a text that models with this ``head`` are for.

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


__all__ = [
    "TASKS",
    "LanguageModelling",
    "MaskedTokens",
    "Metric",
    "SameStates",
    "Task",
    "Translation",
    "load_task",
    "task_for",
    "task_of",
]
