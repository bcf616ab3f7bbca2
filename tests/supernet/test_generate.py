"""Beam search against a plain one: a source at a time, the whole prefix in every step, no cache."""

from __future__ import annotations

from itertools import product
from random import Random

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.search_spaces import Architecture, Backbone, MoesaicError, SearchSpace, load_space
from moesaic.search_spaces.yaml_source import YamlSource
from moesaic.supernet import Transformer, beam_search, scratch
from tests.search_spaces.two_stacks import two_stack_space

START, END, PAD = 0, 1, 2


def threshold_space() -> SearchSpace:
    """Threshold routers in both stacks, of which the deeper ones are read over several layers."""
    layer = {"heads": [1, 2], "experts": [1, 3], "dense_sizes": [32], "expert_sizes": [16, 32],
             "routers": [{"kind": "threshold", "threshold": [0.5, 0.8], "max_k": [3]}]}  # fmt: skip
    cross = {"cross": {"heads": [1, 2], "span": [1, 2, 3]}}
    plain = {"name": "threshold", "backbone": {"qkv_width": 32, "positions": "sinusoidal", "norm": "layer",
             "norm_place": "post", "activation": "relu", "biases": "all"},
             "encoder": {"width": [32], "depth": [3], "layer": layer},
             "width": [32], "depth": [1, 2], "layer": layer | cross}  # fmt: skip
    return load_space(YamlSource("threshold", plain))


SPACES = [two_stack_space(), threshold_space()]


def random_model(architecture: Architecture, vocabulary: int, seed: int) -> Transformer:
    model = scratch(vocabulary, seed)(architecture)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.double()


def random_sources(vocabulary: int, lengths: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Sources of these lengths, padded on the right, and their mask."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    drawn = torch.randint(0, vocabulary, mask.shape, generator=torch.Generator().manual_seed(seed))
    return drawn.where(mask, torch.tensor(PAD)), mask


def log_p(model: Transformer, architecture: Architecture, source: Tensor, prefix: list[int]) -> list[float]:
    """Of each next token after ``prefix``; ``source`` [P] has no padding."""
    with torch.no_grad():
        logits = model(torch.tensor([prefix]), architecture, source=source[None])
    return logits[0, -1].log_softmax(-1).tolist()


def plain_search(
    model: Transformer,
    architecture: Architecture,
    source: Tensor,
    beam: int,
    length_penalty: float,
    fewest: int,
    limit: int,
    barred: set[int],
) -> list[int]:
    """The translation of one source, which ends when ``beam`` hypotheses finished, as in fairseq."""
    running, finished = [(0.0, [START])], []
    while running and len(finished) < beam:
        extended = []
        for total, prefix in running:
            for token, value in enumerate(log_p(model, architecture, source, prefix)):
                if len(prefix) > fewest if token == END else token not in barred and len(prefix) <= limit:
                    extended.append((total + value, [*prefix, token]))
        extended.sort(key=lambda one: one[0], reverse=True)
        finished += [
            (total / (len(ids) - 1) ** length_penalty, ids) for total, ids in extended[:beam] if ids[-1] == END
        ]
        running = [one for one in extended if one[1][-1] != END][:beam]
    return max(finished, key=lambda one: one[0])[1][1:-1]


@settings(max_examples=25)
@given(
    space=st.sampled_from(SPACES),
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    beam=st.integers(1, 5),
    length_penalty=st.sampled_from([-0.5, 0.0, 0.6, 1.0, 2.0]),
    min_length=st.sampled_from([0, 0, 1, 3]),
    max_length=st.sampled_from([None, 1, 3, 6]),
)
def test_it_finds_what_the_plain_search_finds(space, seed, lengths, beam, length_penalty, min_length, max_length):
    assume(max_length is None or min_length <= max_length)
    architecture, vocabulary = space.sample_balanced(Random(seed)), 4 + seed % 5
    model = random_model(space.envelope, vocabulary, seed)
    source, mask = random_sources(vocabulary, lengths, seed)
    found = beam_search(
        model, source, mask, start=START, end=END, beam=beam, length_penalty=length_penalty,
        min_length=min_length, max_length=max_length, forbidden=[PAD], architecture=architecture,
    )  # fmt: skip
    for ids, row, length in zip(found, source, lengths, strict=True):
        limit = int(1.2 * length + 10) if max_length is None else max_length
        barred = {START, PAD}
        assert ids == plain_search(model, architecture, row[:length], beam, length_penalty, min_length, limit, barred)
        assert min_length <= len(ids) <= limit
        assert not {START, END, PAD} & set(ids)


def test_a_search_whose_result_is_certain_ends_and_the_result_is_the_same(monkeypatch):
    model = random_model(SPACES[0].largest, 9, 5)
    source, mask = random_sources(9, [7, 2, 5], 5)
    rows, run = [], model.run
    monkeypatch.setattr(model, "run", lambda *args, **keys: rows.append(len(args[0])) or run(*args, **keys))
    found = beam_search(model, source, mask, start=START, end=END, beam=8, length_penalty=0.0)
    computed = sum(rows)
    rows.clear()
    monkeypatch.setattr(
        "moesaic.supernet.generate._Search.done",
        lambda search, leader, length, beam, _: search.finished >= beam or length > search.limit,
    )
    assert beam_search(model, source, mask, start=START, end=END, beam=8, length_penalty=0.0) == found
    assert computed < sum(rows)


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.5])
@pytest.mark.parametrize("seed", range(4))
def test_a_beam_of_all_hypotheses_finds_the_best_of_all_translations(seed, length_penalty):
    vocabulary, limit = 4, 3
    model = random_model(SPACES[0].largest, vocabulary, seed)
    source, _ = random_sources(vocabulary, [5], seed)
    (found,) = beam_search(
        model, source, start=START, end=END, beam=vocabulary**limit, length_penalty=length_penalty, max_length=limit
    )

    def score(words: tuple[int, ...]) -> float:
        prefix = [START, *words]
        steps = zip(range(1, len(prefix) + 1), [*words, END], strict=True)
        total = sum(log_p(model, model.architecture, source[0], prefix[:n])[token] for n, token in steps)
        return total / (len(words) + 1) ** length_penalty

    words = [token for token in range(vocabulary) if token not in (START, END)]
    everything = [ids for length in range(limit + 1) for ids in product(words, repeat=length)]
    assert tuple(found) == max(everything, key=score)


