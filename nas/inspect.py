"""What is in a folder with a trained model, and what would become of it: sparsity and loss of quality per layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from moesaic.nas.data.tokenizer import tokenizer_of
from moesaic.nas.tasks.text import Frame
from moesaic.nas.terminal.tables import plain_table
from moesaic.search_spaces import Architecture, FeedForward, MoesaicError, Slot
from moesaic.search_spaces.architecture import layer_names
from moesaic.search_spaces.files import PathLike
from moesaic.search_spaces.trained import TrainedSpec
from moesaic.supernet.convert import Checkpoint
from moesaic.supernet.sparsify.activity import Activity, Captured
from moesaic.supernet.sparsify.split import PartCost, split

_TOKENS, _LENGTH, _CHARACTERS = 2048, 256, 1 << 20
_SPARSE, _DENSE = 0.2, 0.4
"""Shares of neurons that hold 95 % of a layer's output: below the first, splits lose little (MoEfication, where models
with ReLU have less than a tenth); above the second, much."""
_HALF, _QUARTER = 0.5, 0.25
_SPEC = TrainedSpec(expert_sizes=[16], shared=[0.125, 0.25], active=[0.1429, 0.3333], kept=[0.25, 0.5])
"""Choices that use about half or a quarter of a layer's neurons per token."""


@dataclass(frozen=True)
class LayerFacts:
    """``experts`` is 1 for a dense layer. The others are squared errors of the layer's output, as shares of its square,
    where a token uses about half or a quarter of the neurons: as ``pruned`` dense layers and as experts (``split``).
    ``captured`` says how well a router finds the neurons that matter."""

    slot: Slot
    neurons: int
    experts: int
    activity: Activity
    pruned_half: float | None
    split_half: float | None
    split_quarter: float | None
    captured: tuple[Captured, ...]


@dataclass(frozen=True)
class Inspection:
    family: str
    kind: str
    folder: str
    parameters: int
    vocab_size: int
    max_length: int | None
    activation: str
    tokens: int
    layers: tuple[LayerFacts, ...]
    advice: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def inspect_checkpoint(
    checkpoint: Checkpoint, text: PathLike | None, on_layer: Callable[[int, int], None] = lambda done, total: None
) -> Inspection:
    """Reads the whole model. ``text`` is a text file of the kind that the model is for; by default the Python standard
    library's licence and sources. ``on_layer`` gets the layers done and their number.

    Raises
    ------
    MoesaicError : the text is too short or cannot be read; the checkpoint is damaged.
    """
    windows = _windows(checkpoint, None if text is None else Path(text))
    model, architecture = checkpoint.load(), checkpoint.architecture
    parameters = sum(parameter.numel() for parameter in model.parameters())
    made = split(
        model, _SPEC.build(architecture), windows, on_layer=lambda done: on_layer(done, len(architecture.layers))
    )
    layers = tuple(
        LayerFacts(
            found.slot,
            architecture.layers[found.slot].feed_forward.neurons,
            architecture.layers[found.slot].feed_forward.experts,
            found.activity,
            _error(made.costs, found.slot, _HALF, dense=True),
            _error(made.costs, found.slot, _HALF, dense=False),
            _error(made.costs, found.slot, _QUARTER, dense=False),
            found.captured,
        )
        for found in made.activities
    )
    activation = architecture.backbone.activation
    return Inspection(
        checkpoint.family.title,
        _kind(architecture),
        str(checkpoint.folder),
        parameters,
        checkpoint.vocab_size,
        checkpoint.max_length,
        activation,
        windows.numel(),
        layers,
        _advice(layers, activation),
    )


def _kind(architecture: Architecture) -> str:
    """What the model is, in words."""
    head = architecture.backbone.head
    heads = {"linear": "", "masked": " with a masked-token head", "none": " without a head"}
    return ("decoder" if architecture.output.causal else "encoder") + heads[head]


def _windows(checkpoint: Checkpoint, text: Path | None) -> Tensor:
    """[B, S] token ids of the text; of an encoder, each between the tokens that it expects around a text."""
    length = min(_LENGTH, checkpoint.max_length or _LENGTH)
    tokenizer = tokenizer_of(checkpoint.tokenizer, checkpoint.vocab_size)
    causal = checkpoint.architecture.output.causal
    frame = None if causal else Frame.of(tokenizer, str(checkpoint.tokenizer))
    length -= 2 if frame else 0
    where = str(text) if text else "the standard library"
    content = text.read_text(encoding="utf-8", errors="strict") if text else _own_text()
    ids = tokenizer.encode(content[:_CHARACTERS], add_special_tokens=frame is None).ids
    count = min(_TOKENS, len(ids)) // length
    if count == 0:
        raise MoesaicError(
            "the text is too short", where=where, found=f"{len(ids)} tokens", allowed=f"{length} and more"
        )
    windows = torch.tensor(ids[: count * length]).view(count, length)
    return windows if frame is None else frame.around(windows)


