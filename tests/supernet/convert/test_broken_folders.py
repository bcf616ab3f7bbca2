"""A folder that is broken, foreign or not exactly representable is refused in one message that names file and key."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic.search_spaces import Architecture, Attention, Backbone, FeedForward, Layer, MoesaicError, Router
from moesaic.search_spaces.architecture import Stack
from moesaic.supernet import Transformer
from moesaic.supernet.convert import open_checkpoint, write_folder

MIXTURE = FeedForward((16,) * 3, Router("top_k", k=2))


def small(kind: str = "llama") -> Transformer:
    part = MIXTURE if kind == "mixtral" else FeedForward((32,))
    layers = (Layer(Attention(2, 1), part),) * 2
    eps = 1e-5 if kind == "mixtral" else 1e-6
    return Transformer(Architecture(Stack(32, layers), Backbone(head_size=16, norm_eps=eps, tied=False)), 40)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(small(), tmp_path / "model", "llama")
    return tmp_path / "model"


def change(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def retensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shards(folder: Path, table: Callable[[dict[str, str]], Any] = lambda table: None) -> None:
    """Divide the file in two, with an index that ``table`` changes."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, own in files.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    (folder / "model.safetensors").unlink()
    places = {name: file for file, own in files.items() for name in own}
    table(places)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": [1.0]}))


def lone_shards(folder: Path) -> None:
    shards(folder)
    (folder / "b.safetensors").unlink()


def cut_shards(folder: Path) -> None:
    shards(folder)
    cut(folder / "b.safetensors")


def outside(folder: Path) -> None:
    shards(folder, lambda table: table.update({"model.norm.weight": "../secret.safetensors"}))


BREAKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: is not readable JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[1]"), "not a JSON object"),
    "no type": (lambda f: change(f, model_type=...), "config.json: model_type: a key is missing"),
    "unknown type": (
        lambda f: change(f, model_type="lama"),
        "(?s)model_type: this family cannot be read.*nearest: llama",
    ),
    "T5": (lambda f: change(f, model_type="t5"), "model_type: encoder-decoder models cannot be read yet"),
    "no width": (lambda f: change(f, hidden_size=...), "config.json: hidden_size: a key is missing"),
    "odd depth": (lambda f: change(f, num_hidden_layers="2"), "num_hidden_layers: is not a positive integer"),
    "odd width": (lambda f: change(f, hidden_size=40), "config.json: width must be a multiple of 16"),
    "kv heads": (
        lambda f: change(f, num_attention_heads=3, num_key_value_heads=2),
        "config.json: kv_heads must divide",
    ),
    "activation": (lambda f: change(f, hidden_act="relu6"), "hidden_act: cannot be represented exactly"),
    "bias": (lambda f: change(f, attention_bias=True), "attention_bias: cannot be represented exactly"),
    "scaled rope": (lambda f: change(f, rope_scaling={"rope_type": "yarn", "factor": 4}), "rope_scaling: cannot be"),
    "old scaled rope": (lambda f: change(f, rope_scaling={"type": "linear", "factor": 4}), "rope_scaling: cannot be"),
    "partial rope": (lambda f: change(f, partial_rotary_factor=0.5), "partial_rotary_factor: cannot be represented"),
    "window": (lambda f: change(f, model_type="mistral", sliding_window=4096), "sliding_window: cannot be represented"),
    "layer types": (lambda f: change(f, layer_types=["full_attention", "sliding_attention"]), "layer_types: cannot be"),
    "quantized": (lambda f: change(f, quantization_config={"quant_method": "fp8"}), "(?s)quantized weights.*fp8"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "the folder has no weights"),
    "pickles": (pickled, "(?s)pickles, which can run code and are never opened.*pytorch_model.bin"),
    "truncated": (lambda f: cut(f / "model.safetensors"), "model.safetensors: is truncated"),
    "missing shard": (lone_shards, "(?s)index.json: a shard is missing.*b.safetensors"),
    "truncated shard": (cut_shards, "b.safetensors: is truncated"),
    "shard outside": (outside, "names a file outside the folder"),
    "index lies": (lambda f: shards(f, lambda t: t.update({"lm_head.weight": "b.safetensors"})), "does not hold"),
    "no index": (lambda f: (shards(f), (f / "model.safetensors.index.json").write_text("{}")), "is no index of shards"),
    "missing tensor": (lambda f: retensor(f, lambda t: t.pop("model.norm.weight")), "(?s)1 tensors are missing.*norm"),
    "unknown tensor": (
        lambda f: retensor(f, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})),
        "(?s)1 tensors have no counterpart.*q_proj.bias",
    ),
    "wrong shape": (
        lambda f: retensor(f, lambda t: t.update({"model.norm.weight": torch.ones(16)})),
        "the shape of model.norm.weight does not fit config.json",
    ),
    "fp8": (
        lambda f: retensor(f, lambda t: t.update({"lm_head.weight": torch.zeros(40, 32).to(torch.float8_e4m3fn)})),
        "lm_head.weight is stored as F8_E4M3",
    ),
    "a listed type": (lambda f: change(f, model_type=["llama"]), "model_type: this family cannot be read"),
    "a quantized name": (lambda f: change(f, quantization_config="fp8"), "(?s)quantized weights.*fp8"),
    "heads as text": (lambda f: change(f, num_key_value_heads="2"), "num_key_value_heads: is not a positive integer"),
    "size as text": (lambda f: change(f, head_dim="16"), "head_dim: is not a positive integer"),
    "a rope list": (lambda f: change(f, rope_parameters=[1]), "rope_parameters: is not a mapping"),
    "a rope base": (lambda f: change(f, rope_parameters={"rope_theta": "1e4"}), "rope_theta: is not a number"),
    "kinds as text": (lambda f: change(f, layer_types="full"), "layer_types: is not a list"),
    "tied as text": (lambda f: change(f, tie_word_embeddings="false"), "tie_word_embeddings: is neither true nor"),
    "length as text": (lambda f: change(f, max_position_embeddings="64"), "max_position_embeddings: is not a positive"),
    "activation as list": (lambda f: change(f, hidden_act=["silu"]), "hidden_act: cannot be represented exactly"),
    "infinite eps": (lambda f: change(f, rms_norm_eps=float("inf")), "rms_norm_eps: is not a number"),
    "no tokenizer": (lambda f: open_checkpoint(f).tokenizer, "no tokenizer.json"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_folder_is_one_clear_message(name: str, folder: Path) -> None:
    spoil, message = BREAKS[name]
    with pytest.raises(MoesaicError, match=message) as caught:
        spoil(folder)
        open_checkpoint(folder).load()
    assert caught.value.where is not None
    assert str(folder) in caught.value.where


def test_no_folder_is_one_clear_message(tmp_path: Path) -> None:
    with pytest.raises(MoesaicError, match="nowhere: no such folder"):
        open_checkpoint(tmp_path / "nowhere")


def test_whole_and_sharded_folders_are_the_same_model(folder: Path) -> None:
    whole = open_checkpoint(folder).load()
    shards(folder)
    parts = open_checkpoint(folder).load()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_a_layer_alone_is_checked_as_well(folder: Path) -> None:
    prefix = "stacks.decoder.layers.1."
    retensor(folder, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))
    assert open_checkpoint(folder).tensors(prefix)  # this layer is whole
    name = "model.layers.1.mlp.up_proj.weight"
    retensor(folder, lambda tensors: tensors.update({name: torch.ones(16, 32)}))
    with pytest.raises(MoesaicError, match=f"the shape of {name} does not fit config.json"):
        open_checkpoint(folder).tensors(prefix)
    retensor(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(MoesaicError, match=f"(?s)1 tensors are missing.*{name}"):
        open_checkpoint(folder).tensors(prefix)


def test_links_to_files_elsewhere_are_followed(folder: Path, tmp_path: Path) -> None:
    """A cache of downloads has links to its blobs."""
    expected = open_checkpoint(folder).load()
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    found = open_checkpoint(folder).load()
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))


