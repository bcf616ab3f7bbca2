"""Multiple-choice questions: the share that a language model answers right, by the likelihood of the choices."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from moesaic.nas.tasks.task import Metric
from moesaic.search_spaces import MoesaicError
from moesaic.supernet import Transformer

ACCURACY = Metric("accuracy", "accuracy", ".1%", higher_is_better=True)
_FORM = '{"question": TEXT, "choices": [TEXT, TEXT, ...], "answer": NUMBER OF THE RIGHT CHOICE, FROM 0}'
_SEQUENCES = 16
"""Sequences that pass through a model at once."""


@dataclass(frozen=True)
class Question:
    text: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Questions:
    """In the order of the file; ``digest`` identifies its contents."""

    questions: tuple[Question, ...]
    digest: str
    where: str

    @staticmethod
    def read(path: Path) -> Questions:
        """From JSON lines of the form ``{"question": ..., "choices": [...], "answer": 0}``.

        Raises
        ------
        MoesaicError : no such file, a line of another form, or no line at all; with the line's number.
        """
        try:
            data = path.read_bytes()
            lines = data.decode("utf-8").splitlines()
        except OSError as error:
            raise MoesaicError(
                f"questions cannot be read: {error.strerror}", where=str(path), allowed=f"a file of lines {_FORM}"
            ) from None
        except UnicodeDecodeError as error:
            raise MoesaicError(
                f"questions are not UTF-8: {error.reason}", where=str(path), allowed=f"a file of lines {_FORM}"
            ) from None
        read = tuple(_question(line, f"{path}:{n}") for n, line in enumerate(lines, start=1) if line.strip())
        if not read:
            raise MoesaicError("has no questions", where=str(path), allowed=f"lines {_FORM}")
        return Questions(read, hashlib.sha256(data).hexdigest()[:16], str(path))

    @torch.inference_mode()
    def accuracy(self, model: Transformer, tokenizer: Tokenizer) -> float:
        """The share of questions whose right choice has the largest probability of all, given the question: ``acc`` of
        the lm-evaluation-harness.

        Raises
        ------
        MoesaicError : a question is longer than the model's positions.
        """
        sequences = [sequence for question in self.questions for sequence in _sequences(question, tokenizer)]
        longest, positions = max(len(ids) for ids, _ in sequences), model.architecture.backbone.max_positions
        if positions is not None and longest > positions:
            raise MoesaicError(
                "a question is too long for the model",
                where=self.where,
                found=f"{longest} tokens",
                allowed=f"at most max_positions = {positions}",
            )
        order = sorted(range(len(sequences)), key=lambda number: len(sequences[number][0]))  # little padding
        scores = [0.0] * len(sequences)
        for first in range(0, len(order), _SEQUENCES):
            chosen = order[first : first + _SEQUENCES]
            for number, score in zip(chosen, _scores(model, [sequences[n] for n in chosen]), strict=True):
                scores[number] = score
        left, right = iter(scores), 0
        for question in self.questions:
            own = [next(left) for _ in question.choices]
            right += own.index(max(own)) == question.answer
        return right / len(self.questions)


def _question(line: str, where: str) -> Question:
    def wrong(problem: str, found: Any) -> MoesaicError:
        return MoesaicError(problem, where=where, found=found, allowed=_FORM)

    try:
        record = json.loads(line)
    except ValueError as error:
        raise wrong(f"is not JSON: {error}", line[:60]) from None
    if not isinstance(record, dict) or record.keys() != {"question", "choices", "answer"}:
        raise wrong("is not a question", list(record) if isinstance(record, dict) else record)
    text, choices, answer = record["question"], record["choices"], record["answer"]
    if not isinstance(text, str) or not text.strip():
        raise wrong("question is no text", text)
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise wrong("choices are no texts", choices)
    if len(choices) < 2:
        raise wrong("choices are too few", choices)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise wrong("answer is not the number of a choice", answer)
    return Question(text, tuple(choices), answer)


def _sequences(question: Question, tokenizer: Tokenizer) -> Iterator[tuple[list[int], int]]:
    """For each choice, the ids of question and choice, and how many of them are the question's.

    A space stands between the two; it belongs to the choice, as in running text.
    """
    text = question.text.rstrip()
    start = len(tokenizer.encode(text, add_special_tokens=False).ids)
    for choice in question.choices:
        ids = tokenizer.encode(f"{text} {choice.strip()}", add_special_tokens=False).ids
        yield ids, min(start, len(ids) - 1)


def _scores(model: Transformer, sequences: list[tuple[list[int], int]]) -> list[float]:
    """The log probability of each choice."""
    longest = max(len(ids) for ids, _ in sequences)
    tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in sequences])
    position = torch.arange(longest)
    lengths = torch.tensor([len(ids) for ids, _ in sequences])[:, None]
    starts = torch.tensor([max(start, 1) for _, start in sequences])[:, None]
    tokens, inside = tokens.to(model.device), (position < lengths).to(model.device)
    asked = (inside & (position >= starts).to(model.device))[:, 1:]
    logits = model(tokens[:, :-1], mask=inside[:, :-1]).float()
    found = -F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return found.masked_fill(~asked, 0.0).sum(1).tolist()
