"""Weights on disk: safetensors only, written atomically; a damaged or foreign file raises a clear error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moesaic.search_spaces import Damaged, MoesaicError
from moesaic.search_spaces.files import write_atomically


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and a few strings as one safetensors file."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(plain, temporary, metadata=metadata)
        except SafetensorError as error:  # it wraps the system's "no space left" and the like
            raise OSError(0, str(error)) from None

    write_atomically(path, write)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and strings of a safetensors file. Loading executes no code from it.

    Raises
    ------
    Damaged : missing, truncated, or not a safetensors file.
    MoesaicError : it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()  # the file itself cannot be iterated over
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except FileNotFoundError:
        raise Damaged("no such file", path, allowed="a safetensors file") from None
    except SafetensorError as error:
        problem = f"is truncated or not a safetensors file ({error})"
        raise Damaged(problem, path, allowed="a complete safetensors file") from None
    except OSError as error:
        raise MoesaicError(f"cannot be read: {error.strerror or error}", where=str(path)) from None


def load_weights(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Copy ``tensors`` into ``model``. Raises MoesaicError unless names and shapes agree exactly."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        name = next(n for n in (*expected, *found) if expected.get(n) != found.get(n))
        raise MoesaicError(
            f"belongs to another model: {name} differs",
            where=where,
            found=found.get(name, "absent"),
            allowed=expected.get(name, "absent"),
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
