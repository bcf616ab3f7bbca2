"""The search space that a trained model gives: what each of its layers may become, the model itself included.

A dense layer may keep its most important neurons (structured pruning), or become experts: some neurons serve every
token, the others are split into experts of equal size, of which a token uses a share. A mixture may keep its most
important experts, the most important neurons of each, and route to fewer of them. Attention may keep its most important
heads. A layer may lose its attention, its feed-forward part, or both.
"""

from __future__ import annotations

from itertools import product
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from moesaic.search_spaces.architecture import Architecture, Stack
from moesaic.search_spaces.errors import MoesaicError
from moesaic.search_spaces.parts import TILE, Attention, FeedForward, Layer, Router, RouterScore
from moesaic.search_spaces.space import FeedForwardGroup, LayerSpace, SearchSpace, StackSpace

PRESET = "from-model"
Share = Annotated[float, Field(gt=0, le=1)]
Shares = Annotated[list[Share], Field(min_length=1)]


class TrainedSpec(BaseModel):
    """``space: {preset: from-model}``. Shares are of the model's own numbers; the whole is always a member too.

    Of dense layers: ``kept`` neurons, or experts of ``expert_sizes`` neurons beside a ``shared`` part; a token uses an
    ``active`` share of the experts, or as many as predict a ``threshold`` share of the activation mass, at most twice
    the largest ``active`` share. A ``router`` predicts that mass by a linear layer (``mass``), or by an ``mlp`` beside
    it. Of mixtures: the experts ``kept``, the neurons kept of each (``expert_kept``), and the share ``active`` of the
    model's experts per token, or the experts in order of probability up to a ``threshold``. Feed-forward parts that
    were split before, and those with a threshold router, stay as they are.

    ``prune``: ``heads`` also lets attention keep shares ``kept`` of its heads, those with a common key/value head
    together; ``layers`` also leaves out the attention or the feed-forward part of a layer, or both: it is gone then.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    preset: Literal["from-model"] = PRESET
    expert_sizes: Annotated[list[Annotated[int, Field(ge=TILE, multiple_of=TILE)]], Field(min_length=1)] = [16, 64]
    shared: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=1)] = [0.125, 0.25, 0.375, 0.5]
    active: Shares = [0.125, 0.25, 0.375, 0.5, 0.75]
    threshold: list[Annotated[float, Field(gt=0, lt=1)]] = []
    router: Annotated[list[Literal["mass", "mlp"]], Field(min_length=1)] = ["mass"]
    kept: Shares = [0.25, 0.375, 0.5, 0.625, 0.75, 0.875]
    expert_kept: Shares = [0.5, 0.75, 1.0]
    prune: list[Literal["heads", "layers"]] = []

    def build(self, source: Architecture) -> SearchSpace:
        """The members of ``source``. Its slices share the bank of ``split_bank`` in each dense layer.

        Raises
        ------
        MoesaicError : a layer has experts of different sizes.
        """
        stacks = {name: self._stack(stack) for name, stack in source.stacks.items()}
        return SearchSpace(PRESET, source.backbone, **stacks, source=source)

    def _stack(self, stack: Stack) -> StackSpace:
        layers = tuple(
            LayerSpace(self._attentions(layer.attention), self._groups(layer.feed_forward), self._bank(layer))
            for layer in stack.layers
        )
        return StackSpace((stack.width,), (len(stack.layers),), layers, stack.causal)

    def _bank(self, layer: Layer) -> FeedForward:
        part = layer.feed_forward
        if part.router or not part.experts:
            return part
        return split_bank(part.neurons, "mlp" if "mlp" in self.router else "mass")

    def _attentions(self, attention: Attention) -> tuple[Attention, ...]:
        groups = attention.kv_heads
        kept = {max(1, round(share * groups)) for share in self.kept} if "heads" in self.prune and groups else set()
        if "layers" in self.prune:
            kept.add(0)
        per_group = attention.heads // max(groups, 1)
        return tuple(Attention(per_group * count, count) for count in sorted({*kept, groups}))

    def _groups(self, part: FeedForward) -> tuple[FeedForwardGroup, ...]:
        """By rising number of experts."""
        groups = self._parts(part) if part.experts else {}
        if "layers" in self.prune or not part.experts:
            groups[0] = FeedForwardGroup(0, (TILE,), (0,), (None,))
        return tuple(groups[experts] for experts in sorted(groups))

    def _parts(self, part: FeedForward) -> dict[int, FeedForwardGroup]:
        if len(set(part.expert_sizes)) > 1:
            raise MoesaicError(
                "a layer with experts of different sizes cannot be made sparser yet",
                found=part.expert_sizes,
                allowed="dense layers, and experts of one size in each layer",
            )
        if part.router is None:
            return self._experts_of(part.neurons)
        if part.router.kind == "threshold" or part.router.predicts_mass:
            size, shared = part.expert_sizes[0], part.shared_size
            return {part.experts: FeedForwardGroup(part.experts, (size,), (shared,), (part.router,))}
        return self._fewer_experts(part, part.router)

    def _experts_of(self, neurons: int) -> dict[int, FeedForwardGroup]:
        """Groups by their number of experts. Where two layouts have the same, the one of smaller experts stays."""
        kept = {*(_tiles(share * neurons) for share in self.kept), neurons}
        groups = {1: FeedForwardGroup(1, tuple(sorted(size for size in kept if size <= neurons)), (0,), (None,))}
        for size, shared in product(sorted(self.expert_sizes), self.shared):
            experts = (neurons - round(shared * neurons / TILE) * TILE) // size
            if experts > 1 and experts not in groups:
                rest = neurons - experts * size
                groups[experts] = FeedForwardGroup(experts, (size,), (rest,), self._mass_routers(experts))
        return groups

    def _mass_routers(self, experts: int) -> tuple[Router, ...]:
        counts = sorted({min(experts - 1, max(1, round(share * experts))) for share in self.active})
        most = min(experts - 1, 2 * counts[-1])
        routers = [Router("top_k", k=k, weights="one", score=score) for k in counts for score in self.router]
        for threshold, score in product(self.threshold, self.router):
            wanted = Router("threshold", threshold=threshold, max_k=most, weights="one", score=score)
            routers.append(wanted.for_experts(experts))
        return tuple(dict.fromkeys(routers))

    def _fewer_experts(self, part: FeedForward, router: Router) -> dict[int, FeedForwardGroup]:
        size, most = part.expert_sizes[0], router.max_experts
        sizes = tuple(sorted({_tiles(share * size) for share in self.expert_kept} | {size}))
        counts = sorted({max(1, round(share * most)) for share in (*self.active, 1.0)})
        groups = {}
        for experts in {*(max(2, round(share * part.experts)) for share in self.kept), part.experts}:
            used = dict.fromkeys(min(count, experts) for count in counts)
            routers = [Router("top_k", k=k, weights=router.weights, score=router.score) for k in used]
            for threshold in self.threshold:
                wanted = Router(
                    "threshold", threshold=threshold, max_k=most, weights=router.weights, score=router.score
                )
                routers.append(wanted.for_experts(experts))
            groups[experts] = FeedForwardGroup(experts, sizes, (part.shared_size,), tuple(dict.fromkeys(routers)))
        return groups


def split_bank(neurons: int, score: RouterScore = "mass") -> FeedForward:
    """The bank of a dense layer of ``neurons``, as the smallest experts that any member's consist of.

    An ``mlp`` router contains the linear one, so its bank has members with both.
    """
    experts = neurons // TILE
    if experts == 1:
        return FeedForward((neurons,))
    return FeedForward((TILE,) * experts, Router("top_k", k=experts, weights="one", score=score))


def _tiles(neurons: float) -> int:
    return max(TILE, round(neurons / TILE) * TILE)
