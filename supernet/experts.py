"""The feed-forward part of a layer: a bank of neurons, a router, and the experts that an architecture selects.

Shapes: T tokens, D width, N neurons, E experts.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.kernels import Bank, ExpertLayout, Routing, route, sparse_ffn
from moesaic.search_spaces import Backbone, FeedForward
from moesaic.search_spaces.parts import RouterScore
from moesaic.supernet.regions import Region
from moesaic.supernet.sharing import Sharing, envelope_experts, expert_layout, splits_dense


class SparseFeedForward(nn.Module):
    def __init__(self, width: int, part: FeedForward, backbone: Backbone, sharing: Sharing):
        super().__init__()
        self.part, self.sharing, self.width, self.activation = part, sharing, width, backbone.activation
        biased = backbone.biases == "all"
        self.up = nn.Parameter(torch.empty(part.neurons, width))
        self.gate = nn.Parameter(torch.empty(part.neurons, width)) if backbone.gated else None
        self.down = nn.Parameter(torch.empty(part.neurons, width))
        self.router = nn.Parameter(torch.empty(part.experts, width)) if part.experts > 1 else None
        predicts = splits_dense(part)
        self.router_bias = nn.Parameter(torch.empty(part.experts)) if predicts else None
        hidden = part.router.hidden(width) if part.router else 0
        self.router_in = nn.Parameter(torch.empty(hidden, width)) if hidden else None
        self.router_in_bias = nn.Parameter(torch.empty(hidden)) if hidden else None
        self.router_out = nn.Parameter(torch.empty(part.experts, hidden)) if hidden else None
        self.up_bias = nn.Parameter(torch.empty(part.neurons)) if biased else None
        self.down_bias = nn.Parameter(torch.empty(width)) if biased else None  # once per layer, not per expert
        gated = backbone.shared_gate and part.shared_size > 0
        self.shared_gate = nn.Parameter(torch.empty(width)) if gated else None

    def initialise(self, write_std: float) -> None:
        """Weights that read the residual stream get standard deviation 1 / sqrt(D), those that write ``write_std``."""
        for weight in (self.up, self.gate, self.router_in):
            if weight is not None:
                nn.init.normal_(weight, std=self.width**-0.5)
        nn.init.normal_(self.down, std=write_std)
        if self.router is not None:
            nn.init.normal_(self.router, std=0.02)
        biases = (self.router_bias, self.router_in_bias, self.up_bias, self.down_bias)
        for weight in (*biases, self.router_out, self.shared_gate):
            if weight is not None:
                nn.init.zeros_(weight)

    def where(self, width: int, part: FeedForward) -> dict[str, Region]:
        """The region of each parameter that ``part`` at ``width`` uses. A dense part uses no router.

        Raises
        ------
        ValueError : the bank cannot hold it.
        """
        if width > self.width:
            raise ValueError(f"width {width} exceeds {self.width}")
        layout = expert_layout(self.part, part, self.sharing)
        shared = ((0, part.shared_size),) if part.shared_size else ()
        rows = (*shared, *((start, start + size) for start, size in layout.segments))
        matrices = ["up", "down"] if self.gate is None else ["up", "gate", "down"]
        regions = dict.fromkeys(matrices, Region(rows, width))
        if part.router is not None:
            regions |= _router_regions(self.part, part, width)
        if self.up_bias is not None:
            regions |= {"up_bias": Region(rows), "down_bias": Region.first(width)}
        if part.shared_size and self.shared_gate is not None:
            regions["shared_gate"] = Region.first(width)
        return regions

    def forward(self, x: Tensor, part: FeedForward) -> tuple[Tensor, Routing | None]:
        """[T, D] to [T, D], and the routing (None for a dense layer)."""
        routing = self.route(x, part) if part.router else None
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out = self._experts(x, expert_layout(self.part, part, self.sharing), routing)
        if part.shared_size:
            shared = self._experts(x, ExpertLayout((0,), (part.shared_size,)), None)
            if self.shared_gate is not None:
                shared = shared * (x * self.shared_gate[: x.shape[1]]).sum(-1, keepdim=True).sigmoid().to(shared.dtype)
            out = out + shared
        if self.down_bias is not None:
            out = out + self.down_bias[: x.shape[1]]
        return out, routing

    def route(self, x: Tensor, part: FeedForward) -> Routing:
        """Router logits, always in float32: rounding could change which expert a token is sent to."""
        router = part.router
        assert router is not None
        with torch.autocast(x.device.type, enabled=False):
            logits = self._logits(x.float(), part, router.score)
        return route(
            logits,
            max_experts=router.max_experts,
            threshold=router.threshold,
            score="mass" if router.predicts_mass else "softmax",
            weights=router.weights,
        )

    def _logits(self, x: Tensor, part: FeedForward, score: RouterScore) -> Tensor:
        """[T, E] of [T, D]: a linear function, and of an ``mlp`` router its hidden layer's correction."""
        at = _router_regions(self.part, part, x.shape[1])

        def weight(name: str) -> Tensor:
            return at[name].of(getattr(self, name)).float()

        logits = F.linear(x, weight("router"), None if self.router_bias is None else weight("router_bias"))
        if score != "mlp":
            return logits
        hidden = F.silu(F.linear(x, weight("router_in"), weight("router_in_bias")))
        return logits.add_(F.linear(hidden, weight("router_out")))

    def _experts(self, x: Tensor, layout: ExpertLayout, routing: Routing | None) -> Tensor:
        bank = Bank(self.up, self.gate, self.down, self.up_bias)
        return sparse_ffn(x, bank, layout, routing, self.activation)


@lru_cache(maxsize=4096)
def _router_regions(envelope: FeedForward, part: FeedForward, width: int) -> dict[str, Region]:
    """The first experts' rows. A prediction of mass that ends in a linear layer is additive: the row of an expert that
    consists of several of the envelope's is the sum of theirs."""
    assert envelope.router is not None and part.router is not None
    if not splits_dense(envelope):
        return {"router": Region.first(part.experts, width)}
    runs = envelope_experts(envelope, part)
    together = runs[-1][1] - runs[0][0] == len(runs)  # one each: views
    rows, summed = (((runs[0][0], runs[-1][1]),), False) if together else (runs, True)
    regions = {"router": Region(rows, width, summed), "router_bias": Region(rows, summed=summed)}
    if part.router.score == "mlp":
        if envelope.router.score != "mlp":
            raise ValueError(f"the router of {envelope} has no hidden layer")
        hidden = part.router.hidden(width)
        regions |= {"router_in": Region.first(hidden, width), "router_in_bias": Region.first(hidden)}
        regions["router_out"] = Region(rows, hidden, summed)
    return regions
