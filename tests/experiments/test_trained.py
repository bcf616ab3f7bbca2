"""What the scripts on trained models compute beside the tool: names of members, sentences, agreement, kinds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from experiments.dense_threshold.run import members
from experiments.real_decoder.run import kinds
from experiments.real_encoder.run import agreement, sentences
from moesaic.nas.context import Context
from moesaic.nas.costs.price import Pricer
from moesaic.search_spaces import Architecture, Attention, Backbone, FeedForward, Layer, Router
from moesaic.search_spaces.architecture import Stack
from moesaic.search_spaces.trained import TrainedSpec
from moesaic.supernet import Transformer


def test_members_have_one_router_everywhere_and_the_source_is_first() -> None:
    layer = Layer(Attention(1, 1), FeedForward((16,) * 4, Router("top_k", k=4, weights="softmax")))
    source = Architecture(Stack(16, (layer, layer)), Backbone(16))
    spec = TrainedSpec(kept=[1.0], expert_kept=[1.0], active=[0.25, 0.5], threshold=[0.3, 0.7])
    run = SimpleNamespace(space=spec.build(source), pricer=Pricer(Context(10, 4, 1)))
    found = members(run)  # pyright: ignore[reportArgumentType]
    assert list(found) == ["top-4", "t = 0.7", "top-2", "t = 0.3", "top-1"]
    assert found["top-4"] == source
    for member in found.values():
        assert len({layer.feed_forward for layer in member.layers.values()}) == 1


def test_sentences_are_long_enough(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("Too short. " + "word " * 9 + "end. Short\nagain. " + "more " * 8 + "words")
    assert sentences(path) == ["word " * 9 + "end", "more " * 8 + "words"]


def test_agreement_is_that_of_the_order_of_similarities() -> None:
    one = F.normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    turned = one @ torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))[0]
    assert agreement(one, turned) == pytest.approx(1, abs=1e-3)
    other = F.normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(2)), dim=1)
    assert abs(agreement(one, other)) < 0.5


def test_kinds_count_parts_that_are_left_out() -> None:
    layers = (Layer(Attention(2, 1), FeedForward((32,))), Layer(Attention(0, 0), FeedForward(())))
    model = Transformer(Architecture(Stack(16, layers), Backbone(8)), 10)
    assert kinds(model) == {"dense": 1, "2 heads": 1, "no feed-forward part": 1, "0 heads": 1}
