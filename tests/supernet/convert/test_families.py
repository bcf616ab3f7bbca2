"""Every family that can be opened, against transformers' own models with small random weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from moesaic.supernet.convert import open_checkpoint
from tests.contracts.importers import ImporterContract

os.environ["HF_HUB_OFFLINE"] = "1"
SMALL = {
    "vocab_size": 67,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def saved(folder: Path, kind: str, size: str = "1GB", **settings: Any) -> Any:
    """A model with random weights, none of them at its usual initial value, as saved and loaded again."""
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder, max_shard_size=size)
    return model


class TestLlama(ImporterContract):
    @classmethod
    def written(cls, folder: Path) -> Any:
        return saved(folder, "llama", **SMALL)


class TestLlamaInShards(ImporterContract):
    @classmethod
    def written(cls, folder: Path) -> Any:
        model = saved(
            folder, "llama", "20KB", **SMALL | {"tie_word_embeddings": True, "head_dim": 12, "rms_norm_eps": 1e-3}
        )
        assert len(list(folder.glob("*.safetensors"))) > 1
        return model


class TestMistral(ImporterContract):
    @classmethod
    def written(cls, folder: Path) -> Any:
        return saved(
            folder, "mistral", **SMALL, sliding_window=None, rope_parameters={"rope_type": "default", "rope_theta": 5e4}
        )


class TestQwen2(ImporterContract):
    @classmethod
    def written(cls, folder: Path) -> Any:
        return saved(folder, "qwen2", **SMALL)


class TestQwen3(ImporterContract):
    @classmethod
    def written(cls, folder: Path) -> Any:
        return saved(folder, "qwen3", **SMALL, head_dim=16)


class TestGpt2(ImporterContract):
    @classmethod
    def written(cls, folder: Path) -> Any:
        return saved(folder, "gpt2", vocab_size=67, n_embd=32, n_layer=2, n_head=4, n_positions=64)


class TestOpt(ImporterContract):
    @classmethod
    def written(cls, folder: Path) -> Any:
        sizes = {"vocab_size": 67, "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2}
        rest = {"num_attention_heads": 4, "ffn_dim": 64, "max_position_embeddings": 64, "tie_word_embeddings": False}
        return saved(folder, "opt", **sizes, **rest)

    def unused(self, tensors: dict[str, Tensor]) -> set[str]:
        return {"model.decoder.embed_positions.weight"}  # its first two rows


class TestMixtral(ImporterContract):
    @classmethod
    def written(cls, folder: Path) -> Any:
        return saved(folder, "mixtral", **SMALL, num_local_experts=4, num_experts_per_tok=2)


class TestQwen2Moe(ImporterContract):
    @classmethod
    def written(cls, folder: Path) -> Any:
        return saved(folder, "qwen2_moe", **SMALL, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=16,
                     shared_expert_intermediate_size=32, mlp_only_layers=[0])  # fmt: skip


class TestQwen3Moe(ImporterContract):
    @classmethod
    def written(cls, folder: Path) -> Any:
        return saved(folder, "qwen3_moe", **SMALL, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=16,
                     norm_topk_prob=True, head_dim=8)  # fmt: skip


class TestOlmoe(ImporterContract):
    @classmethod
    def written(cls, folder: Path) -> Any:
        return saved(folder, "olmoe", **SMALL, num_experts=6, num_experts_per_tok=3)


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model("llama", **SMALL)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.save_pretrained(tmp_path)
    loaded = open_checkpoint(tmp_path).load()
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    tokens = torch.arange(2, 14)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens), model.float()(tokens).logits, atol=1e-4, rtol=1e-4)


def test_a_model_saved_without_its_head_has_the_same_states(tmp_path: Path) -> None:
    """GPT-2's base model has no prefix in its names."""
    config = transformers.AutoConfig.for_model("gpt2", vocab_size=67, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    base = transformers.AutoModel.from_config(config, dtype=torch.float32).eval()
    base.save_pretrained(tmp_path)
    tokens = torch.arange(2, 14)[None]
    with torch.no_grad():
        states, _ = open_checkpoint(tmp_path).load().states(tokens)
        torch.testing.assert_close(states, base(tokens).last_hidden_state, atol=1e-4, rtol=1e-4)
