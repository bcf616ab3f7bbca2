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
        self.up_bias = nn.Parameter(torch.empty(part.neurons)) if biased else None
        self.down_bias = nn.Parameter(torch.empty(width)) if biased else None  # once per layer, not per expert
        gated = backbone.shared_gate and part.shared_size > 0
        self.shared_gate = nn.Parameter(torch.empty(width)) if gated else None

    def initialise(self, write_std: float) -> None:
        """Weights that read the residual stream get standard deviation 1 / sqrt(D), those that write ``write_std``."""
        for weight in (self.up, self.gate):
            if weight is not None:
                nn.init.normal_(weight, std=self.width**-0.5)
        nn.init.normal_(self.down, std=write_std)
        if self.router is not None:
            nn.init.normal_(self.router, std=0.02)
        for bias in (self.router_bias, self.up_bias, self.down_bias, self.shared_gate):
            if bias is not None:
                nn.init.zeros_(bias)

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
        assert self.router is not None and part.router is not None
        at = _router_regions(self.part, part, x.shape[1])
        bias = None if self.router_bias is None else at["router_bias"].of(self.router_bias).float()
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), at["router"].of(self.router).float(), bias)
        router = part.router
        return route(
            logits,
            max_experts=router.max_experts,
            threshold=router.threshold,
            score=router.score,
            weights=router.weights,
        )

    def _experts(self, x: Tensor, layout: ExpertLayout, routing: Routing | None) -> Tensor:
        bank = Bank(self.up, self.gate, self.down, self.up_bias)
        return sparse_ffn(x, bank, layout, routing, self.activation)


@lru_cache(maxsize=4096)
def _router_regions(envelope: FeedForward, part: FeedForward, width: int) -> dict[str, Region]:
    """The first experts' rows. A linear prediction of mass is additive: the row of an expert that consists of several
    of the envelope's is the sum of theirs."""
    if not splits_dense(envelope):
        return {"router": Region.first(part.experts, width)}
    runs = envelope_experts(envelope, part)
    if runs[-1][1] - runs[0][0] == len(runs):  # one each: views
        rows = ((runs[0][0], runs[-1][1]),)
        return {"router": Region(rows, width), "router_bias": Region(rows)}
    return {"router": Region(runs, width, summed=True), "router_bias": Region(runs, summed=True)}
