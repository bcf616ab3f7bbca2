"""The configuration of an exported model for transformers: its ``config.json`` as it is."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

from moesaic.search_spaces import Architecture


class MoesaicConfig(PreTrainedConfig):
    """What an export's ``config.json`` says; see ``nas.exports.folder.ModelFacts``.

    ``balance_weight`` scales the balance loss that is added where labels are given, as in Moesaic's own training.
    """

    model_type = "moesaic"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(
        self,
        architecture: dict[str, Any] | None = None,
        vocab_size: int = 1,
        sequence_length: int = 1,
        fingerprint: str = "",
        version: str = "",
        balance_weight: float = 0.01,
        use_cache: bool = True,
        **others: Any,
    ):
        self.architecture = architecture
        self.vocab_size, self.sequence_length = vocab_size, sequence_length
        self.fingerprint, self.version = fingerprint, version
        self.balance_weight, self.use_cache = balance_weight, use_cache
        # The model reads its embeddings again itself; transformers ties and copies nothing.
        super().__init__(**{**others, "tie_word_embeddings": False})

    @property
    def designed(self) -> Architecture:
        """Raises MoesaicError where the file describes no architecture."""
        return Architecture.from_dict(self.architecture, "config.json")

    @property
    def hidden_size(self) -> int:
        return self.designed.output.width

    @property
    def num_hidden_layers(self) -> int:
        """Those that have keys and values to cache."""
        return sum(layer.attention.heads > 0 for layer in self.designed.output.layers)

    @property
    def num_attention_heads(self) -> int:
        """The most of any layer."""
        return max(layer.attention.heads for layer in self.designed.output.layers)

    @property
    def num_key_value_heads(self) -> int:
        """The most of any layer."""
        return max(layer.attention.kv_heads for layer in self.designed.output.layers)

    @property
    def head_dim(self) -> int:
        return self.designed.backbone.head_size

    @property
    def max_position_embeddings(self) -> int | None:
        """The longest sequence that the model can read; None: as long as it is."""
        return self.designed.backbone.max_positions
