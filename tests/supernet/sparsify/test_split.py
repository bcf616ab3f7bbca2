"""A split model is the trained one in other order: whole, it is that model; every member is an exact slice of it."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
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
    Slot,
)
from moesaic.search_spaces.architecture import Stack
from moesaic.search_spaces.parts import RouterScore
from moesaic.search_spaces.trained import TrainedSpec
from moesaic.supernet import Batch, KeyValueCache, Transformer, evaluate
from moesaic.supernet.batch import Inputs
from moesaic.supernet.sparsify.neurons import CLUSTERS, contributions, hidden, importance, neuron_order
from moesaic.supernet.sparsify.repair import repaired
from moesaic.supernet.sparsify.replace import replacement_losses
from moesaic.supernet.sparsify.routers import FITS, Neurons, bounded, fit_hidden, fit_masses, masses
from moesaic.supernet.sparsify.split import split

VOCABULARY, WIDTH = 61, 32
DENSE = Layer(Attention(4, 2), FeedForward((256,)))
MIXTURE = Layer(Attention(2, 2), FeedForward((48,) * 6, Router("top_k", k=2), 16))
BACKBONES: dict[str, dict[str, Any]] = {
    "llama": {"activation": "swiglu"},
    "gpt2": {"activation": "gelu_tanh", "norm": "layer", "biases": "all", "positions": "learned", "max_positions": 32},
    "bert": {"activation": "gelu", "norm": "layer", "norm_place": "post", "biases": "all", "embedding_norm": True},
    "relu": {"activation": "relu", "tied": False},
    "qwen3": {"activation": "swiglu", "qk_norm": "head", "biases": "qkv"},
    "olmoe": {"activation": "swiglu", "qk_norm": "all"},
}
SPEC = TrainedSpec(
    expert_sizes=[16, 32], shared=[0.0, 0.25, 0.5], active=[0.25, 0.5], threshold=[0.5], router=["mass", "mlp"]
)
PRUNED = SPEC.model_copy(update={"prune": ["heads", "layers"]})


def trained(layers: tuple[Layer, ...], seed: int = 0, causal: bool = True, **backbone: Any) -> Transformer:
    """A model with weights that no initialisation has: none are alike, and biases are not zero."""
    architecture = Architecture(Stack(WIDTH, layers, causal), Backbone(head_size=8, **backbone))
    torch.manual_seed(seed)
    model = Transformer(architecture, VOCABULARY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def windows(count: int = 4, length: int = 16, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[*BACKBONES, "mixture", "both"])
def case(request: pytest.FixtureRequest) -> tuple[Transformer, SearchSpace]:
    layers = {"mixture": (MIXTURE, MIXTURE), "both": (DENSE, MIXTURE)}.get(request.param, (DENSE, DENSE))
    model = trained(layers, causal=request.param != "bert", **BACKBONES.get(request.param, {}))
    return model, PRUNED.build(model.architecture)


def test_the_largest_member_is_the_trained_model_and_gives_its_logits(case: tuple[Transformer, SearchSpace]) -> None:
    model, space = case
    assert space.largest == model.architecture
    tokens = windows(seed=2)
    expected = model(tokens).detach()
    found = split(model, space, windows()).model
    torch.testing.assert_close(found(tokens, space.largest), expected, atol=1e-5, rtol=1e-5)


def test_slices_are_what_is_extracted(case: tuple[Transformer, SearchSpace]) -> None:
    model, space = case
    found = split(model, space, windows()).model
    tokens = windows(seed=2)
    for seed in range(12):
        member = space.sample_balanced(Random(seed))
        torch.testing.assert_close(found.extract(member)(tokens), found(tokens, member), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("score", ["mass", "mlp"])
def test_a_slice_of_a_slice_is_a_slice(score: RouterScore) -> None:
    """An export of a split model can be split further where its experts allow it."""
    model = trained((DENSE,))
    found = split(model, SPEC.build(model.architecture), windows()).model
    router = Router("top_k", k=2, weights="one", score=score)
    fine, coarse = (Layer(DENSE.attention, FeedForward((size,) * (192 // size), router, 64)) for size in (16, 32))
    whole = found.architecture.with_layers({Slot("decoder", 0): fine})
    part = found.architecture.with_layers({Slot("decoder", 0): coarse})
    torch.testing.assert_close(found.extract(whole).extract(part)(windows()), found(windows(), part))


def test_what_was_split_before_stays_as_it_is() -> None:
    """An export of a split model, with a threshold router beside, is a model to start from."""
    model = trained((DENSE, MIXTURE))
    found = split(model, SPEC.build(model.architecture), windows()).model
    part = FeedForward((16,) * 12, Router("top_k", k=4, weights="one", score="mlp"), 64)
    first, second = found.architecture.layers
    threshold = replace(MIXTURE.feed_forward, router=Router("threshold", threshold=0.4, max_k=3))
    member = found.architecture.with_layers(
        {first: Layer(DENSE.attention, part), second: Layer(MIXTURE.attention, threshold)}
    )
    export = found.extract(member)
    expected, space = export(windows()).detach(), SPEC.build(member)
    assert space.cardinality == 1
    made = split(export, space, windows())
    again, costs = made.model, made.costs
    torch.testing.assert_close(again(windows(), member), expected, atol=1e-5, rtol=1e-5)
    assert all(cost.error < 1e-10 for cost in costs)


def test_all_experts_of_a_dense_layer_together_are_the_layer() -> None:
    model = trained((DENSE, DENSE))
    space, tokens = SPEC.build(model.architecture), windows(seed=3)
    expected = model(tokens).detach()
    found = split(model, space, windows()).model
    for size in (16, 64):
        everything = FeedForward((size,) * (256 // size), Router("top_k", k=256 // size, weights="one", score="mass"))
        member = space.largest.with_layers({slot: replace(DENSE, feed_forward=everything) for slot in space.layers})
        torch.testing.assert_close(found(tokens, member), expected, atol=1e-5, rtol=1e-5)


def test_part_costs_are_the_errors_and_loads_of_the_parts() -> None:
    model = trained((DENSE,))
    space = PRUNED.build(model.architecture)
    block, read = model.layers[0], []
    block.attention.register_forward_hook(lambda module, given, out: read.append(given[0]))
    block.feed_forward.register_forward_hook(lambda module, given, out: read.append(given[0]))
    model(windows())
    mixed = block.attention(read[0], DENSE.attention, Inputs()).detach()
    expected = block.feed_forward(read[1], DENSE.feed_forward)[0].detach()
    made = split(model, space, windows())
    found, costs = made.model, made.costs
    choices = space.layers[Slot("decoder", 0)]
    assert [cost.part for cost in costs] == [*choices.attentions, *(part for group in choices.groups for part in group)]
    new = found.layers[0]
    for cost in costs:
        if isinstance(cost.part, Attention):
            out = new.attention(read[0], cost.part, Inputs()) if cost.part.heads else 0 * mixed
            error = ((out - mixed).square().sum() / mixed.square().sum()).item()
            assert cost.error == pytest.approx(error, rel=1e-4, abs=1e-9)
            continue
        if not cost.part.experts:
            assert cost.error == pytest.approx(1)
            continue
        out, routing = new.feed_forward(read[1], cost.part)
        error = ((out - expected).square().sum() / expected.square().sum()).item()
        assert cost.error == pytest.approx(error, rel=1e-4, abs=1e-9)
        if routing is None:
            assert cost.load is None
        else:
            assert cost.load is not None
            assert cost.load.pairs_per_token == pytest.approx((routing.load / 64).tolist())
    whole = next(cost for cost in costs if cost.part == DENSE.feed_forward)
    assert whole.error < 1e-10


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_an_order_has_every_neuron_once_and_its_bands_hold_the_most_important(cluster: str) -> None:
    layer = trained((DENSE,)).layers[0].feed_forward
    contribution = contributions(hidden(layer, torch.randn(80, WIDTH)), layer.down).detach()
    order = neuron_order(layer, contribution, [64, 160, 256], cluster)
    assert order.sort().values.tolist() == list(range(256))
    ranked = importance(contribution).argsort(descending=True)
    for bound in (64, 160):
        assert set(order[:bound].tolist()) == set(ranked[:bound].tolist())


def test_neurons_that_act_together_share_a_tile() -> None:
    """Groups of 16 that fire on tokens of their own, shuffled: each comes back as one tile."""
    layer = trained((DENSE,)).layers[0].feed_forward
    group = torch.randperm(256, generator=torch.Generator().manual_seed(0)) // 16
    contribution = (torch.arange(320)[:, None] % 16 == group).float() + 0.01 * torch.rand(320, 256)
    order = neuron_order(layer, contribution, [], "coactivation")
    assert all(len(set(tile.tolist())) == 1 for tile in group[order].split(16))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 100))
def test_a_fit_of_masses_is_additive_and_recovers_a_linear_law(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs, law = torch.randn(400, 8, generator=generator), torch.randn(6, 8, generator=generator)
    weight, bias = fit_masses(inputs, inputs @ law.T + 3)
    torch.testing.assert_close(weight, law, atol=0.05, rtol=0.05)
    torch.testing.assert_close(bias, torch.full((6,), 3.0), atol=0.05, rtol=0.05)
    contribution = torch.rand(400, 64, generator=generator)
    fine, coarse = (fit_masses(inputs, masses(contribution, tile)) for tile in (16, 32))
    torch.testing.assert_close(fine[0].unflatten(0, (2, 2)).sum(1), coarse[0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(fine[1].unflatten(0, (2, 2)).sum(1), coarse[1], atol=1e-4, rtol=1e-3)


def test_a_mass_is_bounded_by_its_tile() -> None:
    mass = torch.rand(400, 6) + 1
    mass[7] = 1000
    found = bounded(mass)
    assert found.max() < 2
    assert (found != mass).sum(0).tolist() == [4] * 6  # of 400 tokens, the bound is the 396th


def curved(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs [T, 16] and masses [T, 12] that no linear layer predicts."""
    generator = torch.Generator().manual_seed(seed)
    inputs, law = torch.randn(tokens, 16, generator=generator), torch.randn(12, 16, generator=generator)
    return inputs, (inputs @ law.T).relu()


