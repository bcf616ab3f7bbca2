"""What a cost depends on besides the architecture: the batch of one pass, and how it is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moesaic.kernels.workspace import Implementation

Phase = Literal["prefill", "decode", "translate"]


@dataclass(frozen=True)
class Extent:
    """How much is computed in a stack: ``passes`` one after the other, each of ``tokens`` hidden states of
    ``sequences``, with an ``implementation`` of the sparse layer.

    In the last pass they attend to ``keys`` positions, and in each before it to one less. Cross-attention reads
    ``read`` positions of an encoder's layer for each of ``sources``.
    """

    tokens: int
    sequences: int
    keys: int
    implementation: Implementation = "torch"
    passes: int = 1
    read: int = 0
    sources: int = 0

    @property
    def all_tokens(self) -> int:
        """Of all passes."""
        return self.passes * self.tokens

    @property
    def mean_keys(self) -> float:
        """Positions that a token attends to, as a mean over passes."""
        return self.keys - (self.passes - 1) / 2


@dataclass(frozen=True)
class Context:
    """One pass over ``batch_size`` sequences.

    ``prefill`` computes all ``sequence_length`` positions at once (also: scoring a text); ``decode`` computes one
    token per sequence, which attends to ``sequence_length`` positions in a key/value cache and to itself.
    ``translate`` encodes sources of ``source_length`` tokens, and decodes ``sequence_length`` tokens of ``beam``
    hypotheses each, one after the other. A model with an encoder reads as many source tokens in its prefill.
    ``bytes_per_value`` is that of products and cache: 4 (float32) or 2 (bfloat16). ``implementation`` is that of the
    sparse layer. ``source_vocab_size`` is that of a vocabulary of the encoder's own.
    """

    vocab_size: int
    sequence_length: int
    batch_size: int = 1
    bytes_per_value: int = 4
    phase: Phase = "prefill"
    implementation: Implementation = "torch"
    source_length: int = 0
    beam: int = 1
    source_vocab_size: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens that one pass scores or writes: what costs per token are divided by."""
        return self.batch_size * (1 if self.phase == "decode" else self.sequence_length)

    @property
    def output(self) -> Extent:
        """What a pass computes in the stack whose states become logits."""
        return self.extent("decoder")

    def extent(self, stack: str) -> Extent:
        """What a pass computes in the named stack."""
        batch, length = self.batch_size, self.sequence_length
        if stack == "encoder":
            return Extent(batch * self.source_length, batch, self.source_length, self.implementation)
        sources = batch if self.source_length else 0
        if self.phase == "translate":
            rows = batch * self.beam
            return Extent(rows, rows, length, self.implementation, length, self.source_length, sources)
        keys = length + (self.phase == "decode")
        return Extent(self.tokens, batch, keys, self.implementation, 1, self.source_length, sources)

    def __str__(self) -> str:
        if self.phase == "decode":
            return f"{self.batch_size} tokens, each after {self.sequence_length} cached ones"
        if self.phase == "translate":
            return (
                f"{self.batch_size} x {self.source_length} source tokens, each translated into {self.sequence_length} "
                f"tokens with beam {self.beam}"
            )
        source = f"{self.source_length} source and " if self.source_length else ""
        return f"{self.batch_size} x {source}{self.sequence_length} tokens"
