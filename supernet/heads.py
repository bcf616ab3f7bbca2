"""The head of a masked-token model: what BERT has beside the final states and the weights of the vocabulary layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.kernels.reference import activate
from moesaic.search_spaces import Backbone
from moesaic.supernet.norms import Norm
from moesaic.supernet.regions import Region, inside


class MaskedHead(nn.Module):
    """A layer D to D, activation and norm before the vocabulary layer, whose logits get a bias (arXiv 1810.04805)."""

    def __init__(self, width: int, vocab_size: int, backbone: Backbone):
        super().__init__()
        self.activation = backbone.activation
        self.dense = nn.Parameter(torch.empty(width, width))
        self.dense_bias = nn.Parameter(torch.empty(width))
        self.norm = Norm(width, backbone)
        self.bias = nn.Parameter(torch.empty(vocab_size))

    def initialise(self, write_std: float) -> None:
        """The layer reads the residual stream, and gets standard deviation 1 / sqrt(D)."""
        nn.init.normal_(self.dense, std=len(self.dense) ** -0.5)
        nn.init.zeros_(self.dense_bias)
        nn.init.zeros_(self.bias)

    def where(self, width: int) -> dict[str, Region]:
        """The region of each parameter that ``width`` features use. Raises ValueError if there are fewer."""
        square, vector = Region.first(width, width), Region.first(width)
        whole = Region.first(len(self.bias))
        return {"dense": square, "dense_bias": vector, **inside("norm", self.norm.where(width)), "bias": whole}

    def forward(self, states: Tensor) -> Tensor:
        """[B, S, D] to what the vocabulary layer reads, [B, S, D]."""
        width = states.shape[-1]
        states = F.linear(states, self.dense[:width, :width], self.dense_bias[:width])
        states = activate(states, None, self.activation)
        return self.norm(states)
