"""What do AutoMoE's published networks store, and how much of it does a token use?

The networks are those of Table 5 of AutoMoE (arXiv 2210.07535) whose expert sizes are given, as sub-transformer files.

python -m experiments.hat_costs.run [--out FILE]
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from experiments.common import Row, facts, parser_of, run_script
from moesaic import Architecture, HatCosts, hat_costs, write_value
from moesaic.search_spaces import FeedForward, read_hat

HERE = Path(__file__).parent
FULL = 3072
"""Neurons of the largest feed-forward part of the space."""
PUBLISHED = {
    "wmt14.en-de-std": {"active_params_m": 45, "sparsity": 0.62, "gflops": 2.9},
    "wmt14.en-fr-std": {"active_params_m": 46, "sparsity": 0.72, "gflops": 2.9},
    "wmt19.en-de-std": {"active_params_m": 45, "sparsity": 0.41, "gflops": 2.8},
}
"""Table 4, rows AutoMoE (6) and, for WMT19, AutoMoE (2)."""


def padded(architecture: Architecture) -> Architecture:
    """Every layer with as many experts as the stack's layer with most, all of the largest size."""
    changed = {}
    for name, stack in architecture.stacks.items():
        most = max(stack.layers, key=lambda layer: layer.feed_forward.experts).feed_forward
        part = FeedForward((FULL,) * most.experts, most.router)
        changed[name] = replace(stack, layers=tuple(replace(layer, feed_forward=part) for layer in stack.layers))
    return replace(architecture, **changed)


def with_span(architecture: Architecture, span: int) -> HatCosts:
    """Costs where every decoder layer reads ``span`` encoder layers: which ones do is not published."""
    layers = {
        slot: replace(layer, cross=replace(layer.cross, span=span))
        for slot, layer in architecture.layers.items()
        if layer.cross is not None
    }
    return hat_costs(architecture.with_layers(layers))


def row_of(path: Path) -> Row:
    architecture = read_hat(path)
    costs, whole = hat_costs(architecture), hat_costs(padded(architecture))
    return {
        "network": path.stem,
        "params_m": costs.params / 1e6,
        "active_params_m": costs.active_params / 1e6,
        "sparsity": costs.sparsity,
        "padded_params_m": whole.params / 1e6,
        "padded_sparsity": whole.sparsity,
        "gflops_at_least": with_span(architecture, 1).flops / 1e9,
        "gflops_at_most": with_span(architecture, 3).flops / 1e9,
        "published": PUBLISHED.get(path.stem),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "result.json")
    arguments = parser.parse_args()
    rows = [row_of(path) for path in sorted((HERE / "networks").glob("*.yml"))]
    write_value(arguments.out, {**facts("none"), "networks": rows})


if __name__ == "__main__":
    run_script(main)
