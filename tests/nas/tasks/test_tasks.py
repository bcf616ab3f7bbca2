"""Every task against the contract."""

from __future__ import annotations

import math
from importlib import import_module
from pathlib import Path

import pytest
import torch

from moesaic.nas.config import DataConfig
from moesaic.nas.data import Corpus, load_corpus
from moesaic.nas.data.tokenizer import train_tokenizer
from moesaic.nas.tasks import TASKS, LanguageModelling, MaskedTokens, SameStates, task_for
from moesaic.search_spaces import Architecture, Attention, Backbone, FeedForward, Layer, MoesaicError, Stack
from moesaic.supernet import evaluate, scratch
from moesaic.supernet.convert import open_checkpoint, write_folder
from tests.contracts.tasks import TaskContract
from tests.nas.search_tools import tiny_space


class TestLanguageModelling(TaskContract):
    @pytest.fixture
    def task(self, corpus_folder: Path) -> LanguageModelling:
        config = DataConfig(kind="text", files=[str(corpus_folder)], vocab_size=300, sequence_length=32)
        return LanguageModelling(load_corpus(config, "test"))

    def test_a_target_is_the_token_after(self, task: LanguageModelling) -> None:
        batch = task.batch(4, 0, 0)
        assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        assert batch.mask is None

    def test_metrics_are_those_of_the_literature(self, task: LanguageModelling) -> None:
        found = task.measure("test", 2.0)
        split = task.corpus.splits["test"]
        assert found["perplexity"] == pytest.approx(math.exp(2.0))
        assert found["bits_per_byte"] == pytest.approx(2.0 / math.log(2) * len(split.tokens) / split.text_bytes)
        assert task.measure("test", 1000.0)["perplexity"] == math.inf

    def test_a_tokenizer_that_was_purged_names_its_place(self, corpus_folder: Path, tmp_path, monkeypatch) -> None:
        monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path))
        config = DataConfig(kind="text", files=[str(corpus_folder)], vocab_size=300, sequence_length=32)
        task = LanguageModelling(load_corpus(config, "test"))
        task.tokenizer.unlink()
        with pytest.raises(MoesaicError, match=r"corpora/.*tokenizer.json: is gone"):
            _ = task.tokenizer


def encoder_tokenizer(corpus_folder: Path, folder: Path, *names: str) -> Path:
    """A small BPE of the corpus with special tokens."""
    tokenizer = train_tokenizer([path.read_text() for path in sorted(corpus_folder.rglob("*.txt"))], 300)
    tokenizer.add_special_tokens(list(names))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def encoder_corpus(corpus_folder: Path, folder: Path) -> Corpus:
    tokenizer = encoder_tokenizer(corpus_folder, folder, "[CLS]", "[SEP]", "[MASK]")
    config = DataConfig(kind="text", files=[str(corpus_folder)], sequence_length=32)
    return load_corpus(config, "test", tokenizer=tokenizer)


ENCODER = {"activation": "gelu", "norm": "layer", "norm_place": "post"}


class TestMaskedTokens(TaskContract):
    backbone = Backbone(32, **ENCODER, head="masked")
    causal = False

    @pytest.fixture
    def task(self, corpus_folder: Path, tmp_path: Path) -> MaskedTokens:
        return MaskedTokens(encoder_corpus(corpus_folder, tmp_path))

    def test_fifteen_per_cent_are_scored_and_replaced_as_in_bert(self, task: MaskedTokens) -> None:
        batch = task.batch(400, 0, 0)
        assert batch.scored is not None
        start, end = task.frame.start, task.frame.end
        assert set(batch.tokens[:, 0].tolist()) == {start} and set(batch.tokens[:, -1].tolist()) == {end}
        special = torch.isin(batch.targets, torch.tensor(sorted(task.frame.special)))
        assert not (batch.scored & special).any()
        usual = (~special).sum(1)
        assert torch.equal(batch.scored.sum(1), (0.15 * usual).round().clamp(min=1).long())
        assert torch.equal(batch.tokens[~batch.scored], batch.targets[~batch.scored])
        found, wanted = batch.tokens[batch.scored], batch.targets[batch.scored]
        masked, kept = found == task.mask, found == wanted
        other = ~masked & ~kept
        assert masked.float().mean() == pytest.approx(0.8, abs=0.03)
        assert kept.float().mean() == pytest.approx(0.1, abs=0.03)  # a random token may be the same
        assert other.float().mean() == pytest.approx(0.1, abs=0.03)
        assert not set(found[other].tolist()) & task.frame.special
        assert len(set(found[other].tolist())) > 50

    def test_what_is_masked_is_a_function_of_the_window(self, task: MaskedTokens) -> None:
        few, many = task.held_out("test", 2), task.held_out("test", 10**9)
        for row in few.targets:
            (same,) = (many.targets == row).all(1).nonzero()[:1]
            at = (few.targets == row).all(1).nonzero()[0]
            assert torch.equal(few.tokens[at], many.tokens[same])

    def test_only_scored_tokens_count(self, task: MaskedTokens) -> None:
        batch = task.held_out("validation", 3)
        losses = torch.rand(batch.tokens.shape)
        assert batch.mean(losses) == pytest.approx(losses[batch.scored].mean())
        assert batch.means(losses)[1] == pytest.approx(losses[1][batch.scored[1]].mean())
        model = scratch(task.vocab_size, 0)(
            Architecture(Stack(32, (Layer(Attention(1, 1), FeedForward((32,))),), causal=False), self.backbone)
        )
        found = evaluate(model, batch)
        with torch.no_grad():
            nats = torch.nn.functional.cross_entropy(
                model(batch.tokens)[batch.scored], batch.targets[batch.scored], reduction="mean"
            )
        assert found.loss == pytest.approx(nats.item(), rel=1e-5)
        assert found.tokens == int(batch.scored.sum())


