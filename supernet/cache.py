"""The key/value cache: keys and values of earlier positions, so that decoding computes only new tokens.

For inference only: buffers are written in place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moesaic.search_spaces import Architecture, MoesaicError, Slot
from moesaic.supernet.memory import Memory


class LayerPast(Protocol):
    """What attention asks of one layer of a cache: see ``LayerCache``, which keeps it in buffers."""

    @property
    def length(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def crossed(self) -> list[Tensor]: ...
    def extended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]: ...


class Past(Protocol):
    """What a model asks of a cache: see ``KeyValueCache``. Another program may bring its own."""

    length: int
    memory: Memory | None

    def check(self, tokens: Tensor, architecture: Architecture) -> None: ...
    def seen(self, mask: Tensor | None, length: int) -> Tensor | None: ...
    def layer(self, stack: str, index: int) -> LayerPast: ...


@dataclass(frozen=True)
class LayerCache:
    """``keys`` (rotated) and ``values`` [B, K, capacity, C] of one layer; the first ``length`` positions are filled.
    ``crossed`` are the keys and values of cross-attention, [M, K, P, C] each, once they are known."""

    keys: Tensor
    values: Tensor
    length: int
    crossed: list[Tensor]

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def extended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, K, S, C]; returns views of all, [B, K, length + S, C]."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end], self.values[:, :, self.length : end] = keys, values
        return self.keys[:, :, :end], self.values[:, :, :end]


class KeyValueCache:
    """Room for ``capacity`` positions of ``batch_size`` sequences in every layer of ``architecture``.

    ``length`` positions are filled; ``Transformer.run`` appends to them. Reducing ``length`` drops the last ones.
    Beside an encoder it also keeps, from the first pass on, the ``memory`` and what cross-attention makes of it.
    ``buffer`` [n] is memory for the keys and values, of at least ``size`` values; caches that share it overwrite one
    another's. Without it, each has its own.
    """

    def __init__(
        self,
        architecture: Architecture,
        batch_size: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        buffer: Tensor | None = None,
    ):
        self.length, self.batch_size, self.capacity = 0, batch_size, capacity
        self.kv_widths = _kv_widths(architecture)
        self.memory: Memory | None = None
        self._mask = torch.ones(batch_size, capacity, dtype=torch.bool, device=device)
        self._padded = False
        self._layers: dict[Slot, tuple[Tensor, Tensor]] = {}
        if buffer is None:
            buffer = torch.zeros(self.size(architecture, batch_size, capacity), device=device, dtype=dtype)
        used = 0
        for slot, (heads, width) in self.kv_widths.items():
            shape = (2, batch_size, heads, capacity, width // max(heads, 1))
            both = buffer[used : used + math.prod(shape)].view(shape)
            used += both.numel()
            self._layers[slot] = both[0], both[1]
        self._crossed: dict[Slot, list[Tensor]] = {slot: [] for slot in self._layers}

    @staticmethod
    def size(architecture: Architecture, batch_size: int, capacity: int) -> int:
        """Values of the keys and values."""
        return 2 * sum(width for _, width in _kv_widths(architecture).values()) * batch_size * capacity

    def check(self, tokens: Tensor, architecture: Architecture) -> None:
        """Raises MoesaicError unless ``tokens`` [B, S] of a model of ``architecture`` can be appended."""
        if not architecture.output.causal:
            raise MoesaicError(
                "an encoder sees all tokens at once: it neither decodes nor generates",
                found="a key/value cache",
                allowed="a pass over whole sequences, or a causal model",
            )
        batch, length = tokens.shape
        widths, positions = _kv_widths(architecture), self.length + length
        if (batch, widths) != (self.batch_size, self.kv_widths) or positions > self.capacity:
            heads, allowed = ([count for count, _ in some.values()] for some in (widths, self.kv_widths))
            raise MoesaicError(
                "does not fit the key/value cache",
                found=f"{batch} sequences, key/value heads {heads}, {positions} positions",
                allowed=f"{self.batch_size} sequences, key/value heads {allowed}, at most {self.capacity} positions",
            )

    def keep(self, rows: Tensor, sequences: Tensor | None = None) -> None:
        """Continue with the sequences ``rows`` [b] of the batch, in that order, some perhaps more than once. With
        ``sequences`` [m], only these of the memory are read on."""
        for keys, values in self._layers.values():
            for part in (keys, values):
                part[: len(rows), :, : self.length] = part[rows, :, : self.length]
        self._layers = {slot: (k[: len(rows)], v[: len(rows)]) for slot, (k, v) in self._layers.items()}
        self._mask[: len(rows)] = self._mask[rows]
        self._mask, self.batch_size = self._mask[: len(rows)], len(rows)
        if sequences is not None and self.memory is not None:
            self.memory = self.memory.rows(sequences)
            for crossed in self._crossed.values():
                crossed[:] = [part[sequences] for part in crossed]

    def seen(self, mask: Tensor | None, length: int) -> Tensor | None:
        """[B, P] which of the cached and the ``length`` new positions hold tokens; ``mask`` [B, S] is of the new ones.
        None while there is no padding."""
        end = self.length + length
        self._padded = self._padded or mask is not None
        if not self._padded:
            return None
        self._mask[:, self.length : end] = True if mask is None else mask
        return self._mask[:, :end]

    def layer(self, stack: str, index: int) -> LayerCache:
        slot = Slot(stack, index)
        return LayerCache(*self._layers[slot], self.length, self._crossed[slot])

    @property
    def tensors(self) -> list[Tensor]:
        return [part for layers in (self._layers, self._crossed) for layer in layers.values() for part in layer]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def _kv_widths(architecture: Architecture) -> dict[Slot, tuple[int, int]]:
    """Key/value heads of each layer that decodes, and how many values a token's keys have."""
    return {
        slot: (layer.attention.kv_heads, architecture.backbone.widths(layer.attention)[1])
        for slot, layer in architecture.layers.items()
        if architecture.stacks[slot.stack].causal
    }
