"""Opens a folder that holds a trained model: Hugging Face's format (``config.json``, safetensors), or an export.

Nothing in it is executed: no remote code, no pickles. Tensors are read one by one from memory-mapped files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moesaic.search_spaces import Architecture, Damaged, MoesaicError
from moesaic.search_spaces.errors import nearest_name
from moesaic.search_spaces.files import PathLike, write_text
from moesaic.supernet.checkpoint import save_tensors
from moesaic.supernet.convert import bert, gpt2, llama
from moesaic.supernet.convert.family import Family, Settings
from moesaic.supernet.convert.names import Names, Piece, ours, theirs
from moesaic.supernet.model import Transformer

_DTYPES = {"F32", "F16", "BF16", "F64"}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
OWN = "moesaic"
"""``model_type`` of an export."""


def _read_export(settings: Settings) -> Architecture:
    return Architecture.from_dict(settings.get("architecture"), str(settings.path))


def _export_names(architecture: Architecture) -> Names:
    with torch.device("meta"):
        parameters = Transformer(architecture, 1).named_parameters()
        return {name: [Piece(name)] for name, _ in parameters}


FAMILIES = {
    family.model_type: family
    for family in (
        *llama.FAMILIES,
        *gpt2.FAMILIES,
        *bert.FAMILIES,
        Family(OWN, "an export", _read_export, None, _export_names),
    )
}
"""By ``model_type``. A new family is a module and an entry here."""
_NOT_YET = {"t5": "encoder-decoder models", "mt5": "encoder-decoder models", "bart": "encoder-decoder models",
            "marian": "encoder-decoder models", "roberta": "encoders other than BERT",
            "distilbert": "encoders other than BERT"}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A trained model in ``folder``. ``files`` are the safetensors files of its tensors, by their name there, and
    ``dtypes`` what their headers say."""

    folder: Path
    family: Family
    architecture: Architecture
    vocab_size: int
    max_length: int | None
    files: Mapping[str, Path] = field(repr=False)
    dtypes: Mapping[str, str] = field(repr=False)

    @property
    def tokenizer(self) -> Path:
        """Its ``tokenizer.json``. Raises MoesaicError where there is none."""
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise MoesaicError(
                "the folder has no tokenizer.json",
                where=str(self.folder),
                allowed="a fast tokenizer, as AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it",
            )
        return path

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the configuration and of all weights: reads the files, about a gigabyte a second."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for path in sorted(set(self.files.values())):
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]

    @cached_property
    def names(self) -> Names:
        """The tensors of each of our parameters, as they are called in this folder."""
        return self.family.spelt(self.family.names(self.architecture), self.files)

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Our parameters whose names start with ``prefix`` (such as ``stacks.decoder.layers.3.``), without it.

        Raises
        ------
        MoesaicError : a tensor is missing, of another shape or type, or cannot be read.
        """
        wanted = [own for own in self.names if own.startswith(prefix)]
        self._check_present(wanted)
        return {own.removeprefix(prefix): self._value(own) for own in wanted}

    def load(self) -> Transformer:
        """The whole model in float32, in evaluation mode. Raises MoesaicError for missing or unexpected tensors."""
        self.check()
        with torch.device("meta"):
            model = Transformer(self.architecture, self.vocab_size)
        for name in self._shapes:
            model.load_state_dict({name: self._value(name)}, strict=False, assign=True)
        return model.eval()

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        """Of our parameters."""
        with torch.device("meta"):
            return {n: p.shape for n, p in Transformer(self.architecture, self.vocab_size).named_parameters()}

    def _value(self, own: str) -> Tensor:
        pieces = self.names[own]
        try:
            found, shape = ours(pieces, self._read), None
        except (RuntimeError, IndexError) as error:  # pieces of different shapes
            found, shape = None, str(error)
        if found is None or found.shape != self._shapes[own]:
            names = [name for piece in pieces for name in piece.names]
            raise MoesaicError(
                f"the shape of {', '.join(names[:2])} does not fit config.json",
                where=str(self.files[names[0]]),
                found=shape if found is None else list(found.shape),
                allowed=list(self._shapes[own]),
            )
        return found

    def check(self) -> None:
        """Raises MoesaicError unless the folder holds every tensor of the model, and no others."""
        wanted = self._check_present(self.names)
        tied = {"lm_head.weight"} if self.architecture.backbone.tied else set()
        others = self.files.keys() - wanted - tied
        if unknown := sorted(name for name in others if not name.endswith(self.family.ignored or ("\0",))):
            raise MoesaicError(
                f"{len(unknown)} tensors have no counterpart in a {self.family.title} of this configuration",
                where=str(self.files[unknown[0]]),
                found=unknown[0],
                allowed="the tensors that config.json describes",
            )

    def _check_present(self, parameters: Iterable[str]) -> set[str]:
        """The tensors of these parameters. Raises MoesaicError where one is missing, or of a type that is not read."""
        wanted = {name: None for own in parameters for piece in self.names[own] for name in piece.names}
        if missing := [name for name in wanted if name not in self.files]:
            raise MoesaicError(
                f"{len(missing)} tensors are missing",
                where=str(self.folder),
                found=f"no {missing[0]}",
                allowed="the complete checkpoint that config.json describes",
            )
        if other := [name for name in wanted if self.dtypes[name] not in _DTYPES]:
            kind, allowed = self.dtypes[other[0]], ", ".join(sorted(_DTYPES))
            where = str(self.files[other[0]])
            raise MoesaicError(f"{other[0]} is stored as {kind}", where=where, found=kind, allowed=allowed)
        return set(wanted)

    def _read(self, name: str) -> Tensor:
        path = self.files[name]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise MoesaicError(f"cannot read {name}: {error}", where=str(path)) from None


def open_checkpoint(folder: PathLike) -> Checkpoint:
    """The trained model in ``folder``; reads its configuration and the headers of its files.

    Raises
    ------
    MoesaicError : no such folder, a missing or damaged file, an unknown family, or something in the configuration that
        has no exact counterpart here; with the file and the key.
    """
    folder = Path(folder)
    settings = Settings(_json(folder), folder / "config.json")
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = [name for name in FAMILIES if name != OWN]
        problem = "this family cannot be read"
        if isinstance(kind, str) and kind in _NOT_YET:
            problem = f"{_NOT_YET[kind]} cannot be read yet"
        raise MoesaicError(
            problem, where=f"{settings.path}: model_type", found=kind, allowed=", ".join(known),
            nearest=nearest_name(str(kind), known),
        )  # fmt: skip
    if quantized := settings.get("quantization_config", None):
        method = quantized.get("quant_method", quantized) if isinstance(quantized, dict) else quantized
        raise settings.error(
            "quantized weights are not read", "quantization_config", method, "float32, float16, bfloat16"
        )
    family = FAMILIES[kind]
    try:
        architecture = family.read(settings)
    except MoesaicError as error:
        if error.where is not None:
            raise
        raise MoesaicError(
            error.problem, where=str(settings.path), found=error.found, allowed=error.allowed, nearest=error.nearest
        ) from None
    except ValueError as error:
        raise MoesaicError(str(error), where=str(settings.path)) from None
    longest = settings.spelled(family.max_length, "sequence_length")
    length = settings.size(longest) if longest in settings.data else None
    dtypes: dict[str, str] = {}
    files = _files(folder, dtypes)
    return Checkpoint(folder, family, architecture, settings.size("vocab_size"), length, files, dtypes)


def write_folder(model: Transformer, folder: PathLike, model_type: str) -> None:
    """Write ``model`` as a folder that another program opens as a ``model_type``: the inverse of ``open_checkpoint``.

    Raises
    ------
    MoesaicError : the family is not written (an export has figures, too: ``nas.exports`` writes it), or cannot
        represent this architecture exactly.
    """
    folder, writers = Path(folder), {name: family for name, family in FAMILIES.items() if family.write is not None}
    if model_type not in writers:
        raise MoesaicError(
            "this family is not written",
            where="model_type",
            found=model_type,
            allowed=", ".join(writers),
            nearest=nearest_name(model_type, writers),
        )
    family = writers[model_type]
    assert family.write is not None
    architecture, parameters = _without_empty_layers(model)
    problem = f"{family.title} cannot represent this architecture"
    for slot, layer in model.architecture.layers.items():
        if layer.blocks == 1:
            raise MoesaicError(
                problem,
                where=str(folder),
                found=f"{slot} without {'a feed-forward part' if layer.attention.heads else 'attention'}",
                allowed="layers with both, or with neither",
            )
    data = family.write(architecture, model.vocab_size)
    try:
        back = family.read(Settings(data, folder / "config.json"))
    except MoesaicError as error:
        raise MoesaicError(problem, where=str(folder), found=error.found, allowed=error.allowed) from None
    if back != architecture:
        raise MoesaicError(problem, where=str(folder), found=_difference(architecture, back))
    tensors = theirs(family.names(back), parameters)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    write_text(folder / "config.json", json.dumps(data, indent=2) + "\n")


def _without_empty_layers(model: Transformer) -> tuple[Architecture, dict[str, Tensor]]:
    """The architecture and parameters of a model that computes the same without layers of which nothing is left.

    Raises
    ------
    MoesaicError : no layer is left.
    """
    architecture, numbers = model.architecture, dict[tuple[str, str], str]()
    for name, stack in model.architecture.stacks.items():
        left = [index for index, layer in enumerate(stack.layers) if layer.blocks]
        if not left:
            raise MoesaicError(f"nothing is left of the {name}", allowed="at least one layer")
        layers = tuple(stack.layers[index] for index in left)
        architecture = replace(architecture, **{name: replace(stack, layers=layers)})
        numbers |= {(name, str(old)): str(new) for new, old in enumerate(left)}

    def renamed(key: str) -> str:
        words = key.split(".")
        if words[2:3] == ["layers"]:
            words[3] = numbers[words[1], words[3]]
        return ".".join(words)

    parameters: dict[str, Tensor] = {renamed(key): value for key, value in model.named_parameters()}
    return architecture, parameters


def _difference(one: Architecture, other: Architecture) -> str:
    """Where two architectures first differ."""
    if one.backbone != other.backbone:
        return str(one.backbone)
    for slot, layer in one.layers.items():
        if layer != other.layers.get(slot):
            return f"{slot}: {layer}"
    return f"{len(one.layers)} layers"


def _json(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not folder.is_dir():
        raise MoesaicError(
            "no such folder", where=str(folder), allowed="a folder with config.json and safetensors files"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MoesaicError(
            "the folder has no config.json", where=str(folder), allowed="the folder of one model"
        ) from None
    except (ValueError, OSError) as error:
        raise Damaged(f"is not readable JSON: {error}", path) from None
    if not isinstance(data, dict):
        raise Damaged("is not a JSON object", path)
    return data


def _files(folder: Path, dtypes: dict[str, str]) -> dict[str, Path]:
    """The file of every tensor; their types are added to ``dtypes``."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        dtypes |= _tensors_in(folder / "model.safetensors")
        return dict.fromkeys(dtypes, folder / "model.safetensors")
    if not index.is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        raise MoesaicError(
            "the weights are pickles, which can run code and are never opened"
            if pickles
            else "the folder has no weights",
            where=str(folder),
            found=", ".join(pickles[:2]) or None,
            allowed="model.safetensors, whole or in shards: transformers' save_pretrained writes it",
        )
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {str(name) for name in table.values()}
    except (ValueError, KeyError, AttributeError, OSError) as error:
        raise Damaged(f"is no index of shards: {error}", index) from None
    found: dict[str, Path] = {}
    for shard in sorted(shards):
        path = folder / shard
        if os.path.basename(shard) != shard:
            raise MoesaicError(
                "names a file outside the folder", where=str(index), found=shard, allowed="a file beside it"
            )
        if not path.is_file():
            raise MoesaicError("a shard is missing", where=str(index), found=shard, allowed="all files of the index")
        there = _tensors_in(path)
        dtypes |= there
        found |= dict.fromkeys(there, path)
    if absent := [name for name, shard in table.items() if found.get(name) != folder / shard]:
        raise Damaged(f"names {absent[0]}, which {table[absent[0]]} does not hold", index)
    return found


def _tensors_in(path: Path) -> dict[str, str]:
    """Names and types of the tensors in a safetensors file. Raises Damaged where it is cut."""
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()  # the file itself cannot be iterated over
            return {name: file.get_slice(name).get_dtype() for name in names}
    except (SafetensorError, OSError) as error:
        raise Damaged(f"is truncated or not a safetensors file ({error})", path) from None