class TestSameStates(TaskContract):
    backbone = Backbone(32, **ENCODER, head="none")
    causal = False

    @pytest.fixture
    def task(self, corpus_folder: Path, tmp_path: Path) -> SameStates:
        corpus, width = encoder_corpus(corpus_folder, tmp_path), tiny_space().largest.output.width
        layer = Layer(Attention(2, 2), FeedForward((32,)))
        backbone = Backbone(width // 2, **ENCODER, embedding_norm=True, positions="learned", max_positions=32,
                            biases="all", head="none", norm_eps=1e-12)  # fmt: skip
        model = scratch(corpus.vocab_size, 3)(Architecture(Stack(width, (layer,), causal=False), backbone))
        write_folder(model, tmp_path, "bert")
        return SameStates(corpus, open_checkpoint(tmp_path))

    def test_the_source_has_no_loss_and_another_model_has(self, task: SameStates) -> None:
        batch, source = task.held_out("test", 5), task.source.load()
        assert batch.tokens[:, 0].tolist() == [task.frame.start] * len(batch)
        assert evaluate(source, batch, loss=task.loss).loss == pytest.approx(0, abs=1e-6)
        with torch.no_grad():
            states = source(batch.tokens)
            for parameter in source.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            cosine = torch.nn.functional.cosine_similarity(source(batch.tokens), states, dim=-1).mean().item()
        found = evaluate(source, batch, loss=task.loss).loss
        assert found == pytest.approx(1 - cosine, rel=1e-4)
        assert task.measure("test", found) == {"cosine": pytest.approx(cosine, rel=1e-4)}


@pytest.mark.parametrize(("missing", "head"), [("[MASK]", "masked"), ("[SEP]", "masked"), ("[CLS]", "none")])
def test_a_tokenizer_that_is_not_an_encoders_is_one_message(
    missing: str, head: str, corpus_folder: Path, tmp_path: Path
) -> None:
    names = [name for name in ("[CLS]", "[SEP]", "[MASK]") if name != missing]
    tokenizer = encoder_tokenizer(corpus_folder, tmp_path, *names)
    corpus = load_corpus(DataConfig(kind="text", files=[str(corpus_folder)]), "test", tokenizer=tokenizer)
    with pytest.raises(MoesaicError, match=rf"(?s)model/tokenizer.json: the tokenizer has no \{missing}") as caught:
        task_for(head, corpus, None, "model/tokenizer.json")
    assert missing in str(caught.value.allowed)


def test_the_head_of_a_model_says_what_its_task_is(corpus_folder: Path, tmp_path: Path) -> None:
    corpus = encoder_corpus(corpus_folder, tmp_path)
    assert type(task_for("linear", corpus, None, "x")) is LanguageModelling
    assert type(task_for("masked", corpus, None, "x")) is MaskedTokens
    with pytest.raises(MoesaicError, match="a model without a head is judged by the states of a trained model"):
        task_for("none", corpus, None, "x")


def test_every_registered_task_has_a_suite() -> None:
    import_module("tests.nas.tasks.test_translation")  # a suite in another file
    tested = {kind.__name__.removeprefix("Test") for kind in TaskContract.__subclasses__()}
    assert {task.__name__ for task in TASKS.values()} == tested
