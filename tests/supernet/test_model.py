from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest
import torch
from torch import Tensor

from moesaic.search_spaces import (
    Architecture,
    Attention,
    Backbone,
    FeedForward,
    Layer,
    MoesaicError,
    Router,
    SearchSpace,
    Stack,
)
from moesaic.supernet import Transformer
from tests.search_spaces.two_stacks import two_stack_space

MakeModel = Callable[..., Transformer]
MakeTokens = Callable[..., Tensor]


def some_members(space: SearchSpace, number: int, seed: int = 0) -> list[Architecture]:
    """The extremes, and random members of both ways to sample."""
    rng = Random(seed)
    drawn = [space.sample(rng) if i % 2 else space.sample_balanced(rng) for i in range(number)]
    return [space.largest, space.smallest, *drawn]


# ---------------------------------------------------------------- the central invariant


@torch.no_grad()
def test_a_slice_and_its_extracted_model_give_the_same_logits(
    preset_space: SearchSpace, sharing: str, make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    supernet = make_model(preset_space.envelope, sharing)
    worst, largest = 0.0, 0.0
    for seed, architecture in enumerate(some_members(preset_space, 60)):
        tokens = make_tokens(2, 8, seed)
        logits = supernet(tokens, architecture=architecture)
        worst = max(worst, (logits - supernet.extract(architecture)(tokens)).abs().max().item())
        largest = max(largest, logits.abs().max().item())
    assert worst <= 1e-4
    assert largest > 1  # the logits say something


@torch.no_grad()
def test_the_envelope_runs_as_itself(preset_space: SearchSpace, sharing: str, make_model, make_tokens) -> None:
    supernet, tokens = make_model(preset_space.envelope, sharing), make_tokens()
    whole = supernet(tokens)
    assert torch.equal(whole, supernet(tokens, architecture=preset_space.envelope))
    assert torch.equal(whole, supernet.extract(preset_space.envelope)(tokens))


@torch.no_grad()
def test_sharing_policies_agree_on_the_envelope_and_differ_on_slices(tiny_space, make_model, make_tokens) -> None:
    nested, packed = (make_model(tiny_space.envelope, sharing) for sharing in ("nested", "packed"))
    tokens = make_tokens()
    assert torch.equal(nested(tokens), packed(tokens))
    part = FeedForward((32, 16), Router("top_k", k=2))
    slim = Architecture(Stack(32, (Layer(Attention(1, 1), part),)), tiny_space.backbone)
    assert not torch.allclose(nested(tokens, architecture=slim), packed(tokens, architecture=slim), atol=1e-3)


@torch.no_grad()
def test_different_slices_give_different_logits(tiny_space: SearchSpace, make_model, make_tokens) -> None:
    """Every choice of an architecture reaches the output."""
    supernet, tokens = make_model(tiny_space.envelope), make_tokens()
    part = FeedForward((32, 16), Router("top_k", k=1))
    layer = Layer(Attention(2, 1), part)

    def network(width: int = 48, depth: int = 2, **changes: object) -> Architecture:
        changed = replace(layer, **changes)
        return Architecture(Stack(width, (changed,) * depth), tiny_space.backbone)

    variants = [
        network(),
        network(width=32),
        network(depth=1),
        network(attention=Attention(1, 1)),
        network(attention=Attention(2, 2)),
        network(feed_forward=replace(part, expert_sizes=(32, 32))),
        network(feed_forward=replace(part, expert_sizes=(32, 16, 16, 16))),
        network(feed_forward=replace(part, router=Router("top_k", k=2))),
        network(feed_forward=replace(part, shared_size=16)),
        network(feed_forward=FeedForward((32,))),
    ]
    logits = [supernet(tokens, architecture=a) for a in variants]
    for i, one in enumerate(logits):
        for other in logits[:i]:
            assert (one - other).abs().max() > 1e-3


@torch.no_grad()
def test_a_slice_leaves_no_state_behind(preset_space: SearchSpace, sharing: str, make_model, make_tokens) -> None:
    supernet, tokens = make_model(preset_space.envelope, sharing), make_tokens()
    weights = {name: value.clone() for name, value in supernet.state_dict().items()}
    attributes = set(vars(supernet))
    generator = torch.get_rng_state()
    first, second = some_members(preset_space, 2)[2:]
    before = supernet(tokens, architecture=first)
    supernet(make_tokens(3, 5, 1), architecture=second)
    supernet.extract(second)
    supernet(tokens)
    assert torch.equal(supernet(tokens, architecture=first), before)
    assert all(torch.equal(value, weights[name]) for name, value in supernet.state_dict().items())
    assert set(vars(supernet)) == attributes
    assert supernet.architecture == preset_space.envelope
    assert torch.equal(torch.get_rng_state(), generator)


@torch.no_grad()
def test_an_extracted_model_is_a_copy(tiny_space: SearchSpace, make_model, make_tokens) -> None:
    supernet, tokens = make_model(tiny_space.envelope), make_tokens()
    before = supernet(tokens)
    for parameter in supernet.extract(tiny_space.largest).parameters():
        parameter.zero_()
    assert torch.equal(supernet(tokens), before)


def test_an_extracted_model_has_the_dtype_of_the_supernet(tiny_space: SearchSpace, make_model, make_tokens) -> None:
    supernet = make_model(tiny_space.envelope).double()
    extracted = supernet.extract(tiny_space.smallest)
    assert {p.dtype for p in extracted.parameters()} == {torch.float64}
    assert all(p.requires_grad and p.is_leaf for p in extracted.parameters())
    logits = supernet(make_tokens(), architecture=tiny_space.smallest)
    torch.testing.assert_close(logits, extracted(make_tokens()), rtol=1e-12, atol=1e-12)


def test_regions_are_the_parameters_of_a_model_of_its_own(preset_space: SearchSpace, sharing: str, make_model) -> None:
    supernet = make_model(preset_space.envelope, sharing)
    parameters = dict(supernet.named_parameters())
    for architecture in some_members(preset_space, 4):
        found = {name: region.of(parameters[name]) for name, region in supernet.where(architecture).items()}
        expected = dict(supernet.extract(architecture).named_parameters())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], parameter) for name, parameter in expected.items())


