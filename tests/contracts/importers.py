"""What every family of models must satisfy: its logits are those of the program that wrote it, and the way back too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moesaic.search_spaces import MoesaicError
from moesaic.supernet import Transformer
from moesaic.supernet.cache import KeyValueCache
from moesaic.supernet.convert import open_checkpoint, write_folder

LENGTH = 12


def outputs(found: Any) -> Tensor:
    """Logits, or the final states of a model without a head."""
    return found.logits if "logits" in found else found.last_hidden_state


class ImporterContract:
    """A test class per family gives ``written(folder)``: it saves a small random model and returns it."""

    vocabulary = 67
    writes = True
    decodes = True

    @classmethod
    def written(cls, folder: Path) -> Any:
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def original(cls, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp("model")
        torch.manual_seed(0)
        return folder, cls.written(folder)

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, original: tuple[Path, Any]) -> Transformer:
        return open_checkpoint(original[0]).load()

    @pytest.fixture
    def tokens(self) -> Tensor:
        return torch.randint(2, self.vocabulary, (3, LENGTH), generator=torch.Generator().manual_seed(1))

    def test_logits_are_those_of_the_original(
        self, original: tuple[Path, Any], model: Transformer, tokens: Tensor
    ) -> None:
        with torch.no_grad():
            expected, found = outputs(original[1](tokens)), model(tokens)
        assert expected.std() > 0.05  # else weights hardly matter
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_is_masked_as_in_the_original(
        self, original: tuple[Path, Any], model: Transformer, tokens: Tensor, side: str
    ) -> None:
        mask = torch.ones_like(tokens, dtype=torch.bool)
        mask[0, slice(0, 4) if side == "left" else slice(-4, None)] = False
        places = (mask.cumsum(1) - 1).clamp(min=0)  # as generate() numbers positions
        with torch.no_grad():
            expected = outputs(original[1](tokens, attention_mask=mask.long(), position_ids=places))
            found = model(tokens, mask=mask)
        torch.testing.assert_close(found[mask], expected[mask], atol=1e-4, rtol=1e-4)

    def test_decoding_with_a_cache_gives_the_same_logits(self, model: Transformer, tokens: Tensor) -> None:
        cache = KeyValueCache(model.architecture, len(tokens), LENGTH, model.device)
        if not self.decodes:
            with pytest.raises(MoesaicError, match="an encoder sees all tokens at once"):
                model.run(tokens, cache=cache)
            return
        with torch.no_grad():
            parts = [model.run(tokens[:, [at]], cache=cache).logits for at in range(LENGTH)]
            torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=1e-4, rtol=1e-4)

    def test_a_layer_can_be_read_alone(self, original: tuple[Path, Any], model: Transformer) -> None:
        checkpoint, prefix = open_checkpoint(original[0]), "stacks.decoder.layers.1."
        layer = checkpoint.tensors(prefix)
        expected = {name.removeprefix(prefix): value for name, value in model.named_parameters() if prefix in name}
        assert layer.keys() == expected.keys()
        assert all(torch.equal(layer[name], value) for name, value in expected.items())

    def test_the_way_back_gives_the_same_tensors_and_configuration(
        self, original: tuple[Path, Any], model: Transformer, tmp_path: Path
    ) -> None:
        if not self.writes:
            return
        folder, checkpoint = original[0], open_checkpoint(original[0])
        write_folder(model, tmp_path / "back", checkpoint.family.model_type)
        again = open_checkpoint(tmp_path / "back")
        assert (again.architecture, again.vocab_size) == (checkpoint.architecture, checkpoint.vocab_size)
        before = {name: tensor for path in set(checkpoint.files.values()) for name, tensor in load_file(path).items()}
        after = load_file(tmp_path / "back" / "model.safetensors")
        common = before.keys() & after.keys()
        assert {piece.name for pieces in checkpoint.names.values() for piece in pieces} <= common
        for name in common - self.unused(before):
            assert torch.equal(after[name], before[name].float()), name
        assert (
            json.loads((tmp_path / "back" / "config.json").read_text())["model_type"]
            == json.loads((folder / "config.json").read_text())["model_type"]
        )

    def unused(self, tensors: dict[str, Tensor]) -> set[str]:
        """Tensors of which the model uses a part only."""
        return set()
