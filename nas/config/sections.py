"""What a user may write in a configuration, and its defaults."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, field_validator, model_validator

from moesaic.nas.config.data import DataConfig
from moesaic.nas.config.section import Count, NotNegative, Positive, Section, Share
from moesaic.nas.context import Phase
from moesaic.nas.units import DIMENSIONS
from moesaic.search_spaces import MoesaicError
from moesaic.search_spaces.trained import PRESET

FEWEST_MEMBERS = 4
"""Fewest architectures for which a rank correlation is worth computing."""
BudgetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Objective = Literal["loss", "latency", "flops", "parameters", "active_parameters", "memory"]


class LimitConfig(Section):
    """One hard limit. ``bind`` says which cost of a threshold router it limits: the expected or the worst case.

    ``confidence`` is for latency, which is predicted with an error: the limit holds with that probability. Without it
    the limit applies to the prediction itself.
    """

    limit: str | int | float
    bind: Literal["expected", "worst"] = "expected"
    confidence: Annotated[float, Field(gt=0.5, lt=1)] | None = None


class DeviceConfig(Section):
    """Where everything runs. ``dtype: auto`` is bfloat16 on a GPU that has it and float32 on a CPU."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: Count | None = None


ROWS = 8
"""Rows of a batch of sentences, which differ in length, are a multiple of what this and the batch size share."""


class TrainingConfig(Section):
    """Optimiser settings shared by the supernet and single models. ``clip_norm``: .inf or null turns clipping off.

    ``balance_weight`` scales the mean of the load-balance loss over sparse layers. Switch and XMoE sum over layers:
    their 0.01 with L sparse layers is 0.01 * L here.

    ``label_smoothing`` is the share of the loss that goes to all tokens of the vocabulary alike; ``dropout`` is that of
    the embedding's and of each part's outputs. Neither is in an evaluation.
    """

    steps: Count = 1000
    batch_size: Count = 16
    learning_rate: Positive = 3e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    weight_decay: NotNegative = 0.1
    clip_norm: Annotated[Positive | None, BeforeValidator(lambda norm: None if norm == math.inf else norm)] = 1.0
    balance_weight: NotNegative = 0.01
    label_smoothing: Share = 0.0
    dropout: Share = 0.0
    checkpoint_every: Count = 100


class TrainConfig(Section):
    """``workers`` processes on this machine train together. Each takes a part of every batch and, with ``shard``, holds
    a part of weights and optimiser state. On GPUs, each has its own. When one dies, all restart, ``restarts`` times.
    """

    workers: Count = 1
    restarts: Annotated[int, Field(ge=0)] = 3
    shard: bool = False

    @model_validator(mode="after")
    def _several_to_shard(self) -> TrainConfig:
        if self.shard and self.workers == 1:
            raise MoesaicError("shard needs at least two workers", nearest="workers: 2")
        return self


class ModelConfig(Section):
    """The trained model that a run starts from: the folder ``from``, of Hugging Face's format or an export.

    Each of its layers is reordered on ``calibration_windows`` windows of training text, so that its slices are the best
    ones. Neurons of a dense layer that act on the same tokens (``coactivation``), or whose input weights are alike
    (``weights``), become one expert; ``none`` goes by importance alone, and ``stored`` by chance, for comparison.
    Routers of such experts are fitted to their activation mass (``regression``); ``similarity`` to an expert's input
    weights, and its ``representative`` neuron, need no fit, and are there for comparison too.
    """

    from_: Annotated[str, Field(alias="from", min_length=1)]
    calibration_windows: Count = 16
    cluster: Literal["coactivation", "weights", "none", "stored"] = "coactivation"
    router: Literal["regression", "similarity", "representative"] = "regression"


class SupernetConfig(TrainingConfig):
    """``largest_first``: share of the steps that train the largest architecture alone, before random slices."""

    sharing: Literal["nested", "packed"] = "nested"
    largest_first: Share = 0.15