# ---------------------------------------------------------------- gradients


def places(supernet: Transformer, architecture: Architecture) -> dict[str, Tensor]:
    """Where each weight of the extracted model stands in the supernet (a flat index), found by numbering them."""
    numbered = Transformer(supernet.architecture, supernet.vocab_size, supernet.sharing).double()
    with torch.no_grad():
        for parameter in numbered.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter))
    return {name: p.detach().long().flatten() for name, p in numbered.extract(architecture).named_parameters()}


def test_gradient_of_a_slice_is_that_of_the_extracted_model_and_zero_elsewhere(
    preset_space: SearchSpace, sharing: str, make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    supernet, tokens = make_model(preset_space.envelope, sharing), make_tokens()
    for architecture in some_members(preset_space, 4, seed=1):
        extracted = supernet.extract(architecture)
        where = places(supernet, architecture)
        for model, argument in ((supernet, architecture), (extracted, None)):
            model.zero_grad(set_to_none=True)
            output = model.run(tokens, argument)
            (output.logits.float().log_softmax(-1)[..., 0].sum() + output.balance_loss()).backward()
        expected = dict(extracted.named_parameters())
        for name, parameter in supernet.named_parameters():
            scattered = torch.zeros(parameter.numel())
            if name in expected:
                grad = expected[name].grad
                assert grad is not None
                scattered[where[name]] = grad.flatten()
                assert len(where[name].unique()) == len(where[name])
            outside = torch.ones(parameter.numel(), dtype=torch.bool)
            outside[where.get(name, torch.tensor([], dtype=torch.long))] = False
            found = torch.zeros(parameter.numel()) if parameter.grad is None else parameter.grad.flatten()
            assert (found[outside] == 0).all()
            assert (found - scattered).norm() <= 1e-5 * scattered.norm()


def test_every_weight_of_a_model_gets_a_gradient(tiny_space: SearchSpace, make_model, make_tokens) -> None:
    """All experts are used by enough tokens; nothing in the model is dead weight."""
    model = make_model(tiny_space.envelope)
    model(make_tokens(16, 16)).log_softmax(-1)[..., 0].sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.norm() > 0, name


# ---------------------------------------------------------------- what does not fit


def too_large(space: SearchSpace) -> dict[str, Architecture]:
    largest = space.largest
    stack, layer = largest.decoder, largest.decoder.layers[0]

    def with_layer(**changes: object) -> Architecture:
        return replace(largest, decoder=replace(stack, layers=(replace(layer, **changes), *stack.layers[1:])))

    part = layer.feed_forward
    return {
        "width": replace(largest, decoder=replace(stack, width=stack.width + 16)),
        "depth": replace(largest, decoder=replace(stack, layers=stack.layers + stack.layers[:1])),
        "heads": with_layer(attention=Attention(4, 2)),
        "kv_heads": with_layer(attention=Attention(4, 4)),
        "experts": with_layer(feed_forward=FeedForward((16,) * 5, Router("top_k", k=1))),
        "expert size": with_layer(feed_forward=replace(part, expert_sizes=(64, *part.expert_sizes[1:]))),
        "dense size": with_layer(feed_forward=FeedForward((1024,))),
        "shared size": with_layer(feed_forward=replace(part, shared_size=32)),
        "activation": replace(largest, backbone=replace(largest.backbone, activation="gelu")),
        "norm": replace(largest, backbone=replace(largest.backbone, norm="layer")),
    }


CHOICES = ["width", "depth", "heads", "kv_heads", "experts", "expert size", "dense size", "shared size",
           "activation", "norm"]  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES)
