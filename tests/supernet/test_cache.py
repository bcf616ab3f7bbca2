from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moesaic.search_spaces import Architecture, MoesaicError, load_space
from moesaic.search_spaces.yaml_source import YamlSource
from moesaic.supernet import KeyValueCache, Transformer
from tests.supernet.conftest import PRESETS

LENGTH = 9


@torch.no_grad()
def in_chunks(model: Transformer, tokens: Tensor, chunks: list[int], architecture: Architecture) -> Tensor:
    """Logits of ``tokens`` fed through a cache in pieces of the given lengths, then one by one."""
    cache = KeyValueCache(architecture, len(tokens), tokens.shape[1])
    found = []
    for length in [*chunks, *[1] * (tokens.shape[1] - sum(chunks))]:
        piece = tokens[:, cache.length : cache.length + length]
        found.append(model.run(piece, architecture, cache).logits)
    assert cache.length == cache.capacity
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("preset", list(PRESETS))
@given(seed=st.integers(0, 10**6), cuts=st.sets(st.integers(1, LENGTH - 1), max_size=3))
@torch.no_grad()
def test_a_sequence_in_pieces_gives_the_logits_of_one_pass(make_model, make_tokens, preset, seed, cuts):
    space = load_space(YamlSource("test", PRESETS[preset]))
    architecture = space.sample_balanced(Random(seed))
    model, tokens = make_model(architecture), make_tokens(2, LENGTH, seed)
    ends = sorted(cuts)
    chunks = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    whole = model(tokens)
    assert whole.abs().max() > 0.3  # the logits say something
    torch.testing.assert_close(in_chunks(model, tokens, chunks, architecture), whole, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_slice_decodes_as_its_extracted_model(preset_space, sharing, make_model, make_tokens):
    supernet = make_model(preset_space.envelope, sharing)
    for seed in range(20):
        architecture, tokens = preset_space.sample_balanced(Random(seed)), make_tokens(2, LENGTH, seed)
        sliced = in_chunks(supernet, tokens, [4], architecture)
        extracted = in_chunks(supernet.extract(architecture), tokens, [4], architecture)
        torch.testing.assert_close(sliced, extracted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_shortened_cache_forgets_later_positions(tiny_space, make_model, make_tokens):
    model, tokens = make_model(tiny_space.largest), make_tokens(2, 6)
    cache = KeyValueCache(tiny_space.largest, 2, 6)
    model.run(tokens[:, :4], cache=cache)
    first = model.run(tokens[:, 4:5], cache=cache).logits
    cache.length = 4
    assert torch.equal(model.run(tokens[:, 4:5], cache=cache).logits, first)


def test_what_does_not_fit_the_cache_is_one_message(tiny_space, make_model):
    model = make_model(tiny_space.largest)
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(MoesaicError, match="key/value cache") as caught:
        model.run(tokens, cache=KeyValueCache(tiny_space.largest, 2, 3))
    assert "at most 3 positions" in str(caught.value.allowed)
    with pytest.raises(MoesaicError, match="key/value cache"):
        model.run(tokens[:1], cache=KeyValueCache(tiny_space.largest, 2, 4))
    with pytest.raises(MoesaicError, match="key/value cache"):  # one head would spread over two without a word
        model.run(tokens, tiny_space.smallest, cache=KeyValueCache(tiny_space.largest, 2, 4))


def test_the_bytes_of_a_cache_are_those_of_its_positions(tiny_space):
    architecture = tiny_space.largest
    heads = sum(layer.attention.kv_heads for layer in architecture.decoder.layers)
    cache = KeyValueCache(architecture, 3, 7)
    assert cache.bytes == 2 * 4 * 3 * 7 * heads * architecture.backbone.head_size
