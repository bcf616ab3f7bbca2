"""The configuration of a run: what a user may write, its defaults, and reading it with overrides."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moesaic.nas.context import Phase
from moesaic.nas.units import DIMENSIONS, Limit, parse_limit
from moesaic.search_spaces import MoesaicError, SearchSpace, load_space
from moesaic.search_spaces.errors import nearest_name
from moesaic.search_spaces.yaml_source import YamlSource, parse_yaml, read_yaml, validate

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
FEWEST_MEMBERS = 4
"""Fewest architectures whose order by two judges is worth comparing."""
BudgetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Objective = Literal["loss", "latency", "flops", "parameters", "active_parameters", "memory"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DataConfig(_Section):
    """``stdlib`` is the Python standard library's source; ``text`` takes ``files``: paths, folders, globs."""

    kind: Literal["stdlib", "text"] = "stdlib"
    files: list[str] = []
    vocab_size: Annotated[int, Field(ge=258, le=2**20)] = 2048
    sequence_length: Annotated[int, Field(ge=8)] = 128

    @field_validator("files", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _files_for_text(self) -> DataConfig:
        if self.kind == "text" and not self.files:
            raise MoesaicError("data of kind text needs files", allowed="files: a path, a folder, a glob, or a list")
        if self.kind == "stdlib" and self.files:
            raise MoesaicError("data of kind stdlib takes no files", nearest="kind: text")
        return self


class BudgetLine(_Section):
    """One hard limit. ``bind`` says which cost of a threshold router it holds for: the expected or the worst case.

    ``confidence`` is for latency, which is predicted with an error: the limit holds with that probability. Without it
    the prediction itself is bound.
    """

    limit: str | int | float
    bind: Literal["expected", "worst"] = "expected"
    confidence: Annotated[float, Field(gt=0.5, lt=1)] | None = None


class DeviceConfig(_Section):
    """Where everything runs. ``dtype: auto`` is bfloat16 on a GPU that has it and float32 on a CPU."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: Count | None = None


class TrainingConfig(_Section):
    """Optimisation that the supernet and a single model share."""

    steps: Count = 1000
    batch_size: Count = 16
    learning_rate: Positive = 3e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip_norm: Positive = 1.0
    balance_weight: Annotated[float, Field(ge=0)] = 0.01
    checkpoint_every: Count = 100


class TrainConfig(_Section):
    """``workers`` processes of this machine train together, each a part of every batch and, with ``shard``, each a part
    of weights and optimiser state. On GPUs each has its own. When one dies all are started again, ``restarts`` times.
    """

    workers: Count = 1
    restarts: Annotated[int, Field(ge=0)] = 3
    shard: bool = False

    @model_validator(mode="after")
    def _several_to_shard(self) -> TrainConfig:
        if self.shard and self.workers == 1:
            raise MoesaicError("shard divides a model between workers, and there is one", nearest="workers: 2")
        return self


class SupernetConfig(TrainingConfig):
    """``largest_first``: share of the steps in which the largest architecture trains alone, before slices join."""

    random_slices: Count = 1
    sampling: Literal["fair", "uniform"] = "fair"
    sharing: Literal["nested", "packed"] = "nested"
    largest_first: Annotated[float, Field(ge=0, lt=1)] = 0.15


class LatencyConfig(_Section):
    """The pass that latency is of, and how many models calibrate its predictor in how many rounds at least.

    ``prefill`` computes ``sequence_length`` positions of each sequence at once, ``decode`` one token after as many in
    a key/value cache; without a length it is that of the data.
    """

    phase: Phase = "prefill"
    batch_size: Count = 8
    sequence_length: Count | None = None
    models: Annotated[int, Field(ge=8)] = 80
    repeats: Annotated[int, Field(ge=3)] = 5


class SearchConfig(_Section):
    """``trials`` architectures are evaluated on ``evaluation_windows`` windows of held-out text.

    A sampler learns from ``population`` of them before it proposes; ``puzzle`` scores half as many parts per layer.
    """

    sampler: Literal["random", "nsga2", "tpe", "puzzle", "evolution"] = "evolution"
    trials: Count = 300
    objectives: Annotated[list[Objective], Field(min_length=1)] = ["loss", "flops"]
    population: Annotated[int, Field(ge=4)] = 40
    evaluation_windows: Annotated[int, Field(ge=2)] = 128

    @field_validator("objectives")
    @classmethod
    def _different_and_loss(cls, objectives: list[Objective]) -> list[Objective]:
        if len(set(objectives)) < len(objectives):
            raise MoesaicError("an objective stands twice")
        if "loss" not in objectives:
            raise MoesaicError("loss must be an objective: without it the smallest architecture always wins")
        return objectives


class LaneResources(_Section):
    """What a lane takes of its node; a fraction of a GPU lets several lanes share one."""

    cpu: Positive = 1.0
    gpu: Annotated[float, Field(ge=0)] = 0.0


class ExecutorConfig(_Section):
    """Where the search evaluates: in this process (``local``), or in ``lanes`` lanes of a Ray cluster.

    ``address``: a cluster's, or ``auto`` for the one this machine belongs to; without it Ray starts on this machine
    alone. An evaluation is retried ``retries`` times when its lane dies, and fails after ``time_limit`` seconds.
    """

    kind: Literal["local", "ray"] = "local"
    address: str | None = None
    lanes: Count = 1
    resources: LaneResources = LaneResources()
    retries: Annotated[int, Field(ge=0)] = 2
    time_limit: Positive = 600.0

    @model_validator(mode="after")
    def _only_ray_has_lanes(self) -> ExecutorConfig:
        fields = type(self).model_fields
        ignored = [name for name in fields if name != "kind" and getattr(self, name) != fields[name].default]
        if self.kind == "local" and ignored:
            raise MoesaicError(
                f"{ignored[0]} is a setting of lanes, and the executor of this process has none",
                found="kind: local",
                nearest="kind: ray",
            )
        return self


class FidelityConfig(_Section):
    """``check``: how many of the evaluated architectures are trained from scratch, for ``steps`` each and otherwise as
    ``retrain`` says, to see how well inherited losses rank them."""

    check: Annotated[int, Field(ge=0)] = 0
    steps: Count = 300

    @field_validator("check")
    @classmethod
    def _none_or_enough(cls, check: int) -> int:
        if 0 < check < FEWEST_MEMBERS:
            raise MoesaicError(
                "so few say nothing of a ranking", allowed=f"0, or {FEWEST_MEMBERS} and more", nearest=FEWEST_MEMBERS
            )
        return check


class ExportConfig(_Section):
    """``front``: how many members of the Pareto front are exported beside the best one, evenly spread."""

    front: Annotated[int, Field(ge=0)] = 4


class RetrainConfig(TrainingConfig):
    """Training of the chosen architecture and, with ``rivals``, of the best uniform and dense ones in the same budget.

    Each is trained once with each of ``seeds`` seeds, the first of which is the run's: with one, chance in training is
    in no figure. What is trained is kept when there are more later.
    """

    seeds: Count = 1
    init: Literal["scratch", "inherited"] = "scratch"
    rivals: bool = True
    evaluation_windows: Annotated[int, Field(ge=2)] = 256


class Config(_Section):
    """Everything a run depends on. ``space`` is read by ``search_spaces.load_space``.

    There is one ``budget``, or several under names of their own in ``budgets``: these share one supernet and one
    search, and each gets its own models and report. ``mirror`` is the URL of a database that gets the search's trials
    as a study of Optuna; without it they are in a journal file.
    """

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: Annotated[int, Field(ge=0)] = 0
    data: DataConfig = DataConfig()
    space: Any = "small"
    budget: dict[str, BudgetLine]
    budgets: dict[BudgetName, dict[str, BudgetLine]] = {}
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

    @model_validator(mode="before")
    @classmethod
    def _one_or_several(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("budgets") and not data.get("budget"):
            return {**data, "budget": None}
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
    def _not_both(self) -> Config:
        if bool(self.budget) == bool(self.budgets):
            raise MoesaicError("there is one budget, or several in budgets", allowed="one of the two keys")
        return self

    def limits(self) -> dict[str, Limit]:
        return {name: parse_limit(line.limit, name) for name, line in self.budget.items()}


def _lines(value: Any) -> Any:
    """The lines of a budget, of which a plain value is the limit."""
    if not isinstance(value, dict) or not value:
        raise MoesaicError("budget needs at least one line", allowed=", ".join(DIMENSIONS))
    return {name: {"limit": line} if not isinstance(line, dict) else line for name, line in value.items()}


class RetrainFile(_Section):
    """``retrain.yaml`` of an exported model: what its training needs to know of the run it came from."""

    name: str
    seed: Annotated[int, Field(ge=0)] = 0
    data: DataConfig
    device: DeviceConfig = DeviceConfig()
    train: TrainConfig = TrainConfig()
    retrain: RetrainConfig = RetrainConfig()


@dataclass(frozen=True)
class Loaded:
    """A configuration with the space it names and the YAML it came from."""

    config: Config
    space: SearchSpace
    source: YamlSource

    def under(self, name: str) -> Loaded:
        """The configuration with that one of its ``budgets`` alone."""
        config = self.config.model_copy(update={"budget": self.config.budgets[name], "budgets": {}})
        return replace(self, config=config)

    def resolved_yaml(self) -> str:
        """The whole configuration, defaults written out, ready to be read again."""
        return yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=100)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read a run's YAML and apply ``KEY=VALUE`` overrides with dotted keys.

    Raises
    ------
    MoesaicError : the first thing that does not fit, with file, line, key and the nearest valid value.
    """
    source = _read(path, overrides)
    config = validate(Config, source)
    _check_workers(config.train, gcd(config.supernet.batch_size, config.retrain.batch_size), source)
    budgets = {("budgets", name): lines for name, lines in config.budgets.items()}
    for keys, lines in {("budget",): config.budget, **budgets}.items():
        for name, line in lines.items():
            _check_budget((*keys, name), line, source)
    space_source = source.at("space", data=config.space)
    return Loaded(config, load_space(space_source), source)


def load_retrain_file(path: Path, overrides: Sequence[str] = ()) -> RetrainFile:
    """Read an export's ``retrain.yaml``. Raises MoesaicError as ``load_config``."""
    source = _read(path, overrides)
    file = validate(RetrainFile, source)
    _check_workers(file.train, file.retrain.batch_size, source)
    return file


def _read(path: str | Path, overrides: Sequence[str]) -> YamlSource:
    source = read_yaml(path)
    if source.data is None:
        raise MoesaicError("is empty", where=str(path), allowed="a configuration; `moesaic init` writes one")
    if not isinstance(source.data, dict):
        raise MoesaicError(
            "is not a mapping of keys", where=source.where(), found=source.data, allowed=", ".join(Config.model_fields)
        )
    return _overridden(source, overrides)


def _check_workers(train: TrainConfig, rows: int, source: YamlSource) -> None:
    """Raises MoesaicError unless every worker gets as many of ``rows`` rows of each batch."""
    if rows % train.workers:
        raise MoesaicError(
            "batches cannot be dealt evenly to the workers",
            where=source.where(("train", "workers")),
            found=train.workers,
            allowed=f"a divisor of batch_size: {', '.join(str(n) for n in range(1, rows + 1) if rows % n == 0)}",
            nearest=max(n for n in range(1, min(train.workers, rows) + 1) if rows % n == 0),
        )


def _check_budget(path: tuple[str, ...], line: BudgetLine, source: YamlSource) -> None:
    name = path[-1]
    if name not in DIMENSIONS:
        raise MoesaicError(
            "unknown cost",
            where=source.where(path),
            found=name,
            allowed=", ".join(DIMENSIONS),
            nearest=nearest_name(name, DIMENSIONS),
        )
    if line.confidence is not None and name != "latency":
        raise MoesaicError(
            f"{name} is computed without error and takes no confidence",
            where=source.where((*path, "confidence")),
            found=line.confidence,
            allowed="confidence of latency alone",
        )
    try:
        parse_limit(line.limit, name)
    except MoesaicError as error:
        raise MoesaicError(
            error.problem,
            where=source.where(path),
            found=error.found,
            allowed=error.allowed,
            nearest=error.nearest,
        ) from None


def _overridden(source: YamlSource, overrides: Sequence[str]) -> YamlSource:
    data = copy.deepcopy(source.data)
    lines: dict[tuple[str | int, ...], int | str] = dict(source.lines)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise MoesaicError(
                "an override is KEY=VALUE", where="command line", found=override, nearest="search.trials=50"
            )
        value = parse_yaml(text, f"command line: {key}").data
        *parents, last = path = tuple(key.split("."))
        target: dict[str, Any] = data
        for depth, parent in enumerate(parents):
            inner = target.get(parent)
            if parent == "space" and isinstance(inner, str):
                inner = {"preset": inner}  # `space: small` takes overrides like `space: {preset: small}`
            if inner is None:
                inner = {}
            if not isinstance(inner, dict):
                raise MoesaicError(
                    "the key has no parts", where=f"command line: {'.'.join(parents[: depth + 1])}", found=override
                )
            target[parent] = inner
            target = inner
        target[last] = value
        lines[path] = "command line"
    return YamlSource(source.name, data, lines)