def test_what_does_not_fit_is_neither_run_nor_extracted(choice: str, tiny_space, sharing: str, make_model) -> None:
    supernet = make_model(tiny_space.envelope, sharing)
    architectures = too_large(tiny_space)
    assert list(architectures) == CHOICES
    with pytest.raises(MoesaicError, match="does not fit"):
        supernet.extract(architectures[choice])
    with pytest.raises(MoesaicError, match="does not fit"):
        supernet(torch.zeros(1, 3, dtype=torch.long), architecture=architectures[choice])


def test_more_key_value_heads_do_not_fit_where_the_query_heads_do() -> None:
    """In the spaces above, more of the ones means more of the others."""

    def heads(query: int, key_value: int) -> Architecture:
        return Architecture(Stack(32, (Layer(Attention(query, key_value), FeedForward((32,))),)), Backbone(16))

    model = Transformer(heads(4, 2), 23)
    for fitting in (heads(4, 2), heads(4, 1), heads(2, 2)):
        assert model.where(fitting)
    for attention in ((4, 4), (3, 3), (6, 2)):
        with pytest.raises(MoesaicError, match="does not fit"):
            model.where(heads(*attention))


def test_a_network_of_other_stacks_is_not_a_slice() -> None:
    space = two_stack_space()
    lone = Architecture(replace(space.encoder.smallest, causal=True), space.backbone)
    with torch.device("meta"):
        models = {name: Transformer(a, 23) for name, a in (("one", lone), ("two", space.envelope))}
    for name, architecture in (("one", space.smallest), ("two", lone)):
        with pytest.raises(MoesaicError, match="does not fit this model: stacks"):
            models[name].where(architecture)


@torch.no_grad()
def test_each_of_two_stacks_has_its_regions() -> None:
    space = two_stack_space()
    supernet = Transformer(space.envelope, 23)
    for architecture in some_members(space, 6):
        names = supernet.where(architecture)
        assert {name.split(".")[1] for name in names} == {"encoder", "decoder"}
        extracted = dict(supernet.extract(architecture).named_parameters())
        assert extracted.keys() == names.keys()
        for name, parameter in extracted.items():
            assert torch.equal(parameter, names[name].of(supernet.get_parameter(name)))
        widest = max(stack.width for stack in architecture.stacks.values())
        assert extracted["stacks.decoder.embedding.weight"].shape[1] == widest  # shared
    with pytest.raises(MoesaicError, match="a model with an encoder translates"):
        supernet(torch.zeros(1, 3, dtype=torch.long))


# ---------------------------------------------------------------- the function it computes


def uniform_layers(router: Router, experts: int = 4, depth: int = 2) -> Architecture:
    part = FeedForward((32,) * experts, router)
    return Architecture(Stack(64, (Layer(Attention(2, 1), part),) * depth), Backbone(16))