def test_a_change_of_a_loaded_model_does_not_reach_its_file(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    model = open_checkpoint(folder).load()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before


def test_the_fingerprint_knows_weights_and_configuration(folder: Path) -> None:
    first = open_checkpoint(folder).fingerprint
    assert open_checkpoint(folder).fingerprint == first
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1  # one bit
    (folder / "model.safetensors").write_bytes(data)
    second = open_checkpoint(folder).fingerprint
    change(folder, rms_norm_eps=1e-5)
    assert len({first, second, open_checkpoint(folder).fingerprint}) == 3


def test_old_spellings_and_buffers_are_read(folder: Path) -> None:
    expected = open_checkpoint(folder).load()
    change(folder, rope_parameters=..., rope_theta=10_000.0, rope_scaling=None)
    retensor(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    found = open_checkpoint(folder).load()
    assert found.architecture == expected.architecture
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))


def test_what_a_family_cannot_hold_is_not_written(tmp_path: Path) -> None:
    part = FeedForward((32, 16), Router("top_k", k=1))
    model = Transformer(Architecture(Stack(32, (Layer(Attention(2, 1), part),)), Backbone(16, norm_eps=1e-5)), 40)
    for kind in ("llama", "mixtral", "gpt2"):
        with pytest.raises(MoesaicError, match="cannot represent this architecture"):
            write_folder(model, tmp_path / kind, kind)
        assert not (tmp_path / kind).exists()


def pruned(*left_out: Layer) -> Transformer:
    """Three layers of which the second is ``left_out``."""
    whole = Layer(Attention(2, 1), FeedForward((32,)))
    torch.manual_seed(0)
    return Transformer(Architecture(Stack(32, (whole, *left_out, whole)), Backbone(16, norm_eps=1e-5)), 40).eval()


NOTHING = Layer(Attention(0, 0), FeedForward(()))


def test_layers_of_which_nothing_is_left_are_not_written(tmp_path: Path) -> None:
    model, tokens = pruned(NOTHING, NOTHING), torch.arange(12)[None]
    write_folder(model, tmp_path, "llama")
    again = open_checkpoint(tmp_path).load()
    assert len(again.layers) == 2
    assert torch.equal(again(tokens), model(tokens))


@pytest.mark.parametrize("layer", [Layer(Attention(0, 0), FeedForward((32,))), Layer(Attention(2, 1), FeedForward(()))])
def test_half_a_layer_is_not_written(layer: Layer, tmp_path: Path) -> None:
    with pytest.raises(MoesaicError, match=r"(?s)cannot represent this architecture.*decoder\.1 without"):
        write_folder(pruned(layer), tmp_path / "out", "llama")
    empty = Transformer(Architecture(Stack(32, (NOTHING,)), Backbone(16)), 40)
    with pytest.raises(MoesaicError, match="nothing is left of the decoder"):
        write_folder(empty, tmp_path / "out", "llama")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "nearest"), [("lama", "nearest: llama"), ("moesaic", "found: +moesaic")])
def test_an_unknown_family_to_write_is_one_message(kind: str, nearest: str, tmp_path: Path) -> None:
    with pytest.raises(MoesaicError, match=f"(?s)this family is not written.*{nearest}"):
        write_folder(small(), tmp_path / "out", kind)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_what_is_written_is_read_back(kind: str, tmp_path: Path) -> None:
    model = small(kind)
    write_folder(model, tmp_path, kind)
    again = open_checkpoint(tmp_path).load()
    assert again.architecture == model.architecture
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
