"""Writes and loads exported models: a folder with a plain checkpoint, architecture, tokenizer, figures and card."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from moesaic.nas import __version__
from moesaic.nas.config import Config
from moesaic.nas.data.files import absolute_files
from moesaic.nas.data.parallel import SOURCE_TOKENIZER
from moesaic.nas.data.streams import TOKENIZER
from moesaic.nas.data.tokenizer import Vocabulary
from moesaic.nas.exports.card import model_card
from moesaic.nas.exports.figures import ExportFigures
from moesaic.nas.exports.huggingface.files import MODEL_CLASS, is_language_model, write_language_files
from moesaic.nas.tasks import Task
from moesaic.search_spaces import Architecture, MoesaicError
from moesaic.search_spaces.architecture import ArchitectureField
from moesaic.search_spaces.files import (
    PathLike,
    complete_replacement,
    read_json,
    read_value,
    replace_folder,
    temporary_beside,
    unwritable,
    write_atomically,
    write_text,
    write_value,
)
from moesaic.supernet import Batch, Transformer
from moesaic.supernet.checkpoint import load_tensors, load_weights, save_tensors

MODEL_TYPE = "moesaic"
WEIGHTS, CARD, FIGURES = "model.safetensors", "README.md", "figures.json"


@dataclass(frozen=True)
class ModelFacts:
    """``config.json``: what a model is built from besides its weights."""

    model_type: str
    version: str
    vocab_size: int
    sequence_length: int
    fingerprint: str
    architecture: ArchitectureField
    source_vocab_size: int | None = None
    """That of the encoder, where it has a vocabulary of its own."""
    architectures: tuple[str, ...] = ()
    """The class of transformers that loads it, where there is one."""


def export_model(
    directory: Path, model: Transformer, config: Config, task: Task, figures: ExportFigures, batch: Batch
) -> ExportFigures:
    """Write ``model`` to ``directory`` (replaced as a whole, or not at all), and check it by reading it back.

    ``figures`` go into ``figures.json`` and the model card. Logits are compared on ``batch``. Other files
    in the folder stay. Returns the figures with that comparison.

    Raises
    ------
    MoesaicError : the folder cannot be written, or is not an export.
    """
    architecture = model.architecture
    with replacing(directory) as temporary:
        save_tensors(
            temporary / WEIGHTS,
            dict(model.named_parameters()),
            {"format": "pt", "fingerprint": architecture.fingerprint},
        )
        write_facts(temporary, model, task)
        write_retrain_file(temporary, config, task)
        reloaded = load_exported(temporary)
        with torch.inference_mode():
            logits = (one(batch.tokens, **batch.beside) for one in (reloaded, model.cpu()))
            difference = (next(logits) - next(logits)).abs().max().item()
        figures = replace(figures, reload_max_logit_difference=difference)
        write_value(temporary / FIGURES, figures)
        write_text(temporary / CARD, model_card(architecture, figures, task))
    return figures


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A new folder to write an export into, which becomes ``directory``, as a whole, where the block ends well.

    Raises
    ------
    MoesaicError : it cannot be written, or ``directory`` is something else than an export.
    """
    temporary = temporary_beside(directory)
    try:
        complete_replacement(directory)
        if os.path.lexists(directory) and not _is_export(directory):
            raise MoesaicError("is not an exported model, and stays", where=str(directory), allowed="move it away")
        temporary.mkdir(parents=True)
        yield temporary
        replace_folder(directory, temporary)
    except OSError as error:
        raise unwritable(directory, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_facts(directory: Path, model: Transformer, task: Task) -> None:
    """Write what ``load_exported`` and a user of ``model`` need beside its weights: ``config.json``,
    ``architecture.yaml``, ``tokenizer.json``, and ``source_tokenizer.json`` of a vocabulary of the source alone; for a
    language model, also the files of transformers."""
    architecture = model.architecture
    facts = ModelFacts(
        MODEL_TYPE,
        __version__,
        model.vocab_size,
        task.sequence_length,
        architecture.fingerprint,
        architecture,
        model.source_vocab_size,
        (MODEL_CLASS,) if is_language_model(architecture) else (),
    )
    write_value(directory / "config.json", facts)
    write_text(directory / "architecture.yaml", architecture.to_yaml())
    for name, tokenizer in ((TOKENIZER, task.tokenizer), (SOURCE_TOKENIZER, task.source_tokenizer)):
        if tokenizer is not None:
            write_atomically(directory / name, lambda path, tokenizer=tokenizer: shutil.copyfile(tokenizer, path))
    if is_language_model(architecture):
        write_language_files(directory, task.tokenizer, task.sequence_length)


def vocabulary_of(directory: Path, model: Transformer) -> Vocabulary:
    """That of ``model``, which is exported in ``directory``."""
    source = None if model.source_vocab_size is None else directory / SOURCE_TOKENIZER
    return Vocabulary(directory / TOKENIZER, model.vocab_size, source, model.source_vocab_size)


def load_exported(directory: PathLike) -> Transformer:
    """The model of an export, or of a training's folder, on the CPU, in evaluation mode. No code from the folder is
    executed.

    Raises
    ------
    MoesaicError : the folder is not an export or is damaged, or the weights do not fit the architecture.
    """
    directory = Path(directory)
    facts = read_facts(directory)
    model = Transformer(facts.architecture, facts.vocab_size, source_vocab_size=facts.source_vocab_size)
    tensors, _ = load_tensors(directory / WEIGHTS)
    load_weights(model, tensors, str(directory / WEIGHTS))
    return model.eval()


def read_facts(directory: Path) -> ModelFacts:
    """What ``config.json`` of an export says. Raises MoesaicError where there is none, or it is not valid."""
    path = directory / "config.json"
    if not path.exists():
        raise MoesaicError("is not an exported model: it has no config.json", where=str(directory))
    plain = read_json(path)
    if not isinstance(plain, dict) or plain.get("model_type") != MODEL_TYPE:
        found = plain.get("model_type") if isinstance(plain, dict) else type(plain).__name__
        raise MoesaicError(
            "is not the configuration of an exported model",
            where=str(path),
            found=f"model_type {found}",
            allowed=f"model_type {MODEL_TYPE}",
        )
    Architecture.from_dict(plain.get("architecture"), str(path))  # raises with the key that is wrong
    facts = read_value(path, ModelFacts)
    for name in ("vocab_size", "source_vocab_size"):
        size = getattr(facts, name)
        if size is not None and size < 1:
            raise MoesaicError(f"{name} is not a count", where=str(path), found=size)
    return facts


def retrain_settings(config: Config, task: Task) -> dict[str, Any]:
    """The settings of the run that `moesaic retrain` needs: data, device, training, seed; and the model whose states
    are to be reproduced, where that is the task."""
    keep = {"name", "seed", "data", "device", "retrain"}
    whole = config.model_copy(update={"data": absolute_files(config.data)}).model_dump(mode="json", include=keep)
    if config.model is not None:  # an export goes on from its own weights, and on its own
        whole["retrain"] |= {"init": "inherited", "distil": False}
        if task.imitation is None:
            whole["source"] = os.path.abspath(config.model.from_)
    return whole


def write_retrain_file(directory: Path, config: Config, task: Task) -> None:
    """Write ``retrain.yaml`` of an export."""
    head = "# How this model is retrained: `moesaic retrain DIRECTORY`, with KEY=VALUE to change a setting.\n"
    text = yaml.safe_dump(retrain_settings(config, task), sort_keys=False, default_flow_style=None, width=100)
    write_text(directory / "retrain.yaml", head + text)


def _is_export(directory: Path) -> bool:
    path = directory / "config.json"
    plain = read_json(path) if path.is_file() else None
    return isinstance(plain, dict) and plain.get("model_type") == MODEL_TYPE