@pytest.mark.parametrize("router", [Router("threshold", threshold=0.6, max_k=3), Router("top_k", k=2)])
@torch.no_grad()
def test_later_tokens_and_other_rows_do_not_change_earlier_logits(router: Router, make_model, make_tokens) -> None:
    model, tokens = make_model(uniform_layers(router), scale=5.0), make_tokens(4, 12)
    logits = model(tokens)
    for position in range(1, 12):
        changed = tokens.clone()
        changed[:, position:] = (changed[:, position:] + 1 + torch.arange(12 - position)) % model.vocab_size
        changed[1:] = changed[1:].flip(1)
        found = model(changed)
        torch.testing.assert_close(found[0, :position], logits[0, :position], rtol=0, atol=1e-4)
        assert (found[0, position:] - logits[0, position:]).abs().max() > 1e-2
    torch.testing.assert_close(model(tokens[:1, :5]), logits[:1, :5], rtol=0, atol=1e-4)


def feed_forward_rms(experts: int, router_weights: str, make_model: MakeModel) -> float:
    model = make_model(uniform_layers(Router("top_k", k=2, weights=router_weights), experts, depth=1), scale=1.0)
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(5))
    layer = model.layers[0]
    with torch.no_grad():
        out, _ = layer.feed_forward(x, model.architecture.decoder.layers[0].feed_forward)
    return out.square().mean().sqrt().item()


def test_scale_of_the_output_does_not_depend_on_the_number_of_experts(make_model: MakeModel) -> None:
    scales = [feed_forward_rms(experts, "sum", make_model) for experts in (2, 8, 32)]
    assert max(scales) / min(scales) < 1.5


def test_weights_left_as_probabilities_shrink_with_the_number_of_experts(make_model: MakeModel) -> None:
    """XMoE's own choice: near the start a probability is 1 / E."""
    scales = [feed_forward_rms(experts, "softmax", make_model) for experts in (2, 8, 32)]
    assert scales[0] / scales[1] == pytest.approx(4, rel=0.3)
    assert scales[1] / scales[2] == pytest.approx(4, rel=0.3)


def test_initial_loss_is_that_of_a_guess(tiny_space: SearchSpace, make_tokens) -> None:
    torch.manual_seed(0)
    model = Transformer(tiny_space.envelope, 23)
    with torch.no_grad():
        logits = model(make_tokens(16, 16))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), make_tokens(16, 16, 1).flatten())
    assert loss.item() == pytest.approx(math.log(23), abs=0.05)


def test_embedding_is_tied(tiny_space: SearchSpace, make_model) -> None:
    names = {name for name, _ in make_model(tiny_space.envelope).named_parameters()}
    assert {n.removeprefix("stacks.decoder.") for n in names if "layers" not in n} == {
        "embedding.weight",
        "norm.weight",
    }


def test_run_returns_the_routing_of_every_sparse_layer(make_model, make_tokens) -> None:
    sparse = Layer(Attention(1, 1), FeedForward((32, 16, 16), Router("top_k", k=2)))
    dense = Layer(Attention(1, 1), FeedForward((32,)))
    model = make_model(Architecture(Stack(32, (sparse, dense, sparse)), Backbone(16)))
    output = model.run(make_tokens(2, 5))
    first, none, third = output.routings
    assert none is None
    assert first is not None
    assert third is not None
    assert len(first.tokens) == 2 * len(first.probabilities)
    assert len(third.tokens) == 2 * len(third.probabilities)
    expected = (first.balance_loss() + third.balance_loss()) / 2
    assert output.balance_loss().item() == pytest.approx(expected.item())
    dense_alone = make_model(Architecture(Stack(32, (dense,)), Backbone(16)))
    assert dense_alone.run(make_tokens()).balance_loss() == 0


# ---------------------------------------------------------------- batches at the edge


@torch.no_grad()
@pytest.mark.parametrize("shape", [(0, 4), (1, 0), (0, 0), (1, 1), (3, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_empty_and_one_token_batches_give_logits_of_their_shape(
    tiny_space: SearchSpace, make_model: MakeModel, shape: tuple[int, int], masked: bool
) -> None:
    for member in some_members(tiny_space, 6):
        model = make_model(member)
        tokens = torch.zeros(shape, dtype=torch.long)
        mask = torch.ones(shape, dtype=torch.bool) if masked else None
        logits = model(tokens, mask=mask)
        assert logits.shape == (*shape, model.vocab_size)
        if logits.numel():
            longer = model(torch.cat((tokens, tokens + 1), dim=1))
            torch.testing.assert_close(logits, longer[:, : shape[1]], rtol=1e-4, atol=1e-5)