def test_a_hidden_layer_predicts_what_a_linear_one_cannot() -> None:
    inputs, mass = curved(4000, 0)
    linear = F.linear(inputs, *fit_masses(inputs, mass))
    hidden = fit_hidden(inputs, mass - linear, 64)
    before, after = (((mass - linear - c)[-500:]).square().mean() for c in (0, corrected(inputs, hidden)))
    assert after < 0.3 * before
    again = fit_hidden(inputs, mass - linear, 64)
    assert all(torch.equal(one, other) for one, other in zip(hidden, again, strict=True))


def corrected(inputs: Tensor, hidden: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    weight, bias, out = hidden
    return F.silu(inputs @ weight.T + bias) @ out.T


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 100), st.sampled_from([2, 9, 64, 300]))
def test_a_hidden_layer_is_never_worse_on_the_tokens_held_out(seed: int, tokens: int) -> None:
    """Here there is nothing to learn."""
    generator = torch.Generator().manual_seed(seed)
    inputs, missing = torch.randn(tokens, 8, generator=generator) + 3, torch.randn(tokens, 6, generator=generator)
    held = max(1, tokens // 8)
    left = (missing - corrected(inputs, fit_hidden(inputs, missing, 32, seed)))[-held:]
    assert left.square().mean() <= missing[-held:].square().mean() * (1 + 1e-4)


@pytest.mark.parametrize("name", FITS)
def test_routers_of_tiles_add_up_to_those_of_experts(name: str) -> None:
    """A slice's router is the sum of rows, whichever fit made them, and chooses by the sum of the predictions."""
    model = trained((DENSE,), **BACKBONES["relu"])
    found = split(model, SPEC.build(model.architecture), windows(), router=name).model
    layer, x = found.layers[0].feed_forward, torch.randn(20, WIDTH)
    tiles = F.linear(x, layer.router, layer.router_bias)
    part = FeedForward((32,) * 6, Router("top_k", k=2, weights="one", score="mass"), 64)
    expected = tiles[:, 4:].unflatten(1, (-1, 2)).sum(2).clamp(min=0)
    shares = expected / expected.sum(1, keepdim=True).clamp(min=1e-12)
    positive = expected.sum(1) > 0
    torch.testing.assert_close(layer.route(x, part).probabilities[positive], shares[positive], atol=1e-4, rtol=1e-3)


def test_routers_that_need_no_fit_rank_tiles_by_the_weights_of_their_neurons() -> None:
    """A tile's similarity is the sum over the directions of its neurons; its representative, in tiles of one neuron
    each, is that neuron."""
    inputs, weight = torch.randn(200, 8), torch.randn(12, 8)
    neurons = Neurons((inputs @ weight.T).relu(), weight, torch.zeros(12))
    similar = FITS["similarity"](inputs, neurons, 4)
    score = (inputs @ F.normalize(weight, dim=1).T).unflatten(1, (-1, 4)).sum(2)
    assert torch.equal(F.linear(inputs, *similar).argsort(1), score.argsort(1))
    single = FITS["representative"](inputs, neurons, 1)
    assert torch.equal(F.linear(inputs, *single).argsort(1), (inputs @ weight.T).argsort(1))


def test_a_bank_without_a_hidden_layer_refuses_an_mlp_router() -> None:
    model = trained((DENSE,))
    found = split(model, TrainedSpec(router=["mass"]).build(model.architecture), windows()).model
    part = FeedForward((16,) * 12, Router("top_k", k=4, weights="one", score="mlp"), 64)
    member = found.architecture.with_layers({Slot("decoder", 0): replace(DENSE, feed_forward=part)})
    with pytest.raises(MoesaicError, match="has no hidden layer"):
        found(windows(), member)


def test_replacement_losses_are_those_of_whole_models() -> None:
    model = trained((DENSE, DENSE, MIXTURE))
    space = PRUNED.build(model.architecture)
    found = split(model, space, windows()).model
    tokens, rng = windows(3, 17, 5), Random(0)
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    changed = {slot: [Layer(rng.choice(layer.attentions), rng.choice(layer.groups).sample(rng)) for _ in range(3)]
               for slot, layer in space.layers.items()}  # fmt: skip
    loss, losses = replacement_losses(found, space.largest, changed, batch)
    assert loss == pytest.approx(evaluate(found, batch, space.largest).loss, rel=1e-5)
    for slot, layers in changed.items():
        members = [space.largest.with_layers({slot: layer}) for layer in layers]
        assert losses[slot] == pytest.approx([evaluate(found, batch, member).loss for member in members], rel=1e-5)


SPLIT = FeedForward((16,) * 12, Router("top_k", k=4, weights="one", score="mass"), 64)
LESS: dict[str, tuple[Layer, Layer]] = {
    "experts": (Layer(DENSE.attention, SPLIT), Layer(DENSE.attention, SPLIT)),
    "heads": (Layer(Attention(2, 1), DENSE.feed_forward), Layer(Attention(2, 1), SPLIT)),
    "no attention": (Layer(Attention(0, 0), DENSE.feed_forward), Layer(Attention(2, 1), DENSE.feed_forward)),
    "no feed-forward": (Layer(Attention(2, 1), FeedForward(())), Layer(DENSE.attention, SPLIT)),
    "no layer": (Layer(Attention(0, 0), FeedForward(())), Layer(DENSE.attention, SPLIT)),
}


@pytest.mark.parametrize("less", LESS)
@pytest.mark.parametrize("name", BACKBONES)
def test_repair_brings_a_member_nearer_to_the_trained_model(name: str, less: str) -> None:
    model = trained((DENSE, DENSE), causal=name != "bert", **BACKBONES[name])
    space, text = PRUNED.build(model.architecture), windows(32, 16)
    expected = model(text).detach()
    found = split(model, space, text).model
    member = space.largest.with_layers(dict(zip(space.layers, LESS[less], strict=True)))
    mended = repaired(found, space.largest, text)(member)
    assert mended.architecture == member
    before, after = ((m(text) - expected).square().mean().item() for m in (found.extract(member), mended))
    assert after < 0.9 * before


def test_repair_leaves_the_trained_model_as_it_is() -> None:
    model = trained((DENSE, MIXTURE))
    space = SPEC.build(model.architecture)
    found = split(model, space, windows()).model
    mended = repaired(found, space.largest, windows())(space.largest)
    assert torch.equal(mended(windows()), found.extract(space.largest)(windows()))


def test_the_stored_order_is_kept_as_a_control() -> None:
    model = trained((DENSE, MIXTURE))
    before = [layer.feed_forward.down.detach().clone() for layer in model.layers]
    found = split(model, SPEC.build(model.architecture), windows(), "stored").model
    assert all(torch.equal(layer.feed_forward.down, old) for layer, old in zip(found.layers, before, strict=True))


def test_the_most_salient_experts_and_neurons_of_a_mixture_come_first() -> None:
    """One expert's output is scaled up, another's is zero; in each, one neuron writes most."""
    model = trained((MIXTURE,))
    down = model.layers[0].feed_forward.down.data
    loud, silent = slice(16 + 3 * 48, 16 + 4 * 48), slice(16, 16 + 48)
    down[loud] *= 20
    down[loud.stop - 1] *= 20
    down[silent] = 0
    last = down[loud.stop - 1].clone()
    found = split(model, SPEC.build(model.architecture), windows(8)).model
    ordered = found.layers[0].feed_forward.down
    assert torch.equal(ordered[16], last)
    assert (ordered[-48:] == 0).all()


@pytest.mark.parametrize("name", BACKBONES)
def test_the_heads_that_write_most_come_first(name: str) -> None:
    """Of four groups of two heads, the third writes most and the first nothing."""
    model = trained((Layer(Attention(8, 4), FeedForward((64,))),), causal=name != "bert", **BACKBONES[name])
    o, text = model.layers[0].attention.o.data, windows(8)
    o[:, 32:48] *= 20
    o[:, :16] = 0
    third = o[:, 32:48].clone()
    expected = model(text).detach()
    made = split(model, PRUNED.build(model.architecture), text)
    found, costs = made.model, made.costs
    ordered = found.layers[0].attention.o
    assert torch.equal(ordered[:, :16], third)
    assert (ordered[:, -16:] == 0).all()
    torch.testing.assert_close(found(text), expected, atol=1e-4, rtol=1e-4)
    errors = {cost.part.kv_heads: cost.error for cost in costs if isinstance(cost.part, Attention)}
    assert errors[4] < 1e-9 < errors[1] < errors[0] == pytest.approx(1)


def test_what_is_left_out_has_no_weights_and_changes_nothing() -> None:
    model = trained((DENSE, DENSE, DENSE))
    found = split(model, PRUNED.build(model.architecture), windows()).model
    nothing = Layer(Attention(0, 0), FeedForward(()))
    member = found.architecture.with_layers({Slot("decoder", 1): nothing})
    export = found.extract(member)
    assert not list(export.layers[1].parameters())
    first, _, last = member.layers.values()
    shorter = Transformer(Architecture(Stack(WIDTH, (first, last)), member.backbone), VOCABULARY).eval()
    names = {name.replace("layers.2", "layers.1"): value for name, value in export.state_dict().items()}
    shorter.load_state_dict(names)
    assert torch.equal(export(windows()), shorter(windows()))
    made = split(export, PRUNED.build(member), windows())  # an export of it is a model to start from
    again, costs = made.model, made.costs
    torch.testing.assert_close(again(windows()), shorter(windows()), atol=1e-5, rtol=1e-5)
    assert not [cost for cost in costs if cost.slot.index == 1]


def test_decoding_step_by_step_gives_the_logits_of_a_pruned_member() -> None:
    model = trained((DENSE, DENSE, DENSE))
    found = split(model, PRUNED.build(model.architecture), windows()).model
    layers = (
        Layer(Attention(0, 0), DENSE.feed_forward),
        Layer(Attention(2, 1), SPLIT),
        Layer(Attention(0, 0), FeedForward(())),
    )
    member = found.architecture.with_layers(dict(zip(found.architecture.layers, layers, strict=True)))
    export, tokens = found.extract(member), windows(2, 12)
    cache = KeyValueCache(member, 2, 12, export.device)
    steps = [export.run(tokens[:, :5], cache=cache).logits]
    steps += [export.run(tokens[:, i : i + 1], cache=cache).logits for i in range(5, 12)]
    torch.testing.assert_close(torch.cat(steps, 1), export(tokens), atol=1e-5, rtol=1e-4)
