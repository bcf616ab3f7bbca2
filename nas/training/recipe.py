"""The description of one training, plain enough to be sent as JSON to the processes that share it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.nas.config import Config, RetrainConfig, TrainingConfig
from moesaic.nas.tasks import Task
from moesaic.search_spaces import Architecture, SearchSpace, load_space
from moesaic.search_spaces.architecture import ArchitectureField
from moesaic.search_spaces.yaml_source import YamlSource, adapter
from moesaic.supernet import Batch, SliceSampler, TrainData, TrainSettings, Transformer, Weights, scratch
from moesaic.supernet.checkpoint import load_tensors
from moesaic.supernet.sharing import Sharing


@dataclass(frozen=True)
class Teacher:
    """A model whose predictions a training imitates: the slice ``architecture`` of the weights in the file ``path``,
    which are those of ``envelope``."""

    path: str
    envelope: ArchitectureField
    architecture: ArchitectureField

    def of(self, task: Task) -> Callable[[Batch], Tensor]:
        """Its logits of a batch, on the batch's device. Raises MoesaicError where the file cannot be read."""
        tensors, _ = load_tensors(Path(self.path))
        with torch.device("meta"):
            model = Transformer(self.envelope, task.vocab_size, source_vocab_size=task.source_vocab_size)
        model.load_state_dict(tensors, assign=True)
        model.eval()

        def logits(batch: Batch) -> Tensor:
            with torch.no_grad():
                return model.to(batch.tokens.device)(batch.tokens, self.architecture, **batch.beside)

        return logits


@dataclass(frozen=True)
class Recipe:
    """One training: the model's size, the batches, the slices of the model that train, and the optimisation.

    ``space`` is the YAML of a search space: its largest member trains alone for ``largest_first`` steps, then one
    random member per step. Without a space the whole model trains. Recipes with the same seed and batch size see the
    same batches. With a ``teacher`` its predictions are the target, not the text.
    """

    architecture: ArchitectureField
    seed: int
    batch_size: int
    settings: TrainSettings
    sharing: Sharing = "nested"
    space: Any = None
    largest_first: int = 0
    teacher: Teacher | None = None

    def weights(self, task: Task) -> Weights:
        """Random initial weights, a function of the seed."""
        return scratch(task.vocab_size, self.seed, self.sharing, task.source_vocab_size)

    def data(self, task: Task) -> TrainData:
        """Batches of ``task``, and the slices of each step."""
        slices = self._sampler().slices if self.space is not None else lambda step: [self.architecture]
        teacher = self.teacher and self.teacher.of(task)
        loss = task.imitation if teacher and task.imitation else task.loss
        return TrainData(lambda step: task.batch(self.batch_size, self.seed, step), slices, loss, teacher, self.seed)

    def plain(self) -> dict[str, Any]:
        return adapter(Recipe).dump_python(self, mode="json")

    @staticmethod
    def of(plain: Any) -> Recipe:
        """The inverse of ``plain``."""
        return adapter(Recipe).validate_python(plain)

    def _sampler(self) -> SliceSampler:
        return SliceSampler(load_space(YamlSource("space", self.space)), self.seed, self.largest_first)


def supernet_recipe(config: Config, space: SearchSpace, bfloat16: bool) -> Recipe:
    """The training of the supernet of ``config``; ``space`` is the one it names."""
    chosen = config.supernet
    return Recipe(
        architecture=space.envelope,
        seed=config.seed,
        batch_size=chosen.batch_size,
        settings=train_settings(chosen, bfloat16),
        sharing=chosen.sharing,
        space=config.space,
        largest_first=round(chosen.largest_first * chosen.steps),
    )


def single_recipe(
    architecture: Architecture, config: RetrainConfig, seed: int, bfloat16: bool, teacher: Teacher | None = None
) -> Recipe:
    """The training of one model, which imitates ``teacher`` where there is one."""
    return Recipe(architecture, seed, config.batch_size, train_settings(config, bfloat16), teacher=teacher)


def train_settings(config: TrainingConfig, bfloat16: bool) -> TrainSettings:
    return TrainSettings(
        steps=config.steps,
        learning_rate=config.learning_rate,
        warmup_steps=min(config.warmup_steps, config.steps // 2),
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        balance_weight=config.balance_weight,
        label_smoothing=config.label_smoothing,
        dropout=config.dropout,
        bfloat16=bfloat16,
        checkpoint_every=config.checkpoint_every,
    )
