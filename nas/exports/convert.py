"""Converts exports for other programs. A converted model stays only if its program computes the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from moesaic.nas.data.streams import TOKENIZER
from moesaic.nas.exports.figures import ExportFigures, RuntimeCheck
from moesaic.nas.exports.folder import CARD, FIGURES, ModelFacts, load_exported, read_facts, replacing
from moesaic.nas.exports.huggingface.files import MODEL_CLASS, check_language_model, write_language_files
from moesaic.nas.exports.verification import verified
from moesaic.search_spaces import MoesaicError
from moesaic.search_spaces.files import read_value, write_text, write_value


@dataclass(frozen=True)
class Format:
    """``write`` makes a folder from an export with such facts. ``check`` is the module that asks ``program``."""

    program: str
    extra: str
    check: str
    write: Callable[[Path, ModelFacts, Path], None]


def _write_transformers(export: Path, facts: ModelFacts, folder: Path) -> None:
    """The export itself, with the files of transformers where an older version left them out."""
    check_language_model(facts.architecture, str(export))
    shutil.copytree(export, folder, dirs_exist_ok=True)
    write_value(folder / "config.json", replace(facts, architectures=(MODEL_CLASS,)))
    write_language_files(folder, export / TOKENIZER, facts.sequence_length)


FORMATS = {
    "transformers": Format("transformers", "hf", "moesaic.nas.exports.huggingface.check", _write_transformers),
}
"""By the name that a user gives. A new format is a module and an entry here."""


def convert(export: Path, name: str, out: Path) -> RuntimeCheck:
    """Convert an export to ``FORMATS[name]`` in ``out`` (replaced as a whole, or not at all), and check it there.

    The check goes into its ``figures.json`` and its card.

    Raises
    ------
    MoesaicError : it is not an export or cannot be converted; the program is not installed, or computes something
        else, or ``out`` cannot be written. Nothing is left in ``out``.
    """
    chosen = FORMATS[name]
    if find_spec(chosen.program) is None:
        raise MoesaicError(f"{chosen.program} is not installed", nearest=f"pip install 'moesaic[{chosen.extra}]'")
    if out.resolve() == export.resolve():
        raise MoesaicError("is the export itself, which stays", where="--out", found=str(out), allowed="a new folder")
    facts, model = read_facts(export), load_exported(export)
    with replacing(out) as folder:
        chosen.write(export, facts, folder)
        check = verified(chosen.program, chosen.check, folder, model, export / TOKENIZER)
        if (folder / FIGURES).exists():
            figures = read_value(folder / FIGURES, ExportFigures)
            write_value(folder / FIGURES, replace(figures, checks=(check,)))
        card = folder / CARD
        text = card.read_text(encoding="utf-8") if card.exists() else ""
        write_text(card, f"{text}\n{check_text(check)}\n")
    return check


def check_text(check: RuntimeCheck) -> str:
    return (
        f"Checked in {check.program} {check.version} on {check.positions} tokens of real text: logits differ from "
        f"Moesaic's by at most {check.logit_difference:.2g}, step by step by {check.decode_logit_difference:.2g}."
    )
