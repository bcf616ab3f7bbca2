"""Every task against the contract."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from moesaic.nas.config import DataConfig
from moesaic.nas.data import load_corpus
from moesaic.nas.tasks import TASKS, LanguageModelling
from moesaic.search_spaces import MoesaicError
from tests.contracts.tasks import TaskContract


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


def test_every_registered_task_has_a_suite() -> None:
    tested = {kind.__name__.removeprefix("Test") for kind in TaskContract.__subclasses__()}
    assert {task.__name__ for task in TASKS.values()} == tested
