"""A ReLU language model trained by the tool, split into experts: every order of neurons, every router, several shares.

python -m experiments.moefication.run [--out runs/moefication] [--steps 2000]

Accuracy is that of the next token on the test split, as a share of the dense model's. `oracle` knows the activation
mass of each expert; `mass` predicts it by a linear layer, `mlp` by a hidden layer beside it; `similarity` and
`representative` go by the experts' weights; `random` draws experts. Then the shares of each layer are searched, at the
FLOPs of the uniform shares.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import moesaic
from experiments.choosers import CHOOSERS, choose_by, refit
from experiments.common import Row, do_stage, facts, markdown, parser_of, run_script
from moesaic import Architecture, Run, Transformer, load_search, open_run, uniform_layouts, write_value

HERE = Path(__file__).parent
ORDERS = ("stored", "none", "weights", "coactivation")
ROUTERS = ("oracle", "mass", "mlp", "similarity", "representative", "random")
SHARES = (0.1, 0.2, 0.3, 0.5)


@torch.inference_mode()
def accuracy(model: Transformer, architecture: Architecture, windows: Tensor) -> float:
    """Share of next tokens that are the most probable ones."""
    right = [(model(part[:, :-1], architecture).argmax(-1) == part[:, 1:]).float().mean() for part in windows.split(16)]
    return torch.stack(right).mean().item()


def uniform(run: Run, share: float, score: str = "mass") -> Architecture:
    """All layers alike, without shared neurons: ``share`` of the experts per token."""
    layouts = uniform_layouts(run.space, sparse=True)

    def distance(architecture: Architecture) -> float:
        part = next(iter(architecture.layers.values())).feed_forward
        if part.router is None or part.router.score != score:
            return 1e9
        return part.shared_size + abs(part.router.max_experts / part.experts - share)

    return min(layouts, key=distance)


def split_by(order: str, model: Path, out: Path) -> Run:
    settings = [f"model.from={model}", f"model.cluster={order}", "space.router=[mass, mlp]"]
    run = open_run(HERE / "split.yaml", settings, out / f"split-{order}")
    do_stage(run, "supernet")
    return run


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/moefication"))
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    moesaic.run(HERE / "relu.yaml", [f"retrain.steps={arguments.steps}"], arguments.out / "relu")
    model = arguments.out / "relu" / "exports" / "best"

    rows: list[Row] = []
    dense = 0.0
    for order in ORDERS:
        run = split_by(order, model, arguments.out)
        windows = torch.cat([(batch := run.task.held_out("test", 64)).tokens, batch.targets[:, -1:]], dim=1)
        dense = accuracy(run.supernet, run.space.largest, windows)
        assert run.config.model is not None
        calibration = run.task.batch(run.config.model.calibration_windows, run.config.seed, 0).tokens
        for router in ROUTERS:
            choose_by(run.supernet, router if router in CHOOSERS else None)
            if router in ("similarity", "representative"):
                refit(run.supernet, calibration, router)
            for share in SHARES:
                member = uniform(run, share, "mlp" if router == "mlp" else "mass")
                found = accuracy(run.supernet, member, windows)
                flops = run.pricer.expected(member)["flops"]
                row = {"order": order, "router": router, "share": share, "relative": round(found / dense, 4)}
                rows.append({**row, "flops": round(flops)})
    searched = [search_at(share, model, arguments.out) for share in SHARES[1:]]
    run = split_by("coactivation", model, arguments.out)
    result = {
        **facts(run.device),
        "seed": run.config.seed,
        "dense_accuracy": round(dense, 4),
        "rows": rows,
        "searched": searched,
    }
    write_value(HERE / "result.json", result, dict)
    by = {(row["order"], row["router"], row["share"]): row["relative"] for row in rows}
    table = [
        [order, router, *(f"{by[order, router, share]:.3f}" for share in SHARES)]
        for order, router in dict.fromkeys((row["order"], row["router"]) for row in rows)
    ]
    print(markdown("order|router|" + "|".join(f"{share:.0%}" for share in SHARES), table))
    print(
        markdown("share|FLOPs|uniform loss|searched loss", [[str(value) for value in row.values()] for row in searched])
    )


def search_at(share: float, model: Path, out: Path) -> Row:
    """The best searched shares at the FLOPs of the uniform ``share``, and that one, by loss on the validation split."""
    run = split_by("coactivation", model, out)
    member = uniform(run, share)
    flops = run.pricer.expected(member)["flops"]
    settings = [f"model.from={model}", "model.cluster=coactivation", f"budget.flops={flops * 1.0001:.0f} FLOPs"]
    searching = open_run(HERE / "split.yaml", settings, out / f"search-{share}")
    for stage in ("supernet", "latency", "search"):
        do_stage(searching, stage)
    judge = searching.judge("test", 256)
    (part,) = searching.budgets
    best = load_search(part)[1].best.architecture
    losses = {"uniform": round(judge(member).loss, 4), "searched": round(judge(best).loss, 4)}
    return {"share": share, "flops": round(flops), **losses}


if __name__ == "__main__":
    run_script(main)
