"""The key/value cache: keys and values of earlier positions, so that decoding computes only new tokens.

For inference only: buffers are written in place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.search_spaces import Architecture, MoesaicError, Slot


@dataclass(frozen=True)
class LayerCache:
    """``keys`` (rotated) and ``values`` [B, K, capacity, C] of one layer; the first ``length`` positions are filled."""

    keys: Tensor
    values: Tensor
    length: int

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
        self.kv_heads = _kv_heads(architecture)
        self._mask = torch.ones(batch_size, capacity, dtype=torch.bool, device=device)
        self._padded = False
        self._layers: dict[Slot, tuple[Tensor, Tensor]] = {}
        if buffer is None:
            buffer = torch.zeros(self.size(architecture, batch_size, capacity), device=device, dtype=dtype)
        used = 0
        for slot, heads in self.kv_heads.items():
            shape = (2, batch_size, heads, capacity, architecture.backbone.head_size)
            both = buffer[used : used + math.prod(shape)].view(shape)
            used += both.numel()
            self._layers[slot] = both[0], both[1]

    @staticmethod
    def size(architecture: Architecture, batch_size: int, capacity: int) -> int:
        """Values of the keys and values."""
        heads = sum(_kv_heads(architecture).values())
        return 2 * heads * batch_size * capacity * architecture.backbone.head_size

    def check(self, tokens: Tensor, architecture: Architecture) -> None:
        """Raises MoesaicError unless ``tokens`` [B, S] of a model of ``architecture`` can be appended."""
        if not architecture.output.causal:
            raise MoesaicError(
                "an encoder sees all tokens at once: it neither decodes nor generates",
                found="a key/value cache",
                allowed="a pass over whole sequences, or a causal model",
            )
        batch, length = tokens.shape
        heads, positions = _kv_heads(architecture), self.length + length
        if (batch, heads) != (self.batch_size, self.kv_heads) or positions > self.capacity:
            raise MoesaicError(
                "does not fit the key/value cache",
                found=f"{batch} sequences, key/value heads {list(heads.values())}, {positions} positions",
                allowed=f"{self.batch_size} sequences, key/value heads {list(self.kv_heads.values())}, "
                f"at most {self.capacity} positions",
            )

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
        keys, values = self._layers[Slot(stack, index)]
        return LayerCache(keys, values, self.length)

    @property
    def tensors(self) -> list[Tensor]:
        return [part for layer in self._layers.values() for part in layer]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def _kv_heads(architecture: Architecture) -> dict[Slot, int]:
    return {slot: layer.attention.kv_heads for slot, layer in architecture.layers.items()}
