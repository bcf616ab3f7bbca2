"""What a cost depends on besides the architecture: the batch of one forward pass, and how it is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moesaic.kernels.workspace import Implementation

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Extent:
    """How much one pass computes in a stack: ``tokens`` hidden states of ``sequences``, each attending to ``keys``
    positions, with an ``implementation`` of the sparse layer."""

    tokens: int
    sequences: int
    keys: int
    implementation: Implementation = "torch"


@dataclass(frozen=True)
class Context:
    """One forward pass of ``batch_size`` sequences.

    ``prefill`` computes all ``sequence_length`` positions at once (also: scoring a text); ``decode`` computes one
    token per sequence, which attends to ``sequence_length`` positions in a key/value cache and to itself.
    ``bytes_per_value`` is that of products and cache: 4 (float32) or 2 (bfloat16). ``implementation`` is that of the
    sparse layer.
    """

    vocab_size: int
    sequence_length: int
    batch_size: int = 1
    bytes_per_value: int = 4
    phase: Phase = "prefill"
    implementation: Implementation = "torch"

    @property
    def tokens(self) -> int:
        """Tokens whose logits one pass computes."""
        return self.batch_size * (self.sequence_length if self.phase == "prefill" else 1)

    def extent(self, stack: str) -> Extent:
        """What a pass computes in the named stack; today's architectures have only one, the decoder."""
        assert stack == "decoder"
        keys = self.sequence_length + (self.phase == "decode")
        return Extent(self.tokens, self.batch_size, keys, self.implementation)

    def __str__(self) -> str:
        if self.phase == "decode":
            return f"{self.batch_size} tokens, each after {self.sequence_length} cached ones"
        return f"{self.batch_size} x {self.sequence_length} tokens"
