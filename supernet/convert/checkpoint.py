"""Opens a folder that holds a trained model: Hugging Face's format (``config.json``, safetensors), or an export.

Nothing in it is executed: no remote code, no pickles. Tensors are read one by one from memory-mapped files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
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
from moesaic.supernet.convert import gpt2, llama
from moesaic.supernet.convert.family import Family, Settings
from moesaic.supernet.convert.names import Names, Piece, ours, theirs
from moesaic.supernet.model import Transformer

_BLOCKS, _BLOCK = 256, 65536
"""Blocks of a file that its fingerprint reads, and their bytes: a training changes all of them."""
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


def _not_written(architecture: Architecture, vocab_size: int) -> dict[str, Any]:
    raise NotImplementedError("exports are written with their figures, by moesaic.nas.exports")


FAMILIES = {
    family.model_type: family
    for family in (*llama.FAMILIES, *gpt2.FAMILIES, Family(OWN, "an export", _read_export, _not_written, _export_names))
}
"""By ``model_type``. A new family is a module and an entry here."""
_NOT_YET = {"t5": "encoder-decoder models", "mt5": "encoder-decoder models", "bart": "encoder-decoder models",
            "marian": "encoder-decoder models", "bert": "encoders", "roberta": "encoders"}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A trained model in ``folder``. ``files`` are the safetensors files of its tensors, by their name there."""

    folder: Path
    family: Family
    architecture: Architecture
    vocab_size: int
    max_length: int | None
    files: Mapping[str, Path] = field(repr=False)

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
        """16 hexadecimal digits of the configuration and of the weights: sizes, headers, and blocks spread evenly."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for path in sorted(set(self.files.values())):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for block in range(_BLOCKS):
                    file.seek(max(0, size - _BLOCK) * block // (_BLOCKS - 1))
                    digest.update(file.read(_BLOCK))
        return digest.hexdigest()[:16]

    @cached_property
    def names(self) -> Names:
        """The tensors of each of our parameters, as they are called in this folder."""
        names = self.family.names(self.architecture)
        prefix = self.family.prefix
        bare = prefix and not any(name.startswith(prefix) for name in self.files)
        if not bare:
            return names
        return {
            own: [_renamed(piece, piece.name.removeprefix(prefix)) for piece in pieces] for own, pieces in names.items()
        }

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Our parameters whose names start with ``prefix`` (such as ``stacks.decoder.layers.3.``), without it.

        Raises
        ------
        MoesaicError : a tensor is missing or cannot be read.
        """
        return {
            own.removeprefix(prefix): ours(pieces, self._read)
            for own, pieces in self.names.items()
            if own.startswith(prefix)
        }

    def load(self) -> Transformer:
        """The whole model in float32, in evaluation mode. Raises MoesaicError for missing or unexpected tensors."""
        self.check()
        with torch.device("meta"):
            model = Transformer(self.architecture, self.vocab_size)
        for name, expected in model.named_parameters():
            found = ours(self.names[name], self._read)
            if found.shape != expected.shape:
                pieces = ", ".join(piece.name for piece in self.names[name][:2])
                raise MoesaicError(
                    f"the shape of {pieces} does not fit config.json",
                    where=str(self.files[self.names[name][0].name]),
                    found=list(found.shape),
                    allowed=list(expected.shape),
                )
            model.load_state_dict({name: found}, strict=False, assign=True)
        return model.eval()

    def check(self) -> None:
        """Raises MoesaicError unless the folder holds every tensor of the model, and no others."""
        wanted = {piece.name: own for own, pieces in self.names.items() for piece in pieces}
        if missing := [name for name in wanted if name not in self.files]:
            raise MoesaicError(
                f"{len(missing)} tensors are missing",
                where=str(self.folder),
                found=f"no {missing[0]}",
                allowed="the complete checkpoint that config.json describes",
            )
        tied = {"lm_head.weight"} if self.architecture.backbone.tied else set()
        others = self.files.keys() - wanted.keys() - tied
        if unknown := sorted(name for name in others if not name.endswith(self.family.ignored or ("\0",))):
            raise MoesaicError(
                f"{len(unknown)} tensors have no counterpart in a {self.family.title} of this configuration",
                where=str(self.files[unknown[0]]),
                found=unknown[0],
                allowed="the tensors that config.json describes",
            )

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
    if kind not in FAMILIES:
        known = [name for name in FAMILIES if name != OWN]
        problem = "this family cannot be read"
        if kind in _NOT_YET:
            problem = f"{_NOT_YET[kind]} cannot be read yet"
        raise MoesaicError(
            problem, where=f"{settings.path}: model_type", found=kind, allowed=", ".join(known),
            nearest=nearest_name(str(kind), known),
        )  # fmt: skip
    if settings.get("quantization_config", None) is not None:
        method = settings.data["quantization_config"].get("quant_method", "quantized")
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
    longest = settings.get(family.max_length, settings.get("sequence_length", None))
    return Checkpoint(folder, family, architecture, settings.size("vocab_size"), longest, _files(folder))


def write_folder(model: Transformer, folder: PathLike, model_type: str) -> None:
    """Write ``model`` as a folder that another program opens as a ``model_type``: the inverse of ``open_checkpoint``.

    Raises
    ------
    MoesaicError : the family cannot represent this architecture exactly.
    """
    family, folder = FAMILIES[model_type], Path(folder)
    data = family.write(model.architecture, model.vocab_size)
    problem = f"{family.title} cannot represent this architecture"
    try:
        back = family.read(Settings(data, folder / "config.json"))
    except MoesaicError as error:
        raise MoesaicError(problem, where=str(folder), found=error.found, allowed=error.allowed) from None
    if back != model.architecture:
        raise MoesaicError(problem, where=str(folder), found=_difference(model.architecture, back))
    tensors = theirs(family.names(back), dict(model.named_parameters()))
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    write_text(folder / "config.json", json.dumps(data, indent=2) + "\n")


def _difference(one: Architecture, other: Architecture) -> str:
    """Where two architectures first differ."""
    if one.backbone != other.backbone:
        return str(one.backbone)
    for slot, layer in one.layers.items():
        if layer != other.layers.get(slot):
            return f"{slot}: {layer}"
    return f"{len(one.layers)} layers"


def _renamed(piece: Piece, name: str) -> Piece:
    return Piece(name, piece.transposed, piece.rows, piece.flat, piece.count)


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


def _files(folder: Path) -> dict[str, Path]:
    """The file of every tensor."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return dict.fromkeys(_tensors_in(folder / "model.safetensors"), folder / "model.safetensors")
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
        found |= dict.fromkeys(_tensors_in(path), path)
    if absent := [name for name, shard in table.items() if found.get(name) != folder / shard]:
        raise Damaged(f"names {absent[0]}, which {table[absent[0]]} does not hold", index)
    return found


def _tensors_in(path: Path) -> list[str]:
    """Names in a safetensors file. Raises MoesaicError where it is cut or holds types that are not read."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            for name in names:
                kind = file.get_slice(name).get_dtype()
                if kind not in _DTYPES and not name.endswith((".bias", "position_ids")):
                    raise MoesaicError(
                        f"{name} is stored as {kind}", where=str(path), found=kind, allowed=", ".join(sorted(_DTYPES))
                    )
            return names
    except (SafetensorError, OSError) as error:
        raise Damaged(f"is truncated or not a safetensors file ({error})", path) from None