def _own_text() -> str:
    import argparse
    import inspect
    import textwrap

    return "\n".join(inspect.getsource(module) for module in (textwrap, argparse))


def _error(costs: Sequence[PartCost], slot: Slot, share: float, dense: bool) -> float | None:
    """The least error of a choice of this kind that uses at most about ``share`` of the layer's neurons."""
    own = [(cost.part, cost.error) for cost in costs if cost.slot == slot and isinstance(cost.part, FeedForward)]
    most = 1.02 * share * max(part.worst_active_neurons for part, _ in own)
    fitting = [error for part, error in own if (part.router is None) == dense and part.worst_active_neurons <= most]
    return min(fitting, default=None)


def _advice(layers: Sequence[LayerFacts], activation: str) -> tuple[str, ...]:
    """What to expect, in sentences."""
    advice, names = [], _names(layers)
    dense = [layer for layer in layers if layer.experts == 1]
    mixtures = [layer for layer in layers if layer.experts > 1]
    if dense:
        mean = sum(layer.activity.concentrated for layer in dense) / len(dense)
        most = max(dense, key=lambda layer: layer.activity.concentrated)
        least = min(dense, key=lambda layer: layer.activity.concentrated)
        advice.append(
            f"Dense layers: 95 % of a token's output comes from {mean:.0%} of the neurons on average, from "
            f"{least.activity.concentrated:.0%} in {names[least.slot]} to {most.activity.concentrated:.0%} in "
            f"{names[most.slot]}."
        )
        if mean < _SPARSE:
            advice.append("That is sparse: splitting into experts will lose little, also without recovery.")
        elif mean < _DENSE:
            advice.append(
                "That is moderately sparse: expect a loss at half of the neurons, which small experts, shared neurons "
                "and repaired weights (retrain.init: repaired) reduce; recover it by distillation (retrain.steps)."
            )
        else:
            advice.append(
                "That is hardly sparse: splitting into experts will hurt, and pruning too. Ask for a mild budget and "
                f"plan a long recovery. A model trained with ReLU instead of {activation} would be far sparser."
            )
        halves = [(layer.split_half or 0.0, layer.pruned_half or 0.0) for layer in dense]
        better = sum(split < pruned for split, pruned in halves)
        advice.append(
            f"At half of the neurons per token, experts are nearer to the layer's output than a pruned dense layer in "
            f"{better} of {len(dense)} layers."
        )
    if mixtures:
        mean = sum(layer.activity.concentrated for layer in mixtures) / len(mixtures)
        advice.append(
            f"Mixtures: {mean:.0%} of the experts take 95 % of this text's tokens. The others can go first; the text "
            "decides which, so calibrate on the text that the model is for."
        )
    return tuple(advice)


def _names(layers: Sequence[LayerFacts]) -> dict[Slot, str]:
    return {slot: f"layer {name}" for slot, name in layer_names(layer.slot for layer in layers).items()}


def print_inspection(console: Console, found: Inspection) -> None:
    console.print(f"{found.family} in {found.folder}", style="bold", highlight=False, soft_wrap=True)
    longest = f", sequences up to {found.max_length}" if found.max_length else ""
    console.print(
        f"{found.kind} of {found.parameters / 1e6:.1f}M parameters, {len(found.layers)} layers, activation "
        f"{found.activation}, vocabulary {found.vocab_size}{longest}; measured on {found.tokens} tokens\n",
        highlight=False,
    )
    title = "Layers: shares of neurons or experts, and errors of the output where a token uses half or a quarter"
    columns = "layer|neurons|experts|hold 95 %|below 1 %|negative|router finds|pruned, half|split, half|split, quarter"
    table, names = plain_table(title, columns, "layer"), _names(found.layers)
    for layer in found.layers:
        seen = layer.activity
        found_half = next((one.routed / one.best for one in layer.captured if one.share == _HALF), None)
        shares = (seen.concentrated, seen.small, seen.negative, found_half)
        errors = (layer.pruned_half, layer.split_half, layer.split_quarter)
        cells = [*("" if share is None else f"{share:.0%}" for share in shares)]
        cells += ["" if error is None else f"{error:.1%}" for error in errors]
        table.add_row(names[layer.slot], str(layer.neurons), str(layer.experts), *cells)
    console.print(table)
    if any(layer.captured for layer in found.layers):
        console.print(
            "Router finds: the activation mass in the half of the tiles that it chooses, of the mass in the best half."
        )
    for sentence in found.advice:
        console.print(sentence, highlight=False)
