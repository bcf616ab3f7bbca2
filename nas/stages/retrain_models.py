"""Stage retrain: train the chosen architecture and its rivals alike, and see which is better on the test split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.nas.config import load_retrain_file
from moesaic.nas.costs.latency.probe import autocast
from moesaic.nas.costs.measure import MeasuredCosts, latency_figures
from moesaic.nas.data import load_corpus
from moesaic.nas.device import choose_device
from moesaic.nas.exports.folder import BEST, load_exported
from moesaic.nas.search.thresholds import hold_budget
from moesaic.nas.stages.check_fidelity import load_rivals
from moesaic.nas.stages.directory import RunDirectory, StageDirectory, fingerprint, stopwatch
from moesaic.nas.stages.run import Run
from moesaic.nas.terminal.progress import Reporter
from moesaic.nas.training.single import difference_over_seeds, loss_figures, over_seeds, retrain, seed_directory
from moesaic.nas.training.workers import Workers
from moesaic.search_spaces import Architecture, MoesaicError
from moesaic.search_spaces.files import read_json, write_json, write_text
from moesaic.supernet import Evaluation, evaluate

SEARCHED = "searched"


@dataclass(frozen=True)
class SeedRun:
    """What one training of a contestant came to; ``architecture`` is that with the thresholds that hold the budget."""

    architecture: Architecture
    evaluation: Evaluation
    figures: dict[str, Any]


def run_retrain(run: Run) -> None:
    """Leaves a folder per model and seed (weights, architecture, metrics) and ``results.json``, the searched model
    first.

    A model whose threshold routers keep more experts after training than its budget allows has them lowered. Losses
    are means over the seeds. Costs are those of the first seed's model; a budget line on what follows from routing is
    of the seed that needs most.
    """
    with run.work("retrain", extendable=("retrain.seeds",)) as stage:
        if stage is None:
            return
        config = run.config.retrain
        models = contestants(run)
        results: list[dict[str, Any]] = []
        searched: list[Evaluation] = []
        steps = len(models) * config.seeds * config.steps
        with run.task("retrain") as task:
            for index, (name, (architecture, inherited_loss)) in enumerate(models.items()):

                def on_step(trained: int, step: int, loss: float, name: str = name, index: int = index) -> None:
                    best = min((r["loss"] for r in results), default=None)
                    facts = f"{name}  loss {loss:.3f}" + (f"  best test {best:.4f}" if best else "")
                    task.update((index * config.seeds + trained) * config.steps + step, steps, facts)

                runs, measured = _train_seeds(run, stage, name, architecture, on_step)
                evaluations = [one.evaluation for one in runs]
                searched = searched or evaluations
                first = runs[0].architecture
                predicted = dict(run.pricer.expected(first))
                results.append(
                    {
                        "name": name,
                        "fingerprint": first.fingerprint,
                        "architecture": first.to_dict(),
                        "thresholds_lowered": any(one.figures["thresholds_lowered"] for one in runs),
                        "inherited_loss": inherited_loss,
                        **over_seeds([one.figures for one in runs]),
                        "above_searched": difference_over_seeds(evaluations, searched),
                        "predicted": predicted,
                        "measured": measured.costs,
                        "latency": latency_figures(measured.timing, predicted["latency"], run.predictor),
                        "budget": run.budget_lines(first, measured.costs | _most_by_routing(run, runs)),
                        "steps": config.steps,
                        "init": config.init,
                        "seconds": round(sum(one.figures["seconds"] for one in runs), 2),
                    }
                )
        write_json(stage.path / "results.json", results)


def _train_seeds(
    run: Run, stage: StageDirectory, name: str, architecture: Architecture, on_step: Callable[[int, int, float], None]
) -> tuple[list[SeedRun], MeasuredCosts]:
    """Train a contestant with every seed; costs are measured of the first one's model.

    ``on_step`` is told the number of finished trainings, the step, and the loss.
    """
    config = run.config.retrain
    windows = run.windows("test", config.evaluation_windows)
    validation = run.windows("validation", run.config.search.evaluation_windows)
    runs: list[SeedRun] = []
    costs: list[MeasuredCosts] = []
    for seed in range(run.config.seed, run.config.seed + config.seeds):
        directory = seed_directory(stage.path / name, seed)
        inherited = run.supernet.extract(architecture) if config.init == "inherited" else None
        with stopwatch() as seconds:
            trained = retrain(
                architecture,
                config,
                run.corpus,
                run.device,
                seed,
                directory,
                _identity(stage, architecture, seed),
                inherited,
                lambda step, record: on_step(len(runs), step, record["loss"]),
                run.should_stop,
                Workers(run.config.train, run.reporter.say),
            )
        model, evaluation = trained.model, trained.evaluation
        with autocast(run.device):
            held = hold_budget(model, validation, run.budget)
            if held != architecture:
                model = model.extract(held).eval()
                evaluation = evaluate(model, windows)
        write_text(directory / "architecture.yaml", held.to_yaml())
        costs = costs or [run.measure(model, windows)]
        figures = {
            "seed": seed,
            "fingerprint": held.fingerprint,
            "thresholds_lowered": held != architecture,
            **loss_figures(run.corpus, evaluation),
            "seconds": round(seconds[0], 2),
        }
        runs.append(SeedRun(held, evaluation, figures))
    return runs, costs[0]


def _identity(stage: StageDirectory, architecture: Architecture, seed: int) -> str:
    """Of one training: everything but how many seeds there are, so that more of them keep those that are trained."""
    inputs = {name: value for name, value in stage.inputs.items() if name != "retrain.seeds"}
    return fingerprint({"inputs": inputs, "architecture": architecture.fingerprint, "seed": seed})


def _most_by_routing(run: Run, runs: Sequence[SeedRun]) -> dict[str, float]:
    """The most FLOPs and active parameters that any seed's model needs, under the loads of its evaluation."""
    costs = [run.pricer.measured(one.architecture, one.evaluation.loads) for one in runs]
    return {name: max(cost[name] for cost in costs) for name in ("flops", "active_parameters")}


