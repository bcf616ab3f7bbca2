"""Every family that can be opened, against transformers' own models with small random weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.search_spaces import MoesaicError
from moesaic.supernet import Transformer
from moesaic.supernet.convert import open_checkpoint, write_folder
from tests.contracts.importers import ImporterContract, outputs

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


def saved(
    folder: Path, kind: str, size: str = "1GB", made: Any = transformers.AutoModelForCausalLM, **settings: Any
) -> Any:
    """A model with random weights, none of them at its usual initial value, as saved and loaded again."""
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = made.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
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


class BertContract(ImporterContract):
    decodes = False
    made: Any = transformers.AutoModelForMaskedLM
    settings: ClassVar[dict[str, Any]] = {}

    @classmethod
    def written(cls, folder: Path) -> Any:
        return saved(folder, "bert", made=cls.made, **SMALL | cls.settings)

    def unused(self, tensors: dict[str, Tensor]) -> set[str]:
        """The vector of token type 0 is written as part of those of the positions."""
        return {name for name in tensors if "position_embeddings" in name or "token_type_embeddings" in name}

    def test_what_is_written_is_the_same_model_to_its_own_program(
        self, original: tuple[Path, Any], model: Transformer, tokens: Tensor, tmp_path: Path
    ) -> None:
        write_folder(model, tmp_path, "bert")
        again = self.made.from_pretrained(tmp_path, attn_implementation="eager").eval()
        with torch.no_grad():
            expected, found = (outputs(one(tokens)) for one in (original[1], again))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


class TestBertWithItsHead(BertContract):
    pass


class TestBertUntied(BertContract):
    settings: ClassVar = {"tie_word_embeddings": False, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3}


class TestBertWithoutHead(BertContract):
    """As sentence encoders are saved: names have no prefix, and there is a pooler, which is not read."""

    made = transformers.AutoModel


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


def test_a_folder_of_two_heads_in_old_names_is_read(tmp_path: Path) -> None:
    """As the first BERT was converted: gamma and beta, copies of tied weights, and a head for the next sentence."""
    model = saved(tmp_path, "bert", made=transformers.AutoModelForPreTraining, **SMALL)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta", "ions.bias": "ions.decoder.bias"}
    for end, older in old.items():
        tensors = {name.replace(end, older): tensor for name, tensor in tensors.items()}
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    tokens = torch.arange(2, 14)[None]
    with torch.no_grad():
        expected = model(tokens).prediction_logits
        torch.testing.assert_close(open_checkpoint(tmp_path).load()(tokens), expected, atol=1e-4, rtol=1e-4)


REFUSED = {
    "position_embedding_type": "relative_key",
    "hidden_act": "silu",
    "is_decoder": True,
    "add_cross_attention": True,
    "architectures": ["BertForSequenceClassification"],
    "layer_norm_eps": "small",
    "max_position_embeddings": 0,
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_bert_has_no_counterpart_for_is_refused_by_its_key(key: str, tmp_path: Path) -> None:
    saved(tmp_path, "bert", made=transformers.AutoModelForMaskedLM, **SMALL)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: REFUSED[key]}))
    with pytest.raises(MoesaicError, match=f"config.json: {key}: "):
        open_checkpoint(tmp_path)


def test_token_types_of_another_shape_are_one_message(tmp_path: Path) -> None:
    saved(tmp_path, "bert", made=transformers.AutoModel, **SMALL)
    tensors = load_file(tmp_path / "model.safetensors")
    for wrong in (torch.ones(2, 7), torch.ones(0, 32)):
        save_file(tensors | {"embeddings.token_type_embeddings.weight": wrong}, tmp_path / "model.safetensors")
        with pytest.raises(MoesaicError, match=r"token_type_embeddings.weight does not fit config.json"):
            open_checkpoint(tmp_path).load()
