"""Exports in transformers: the same logits, generation with a cache and padding, training, tracing, and the check."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, StaticCache

import moesaic
from moesaic import auto_classes
from moesaic.nas.data.tokenizer import train_tokenizer
from moesaic.nas.exports import convert as conversion
from moesaic.nas.exports import verification
from moesaic.nas.exports.convert import convert
from moesaic.nas.exports.folder import MODEL_TYPE, ModelFacts
from moesaic.nas.exports.huggingface.files import write_language_files
from moesaic.search_spaces import Architecture, Attention, Backbone, FeedForward, Layer, MoesaicError, Router, Stack
from moesaic.search_spaces.files import write_text, write_value
from moesaic.supernet import Transformer
from moesaic.supernet.checkpoint import save_tensors
from tests.nas.command import moesaic as command
from tests.nas.search_tools import tiny_space
from tests.search_spaces.two_stacks import two_stack_space

LENGTH = 24
MIXED = FeedForward((16, 32, 48), Router("threshold", threshold=0.7, max_k=2), 16)
TOP = FeedForward((32, 16), Router("top_k", k=1))
GPT2 = Backbone(
    16, activation="gelu_tanh", norm="layer", norm_eps=1e-5, positions="learned", max_positions=40, biases="all"
)
DENSE = FeedForward((64,))
KINDS = {
    "rotary": Architecture(
        Stack(48, (Layer(Attention(4, 2), MIXED), Layer(Attention(2, 1), DENSE), Layer(Attention(1, 1), TOP))),
        Backbone(16),
    ),
    "learned positions": Architecture(
        Stack(32, (Layer(Attention(2, 2), DENSE), Layer(Attention(2, 1), TOP))), GPT2
    ),
    "a layer without attention": Architecture(
        Stack(32, (Layer(Attention(0, 0), MIXED), Layer(Attention(2, 1), TOP))), Backbone(16, tied=False)
    ),
}  # fmt: skip


def write_export(folder: Path, architecture: Architecture) -> Path:
    """A model of random weights that are large enough for different texts, as an export."""
    folder.mkdir(parents=True)
    tokenizer = train_tokenizer(["def main(one, two):\n    return one + two\n" * 20], 300)
    write_text(folder / "tokenizer.json", tokenizer.to_str())
    size = tokenizer.get_vocab_size()
    torch.manual_seed(1)
    model = Transformer(architecture, size)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    save_tensors(folder / "model.safetensors", dict(model.named_parameters()), {"format": "pt"})
    write_value(
        folder / "config.json", ModelFacts(MODEL_TYPE, "0", size, LENGTH, architecture.fingerprint, architecture)
    )
    write_language_files(folder, folder / "tokenizer.json", LENGTH)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("exports") / request.param, KINDS[request.param])


@pytest.fixture(scope="module")
def one_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("one") / "export", KINDS["rotary"])


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def some_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 200, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_logits_are_those_of_the_export(export: Path) -> None:
    model, ids = load(export), some_ids(3, 17)
    expected = moesaic.load(export)(ids)
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])
    assert expected.std() > 0.3  # the logits say something
    assert AutoConfig.from_pretrained(export).model_type == "moesaic"


@torch.no_grad()
def test_a_cache_changes_nothing(export: Path) -> None:
    model, ids = load(export), some_ids(2, 9)
    begun = model(ids[:, :4], use_cache=True)
    rest = model(ids[:, 4:], past_key_values=begun.past_key_values)
    both = torch.cat([begun.logits, rest.logits], 1)
    torch.testing.assert_close(both, model(ids).logits, rtol=1e-5, atol=1e-5)
    for settings in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
        with_cache, without = (
            model.generate(ids, max_new_tokens=10, use_cache=use_cache, **settings) for use_cache in (True, False)
        )
        assert torch.equal(with_cache, without)
    sampled = model.generate(ids, max_new_tokens=10, do_sample=True)
    assert torch.equal(sampled[:, :9], ids)


@torch.no_grad()
def test_padding_is_neither_attended_to_nor_routed(export: Path) -> None:
    model, tokenizer = load(export), AutoTokenizer.from_pretrained(export)
    texts = ["def main(one, two):", "one"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert not batch["attention_mask"][1, 0]
    logits, written = model(**batch).logits, model.generate(**batch, max_new_tokens=6, do_sample=False)
    for row, text in enumerate(texts):
        alone = tokenizer(text, return_tensors="pt")
        count = alone["input_ids"].shape[1]
        torch.testing.assert_close(logits[row, -count:], model(**alone).logits[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(written[row, -6:], model.generate(**alone, max_new_tokens=6, do_sample=False)[0, -6:])
    output = model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))
    filled = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 5)
    other = model(filled, attention_mask=batch["attention_mask"], labels=filled)
    assert output.aux_loss == other.aux_loss


@torch.no_grad()
def test_what_is_saved_is_an_export(export: Path, tmp_path: Path) -> None:
    model = load(export)
    model.save_pretrained(tmp_path / "saved")
    for parameters in (load(tmp_path / "saved").model, moesaic.load(tmp_path / "saved")):
        found = dict(parameters.named_parameters())
        assert all(torch.equal(found[name], value) for name, value in model.model.named_parameters())


def test_training_minimises_the_loss_of_moesaic_s_own(one_export: Path) -> None:
    model, ids = load(one_export).train(), some_ids(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        output = model(ids, labels=ids)
        plain = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert output.loss.item() == pytest.approx(plain.item() + 0.01 * output.aux_loss.item(), rel=1e-5)
        assert output.past_key_values is None
        output.loss.backward()
        router = model.get_parameter("model.stacks.decoder.layers.0.feed_forward.router")
        assert router.grad is not None and router.grad.abs().max() > 0
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_an_exported_program_computes_the_same_for_other_tokens_too(export: Path) -> None:
    """Other tokens go to other experts."""
    model, ids = load(export).model, some_ids(2, 12)
    with torch.no_grad():
        program = torch.export.export(model, (ids,)).module()
        for tokens in (ids, some_ids(2, 12, seed=3)):
            torch.testing.assert_close(program(tokens), model(tokens), rtol=1e-5, atol=1e-5)


def test_a_compiled_model_has_the_same_values_and_gradients(one_export: Path) -> None:
    model, ids = load(one_export).model, some_ids(2, 12)
    results = []
    for one in (model, torch.compile(model, backend="aot_eager")):
        logits = one(ids)
        results.append((logits, *torch.autograd.grad(logits.square().mean(), list(model.parameters()))))
    for plain, traced in zip(*results, strict=True):
        assert (traced - plain).norm() <= 1e-4 * plain.norm()


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "cache": (
        lambda folder: load(folder)(some_ids(1, 4), past_key_values=StaticCache(load(folder).config, max_cache_len=9)),
        "attention needs all positions.*StaticCache with 9 positions.*DynamicCache",
    ),
    "mask": (
        lambda folder: load(folder)(some_ids(1, 4), attention_mask=torch.ones(1, 1, 4, 4)),
        "which positions hold tokens",
    ),
    "itself": (lambda folder: convert(folder, "transformers", folder), "is the export itself"),
    "not an export": (lambda folder: convert(folder.parent, "transformers", folder.parent / "new"), "no config.json"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_one_message(one_export: Path, name: str) -> None:
    does, message = WRONG[name]
    with pytest.raises(MoesaicError, match=f"(?s){message}"):
        does(one_export)


def test_other_models_than_language_models_are_refused(tmp_path: Path) -> None:
    architecture = two_stack_space().largest
    folder = write_export(tmp_path / "export", tiny_space().largest)
    facts = ModelFacts(MODEL_TYPE, "0", 300, LENGTH, architecture.fingerprint, architecture)
    write_value(folder / "config.json", facts)
    save_tensors(folder / "model.safetensors", dict(Transformer(architecture, 300).named_parameters()), {})
    for does in (load, lambda path: convert(path, "transformers", tmp_path / "new")):
        with pytest.raises(MoesaicError, match=r"(?s)language models.*a decoder alone"):
            does(folder)
    assert not (tmp_path / "new").exists()


def test_it_is_converted_where_transformers_agrees(one_export: Path, tmp_path: Path) -> None:
    out = tmp_path / "converted"
    done = command("convert", one_export, "--format", "transformers", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    check = json.loads(done.stdout)
    assert check["logit_difference"] == 0 and 0 < check["decode_logit_difference"] < 1e-4 and check["positions"] == 128
    assert f"Checked in transformers {check['version']} on 128 tokens" in (out / "README.md").read_text()
    assert json.loads((out / "config.json").read_text())["architectures"] == ["MoesaicForCausalLM"]
    ids = some_ids(1, 5)
    assert torch.equal(moesaic.load(out)(ids), moesaic.load(one_export)(ids))


def test_nothing_is_left_where_it_does_not(one_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(pattern: str) -> None:
        with pytest.raises(MoesaicError, match=pattern):
            convert(one_export, "transformers", tmp_path / "new")
        assert list(tmp_path.iterdir()) == []

    with monkeypatch.context() as patch:
        patch.setattr(verification, "TOLERANCE", -1.0)
        fails("the logits of transformers .* are others")
    with monkeypatch.context() as patch:
        form = replace(conversion.FORMATS["transformers"], check="moesaic.nowhere")
        patch.setitem(conversion.FORMATS, "transformers", form)
        fails("(?s)does not run the converted model.*No module named moesaic.nowhere")
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "find_spec", lambda name: None)
        fails(r"(?s)transformers is not installed.*pip install 'moesaic\[hf\]'")


def test_neither_library_loads_the_other_and_the_order_does_not_matter(one_export: Path) -> None:
    code = f"""
import moesaic, sys
assert not {{"transformers", "torch"}} & set(sys.modules)
del sys.modules["moesaic"], sys.modules["moesaic.auto_classes"]
sys.meta_path.pop(0)
from transformers import AutoModelForCausalLM
assert "moesaic" not in sys.modules
import moesaic
print(type(AutoModelForCausalLM.from_pretrained({str(one_export)!r})).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["MoesaicForCausalLM"]


def test_an_older_transformers_still_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "moesaic.nas.exports.huggingface.configuration", None)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    with pytest.warns(UserWarning, match="version 5 is needed"):
        auto_classes.add_when_loaded()