class LatencyConfig(Section):
    """The pass whose latency counts; how many models calibrate its predictor, and in how many rounds at least.

    ``prefill`` computes ``sequence_length`` positions of each sequence at once. ``decode`` computes one token after
    that many positions in a key/value cache. ``translate``, for models with an encoder, reads ``source_length`` tokens
    and writes ``sequence_length`` tokens, the end among them, with a ``beam``. Without a ``phase`` it is ``translate``
    for them, else ``prefill``. The default lengths are that of the data. Where whole models would take longer than
    ``time_limit`` seconds to measure, most are measured with one or two layers and a small vocabulary.
    """

    phase: Phase | None = None
    batch_size: Count = 8
    sequence_length: Count | None = None
    source_length: Count | None = None
    beam: Count = 4
    models: Annotated[int, Field(ge=8)] = 80
    repeats: Annotated[int, Field(ge=3)] = 5
    time_limit: Positive = 180.0


class SearchConfig(Section):
    """``trials`` architectures are evaluated on ``evaluation_windows`` windows, or pairs, of held-out text. What the
    search takes for their loss is the task's ``loss``, or, of models that translate, 1 - ``bleu``.

    A sampler learns from ``population`` of them before it proposes; ``puzzle`` scores half as many parts per layer.
    """

    sampler: Literal["random", "nsga2", "tpe", "puzzle", "evolution"] = "evolution"
    trials: Count = 300
    objectives: Annotated[list[Objective], Field(min_length=1)] = Field(default=["loss", "flops"])
    population: Annotated[int, Field(ge=4)] = 40
    evaluation_windows: Annotated[int, Field(ge=2)] = 128
    judge: Literal["loss", "bleu"] = "loss"

    @field_validator("objectives")
    @classmethod
    def _different_and_loss(cls, objectives: list[Objective]) -> list[Objective]:
        if len(set(objectives)) < len(objectives):
            raise MoesaicError("duplicate objective")
        if "loss" not in objectives:
            raise MoesaicError("loss must be an objective: without it the smallest architecture always wins")
        return objectives


class LaneResources(Section):
    """Resources of one lane on its node; with a fraction of a GPU, several lanes share one."""

    cpu: Positive = 1.0
    gpu: NotNegative = 0.0


class ExecutorConfig(Section):
    """Where the search evaluates: in this process (``local``), or in ``lanes`` parallel lanes of a Ray cluster, as
    trials of Ray Tune (``tune``) or in plain actors (``ray``), for evaluations of milliseconds in many lanes.

    ``address`` is that of a cluster, or ``auto`` for the one this machine belongs to; without it, Ray starts on this
    machine only. An evaluation is retried ``retries`` times when its lane dies, and fails after ``time_limit`` seconds.
    Tune writes what ``loggers`` record to ``storage``, a folder or the URL of an object store, or else to a temporary
    folder.
    """

    kind: Literal["local", "ray", "tune"] = "local"
    address: str | None = None
    lanes: Count = 1
    resources: LaneResources = LaneResources()
    retries: Annotated[int, Field(ge=0)] = 2
    time_limit: Positive = 600.0
    storage: str | None = None
    loggers: list[Literal["json", "csv", "tensorboard"]] = Field(default=[])

    @model_validator(mode="after")
    def _only_ray_has_lanes(self) -> ExecutorConfig:
        fields = type(self).model_fields
        changed = [name for name in fields if name != "kind" and getattr(self, name) != fields[name].default]
        if self.kind == "local" and changed:
            raise MoesaicError(
                f"{changed[0]} is a setting of the ray and tune executors; the local executor has no lanes",
                found="kind: local",
                nearest="kind: tune",
            )
        if self.kind == "ray" and {"storage", "loggers"} & set(changed):
            raise MoesaicError(
                f"{changed[-1]} is a setting of the tune executor", found="kind: ray", nearest="kind: tune"
            )
        if self.loggers and self.storage is None:
            raise MoesaicError("loggers need a storage to write to", allowed="storage: a folder, or the URL of a store")
        return self


