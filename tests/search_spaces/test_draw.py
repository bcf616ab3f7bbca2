from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from moesaic.search_spaces import Architecture, Attention, FeedForward, Layer, Router, SearchSpace, Stack, draw
from moesaic.search_spaces.draw import CELLS, picture

ARCHITECTURE = Architecture(
    Stack(
        64,
        (
            Layer(Attention(4, 2), FeedForward((256, 128, 128), Router("threshold", threshold=0.6, max_k=2), 64)),
            Layer(Attention(2, 1), FeedForward((512,))),
            Layer(Attention(2, 2), FeedForward((32, 32), Router("top_k", k=1))),
        ),
    )
)


def test_a_line_per_layer_has_heads_router_and_sizes() -> None:
    head, first, second, third = draw(ARCHITECTURE).splitlines()
    assert ARCHITECTURE.fingerprint in head
    assert "width 64" in head
    assert "3 layers" in head
    assert "4/2 heads" in first
    assert "mass 0.6, max 2: 256 + 2 x 128 + 64 shared" in first
    assert "2/1 heads" in second
    assert "dense: 512" in second
    assert "2/2 heads" in third
    assert "top-1: 2 x 32" in third


@given(seed=st.integers(0, 2**32))
def test_one_tile_per_expert_as_wide_as_it_is_large(seed: int, preset_space: SearchSpace) -> None:
    architecture = preset_space.sample_balanced(Random(seed))
    lines = picture(architecture)
    assert len(lines) == len(architecture.decoder.layers)
    for line, layer in zip(lines, architecture.decoder.layers, strict=True):
        part = layer.feed_forward
        routed = [tile for tile in line.text.split() if set(tile) == {"█"}]
        shared = [tile for tile in line.text.split() if set(tile) == {"▒"}]
        assert len(routed) == part.experts
        assert len(shared) == (1 if part.shared_size else 0)
        widths = [len(tile) for tile in routed]
        assert widths == sorted(widths, reverse=True)
        assert line.text in draw(architecture)
        assert line.router in draw(architecture)


def test_all_layers_have_one_scale() -> None:
    lines = picture(ARCHITECTURE)
    most = max(layer.feed_forward.neurons for layer in ARCHITECTURE.decoder.layers)
    for line, layer in zip(lines, ARCHITECTURE.decoder.layers, strict=True):
        cells = [len(tile) for tile in line.text.split() if "█" in tile]
        for size, width in zip(layer.feed_forward.expert_sizes, cells, strict=True):
            assert abs(width - size * CELLS / most) <= 0.5 or width == 1
