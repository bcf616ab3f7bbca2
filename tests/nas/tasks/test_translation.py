"""Translation against the contract of tasks, its batches, and the scores of what a model translates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sacrebleu import corpus_bleu, corpus_chrf

from moesaic.nas.data import load_parallel
from moesaic.nas.data.tokenizer import read_tokenizer
from moesaic.nas.tasks import Task, Translation
from moesaic.nas.tasks import translator as translator_module
from moesaic.search_spaces import (
    Architecture,
    Attention,
    Backbone,
    CrossAttention,
    FeedForward,
    Layer,
    Router,
    Stack,
)
from moesaic.supernet import Judge, TrainData, TrainSettings, Transformer, scratch, train
from tests.contracts.tasks import TaskContract
from tests.nas.data.pair_tools import config, write_corpus


def translating() -> Architecture:
    experts = FeedForward((32, 16), Router("top_k", k=1))
    encoder = Stack(48, (Layer(Attention(2, 2), FeedForward((64,))), Layer(Attention(2, 2), experts)), causal=False)
    decoder = Stack(32, (Layer(Attention(2, 2), experts, CrossAttention(2, 2, 1)),))
    return Architecture(decoder, Backbone(16, positions="sinusoidal"), encoder)


class TestTranslation(TaskContract):
    by_tokens = True

    @pytest.fixture(params=["shared", "separate"])
    def task(self, request: pytest.FixtureRequest, tmp_path: Path) -> Translation:
        return Translation(load_parallel(config(write_corpus(tmp_path, 300), vocabulary=request.param), "data"))

    def architecture(self) -> Architecture:
        return translating()

    def test_a_target_is_the_token_after_and_ends_the_sentence(self, task: Translation) -> None:
        batch, end = task.batch(8, 0, 0), task.corpus.end
        assert batch.mask is not None and batch.source is not None and batch.source_mask is not None
        assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        assert (batch.tokens[:, 0] == end).all()
        for targets, length in zip(batch.targets, batch.counts().tolist(), strict=True):
            assert targets[length - 1] == end and end not in targets[: length - 1]
        assert batch.source[torch.arange(len(batch)), batch.source_counts() - 1].eq(task.corpus.source_end).all()

    def test_a_batch_has_about_as_many_tokens_as_pairs_of_average_length(self, task: Translation) -> None:
        mean = task.corpus.splits["train"].lengths.mean()
        batches = [task.batch(16, 0, step) for step in range(30)]
        for batch in batches:
            longest = max(batch.tokens.shape[1], batch.source.shape[1] if batch.source is not None else 0)
            assert len(batch) % 8 == 0
            assert len(batch) * longest <= 16 * mean or len(batch) == 8
        assert len({len(batch) for batch in batches}) > 1

    def test_held_out_pairs_are_spread_over_the_file_and_sorted(self, task: Translation) -> None:
        few, all_of = task.held_out("test", 5), task.held_out("test", 10**9)
        assert len(all_of) == len(task.corpus.splits["test"].kept)
        lengths = torch.maximum(all_of.counts(), all_of.source_counts())
        assert torch.equal(lengths, lengths.sort().values)
        assert few.trimmed().tokens.shape == few.tokens.shape


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Translation:
    return Translation(load_parallel(config(write_corpus(tmp_path_factory.mktemp("pairs"), 4000)), "data"))


def test_scores_are_those_of_sacrebleu_against_the_text_in_the_file(
    task: Translation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search is replaced by one that finds the references, the first of them without its first word."""
    batch, tokenizer = task.held_out("test", 12), read_tokenizer(task.tokenizer)
    known = {tuple(source[:n].tolist()): target[: m - 1].tolist() for source, target, n, m in zip(
        batch.source, batch.targets, batch.source_counts().tolist(), batch.counts().tolist(), strict=True)}  # fmt: skip
    first = next(iter(known))
    known[first] = tokenizer.encode(tokenizer.decode(known[first]).partition(" ")[2]).ids

    def found(model, source, mask, *, start, end, **settings):
        assert (start, end, settings) == (task.corpus.end, task.corpus.end, {"beam": 4, "length_penalty": 0.6})
        return [known[tuple(row[on].tolist())] for row, on in zip(source, mask, strict=True)]

    monkeypatch.setattr(translator_module, "beam_search", found)
    model = scratch(task.vocab_size, 0)(translating())
    scores, signature = task.score_generation(model, "test", 12)
    texts = [tokenizer.decode(ids) for ids in known.values()]
    wanted = [tokenizer.decode(row[: n - 1].tolist()) for row, n in
              zip(batch.targets, batch.counts().tolist(), strict=True)]  # fmt: skip
    assert texts[1:] == wanted[1:]
    assert scores == {"bleu": corpus_bleu(texts, [wanted]).score, "chrf": corpus_chrf(texts, [wanted]).score}
    assert 80 < scores["bleu"] < 100
    assert "beam 4, length penalty 0.6; BLEU nrefs:1|" in signature and "tok:13a" in signature
    known[first] = tokenizer.encode(wanted[0]).ids
    assert task.score_generation(model, "test", 12)[0] == {"bleu": pytest.approx(100), "chrf": pytest.approx(100)}


def trained(task: Task, folder: Path, steps: int) -> Transformer:
    model = scratch(task.vocab_size, 0)(translating())
    settings = TrainSettings(steps=steps, learning_rate=4e-3, warmup_steps=30)
    train(model, TrainData(lambda step: task.batch(32, 0, step), lambda step: [translating()]), settings, folder, "t")
    return model.eval()


def test_a_model_learns_to_translate_and_many_are_translated_as_one(task: Translation, tmp_path: Path) -> None:
    model = trained(task, tmp_path, 300)
    scores, _ = task.score_generation(model, "test", 40)
    assert scores["bleu"] > 10
    translator = task.translator(model)
    sources = translator.encoded(["a cat sees the dog", "water", "one big red ball runs near the green water"])
    together = translator.translated(sources)
    assert together == [translator.translated([source])[0] for source in sources]
    assert len(set(together)) == 3


def test_a_lane_judges_translations_as_the_run_does(tmp_path: Path) -> None:
    task = Translation(load_parallel(config(write_corpus(tmp_path, 60), vocabulary="separate"), "data"))
    model = scratch(task.vocab_size, 0, source_vocab_size=task.source_vocab_size)(translating()).eval()
    judge = Judge(model, task.held_out("validation", 9), loss=task.loss)
    assert Judge.of(*judge.plain(), torch.device("cpu"))(translating()) == judge(translating())
