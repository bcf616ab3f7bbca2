"""What every task must do. A suite is a subclass of ``TaskContract`` with a fixture that makes one."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from moesaic.nas.tasks import Task, task_of
from moesaic.search_spaces import Architecture, Backbone
from moesaic.supernet import Batch, Judge, TrainData, TrainSettings, Transformer, scratch, train
from moesaic.supernet.losses import LOSSES
from tests.nas.search_tools import tiny_space


def same(first: Batch, second: Batch) -> bool:
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in ((getattr(first, name), getattr(second, name)) for name in vars(first))
    )


class TaskContract:
    """Tests take the fixture ``task``. A suite may change the ``backbone`` of the models that learn it, or the whole
    ``architecture``; ``by_tokens`` where a batch has about as many tokens as its size says, and not as many rows."""

    backbone = Backbone(32)
    causal = True
    by_tokens = False

    def architecture(self) -> Architecture:
        largest = tiny_space().largest
        return replace(largest, decoder=replace(largest.decoder, causal=self.causal), backbone=self.backbone)

    def model(self, task: Task) -> Transformer:
        return scratch(task.vocab_size, 0, source_vocab_size=task.source_vocab_size)(self.architecture())

    def test_a_batch_is_a_function_of_seed_and_step(self, task: Task) -> None:
        batch = task.batch(4, seed=1, step=2)
        assert same(batch, task.batch(4, seed=1, step=2))
        assert not same(batch, task.batch(4, seed=1, step=3))
        assert not same(batch, task.batch(4, seed=2, step=2))
        assert len(batch) == len(batch.targets)
        assert len(batch) == 4 or self.by_tokens

    def test_ids_are_of_the_vocabulary_and_no_sequence_is_too_long(self, task: Task) -> None:
        for batch in (task.batch(4, 0, 0), task.held_out("validation", 4), task.held_out("test", 4)):
            assert batch.tokens.shape == batch.targets.shape
            assert batch.tokens.shape[1] <= task.sequence_length
            assert 0 <= int(batch.tokens.min()) <= int(batch.tokens.max()) < task.vocab_size
            assert 0 <= int(batch.targets.min()) <= int(batch.targets.max()) < task.vocab_size
            assert int(batch.scored_counts().min()) > 0

    @pytest.mark.parametrize("split", ["train", "validation", "test"])
    def test_held_out_sequences_are_fixed_and_no_more_than_asked(self, task: Task, split) -> None:
        assert same(task.held_out(split, 5), task.held_out(split, 5))
        assert 0 < len(task.held_out(split, 5)) <= 5
        assert len(task.held_out(split, 10**9)) > 1

    def test_splits_share_no_sequence(self, task: Task) -> None:
        splits = [task.held_out(split, 8).tokens.tolist() for split in ("train", "validation", "test")]
        sequences = [tuple(sequence) for split in splits for sequence in split]
        assert len(set(sequences)) == len(sequences)

    def test_every_metric_is_measured_and_follows_the_loss(self, task: Task) -> None:
        names = [metric.name for metric in task.metrics + task.generation_metrics]
        assert len(set(names)) == len(names)
        better, worse = task.measure("test", 1.0), task.measure("test", 2.0)
        assert set(better) == set(worse) == {metric.name for metric in task.metrics}
        for metric in task.metrics:
            assert (better[metric.name] > worse[metric.name]) == metric.higher_is_better
            assert metric.format(better[metric.name])
        assert all(not math.isnan(value) for value in task.measure("test", 1e4).values())

    def test_another_process_makes_the_same_task(self, task: Task) -> None:
        other = task_of(json.loads(json.dumps(task.plain())))
        assert type(other) is type(task)
        assert other.fingerprint == task.fingerprint
        for name in ("vocab_size", "source_vocab_size", "sequence_length", "loss"):
            assert getattr(other, name) == getattr(task, name)
        assert same(other.batch(3, 1, 7), task.batch(3, 1, 7))
        assert same(other.held_out("test", 3), task.held_out("test", 3))
        assert other.measure("test", 1.5) == task.measure("test", 1.5)
        assert other.tokenizer.read_bytes() == task.tokenizer.read_bytes()
        assert (task.source_tokenizer is None) == (task.source_vocab_size is None)

    def test_what_a_model_generates_is_scored_and_it_is_said_how(self, task: Task) -> None:
        scores, signature = task.score_generation(self.model(task).eval(), "test", 3)
        assert set(scores) == {metric.name for metric in task.generation_metrics}
        assert all(metric.format(scores[metric.name]) for metric in task.generation_metrics)
        assert bool(signature) == bool(scores)

    def test_a_model_learns_it(self, task: Task, tmp_path) -> None:
        model = self.model(task)
        architecture = model.architecture
        judge = Judge(model, task.held_out("validation", 8), loss=task.loss)
        assert task.loss in LOSSES
        assert task.imitation is None or task.imitation in LOSSES
        assert task.unit
        before = judge(architecture).loss
        settings = TrainSettings(steps=30, learning_rate=3e-3, warmup_steps=3)
        data = TrainData(lambda step: task.batch(8, 0, step), lambda step: [architecture], task.loss)
        train(model, data, settings, tmp_path, "contract")
        after = judge(architecture).loss
        assert after < before - 0.1
