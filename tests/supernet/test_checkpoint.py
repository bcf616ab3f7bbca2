from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from moesaic.search_spaces import MoesaicError
from moesaic.supernet.checkpoint import load_tensors, load_weights, save_tensors


def test_tensors_and_strings_come_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 4),
        "transposed": torch.randn(3, 4).t(),
        "b": torch.randn(2, dtype=torch.float64),
        "c": torch.randn(5).bfloat16(),
        "step": torch.tensor(7.0),
        "empty": torch.zeros(0, 3),
    }
    save_tensors(tmp_path / "a.safetensors", tensors, {"step": "7", "name": "ü"})
    found, metadata = load_tensors(tmp_path / "a.safetensors")
    assert metadata == {"step": "7", "name": "ü"}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_parameters_are_saved_without_their_graph(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", {"a": torch.nn.Parameter(torch.ones(2))}, {})
    found, metadata = load_tensors(tmp_path / "a.safetensors")
    assert not found["a"].requires_grad
    assert metadata == {}


@pytest.mark.parametrize("kept", [0, 4, 40, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"a": torch.randn(30, 40)}, {"step": "1"})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(MoesaicError, match="truncated or not a safetensors file") as caught:
        load_tensors(path)
    assert caught.value.where == str(path)


class Attack:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    attack = pickle.dumps(Attack(str(mark)))
    pickle.loads(attack)
    assert mark.exists()  # the attack works on a loader that trusts it
    mark.unlink()
    (tmp_path / "a.safetensors").write_bytes(attack)
    torch.save({"a": torch.ones(2)}, tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_text("not weights at all, but long enough to have a header")
    for name in "abc":
        with pytest.raises(MoesaicError, match="not a safetensors file"):
            load_tensors(tmp_path / f"{name}.safetensors")
    assert not mark.exists()


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MoesaicError, match="no such file"):
        load_tensors(tmp_path / "a.safetensors")
    with pytest.raises(MoesaicError):
        load_tensors(tmp_path)


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"a": torch.ones(2)}, {})
    kept = path.read_bytes()

    def full_disk(tensors: object, temporary: Path, metadata: object) -> None:
        temporary.write_bytes(kept[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moesaic.supernet.checkpoint.save_file", full_disk)
    with pytest.raises(MoesaicError, match="No space left on device"):
        save_tensors(path, {"a": torch.zeros(2)}, {})
    assert path.read_bytes() == kept
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(MoesaicError) as caught:
        save_tensors(tmp_path / "file" / "a.safetensors", {"a": torch.ones(2)}, {})
    assert caught.value.where == str(tmp_path / "file" / "a.safetensors")


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        ({"weight": torch.ones(2, 3)}, "bias"),
        ({"weight": torch.ones(3, 2), "bias": torch.ones(2)}, "weight"),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(2), "extra": torch.ones(1)}, "extra"),
    ],
)
def test_weights_of_another_model_are_refused_whole(tensors: dict[str, torch.Tensor], name: str) -> None:
    model = torch.nn.Linear(3, 2)
    before = model.weight.clone()
    with pytest.raises(MoesaicError, match=f"{name} differs"):
        load_weights(model, tensors, "a.safetensors")
    assert torch.equal(model.weight, before)


def test_weights_are_copied_into_the_model() -> None:
    model = torch.nn.Linear(3, 2)
    tensors = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}
    load_weights(model, tensors, "a.safetensors")
    tensors["bias"].zero_()
    assert torch.equal(model.weight, tensors["weight"])
    assert model.bias.abs().sum() > 0
    assert model.weight.requires_grad