@pytest.mark.parametrize("space", SPACES)
def test_a_sources_translation_does_not_depend_on_the_rest_of_the_batch(space):
    model = random_model(space.largest, 9, 5)
    source, mask = random_sources(9, [7, 1, 3, 5, 2, 6], 5)
    options = {"start": START, "end": END, "forbidden": [PAD]}
    together = beam_search(model, source, mask, **options)
    assert len({len(ids) for ids in together}) > 1  # some leave the batch before others
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert beam_search(model, source[order], mask[order], **options) == [together[index] for index in order]
    alone = [beam_search(model, row[seen][None], **options)[0] for row, seen in zip(source, mask, strict=True)]
    assert alone == together
    assert beam_search(model, source[:0], **options) == []


def test_the_start_may_be_the_end():
    model = random_model(SPACES[0].largest, 6, 1)
    source, _ = random_sources(6, [4], 1)
    (found,) = beam_search(model, source, start=END, end=END)
    assert END not in found


def test_learned_positions_limit_the_length():
    plain = two_stack_space().largest
    backbone = Backbone(head_size=16, positions="learned", max_positions=5)
    model = random_model(Architecture(plain.decoder, backbone, plain.encoder), 40, 3)
    source, _ = random_sources(40, [5], 3)
    (found,) = beam_search(model, source, start=START, end=END, length_penalty=3.0)
    assert len(found) <= 4


def test_settings_without_a_result_are_one_message():
    model = random_model(SPACES[0].largest, 6, 0)
    source, _ = random_sources(6, [3], 0)
    for wrong, message in (
        ({"beam": 0}, "beam is too small"),
        ({"max_length": 0}, "max_length is too small"),
        ({"forbidden": [END]}, "cannot end"),
    ):
        with pytest.raises(MoesaicError, match=message):
            beam_search(model, source, **{"start": START, "end": END} | wrong)
    decoder = Architecture(load_space(YamlSource("test", "tiny")).smallest.decoder)
    with pytest.raises(MoesaicError, match="only a model with an encoder"):
        beam_search(scratch(6, 0)(decoder), source, start=START, end=END)
