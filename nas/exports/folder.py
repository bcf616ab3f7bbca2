"""Exported models: a folder with a plain checkpoint, architecture, tokenizer, and how its figures came about."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from moesaic.nas import __version__
from moesaic.nas.config import Config
from moesaic.nas.context import Context
from moesaic.nas.costs.compliance import over_text, refused_text
from moesaic.nas.costs.measure import latency_text
from moesaic.nas.units import DIMENSIONS
from moesaic.search_spaces import Architecture, MoesaicError, draw
from moesaic.search_spaces.files import read_json, unwritable, write_json, write_text
from moesaic.supernet import Transformer
from moesaic.supernet.checkpoint import load_tensors, load_weights, save_tensors

MODEL_TYPE = "moesaic"
BEST = "best"
"""Name of the export that is retrained and reported as chosen."""


def export_model(
    directory: Path,
    model: Transformer,
    config: Config,
    tokenizer: Path,
    figures: dict[str, Any],
    windows: Tensor,
) -> None:
    """Write ``model`` as ``directory`` (which is replaced as a whole, or not at all), and check it by reading it back.

    ``figures`` go into ``figures.json`` and the model card. ``windows`` [n, S + 1] are what logits are compared on.

    Raises
    ------
    MoesaicError : the folder cannot be written.
    """
    temporary = directory.with_name(f".{directory.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        architecture = model.architecture
        save_tensors(
            temporary / "model.safetensors",
            dict(model.named_parameters()),
            {"format": "pt", "fingerprint": architecture.fingerprint},
        )
        write_json(
            temporary / "config.json",
            {
                "model_type": MODEL_TYPE,
                "version": __version__,
                "vocab_size": model.vocab_size,
                "sequence_length": config.data.sequence_length,
                "fingerprint": architecture.fingerprint,
                "architecture": architecture.to_dict(),
            },
        )
        write_text(temporary / "architecture.yaml", architecture.to_yaml())
        shutil.copyfile(tokenizer, temporary / "tokenizer.json")
        write_text(temporary / "retrain.yaml", _retrain_yaml(config))
        reloaded = load_exported(temporary)
        tokens = windows[:4, :-1]
        with torch.inference_mode():
            difference = (reloaded(tokens) - model.cpu()(tokens)).abs().max().item()
        figures = {**figures, "reload_max_logit_difference": difference}
        write_json(temporary / "figures.json", figures)
        write_text(temporary / "README.md", model_card(architecture, figures))
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
    except OSError as error:
        raise unwritable(directory, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_exported(directory: Path) -> Transformer:
    """The model of an export, on the CPU, in evaluation mode. Nothing in the folder is executed.

    Raises
    ------
    MoesaicError : not an export, damaged, or weights that are not those of its architecture.
    """
    path = directory / "config.json"
    if not path.exists():
        raise MoesaicError("is not an exported model: it has no config.json", where=str(directory))
    facts = read_json(path)
    if not isinstance(facts, dict) or facts.get("model_type") != MODEL_TYPE:
        found = facts.get("model_type") if isinstance(facts, dict) else type(facts).__name__
        raise MoesaicError(
            "is not the configuration of an exported model",
            where=str(path),
            found=f"model_type {found}",
            allowed=f"model_type {MODEL_TYPE}",
        )
    architecture = Architecture.from_dict(facts.get("architecture"), str(path))
    vocab_size = facts.get("vocab_size")
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise MoesaicError("vocab_size is not a count", where=str(path), found=vocab_size)
    model = Transformer(architecture, vocab_size)
    tensors, _ = load_tensors(directory / "model.safetensors")
    load_weights(model, tensors, str(directory / "model.safetensors"))
    return model.eval()


def _retrain_yaml(config: Config) -> str:
    """What `moesaic retrain` needs of the run: data, device, training, seed."""
    keep = {"name", "seed", "data", "device", "retrain"}
    data = config.model_dump(mode="json", include=keep)
    data["data"]["files"] = [
        str(Path(name).expanduser().resolve()) if not _is_glob(name) else name for name in data["data"]["files"]
    ]
    head = "# How this model is retrained: `moesaic retrain DIRECTORY`, with KEY=VALUE to change a setting.\n"
    return head + yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=100)


def _is_glob(name: str) -> bool:
    return any(character in name for character in "*?[")


def model_card(architecture: Architecture, figures: dict[str, Any]) -> str:
    """A README for the folder: the picture, the figures, and how they were obtained."""
    context = Context(**figures["context"])
    over, refused = over_text(figures["budget"]), refused_text(figures["refused"])
    rows = [
        f"| {line['name']} ({line['bind']}) | {_cost(line, 'limit')} | {_cost(line, 'predicted')} "
        f"| {_cost(line, 'measured')} | {_status(line)} |"
        for line in figures["budget"]
    ]
    costs = [
        f"| {name} | {DIMENSIONS[name].format(figures['predicted'][name])} | "
        f"{DIMENSIONS[name].format(figures['measured'][name])} | {DIMENSIONS[name].per} |"
        for name in figures["measured"]
    ]
    return "\n".join(
        [
            f"# {figures['name']}: a sparse Transformer designed by Moesaic {__version__}",
            "",
            "```",
            draw(architecture),
            "```",
            "",
            f"Weights: {figures['weights']}. Loss on held-out text: {figures['loss']:.4f} nats per token "
            f"(standard error {figures['standard_error']:.4f}, {figures['tokens']} tokens), "
            f"perplexity {figures['perplexity']:.2f}, {figures['bits_per_byte']:.3f} bits per byte.",
            "",
            *([f"**{over}.**", ""] if over else []),
            "| budget line | limit | predicted | measured | status |",
            "|---|---|---|---|---|",
            *rows,
            "",
            *([refused, ""] if refused else []),
            "| cost | predicted | measured | |",
            "|---|---|---|---|",
            *costs,
            "",
            "FLOPs are 2 x multiply-accumulates of a forward pass, attention counted unfused; predicted from the",
            "expected load of each expert, measured from the load on the test text. Latency is that of a pass over",
            f"{context} on {figures['device']}.",
            "Memory is the weights in float32 and the peak of activations of such a pass.",
            "",
            latency_text(figures["latency"]),
            "",
            "Slice of the supernet against this model: largest logit difference "
            f"{figures['slice_max_logit_difference']:.2g}; "
            f"this model against itself read back from disk: {figures['reload_max_logit_difference']:.2g}.",
            "",
            "Load it with `nas.export.load_exported(directory)`; retrain it with `moesaic retrain DIRECTORY`.",
            "",
        ]
    )


def _cost(line: dict[str, Any], key: str) -> str:
    return DIMENSIONS[line["name"]].format(line[key])


def _status(line: dict[str, Any]) -> str:
    return "**OVER**" if line["status"] == "over" else line["status"]
