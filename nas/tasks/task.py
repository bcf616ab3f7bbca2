"""The interface of a task: its batches, the loss that training minimises, and the metrics that compare models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from moesaic.nas.data.files import Split
from moesaic.supernet import Batch, Transformer


@dataclass(frozen=True)
class Metric:
    """A reported metric: ``name`` is its key, ``title`` is for tables, ``form`` is its format specification."""

    name: str
    title: str
    form: str
    higher_is_better: bool = False

    def format(self, value: float) -> str:
        return format(value, self.form)


class Task(Protocol):
    """One task on one corpus. Batches depend on their arguments only."""

    @property
    def loss(self) -> str:
        """The loss that training minimises: a key of ``supernet.losses.LOSSES``."""
        ...

    @property
    def unit(self) -> str:
        """What the loss is in, for tables and axes."""
        ...

    @property
    def imitation(self) -> str | None:
        """The loss of a training that imitates a teacher; None where the task itself is to imitate one."""
        ...

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics reported besides the loss."""
        ...

    @property
    def generation_metrics(self) -> tuple[Metric, ...]:
        """Those of what a model generates, which the loss does not tell."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identifies the data, their splits and their encoding."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def source_vocab_size(self) -> int | None:
        """That of what an encoder reads, where it has a vocabulary of its own."""
        ...

    @property
    def sequence_length(self) -> int: ...

    @property
    def tokenizer(self) -> Path:
        """``tokenizer.json`` of the vocabulary."""
        ...

    @property
    def source_tokenizer(self) -> Path | None:
        """That of the vocabulary of ``source_vocab_size``."""
        ...

    def batch(self, size: int, seed: int, step: int) -> Batch:
        """``size`` sequences of the training split; where their lengths differ, about as many tokens as ``size`` have
        on average."""
        ...

    def held_out(self, split: Split, count: int) -> Batch:
        """Up to ``count`` fixed sequences of a split, evenly spread over it."""
        ...

    def measure(self, split: Split, loss: float) -> dict[str, float]:
        """Each of ``metrics`` by name, for a mean ``loss`` on a split."""
        ...

    def score_generation(self, model: Transformer, split: Split, count: int) -> tuple[dict[str, float], str]:
        """Each of ``generation_metrics`` by name, for what ``model`` makes of ``held_out(split, count)``; and how it
        was made and scored."""
        ...

    def plain(self) -> dict[str, Any]:
        """Values, fit for JSON, from which another process on this machine can rebuild the task."""
        ...

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """The task that ``plain`` describes. Raises MoesaicError where its data are gone."""
        ...
