"""Questions: accuracy against an unbatched reference, and files of another form in one message each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.nas.data.tokenizer import train_tokenizer
from moesaic.nas.tasks.questions import Question, Questions
from moesaic.search_spaces import Architecture, Attention, Backbone, FeedForward, Layer, MoesaicError, Router
from moesaic.search_spaces.architecture import Stack
from moesaic.supernet import Transformer

TEXT = "the lazy fox jumps over a quick brown dog and then it runs away from here to there\n" * 20
TOKENIZER = train_tokenizer([TEXT], 300)
WORDS = sorted(set(TEXT.split()))


def model(seed: int, **backbone) -> Transformer:
    layers = (Layer(Attention(2, 1), FeedForward((16,) * 3, Router("top_k", k=2))),) * 2
    torch.manual_seed(seed)
    made = Transformer(Architecture(Stack(32, layers), Backbone(16, **backbone)), 300).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def asked(*questions: Question) -> Questions:
    return Questions(questions, "", "file")


def best_of(one: Transformer, question: Question) -> int:
    """The most probable choice, each run alone."""
    scores = []
    before = TOKENIZER.encode(question.text).ids
    for choice in question.choices:
        ids = torch.tensor(TOKENIZER.encode(f"{question.text} {choice}").ids)
        with torch.no_grad():
            found = F.log_softmax(one(ids[None, :-1])[0], -1)
        scores.append(sum(found[i - 1, ids[i]].item() for i in range(len(before), len(ids))))
    return scores.index(max(scores))


phrases = st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join)
questions = st.builds(
    Question, phrases, st.lists(phrases, min_size=2, max_size=4, unique=True).map(tuple), st.just(0)
)  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(st.lists(questions, min_size=1, max_size=6), st.integers(0, 20))
def test_the_most_probable_choice_is_the_answer(found: list[Question], seed: int) -> None:
    one = model(seed)
    expected = sum(best_of(one, question) == 0 for question in found) / len(found)
    assert asked(*found).accuracy(one, TOKENIZER) == pytest.approx(expected)


def test_answers_are_numbers_of_choices(tmp_path: Path) -> None:
    one, question = model(0), Question("the fox", ("runs", "jumps over", "dog"), 0)
    best = best_of(one, question)
    lines = [{"question": question.text, "choices": list(question.choices), "answer": n} for n in range(3)]
    path = tmp_path / "q.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)))
    read = Questions.read(path)
    assert [each.answer for each in read.questions] == [0, 1, 2]
    assert [asked(each).accuracy(one, TOKENIZER) for each in read.questions] == [float(n == best) for n in range(3)]
    path.write_text(path.read_text() + "\n")
    assert Questions.read(path).digest != read.digest


def test_a_question_longer_than_the_positions_is_told() -> None:
    one = model(0, positions="learned", max_positions=8)
    with pytest.raises(MoesaicError, match=r"(?s)a question is too long for the model.*at most max_positions = 8"):
        asked(Question(" ".join(WORDS * 2), ("a", "dog"), 0)).accuracy(one, TOKENIZER)


GOOD = '{"question": "q", "choices": ["a", "b"], "answer": 1}'
WRONG = {
    "no JSON": ("{", r"q.jsonl:2: is not JSON"),
    "a list": ("[1]", r"q.jsonl:2: is not a question"),
    "a missing key": ('{"question": "q", "choices": ["a", "b"]}', r"q.jsonl:2: is not a question"),
    "an empty text": ('{"question": " ", "choices": ["a", "b"], "answer": 0}', "question is no text"),
    "choices of numbers": ('{"question": "q", "choices": [1, 2], "answer": 0}', "choices are no texts"),
    "one choice": ('{"question": "q", "choices": ["a"], "answer": 0}', "choices are too few"),
    "an answer beyond": ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "answer is not the number"),
    "a true answer": ('{"question": "q", "choices": ["a", "b"], "answer": true}', "answer is not the number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_line_is_one_message(name: str, tmp_path: Path) -> None:
    line, message = WRONG[name]
    path = tmp_path / "q.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(MoesaicError, match=f"(?s){message}"):
        Questions.read(path)


def test_files_that_cannot_be_read_are_one_message(tmp_path: Path) -> None:
    with pytest.raises(MoesaicError, match="questions cannot be read: No such file"):
        Questions.read(tmp_path / "nothing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(MoesaicError, match="has no questions"):
        Questions.read(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9\xff")
    with pytest.raises(MoesaicError, match="questions are not UTF-8"):
        Questions.read(tmp_path / "latin.jsonl")
