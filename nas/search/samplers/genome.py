"""The flat genome that Optuna's samplers work on: every trial has every gene, whatever the values of the others.

Optuna's NSGA-II inherits only parameters that all trials have, so a layer carries the genes of all its possible
experts; decoding ignores those of experts it does not have. Different genomes may give the same architecture; the
search detects such duplicates by fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from moesaic.search_spaces import Architecture, Attention, FeedForward, Layer, Router, SearchSpace, Slot
from moesaic.search_spaces.space import LayerSpace


class Genome:
    """Genes of a space: indices into lists of values, ordered ones as integers, others as categories."""

    def __init__(self, space: SearchSpace):
        self.space = space

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        genes: dict[str, BaseDistribution] = {}
        for name, stack in self.space.stacks.items():
            genes[f"{name}.width"] = _ordered(stack.widths)
            genes[f"{name}.depth"] = _ordered(stack.depths)
        for slot, layer in self.space.layers.items():
            genes[f"{slot}.attention"] = _category(layer.attentions)
            if len(layer.crosses) > 1:
                genes[f"{slot}.cross"] = _category(layer.crosses)
            genes[f"{slot}.experts"] = _ordered(layer.groups)
            genes[f"{slot}.router"] = _category(_routers(layer))
            for name, values in _sizes(layer).items():
                genes[f"{slot}.{name}"] = _ordered(values)
        return genes

    def decode(self, gene: Callable[[str, BaseDistribution], int]) -> Architecture:
        """An architecture from a function that gives each gene's index (it is asked for all of them)."""
        indices = {name: gene(name, distribution) for name, distribution in self.distributions.items()}
        stacks = {}
        for name, space in self.space.stacks.items():
            depth = space.depths[indices[f"{name}.depth"]]
            layers = tuple(self._layer(Slot(name, index), indices) for index in range(depth))
            stacks[name] = space.build(space.widths[indices[f"{name}.width"]], layers)
        return self.space.build(stacks)

    def encode(self, architecture: Architecture) -> dict[str, int]:
        """Indices that decode to ``architecture``; genes it does not use are 0."""
        genes = dict.fromkeys(self.distributions, 0)
        for name, stack in architecture.stacks.items():
            genes[f"{name}.width"] = self.space.stacks[name].widths.index(stack.width)
            genes[f"{name}.depth"] = self.space.stacks[name].depths.index(len(stack.layers))
        for slot, layer in architecture.layers.items():
            space = self.space.layers[slot]
            part, sizes = layer.feed_forward, _sizes(space)
            values: dict[str, int] = {
                "attention": space.attentions.index(layer.attention),
                "experts": [group.experts for group in space.groups].index(part.experts),
            }
            if len(space.crosses) > 1:
                values["cross"] = space.crosses.index(layer.cross)
            if part.experts == 1:
                values["dense_size"] = sizes["dense_size"].index(part.expert_sizes[0])
            elif part.router is not None:
                values["router"] = _routers(space).index(part.router)
                values["shared_size"] = sizes["shared_size"].index(part.shared_size)
                group = space.groups[values["experts"]]
                chosen = part.expert_sizes[: group.chosen]
                values |= {f"size{j}": sizes[f"size{j}"].index(size) for j, size in enumerate(chosen)}
            genes |= {f"{slot}.{name}": value for name, value in values.items()}
        return genes

    def _layer(self, slot: Slot, genes: Mapping[str, int]) -> Layer:
        space = self.space.layers[slot]
        at = {name: genes[f"{slot}.{name}"] for name in ("attention", "experts", "router", *_sizes(space))}
        attention: Attention = space.attentions[at["attention"]]
        cross = space.crosses[genes.get(f"{slot}.cross", 0)]
        group = space.groups[at["experts"]]
        values = _sizes(space)

        def size(gene: str, offered: tuple[int, ...]) -> int:
            """The value of a gene; where this number of experts does not offer it, one that depends on it."""
            value = values[gene][at[gene]]
            return value if value in offered else offered[at[gene] % len(offered)]

        if group.experts < 2:
            sizes = tuple(size("dense_size", group.sizes) for _ in range(group.experts))
            return Layer(attention, FeedForward(sizes), cross)
        router = _routers(space)[at["router"]].for_experts(group.experts)
        if router not in group.routers:
            router = group.routers[at["router"] % len(group.routers)]
        sizes = group.expert_sizes(tuple(size(f"size{j}", group.sizes) for j in range(group.chosen)))
        return Layer(attention, FeedForward(sizes, router, size("shared_size", group.shared_sizes)), cross)


def _routers(space: LayerSpace) -> list[Router]:
    return list(dict.fromkeys(router for group in space.groups for router in group.routers if router)) or [
        Router("top_k", k=1)
    ]


def _sizes(space: LayerSpace) -> dict[str, tuple[int, ...]]:
    """The size genes of a layer and the values behind their indices: all that some number of experts offers."""
    genes: dict[str, set[int]] = {}
    for group in space.groups:
        if group.experts == 1:
            genes["dense_size"] = set(group.sizes)
        elif group.experts:
            genes.setdefault("shared_size", set()).update(group.shared_sizes)
            for j in range(group.chosen):
                genes.setdefault(f"size{j}", set()).update(group.sizes)
    return {name: tuple(sorted(values)) for name, values in genes.items()}


def _ordered(values: tuple) -> IntDistribution:
    return IntDistribution(0, len(values) - 1)


def _category(values: list | tuple) -> CategoricalDistribution:
    return CategoricalDistribution(range(len(values)))
