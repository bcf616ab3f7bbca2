"""`moesaic inspect`: figures are those of the layers, sentences follow from them, and bad input is one message."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer
from typer.testing import CliRunner

from moesaic.nas.cli import app
from moesaic.nas.data.tokenizer import train_tokenizer
from moesaic.nas.inspect import inspect_checkpoint, print_inspection
from moesaic.search_spaces import Architecture, Attention, Backbone, FeedForward, Layer, MoesaicError, Router
from moesaic.search_spaces.architecture import Stack
from moesaic.supernet import Transformer
from moesaic.supernet.convert import open_checkpoint, write_folder
from moesaic.supernet.sparsify.activity import activity

TEXT = "some words and more words of a text that goes on and on\n" * 400


def folder_of(path: Path, kind: str, parts: list[FeedForward], **backbone) -> tuple[Path, Transformer]:
    layers = tuple(Layer(Attention(2, 2), part) for part in parts)
    torch.manual_seed(0)
    model = Transformer(Architecture(Stack(32, layers), Backbone(head_size=16, **backbone)), 300)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    write_folder(model, path, kind)
    train_tokenizer([TEXT], 300).save(str(path / "tokenizer.json"))
    (path / "text.txt").write_text(TEXT)
    return path, model


@pytest.fixture
def dense(tmp_path: Path) -> tuple[Path, Transformer]:
    return folder_of(tmp_path / "dense", "llama", [FeedForward((256,))] * 2)


def test_figures_are_those_of_the_layers(dense: tuple[Path, Transformer]) -> None:
    folder, model = dense
    done: list[tuple[int, int]] = []
    found = inspect_checkpoint(open_checkpoint(folder), folder / "text.txt", lambda *step: done.append(step))
    assert done == [(1, 2), (2, 2)]
    assert (found.family, found.vocab_size, found.activation) == ("Llama, SmolLM", 300, "swiglu")
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    tokens = torch.tensor(ids[: found.tokens]).view(-1, 256)
    read = []
    for block in model.layers:
        block.feed_forward.register_forward_hook(lambda module, given, out: read.append((module, given[0])))
    with torch.no_grad():
        model(tokens)
    for layer, (module, given) in zip(found.layers, read, strict=True):
        assert layer.activity.concentrated == pytest.approx(
            activity(module, FeedForward((256,)), given).concentrated, abs=1e-3
        )
        assert layer.pruned_half is not None
        assert layer.split_half is not None and layer.split_quarter is not None
        assert 0 < layer.split_half < layer.split_quarter < 1
        shares = [(one.routed, one.best) for one in layer.captured]
        assert all(0 < routed <= best <= 1 for routed, best in shares)
        assert shares == sorted(shares)


def test_activity_of_a_known_layer() -> None:
    """Two of 32 ReLU neurons carry everything; of the others half are silent and half are tiny."""
    model = Transformer(
        Architecture(Stack(16, (Layer(Attention(1, 1), FeedForward((32,))),)), Backbone(16, activation="relu")), 10
    )
    layer = model.layers[0].feed_forward
    with torch.no_grad():
        layer.up.zero_()
        layer.up[:2, 0], layer.up[2:17, 0], layer.up[17:, 0] = 1.0, -1.0, 1e-4
        layer.down.fill_(1.0)
    read = torch.zeros(5, 16)
    read[:, 0] = 1.0
    found = activity(layer, FeedForward((32,)), read)
    assert found.concentrated == pytest.approx(2 / 32)
    assert found.small == pytest.approx(30 / 32)
    assert found.negative == pytest.approx(15 / 32)


def test_a_mixture_says_how_many_experts_the_text_needs(tmp_path: Path) -> None:
    part = FeedForward((16,) * 4, Router("top_k", k=2))
    folder, _ = folder_of(tmp_path / "mixture", "mixtral", [part], norm_eps=1e-5, tied=False)
    found = inspect_checkpoint(open_checkpoint(folder), None)  # the standard library's text
    (layer,) = found.layers
    assert (layer.experts, layer.activity.small) == (4, None)
    assert 0.25 <= layer.activity.concentrated <= 1
    assert any(sentence.startswith("Mixtures: ") for sentence in found.advice)


def test_the_command_prints_tables_and_data(dense: tuple[Path, Transformer]) -> None:
    folder, _ = dense
    runner = CliRunner()
    shown = runner.invoke(app, ["inspect", str(folder), "--text", str(folder / "text.txt")])
    assert shown.exit_code == 0, shown.output
    for part in (
        "Llama, SmolLM in",
        "decoder of 0.1M parameters",
        "layer 1",
        "hold 95 %",
        "Dense layers: 95 % of a token's output comes from",
    ):
        assert part in shown.output
    data = runner.invoke(app, ["inspect", str(folder), "--text", str(folder / "text.txt"), "--json"])
    plain = json.loads(data.stdout[data.stdout.index("{") :])
    assert [layer["slot"]["index"] for layer in plain["layers"]] == [0, 1]
    out = io.StringIO()
    print_inspection(Console(file=out, width=60), inspect_checkpoint(open_checkpoint(folder), folder / "text.txt"))
    assert "layer 0" in out.getvalue()  # narrow terminals lose nothing


def test_bad_input_is_one_message(dense: tuple[Path, Transformer], tmp_path: Path) -> None:
    folder, _ = dense
    (tmp_path / "short.txt").write_text("too few")
    with pytest.raises(MoesaicError, match=r"(?s)short.txt: the text is too short.*256 and more"):
        inspect_checkpoint(open_checkpoint(folder), tmp_path / "short.txt")
    numbers = " ".join(str(number) for number in range(4000))
    train_tokenizer([numbers], 700).save(str(folder / "tokenizer.json"))
    (folder / "text.txt").write_text(numbers)
    with pytest.raises(MoesaicError, match=r"(?s)the tokenizer is of another vocabulary.*ids below the model's 300"):
        inspect_checkpoint(open_checkpoint(folder), folder / "text.txt")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "nowhere")])
    assert result.exit_code == 2


@pytest.mark.parametrize("head", ["masked", "none"])
def test_an_encoder_reads_its_text_between_its_own_tokens(head: str, tmp_path: Path) -> None:
    backbone = {"activation": "gelu", "norm": "layer", "norm_place": "post", "norm_eps": 1e-12, "biases": "all",
                "embedding_norm": True, "positions": "learned", "max_positions": 64, "head": head}  # fmt: skip
    stack = Stack(32, (Layer(Attention(2, 2), FeedForward((256,))),), causal=False)
    model = Transformer(Architecture(stack, Backbone(head_size=16, **backbone)), 302)
    write_folder(model, tmp_path, "bert")
    tokenizer = train_tokenizer([TEXT], 300)
    tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(TEXT)
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path), "--text", str(tmp_path / "text.txt")])
    assert shown.exit_code == 0, shown.output
    assert f"encoder with{'out a' if head == 'none' else ' a masked-token'} head of" in shown.output
    found = inspect_checkpoint(open_checkpoint(tmp_path), tmp_path / "text.txt")
    assert found.tokens % 64 == 0  # whole windows, as long as the positions reach
    train_tokenizer([TEXT], 300).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(MoesaicError, match=r"tokenizer.json: the tokenizer has no \[CLS\]"):
        inspect_checkpoint(open_checkpoint(tmp_path), tmp_path / "text.txt")