class FidelityConfig(Section):
    """``check``: how many evaluated architectures are trained from scratch, to see how well inherited losses rank them.
    Each trains for ``steps`` steps, otherwise with the settings of ``retrain``."""

    check: Annotated[int, Field(ge=0)] = 0
    steps: Count = 300

    @field_validator("check")
    @classmethod
    def _none_or_enough(cls, check: int) -> int:
        if 0 < check < FEWEST_MEMBERS:
            raise MoesaicError(
                "too few to estimate a rank correlation",
                allowed=f"0, or {FEWEST_MEMBERS} and more",
                nearest=FEWEST_MEMBERS,
            )
        return check


class ExportConfig(Section):
    """``front``: how many members of the Pareto front, evenly spread, are exported besides the best one."""

    front: Annotated[int, Field(ge=0)] = 4


class RetrainConfig(TrainingConfig):
    """Training of the chosen architecture and, with ``rivals``, the best uniform and dense ones in the same budget.

    They start from random weights (``scratch``), from those of the search (``inherited``), or, of a trained model, from
    these ``repaired``: each layer's output weights are fitted to that model's outputs on ``repair_windows`` windows of
    training text. Then they train for ``steps`` steps, with ``distil`` towards the trained model's predictions.

    Each is trained once per seed, for ``seeds`` seeds starting with the run's. One seed gives no estimate of the
    training variance. Raising ``seeds`` later keeps the models already trained.
    """

    steps: Annotated[int, Field(ge=0)] = 1000
    seeds: Count = 1
    init: Literal["scratch", "inherited", "repaired"] = "scratch"
    repair_windows: Count = 64
    distil: bool = False
    rivals: bool = True
    evaluation_windows: Annotated[int, Field(ge=2)] = 256


_OF_TRAINED: dict[str, dict[str, Any]] = {
    "search": {"sampler": "puzzle", "trials": 24, "evaluation_windows": 16},
    "retrain": {
        "init": "repaired",
        "steps": 0,
        "distil": True,
        "learning_rate": 1e-4,
        "batch_size": 4,
        "balance_weight": 0.0,
        "weight_decay": 0.0,
        "evaluation_windows": 32,
    },
}
"""Defaults of a run that starts from a trained model: scores are known before the search, and models are repaired."""


