"""Reading a configuration: YAML, overrides from the command line, and the checks that need more than one key."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Any

import yaml

from moesaic.nas.config.data import DataConfig
from moesaic.nas.config.sections import (
    ROWS,
    Config,
    LatencyConfig,
    LimitConfig,
    RetrainFile,
    TrainConfig,
)
from moesaic.nas.units import DIMENSIONS, parse_limit
from moesaic.search_spaces import MoesaicError, SearchSpace, load_space
from moesaic.search_spaces.errors import nearest_name
from moesaic.search_spaces.trained import PRESET, TrainedSpec
from moesaic.search_spaces.yaml_source import YamlSource, parse_yaml, read_yaml, validate

if TYPE_CHECKING:
    from moesaic.supernet.convert import Checkpoint

_SURROGATE = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True)
class Loaded:
    """A configuration with the space it names, the YAML it came from and the settings that changed it."""

    config: Config
    space: SearchSpace
    source: YamlSource
    overrides: tuple[str, ...] = ()
    checkpoint: Checkpoint | None = None
    """The trained model to start from."""

    def resolved_yaml(self, budget: str = "") -> str:
        """The configuration with its defaults as YAML; with several budgets, ``budget`` alone."""
        config = self.config
        if budget:
            config = config.model_copy(update={"budget": config.budgets[budget], "budgets": {}})
        return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=100)


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Loaded:
    """Read a run's YAML and apply ``KEY=VALUE`` overrides with dotted keys.

    Raises
    ------
    MoesaicError : the first invalid setting, with file, line, key and the nearest valid value.
    """
    source = _read(path, overrides)
    config = validate(Config, source)
    _check_workers(config.train, config.data, gcd(config.supernet.batch_size, config.retrain.batch_size), source)
    budgets = {("budgets", name): lines for name, lines in config.budgets.items()}
    for keys, lines in {("budget",): config.budget, **budgets}.items():
        for name, line in lines.items():
            _check_budget((*keys, name), line, source)
    checkpoint = None
    if config.model is not None:
        from moesaic.supernet.convert import open_checkpoint  # imported here: torch takes a second

        checkpoint = open_checkpoint(config.model.from_)
    space = _space(config.space, checkpoint, source)
    _check_positions(config, space, source)
    _check_pass(config.latency, space, source)
    check_translates(config.data, space.encoder is not None, source.where(("data", "kind")))
    _check_encoder(config, space, source)
    if config.search.judge == "bleu" and space.encoder is None:
        raise MoesaicError(
            "BLEU is of translations, and the space has no encoder",
            where=source.where(("search", "judge")),
            found="bleu",
            allowed="judge: loss, or a space with the key encoder",
            nearest="loss",
        )
    return Loaded(config, space, source, tuple(overrides), checkpoint)


def load_retrain_file(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RetrainFile:
    """Read an export's ``retrain.yaml``. Raises MoesaicError as ``load_config``."""
    source = _read(path, overrides)
    file = validate(RetrainFile, source)
    _check_workers(file.train, file.data, file.retrain.batch_size, source)
    return file


def check_translates(data: DataConfig, encodes: bool, where: str) -> None:
    """Raises MoesaicError unless models that have an encoder, and no others, get pairs of sentences."""
    if (data.kind == "parallel") == encodes:
        return
    if encodes:
        raise MoesaicError(
            "a model with an encoder and a decoder translates, and learns from parallel text",
            where=where,
            found=f"kind: {data.kind}",
            allowed="data: {kind: parallel, files: {train: [FILE.en, FILE.de]}}",
            nearest="kind: parallel",
        )
    raise MoesaicError(
        "parallel text is for a model that translates, with an encoder beside the decoder",
        where=where,
        found="no encoder",
        allowed="a space with the key encoder",
    )


def _read(path: str | os.PathLike[str], overrides: Sequence[str]) -> YamlSource:
    source = read_yaml(path)
    if source.data is None:
        raise MoesaicError("is empty", where=str(path), allowed="a configuration; `moesaic init` writes one")
    if not isinstance(source.data, dict):
        raise MoesaicError(
            "is not a mapping of keys", where=source.where(), found=source.data, allowed=", ".join(Config.model_fields)
        )
    return _overridden(source, overrides)


