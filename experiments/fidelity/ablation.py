"""Train supernets with one change each and record the loss of every member of the stratified set.

python -m experiments.fidelity.ablation small|gpu [--seeds 2] [--lanes 2] [--only NAME ...] [--weights FOLDER]

The changes are in the variant's ablation.yaml: a name, overrides of the configuration, steps of fine-tuning. Rows go
to ablation.jsonl in the variant's folder. Supernets with rows there are not trained again. --weights saves them.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path

import yaml
from safetensors.torch import save_file

from experiments.common import Row, append_row, in_processes, parser_of, read_rows, run_script, today
from experiments.fidelity.truth import HERE, open_variant
from moesaic import Architecture, Pricer, Run, Transformer, supernet_recipe
from moesaic.supernet import TrainData, TrainSettings, train


def score(variant: str, name: str, change: Row, seed: int, weights: Path | None) -> list[Row]:
    """Train one supernet and evaluate every member with its weights: one row with these losses, and one per number of
    fine-tuning steps before evaluation."""
    overrides = [*change.get("overrides", []), f"seed={seed}"]
    run = open_variant(variant, overrides)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model = run.trainer.train(supernet_recipe(run.config, run.space, run.device.bfloat16), Path(folder), "fidelity")
    seconds = round(time.perf_counter() - started, 1)
    if weights is not None:
        save_file(model.state_dict(), weights / f"{name}-{seed}.safetensors")
    trained = {
        "overrides": overrides,
        "seed": seed,
        "commit": _commit(),
        "date": today(),
        "device": str(run.device),
        "seconds": seconds,
    }
    rows = [{"change": name, **trained, **judge_members(run, model)}]
    for steps in change.get("fine_tune", []):
        started = time.perf_counter()
        judged = judge_members(run, model, steps)
        each = round((time.perf_counter() - started) / len(judged["losses"]), 2)
        row = {"change": f"{name}, members fine-tuned {steps} steps", **trained, "seconds_per_member": each, **judged}
        rows.append(row)
    return rows


def judge_members(run: Run, model: Transformer, steps: int = 0) -> Row:
    """Validation loss and measured FLOPs of every member with inherited weights, fine-tuned for ``steps``."""
    windows, pricer = run.config.search.evaluation_windows, Pricer(run.context)
    losses, flops = [], []
    for row in read_rows(run.path / "members.jsonl"):
        architecture = Architecture.from_dict(row["architecture"])
        judged = fine_tuned(run, model.extract(architecture), steps) if steps else model
        evaluation = run.judge("validation", windows, judged)(architecture)
        losses.append(round(evaluation.loss, 6))
        flops.append(round(pricer.measured(architecture, evaluation.loads)["flops"]))
    return {"losses": losses, "flops": flops}


def fine_tuned(run: Run, model: Transformer, steps: int) -> Transformer:
    """``model`` trained for ``steps`` more on batches that the supernet did not see, at a third of its rate."""
    config, after = run.config.supernet, run.config.supernet.steps
    data = TrainData(
        lambda step: run.task.batch(config.batch_size, run.config.seed, after + step),
        lambda step: [model.architecture],
        run.task.loss,
    )
    settings = TrainSettings(
        steps,
        config.learning_rate / 3,
        warmup_steps=0,
        bfloat16=run.device.bfloat16,
        checkpoint_every=steps,
    )
    with tempfile.TemporaryDirectory() as folder:
        train(model, data, settings, Path(folder), "fidelity")
    return model.eval()


def _commit() -> str:
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("variant", choices=("small", "gpu"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--lanes", type=int, default=2, help="supernets at the same time")
    parser.add_argument("--only", nargs="*", help="names of changes")
    parser.add_argument("--weights", type=Path, help="folder for the trained supernets")
    arguments = parser.parse_args()
    folder = HERE / arguments.variant
    changes = yaml.safe_load((folder / "ablation.yaml").read_text(encoding="utf-8"))
    table = folder / "ablation.jsonl"
    done = {(row["change"], row["seed"]) for row in read_rows(table)}
    todo = {
        (name, seed): (arguments.variant, name, changes[name], seed, arguments.weights)
        for seed in range(arguments.seeds)
        for name in arguments.only or changes
        if (name, seed) not in done
    }
    print(f"{len(done)} rows are there, {len(todo)} to go", flush=True)
    if arguments.weights:
        arguments.weights.mkdir(parents=True, exist_ok=True)
    for count, (key, job) in enumerate(in_processes(score, todo, arguments.lanes), start=1):
        name, seed = key
        if error := job.exception():
            print(f"{count}/{len(todo)} {name} seed {seed} failed: {error}", flush=True)
            continue
        for row in job.result():
            append_row(table, row)
        print(f"{count}/{len(todo)} {name} seed {seed}: {job.result()[0]['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    run_script(main)