def contestants(run: Run) -> dict[str, tuple[Architecture, float]]:
    """Name, architecture and inherited validation loss of every model that is trained, the searched one first."""
    figures = read_json(run.stages["export"].path / BEST / "figures.json")
    best = load_exported(run.stages["export"].path / BEST).architecture
    models = {SEARCHED: (best, figures["validation_loss"])}
    if run.config.retrain.rivals:
        for rival in load_rivals(run):
            models[rival["kind"]] = (Architecture.from_dict(rival["architecture"]), rival["loss"])
    return models


def retrain_export(
    directory: Path, overrides: Sequence[str], reporter: Reporter, should_stop: Callable[[], bool]
) -> dict[str, Any]:
    """Train an exported model by its ``retrain.yaml``, with its own tokenizer, into ``directory/retrained``: a folder
    per seed, and ``result.json`` with the means over them."""
    model = load_exported(directory)
    file = load_retrain_file(directory / "retrain.yaml", overrides)
    device = choose_device(file.device)
    corpus = load_corpus(
        file.data,
        str(directory / "retrain.yaml"),
        lambda text: reporter.say(f"data: {text}"),
        tokenizer=directory / "tokenizer.json",
    )
    if corpus.vocab_size != model.vocab_size:
        raise MoesaicError(
            "tokenizer and model disagree",
            where=str(directory / "tokenizer.json"),
            found=f"{corpus.vocab_size} tokens",
            allowed=f"{model.vocab_size} tokens",
        )
    inherited = model if file.retrain.init == "inherited" else None
    target = RunDirectory(directory / "retrained")
    runs: list[dict[str, Any]] = []
    steps = file.retrain.steps
    with target.locked(), reporter.task("retrain") as task:
        for seed in range(file.seed, file.seed + file.retrain.seeds):
            identity = fingerprint(
                {
                    "file": file.model_dump(
                        mode="json", exclude={"name": True, "seed": True, "train": True, "retrain": {"seeds"}}
                    ),
                    "corpus": corpus.fingerprint,
                    "architecture": model.architecture.fingerprint,
                    "seed": seed,
                }
            )
            trained = retrain(
                model.architecture,
                file.retrain,
                corpus,
                device,
                seed,
                seed_directory(target.path, seed),
                identity,
                inherited,
                lambda step, record: task.update(
                    len(runs) * steps + step, file.retrain.seeds * steps, f"loss {record['loss']:.3f}"
                ),
                should_stop,
                Workers(file.train, reporter.say),
            )
            runs.append({"seed": seed, **loss_figures(corpus, trained.evaluation)})
        result = {
            "name": file.name,
            "fingerprint": model.architecture.fingerprint,
            "device": str(device),
            "steps": steps,
            "init": file.retrain.init,
            "seed": file.seed,
            **over_seeds(runs),
        }
        write_json(target.path / "result.json", result)
    return result