def _space(data: Any, checkpoint: Checkpoint | None, source: YamlSource) -> SearchSpace:
    """The space that ``data``, the key ``space``, describes. Raises MoesaicError unless it fits the start."""
    whole = {"preset": data} if isinstance(data, str) else data
    of_model = isinstance(whole, dict) and whole.get("preset") == PRESET
    if of_model and checkpoint is None:
        raise MoesaicError(
            "this space is that of a trained model",
            where=source.where(("space",)),
            found=PRESET,
            allowed="model: {from: DIR}",
        )
    if checkpoint is None:
        return load_space(source.at("space", data=data))
    if not of_model:
        raise MoesaicError(
            "the space of a run that starts from a trained model is that model's",
            where=source.where(("space",)),
            found=data,
            allowed=f"preset: {PRESET}",
        )
    return validate(TrainedSpec, source.at("space", data=whole)).build(checkpoint.architecture)


def _check_workers(train: TrainConfig, data: DataConfig, batch_size: int, source: YamlSource) -> None:
    """Raises MoesaicError unless the rows of a batch split evenly among the workers."""
    rows, name = batch_size, "batch_size"
    if data.kind == "parallel":
        rows, name = gcd(batch_size, ROWS), f"batch_size and of {ROWS}"
    if rows % train.workers:
        raise MoesaicError(
            "workers must divide the batch size",
            where=source.where(("train", "workers")),
            found=train.workers,
            allowed=f"a divisor of {name}: {', '.join(str(n) for n in range(1, rows + 1) if rows % n == 0)}",
            nearest=max(n for n in range(1, min(train.workers, rows) + 1) if rows % n == 0),
        )


def _check_positions(config: Config, space: SearchSpace, source: YamlSource) -> None:
    """Raises MoesaicError where sequences are longer than the learned positions."""
    most, longest = space.backbone.max_positions, config.data.sequence_length
    if most is not None and longest > most:
        raise MoesaicError(
            "sequences are longer than the learned positions of the space reach",
            where=source.where(("data", "sequence_length")),
            found=longest,
            allowed=f"at most max_positions = {most}",
            nearest=most,
        )


def _check_pass(latency: LatencyConfig, space: SearchSpace, source: YamlSource) -> None:
    """Raises MoesaicError where models of the space do not compute such a pass."""

    def refused(key: str, problem: str, allowed: str, nearest: Any = None) -> MoesaicError:
        found = getattr(latency, key)
        return MoesaicError(
            problem, where=source.where(("latency", key)), found=found, allowed=allowed, nearest=nearest
        )

    if space.encoder is None:
        if latency.phase == "translate":
            raise refused("phase", "a model without an encoder does not translate", "prefill or decode", "decode")
        if latency.phase == "decode" and not space.largest.output.causal:
            raise refused("phase", "an encoder sees all tokens at once and does not decode", "prefill", "prefill")
        for key in ("source_length", "beam"):
            if getattr(latency, key) != LatencyConfig.model_fields[key].default:
                raise refused(key, f"{key} is of models that translate", "a space with the key encoder, or no such key")
    elif latency.phase == "decode":
        problem = "a step of a model with an encoder is part of a translation"
        raise refused("phase", problem, "prefill or translate", "translate")
    elif latency.sequence_length == 1 and latency.phase != "prefill":
        raise refused("sequence_length", "a translation has a word and an end", ">= 2", 2)


def _check_encoder(config: Config, space: SearchSpace, source: YamlSource) -> None:
    """Raises MoesaicError where an encoder alone is to answer questions, or to be trained from nothing."""
    if config.questions is not None and space.backbone.head != "linear":
        raise MoesaicError(
            "an encoder predicts no next token and answers no questions",
            where=source.where(("questions",)),
            found=config.questions,
            allowed="a decoder, or no questions",
        )
    if space.backbone.head == "none" and config.retrain.label_smoothing:
        raise MoesaicError(
            "a model without a head predicts no labels to smooth",
            where=source.where(("retrain", "label_smoothing")),
            found=config.retrain.label_smoothing,
            allowed="0",
            nearest=0,
        )
    if config.model is None and space.backbone.head != "linear":
        raise MoesaicError(
            "this head is that of an encoder, and encoders start from a trained one",
            where=source.where(("space", "backbone", "head")),
            found=space.backbone.head,
            allowed="head: linear, or model: {from: DIR}",
            nearest="linear",
        )


def _check_budget(path: tuple[str, ...], line: LimitConfig, source: YamlSource) -> None:
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
            f"{name} is exact and takes no confidence",
            where=source.where((*path, "confidence")),
            found=line.confidence,
            allowed="confidence of latency only",
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
        # A path whose bytes are no UTF-8 is no YAML either, and is taken as it is.
        value = text if _SURROGATE.search(text) else parse_yaml(text, f"command line: {key}").data
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
                    "this key is not a mapping", where=f"command line: {'.'.join(parents[: depth + 1])}", found=override
                )
            target[parent] = inner
            target = inner
        target[last] = value
        lines[path] = "command line"
    return YamlSource(source.name, data, lines)
