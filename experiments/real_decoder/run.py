"""A trained decoder made sparser: the searched model, the best uniform choice and the best pruned dense model.

python -m experiments.real_decoder.run MODEL TRAIN VALIDATION TEST [--out runs/real-decoder] [KEY=VALUE]...

MODEL is a Hugging Face folder (README.md says how to get the one of the result); the others are text files. It is the
run of sparsify.yaml with the KEY=VALUE settings: no training, unless retrain.steps is set. Then all models are timed in
one process, in turns: a decoding step after 256 tokens, and a prefill of 256. Run nothing else beside it.
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path

import torch

import moesaic
from experiments.common import Row, arguments_of, facts, markdown, run_script
from experiments.turns import decoding, in_turns, prefill
from moesaic import Transformer, open_checkpoint, open_run, write_value

HERE = Path(__file__).parent
LENGTH, ROUNDS = 256, 15
SOURCE = "source"


@torch.inference_mode()
def timed(models: dict[str, Transformer]) -> dict[str, dict[str, float]]:
    """Median milliseconds of each model in turns, and as multiples of the source's in the same round."""
    found: dict[str, dict[str, float]] = {name: {} for name in models}
    for phase, make in (("decode", decoding), ("prefill", partial(prefill, batch=1))):
        times = in_turns({name: make(model, length=LENGTH) for name, model in models.items()}, ROUNDS)
        for name, values in times.items():
            found[name][f"{phase}_ms"] = round(statistics.median(values), 2)
            ratios = [value / whole for value, whole in zip(values, times[SOURCE], strict=True)]
            found[name][f"{phase}_share"] = round(statistics.median(ratios), 3)
    return found


def main() -> None:
    arguments, settings = arguments_of(__doc__, "runs/real-decoder")
    run = open_run(HERE / "sparsify.yaml", settings, arguments.out)
    summaries = moesaic.run(HERE / "sparsify.yaml", settings, arguments.out)

    models = {SOURCE: open_checkpoint(arguments.model).load()}
    judge = run.judge("test", run.config.retrain.evaluation_windows, models[SOURCE])
    rows: list[Row] = [{"budget": "", "model": SOURCE, "repaired_loss": judge(models[SOURCE].architecture).loss}]
    whole = run.pricer.expected(models[SOURCE].architecture)["flops"]
    for budget, summary in summaries.items():
        for result in (summary.chosen.retrained, *summary.rivals):
            folder = arguments.out / "budgets" / budget / "retrain" / result.name / f"seed-{summary.seed}"
            model = models[f"{budget} {result.name}"] = moesaic.load(folder)
            inherited = run.judge("test", run.config.retrain.evaluation_windows)(result.architecture)
            rows.append(
                {
                    "budget": budget,
                    "model": result.name,
                    "flops_share": round(result.measured["flops"] / whole, 3),
                    "parameters": round(result.measured["parameters"]),
                    "inherited_loss": round(inherited.loss, 4),
                    "repaired_loss": round(result.loss, 4),
                    "above_searched": round(result.above_searched.mean, 4),
                    "p_value": result.above_searched.p_value,
                    "layers": kinds(model),
                }
            )
    times = timed(models)
    rows = [row | times[name] for name, row in zip(models, rows, strict=True)]
    seconds = {budget: summary.stage_seconds for budget, summary in summaries.items()}
    result = {
        **facts(run.device),
        "seed": run.config.seed,
        "settings": list(arguments.settings),
        "tokens": judge.batch.tokens.numel(),
        "stage_seconds": seconds,
        "rows": rows,
    }
    write_value(HERE / ("result.json" if not arguments.settings else "result-changed.json"), result, dict)
    columns = "budget|model|FLOPs|inherited loss|repaired loss|decode|prefill"
    print(markdown(columns, [table_row(row) for row in rows]))


def kinds(model: Transformer) -> dict[str, int]:
    """How many layers have a feed-forward part of which kind, and attention with how many heads."""
    found: dict[str, int] = {}
    for layer in model.architecture.layers.values():
        part = layer.feed_forward
        sparse = f"experts of {part.expert_sizes[0]}" if part.router else "dense"
        for kind in (sparse if part.experts else "no feed-forward part", f"{layer.attention.heads} heads"):
            found[kind] = found.get(kind, 0) + 1
    return found


def table_row(row: Row) -> list[str]:
    def shown(key: str, form: str) -> str:
        return format(row[key], form) if key in row else ""

    names = (row["budget"], row["model"], shown("flops_share", ".0%"))
    losses = (shown("inherited_loss", ".3f"), shown("repaired_loss", ".3f"))
    times = (f"{row[f'{phase}_ms']:.1f} ms ({row[f'{phase}_share']:.2f})" for phase in ("decode", "prefill"))
    return [*names, *losses, *times]


if __name__ == "__main__":
    run_script(main)
