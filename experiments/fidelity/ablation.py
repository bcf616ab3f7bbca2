"""Train supernets, one change at a time, and write down what each thinks of every member of the stratified set.

python experiments/fidelity/ablation.py small|gpu [--seeds 2] [--lanes 2] [--only NAME ...] [--weights FOLDER]

The changes are in the variant's ablation.yaml: a name, overrides of the configuration, steps of fine-tuning. Rows go
to ablation.jsonl in the variant's folder; supernets that are there are not trained again. --weights keeps them.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import yaml
from truth import HERE, append_row, read_rows

from moesaic.nas.config import load_config
from moesaic.nas.costs.price import Pricer
from moesaic.nas.stages.run import Run
from moesaic.nas.training.recipe import supernet_training
from moesaic.search_spaces import Architecture
from moesaic.supernet import TrainData, TrainSettings, Transformer, evaluate, train
from moesaic.supernet.checkpoint import save_tensors


def score(variant: str, name: str, change: dict[str, Any], seed: int, weights: Path | None) -> list[dict[str, Any]]:
    """Train one supernet and evaluate every member with its weights; a row for these losses, and one for each number of
    steps that members are fine-tuned before they are judged."""
    overrides = [*change.get("overrides", []), f"seed={seed}"]
    run = Run(load_config(HERE / f"{variant}.yaml", overrides), HERE / variant)
    model, data, settings = supernet_training(run.config, run.space, run.corpus, run.device)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train(model, data, settings, Path(folder), "fidelity")
    seconds = time.perf_counter() - started
    model.eval()
    if weights is not None:
        save_tensors(weights / f"{name}-{seed}.safetensors", dict(model.named_parameters()), {})
    facts = {
        "overrides": overrides,
        "seed": seed,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "device": str(run.device),
    }
    rows = [{"change": name, **facts, "seconds": round(seconds, 1), **judge_members(run, model)}]
    for steps in change.get("fine_tune", []):
        started = time.perf_counter()
        judged = judge_members(run, model, steps)
        each = (time.perf_counter() - started) / len(judged["losses"])
        row = {"change": f"{name}, members fine-tuned {steps} steps", **facts, "seconds": round(seconds, 1)}
        rows.append({**row, "seconds_per_member": round(each, 2), **judged})
    return rows


def judge_members(run: Run, model: Transformer, steps: int = 0) -> dict[str, Any]:
    """Validation loss and measured FLOPs of every member with inherited weights, fine-tuned for ``steps``."""
    windows = run.windows("validation", run.config.search.evaluation_windows)
    pricer, losses, flops = Pricer(run.context), [], []
    for row in read_rows(run.path / "members.jsonl"):
        architecture = Architecture.from_dict(row["architecture"])
        judged = fine_tuned(run, model.extract(architecture), steps) if steps else model
        evaluation = evaluate(judged, windows, architecture)
        losses.append(round(evaluation.loss, 6))
        flops.append(round(pricer.measured(architecture, evaluation.loads)["flops"]))
    return {"losses": losses, "flops": flops}


def fine_tuned(run: Run, model: Transformer, steps: int) -> Transformer:
    """``model`` trained for ``steps`` more on batches that the supernet did not see, from a third of its rate."""
    config, after = run.config.supernet, run.config.supernet.steps
    data = TrainData(
        lambda step: run.corpus.batch("train", config.batch_size, run.config.seed, after + step),
        lambda step: [model.architecture],
    )
    settings = TrainSettings(steps, config.learning_rate / 3, warmup_steps=0, checkpoint_every=steps)
    with tempfile.TemporaryDirectory() as folder:
        train(model, data, settings, Path(folder), "fidelity")
    return model.eval()


def _commit() -> str:
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    names = arguments.only or list(changes)
    todo = [(name, seed) for seed in range(arguments.seeds) for name in names if (name, seed) not in done]
    print(f"{len(done)} rows are there, {len(todo)} to go", flush=True)
    if arguments.weights:
        arguments.weights.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.lanes, mp_context=context) as pool:
        jobs = {
            pool.submit(score, arguments.variant, name, changes[name], seed, arguments.weights): (name, seed)
            for name, seed in todo
        }
        for count, job in enumerate(as_completed(jobs), start=1):
            name, seed = jobs[job]
            if error := job.exception():
                print(f"{count}/{len(todo)} {name} seed {seed} failed: {error}", flush=True)
                continue
            for row in job.result():
                append_row(table, row)
            print(f"{count}/{len(todo)} {name} seed {seed}: {job.result()[0]['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
