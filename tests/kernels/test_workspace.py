"""Buffers and row tiles as priced are those that the kernels use."""

from __future__ import annotations

import pytest
import torch

from moesaic.kernels import Bank, ExpertLayout, gpu, route, workspace
from moesaic.nas.context import Context
from moesaic.nas.costs.use import counted_use
from moesaic.search_spaces import FeedForward, Router


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_triton_buffers_are_those_that_a_pass_allocates(dtype, gated, monkeypatch):
    tokens, width, sizes, most = 96, 40, (48, 32, 16), 2
    up, gate, down = torch.randn(3, 96, width)
    bank, layout = Bank(up, gate if gated else None, down), ExpertLayout((0, 48, 80), sizes)
    x, routing = torch.randn(tokens, width, dtype=dtype), route(torch.randn(tokens, 3), max_experts=most)
    activation, allocated = "swiglu" if gated else "relu", []
    gpu.sparse_ffn(x, bank, layout, routing, activation)  # the first call copies the layout

    def recording(make):
        def made(*args, **options):
            result = make(*args, **options)
            allocated.append(result.nbytes)
            return result

        return made

    routing = routing.in_token_order()
    monkeypatch.setattr(torch.Tensor, "new_empty", recording(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty", recording(torch.empty))
    output = gpu.sparse_ffn(x, bank, layout, routing, activation)
    buffers = workspace.triton_bytes(tokens, width, sizes, most, x.element_size())
    assert sum(allocated) == output.nbytes + buffers


@pytest.mark.parametrize(("tokens", "rows"), [(8, 16), (100, 32), (256, 64), (4096, 128)])
def test_work_is_counted_in_the_row_tiles_of_the_kernels(tokens, rows):
    assert workspace.product_rows("triton", tokens, 8, 2) == rows
    assert workspace.product_rows("torch", tokens, 8, 2) == 16
    part = FeedForward((16,) * 8, Router("top_k", k=2))
    extent = Context(61, tokens, implementation="triton").extent("decoder")
    use = counted_use(part, [1, *[0] * 7], extent)
    assert use.tiled_neurons * tokens == rows * 16
