"""What a cost depends on besides the architecture: the batch of one forward pass, and how it is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Extent:
    """How much one pass computes in a stack: ``tokens`` hidden states of ``sequences``, each attending to ``keys``
    positions. A product over an expert's rows is computed in whole tiles of ``row_tile`` rows."""

    tokens: int
    sequences: int
    keys: int
    row_tile: int


@dataclass(frozen=True)
class Context:
    """One forward pass of ``batch_size`` sequences.

    ``prefill`` computes all ``sequence_length`` positions at once (also: scoring a text); ``decode`` computes one
    token per sequence, which attends to ``sequence_length`` positions in a key/value cache. ``bytes_per_value``
    is that of activations and cache. A product over an expert's rows is computed in whole tiles of ``row_tile`` rows.
    """

    vocab_size: int
    sequence_length: int
    batch_size: int = 1
    bytes_per_value: int = 4
    phase: Phase = "prefill"
    row_tile: int = 16

    @property
    def tokens(self) -> int:
        """Tokens whose logits one pass computes."""
        return self.batch_size * (self.sequence_length if self.phase == "prefill" else 1)

    def extent(self, stack: str) -> Extent:
        """What a pass computes in the named stack; today's architectures have only one, the decoder."""
        assert stack == "decoder"
        return Extent(self.tokens, self.batch_size, self.sequence_length, self.row_tile)

    def __str__(self) -> str:
        if self.phase == "decode":
            return f"{self.batch_size} tokens, each after {self.sequence_length} cached ones"
        return f"{self.batch_size} x {self.sequence_length} tokens"
