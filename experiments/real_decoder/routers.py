"""Which router a split of the decoder needs: linear, an MLP beside it, or one that knows (the bound of all).

python -m experiments.real_decoder.routers MODEL TRAIN VALIDATION TEST [--out runs/real-decoder-routers]

Every layer becomes 72 experts of 16 neurons beside 24 tiles that all tokens use; a token uses a share of the experts.
Perplexity is of 12 test windows; captured mass is the share of the experts' activation mass that the chosen ones hold,
a mean over layers. Times are of the whole model, decoding and prefill, in turns; run nothing else beside it. `mass`
also gets as many more experts as an MLP's FLOPs pay for. Nothing is trained or repaired.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from experiments.choosers import CHOOSERS, choose_by, true_masses
from experiments.common import Row, arguments_of, do_stage, facts, markdown, run_script
from experiments.real_decoder.run import HERE, timed
from moesaic import Architecture, Run, Transformer, open_run, write_value
from moesaic.search_spaces import FeedForward, Router
from moesaic.search_spaces.parts import TILE, RouterScore
from moesaic.supernet.sparsify.split import layer_inputs

SHARES = (0.5, 0.25)
WINDOWS = 12
SPACE = (
    "space.preset=from-model",
    "space.expert_sizes=[16]",
    "space.shared=[0.25]",
    "space.active=[0.25, 0.5]",
    "space.router=[mass, mlp]",
    "space.prune=[]",
    "budgets={}",
    "budget.flops=75%",
)


def member(run: Run, active: int, score: RouterScore) -> Architecture:
    """All layers alike: ``active`` of the 72 experts."""
    whole = run.space.largest

    def split(part: FeedForward) -> FeedForward:
        shared = round(part.neurons / 4 / TILE) * TILE
        experts = (part.neurons - shared) // TILE
        return FeedForward((TILE,) * experts, Router("top_k", k=active, weights="one", score=score), shared)

    return whole.with_layers(
        {s: replace(layer, feed_forward=split(layer.feed_forward)) for s, layer in whole.layers.items()}
    )


@torch.inference_mode()
def captured(
    model: Transformer, whole: Architecture, windows: Tensor, tried: Mapping[str, tuple[Architecture, str | None]]
) -> dict[str, float]:
    """By name, the mean over layers of the share of the experts' mass that the chosen experts hold, for the inputs that
    a layer has in the ``whole`` model."""
    found: dict[str, list[float]] = {name: [] for name in tried}
    for given, block in zip(layer_inputs(model.extract(whole), windows), model.layers, strict=True):
        read = given.read()
        for name, (architecture, chooser) in tried.items():
            layer, part = block.feed_forward, architecture.layers[given.slot].feed_forward
            routing = CHOOSERS[chooser](layer, read, part) if chooser else layer.route(read, part)
            mass = true_masses(layer, read, part)
            experts = torch.arange(part.experts).repeat_interleave(routing.offsets.diff())
            found[name].append((mass[routing.tokens, experts].sum() / mass.sum()).item())
    return {name: sum(shares) / len(shares) for name, shares in found.items()}


def main() -> None:
    arguments, settings = arguments_of(__doc__, "runs/real-decoder-routers")
    run = open_run(HERE / "sparsify.yaml", [*settings, *SPACE], arguments.out)
    do_stage(run, "supernet")
    model, judge = run.supernet, run.judge("test", WINDOWS)
    dense = math.exp(judge(run.space.largest).loss)
    width, mlp = run.space.largest.output.width, member(run, 1, "mlp").output.layers[0].feed_forward
    assert mlp.router is not None
    experts = mlp.experts
    more = mlp.router.hidden(width) * (width + experts) // (3 * width * TILE)  # a gated neuron has three rows

    rows: list[Row] = []
    for share in SHARES:
        active = round(share * experts)
        tried: dict[str, tuple[Architecture, str | None]] = {
            "oracle": (member(run, active, "mass"), "oracle"),
            "mass": (member(run, active, "mass"), None),
            "mlp": (member(run, active, "mlp"), None),
            f"mass, {more} more": (member(run, active + more, "mass"), None),
            "random": (member(run, active, "mass"), "random"),
        }
        shares = captured(model, run.space.largest, judge.batch.tokens, tried)
        for name, (architecture, chooser) in tried.items():
            choose_by(model, chooser)
            rows.append(
                {
                    "share": share,
                    "router": name,
                    "captured": round(shares[name], 4),
                    "perplexity": round(math.exp(judge(architecture).loss), 2),
                    "flops": round(run.pricer.expected(architecture)["flops"]),
                }
            )
        choose_by(model, None)
    halves = {score: model.extract(member(run, experts // 2, score)) for score in ("mass", "mlp")}
    times = timed({"source": model.extract(run.space.largest), **halves})
    result = {
        **facts(run.device),
        "seed": run.config.seed,
        "tokens": judge.batch.tokens.numel(),
        "dense": round(dense, 2),
        "rows": rows,
        "times_at_half": times,
    }
    write_value(HERE / "routers.json", result, dict)
    print(f"dense {dense:.2f}")
    print(markdown("share|router|captured|perplexity|FLOPs", [[str(value) for value in row.values()] for row in rows]))


if __name__ == "__main__":
    run_script(main)
