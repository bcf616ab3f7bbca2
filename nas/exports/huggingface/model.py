"""An exported language model as a model of transformers: the model that Moesaic runs, behind that library's interface.

It has no layers of its own: ``generate``, ``Trainer`` and the programs built on them call ``supernet.Transformer``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from moesaic.nas.exports.huggingface.configuration import MoesaicConfig
from moesaic.nas.exports.huggingface.files import check_language_model
from moesaic.search_spaces import Architecture, MoesaicError
from moesaic.supernet import Transformer
from moesaic.supernet.memory import Memory
from moesaic.supernet.model import Output
from moesaic.supernet.positions import table_length

_PREFIX = "model."


class MoesaicForCausalLM(PreTrainedModel, GenerationMixin):
    """An exported language model. It is read from an export, and saved as one: weights keep Moesaic's names."""

    config_class = MoesaicConfig
    base_model_prefix = _PREFIX[:-1]
    _supports_sdpa = True

    def __init__(self, config: MoesaicConfig):
        super().__init__(config)
        architecture = config.designed
        check_language_model(architecture, "config.json: architecture")
        self.model = Transformer(architecture, config.vocab_size)
        self._no_split_modules = ["TransformerLayer"]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The model has set its initial weights itself."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_submodule("stacks.decoder.embedding")

    def get_output_embeddings(self) -> None:
        return None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **others: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits [B, S, V] of ids [B, S], of the last ``logits_to_keep`` positions or of all.

        ``attention_mask`` [B, P + S] is 0 at padding, which is neither attended to nor routed, of the P cached and S
        new positions. The cache has two names, an older and a newer one. With ``labels`` [B, S], -100 where none, the
        loss is the mean cross-entropy of the next token and ``config.balance_weight`` times the balance loss.

        Raises
        ------
        MoesaicError : a cache that does not keep all positions, or a mask that is not [B, P + S].
        """
        past = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past is None:
            past = DynamicCache(config=self.config)
        states, routings = self.model.states(
            input_ids,
            cache=None if past is None else _Past.of(past, self.model.architecture, input_ids.shape[1]),
            mask=_mask(attention_mask),
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.logits(states[:, kept])
        loss = balance = None
        if labels is not None:
            balance = Output(logits, routings).balance_loss()
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **others)
            loss = loss + self.config.balance_weight * balance
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=balance, logits=logits, **{_CACHE: past})  # pyright: ignore[reportArgumentType]

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, save_directory: str | os.PathLike[str], *, state_dict: dict[str, Tensor] | None = None, **options: Any
    ) -> None:
        """As for any model, under the names that an export has."""
        named = self.state_dict() if state_dict is None else state_dict
        own = {name.removeprefix(_PREFIX): value for name, value in named.items()}
        super().save_pretrained(save_directory, state_dict=own, **options)


_CACHE = "cache" if "cache" in MoeCausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What this release of transformers calls the cache in an output."""


def _mask(attention_mask: Tensor | None) -> Tensor | None:
    """[B, P + S] where tokens are; None where all are, which needs no masked attention."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise MoesaicError(
            "the attention mask says which positions hold tokens",
            found=f"shape {list(attention_mask.shape)}",
            allowed="[sequences, positions]",
        )
    mask = attention_mask.bool()
    return mask if torch.compiler.is_compiling() or not mask.all() else None


@dataclass
class _Past:
    """A cache of transformers, as a model of ours reads and extends it."""

    cache: Cache
    numbers: dict[int, int]
    """Which of the cache's layers belongs to a layer of the model; one without attention has none."""
    length: int
    new: int
    memory: Memory | None = None

    @classmethod
    def of(cls, cache: Cache, architecture: Architecture, new: int) -> _Past:
        """With room for ``new`` positions."""
        attending = [index for index, layer in enumerate(architecture.output.layers) if layer.attention.heads]
        return cls(cache, {index: number for number, index in enumerate(attending)}, cache.get_seq_length(), new)

    def check(self, tokens: Tensor, architecture: Architecture) -> None:
        """It has no size that must fit."""

    def seen(self, mask: Tensor | None, length: int) -> Tensor | None:
        return mask

    def layer(self, stack: str, index: int) -> _PastLayer:
        return _PastLayer(self.cache, self.numbers.get(index, -1), self.length, table_length(self.length + self.new))


@dataclass(frozen=True)
class _PastLayer:
    """One layer of it."""

    cache: Cache
    number: int
    length: int
    capacity: int
    crossed: list[Tensor] = field(default_factory=list)

    def extended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        wanted = self.length + keys.shape[2]
        keys, values = self.cache.update(keys, values, self.number)
        if keys.shape[2] != wanted:
            raise MoesaicError(
                "attention needs all positions and no others",
                where="past_key_values",
                found=f"{type(self.cache).__name__} with {keys.shape[2]} positions",
                allowed=f"DynamicCache, with {wanted}",
            )
        return keys, values