class Config(Section):
    """Everything a run depends on. ``space`` is read by ``search_spaces.load_space``; with ``model``, a trained one to
    start from, by ``search_spaces.trained``.

    There is one ``budget``, or several named ones in ``budgets``: these share one supernet and one search, and each
    gets its own models and report. ``mirror`` is the URL of a database that receives the search's trials as an Optuna
    study; without it they go to a journal file. ``questions`` is a file of multiple-choice questions, JSON lines; the
    share that each trained model answers right is reported.
    """

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: Annotated[int, Field(ge=0)] = 0
    data: DataConfig = DataConfig()
    model: ModelConfig | None = None
    space: Any = "small"
    budget: dict[str, LimitConfig]
    budgets: dict[BudgetName, dict[str, LimitConfig]] = Field(default={})
    device: DeviceConfig = DeviceConfig()
    train: TrainConfig = TrainConfig()
    supernet: SupernetConfig = SupernetConfig()
    latency: LatencyConfig = LatencyConfig()
    search: SearchConfig = SearchConfig()
    executor: ExecutorConfig = ExecutorConfig()
    mirror: str | None = None
    fidelity: FidelityConfig = FidelityConfig()
    export: ExportConfig = ExportConfig()
    retrain: RetrainConfig = RetrainConfig()
    questions: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_or_several(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("budgets") and not data.get("budget"):
            data = {**data, "budget": None}
        if isinstance(data, dict) and data.get("model") is not None:
            own = {name: section for name, section in _OF_TRAINED.items() if isinstance(data.get(name, {}), dict)}
            sections = {name: {**section, **data.get(name, {})} for name, section in own.items()}
            data = {"space": PRESET, **data, **sections}
        return data

    @field_validator("budget", mode="before")
    @classmethod
    def _lines_of_one(cls, value: Any) -> Any:
        return {} if value is None else _lines(value)

    @field_validator("budgets", mode="before")
    @classmethod
    def _lines_of_several(cls, value: Any) -> Any:
        return {name: _lines(lines) for name, lines in value.items()} if isinstance(value, dict) else value

    @field_validator("mirror")
    @classmethod
    def _no_password(cls, url: str | None) -> str | None:
        parts = urlsplit(url or "")
        if parts.password is not None or "passw" in parts.query:
            raise MoesaicError(
                "a password would be written into the run's folder",
                found=f"{parts.scheme}://...",
                allowed="a URL without one; PostgreSQL reads PGPASSWORD and ~/.pgpass",
            )
        return url

    @model_validator(mode="after")
    def _translation_starts_from_nothing(self) -> Config:
        if self.data.kind == "parallel" and self.model is not None:
            raise MoesaicError(
                "a run that starts from a trained model learns from text: none that translates can be read",
                found="data: {kind: parallel}",
                allowed="no model, or data: {kind: text}",
            )
        if self.data.kind == "parallel" and self.questions is not None:
            raise MoesaicError(
                "a model that translates answers no questions", found="data: {kind: parallel}", allowed="no questions"
            )
        return self

    @model_validator(mode="after")
    def _tokenizer_of_the_model(self) -> Config:
        if self.model is not None and self.data.tokenizer is not None:
            raise MoesaicError(
                "a run that starts from a model has that model's tokenizer",
                found=f"data.tokenizer: {self.data.tokenizer}",
                allowed="no data.tokenizer",
            )
        return self

    @model_validator(mode="after")
    def _repairs_a_trained_model(self) -> Config:
        if self.model is None and (self.retrain.init == "repaired" or self.retrain.distil):
            raise MoesaicError(
                "only a trained model can be repaired or imitated: retrain.init: repaired, retrain.distil: true",
                found="no model",
                allowed="model: {from: DIR}",
            )
        return self

    @model_validator(mode="after")
    def _labels_to_smooth(self) -> Config:
        if self.retrain.distil and self.retrain.label_smoothing:
            raise MoesaicError(
                "a training that imitates a model has no labels to smooth",
                found=f"retrain.label_smoothing: {self.retrain.label_smoothing:g}, retrain.distil: true",
                allowed="one of the two",
            )
        return self

    @model_validator(mode="after")
    def _not_both(self) -> Config:
        if bool(self.budget) == bool(self.budgets):
            raise MoesaicError("a run has one budget, or several under budgets", allowed="one of the two keys")
        return self

    @property
    def budgets_by_name(self) -> dict[str, dict[str, LimitConfig]]:
        """All budgets by name; a single budget has an empty name."""
        return self.budgets or {"": self.budget}


def _lines(value: Any) -> Any:
    """The lines of a budget; a plain value is a limit."""
    if not isinstance(value, dict) or not value:
        raise MoesaicError("budget needs at least one line", allowed=", ".join(DIMENSIONS))
    return {name: {"limit": line} if not isinstance(line, dict) else line for name, line in value.items()}


class RetrainFile(Section):
    """``retrain.yaml`` of an exported model: the settings of its run that retraining needs. ``source`` is the folder of
    the model whose states one without a head reproduces."""

    name: str
    seed: Annotated[int, Field(ge=0)] = 0
    data: DataConfig
    source: str | None = None
    device: DeviceConfig = DeviceConfig()
    train: TrainConfig = TrainConfig()
    retrain: RetrainConfig = RetrainConfig()
