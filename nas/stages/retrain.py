"""Stage retrain: train the chosen architecture and its rivals alike, and see which is better on the test split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nas.config import load_retrain_file
from nas.costs.measure import latency_figures, measure_costs
from nas.costs.probe import autocast
from nas.data import load_corpus
from nas.device import choose_device
from nas.export import load_exported
from nas.progress import Reporter
from nas.retrain import loss_figures, retrain
from nas.run_directory import RunDirectory, fingerprint, stopwatch
from nas.search.thresholds import hold_budget
from nas.stages.run import Run
from search_spaces import Architecture, MoesaicError
from search_spaces.files import read_json, write_json, write_text
from supernet import Evaluation, evaluate

SEARCHED = "searched"


def run_retrain(run: Run) -> None:
    """Leaves a folder per model (weights, architecture, metrics) and ``results.json``, the searched model first.

    A model whose threshold routers keep more experts after training than its budget allows has them lowered.
    """
    with run.work("retrain") as stage:
        if stage is None:
            return
        config = run.config.retrain
        models = contestants(run)
        results: list[dict[str, Any]] = []
        searched: Evaluation | None = None
        with run.task("retrain") as task:
            for index, (name, (architecture, inherited_loss)) in enumerate(models.items()):

                def on_step(step: int, record: dict[str, float], name: str = name, index: int = index) -> None:
                    best = min((r["loss"] for r in results), default=None)
                    facts = f"{name}  loss {record['loss']:.3f}" + (f"  best test {best:.4f}" if best else "")
                    task.update(index * config.steps + step, len(models) * config.steps, facts)

                inherited = None
                if config.init == "inherited":
                    inherited = run.supernet.extract(architecture)
                identity = fingerprint({"stage": stage.fingerprint, "architecture": architecture.fingerprint})
                with stopwatch() as seconds:
                    trained = retrain(
                        architecture,
                        config,
                        run.corpus,
                        run.device,
                        run.config.seed,
                        stage.path / name,
                        identity,
                        inherited,
                        on_step,
                        run.should_stop,
                    )
                windows = run.windows("test", config.evaluation_windows)
                model, evaluation = trained.model, trained.evaluation
                validation = run.windows("validation", run.config.search.evaluation_windows)
                with autocast(run.device):
                    held = hold_budget(model, validation, run.budget)
                    if held != architecture:
                        model = model.extract(held).eval()
                        evaluation = evaluate(model, windows)
                write_text(stage.path / name / "architecture.yaml", held.to_yaml())
                searched = searched or evaluation
                predicted = dict(run.pricer.expected(held))
                measured = measure_costs(model, windows, run.pricer, run.device)
                results.append(
                    {
                        "name": name,
                        "fingerprint": held.fingerprint,
                        "architecture": held.to_dict(),
                        "thresholds_lowered": held != architecture,
                        "inherited_loss": inherited_loss,
                        **loss_figures(run.corpus, evaluation),
                        "above_searched": paired_difference(evaluation, searched),
                        "predicted": predicted,
                        "measured": measured.costs,
                        "latency": latency_figures(measured.timing, predicted["latency"], run.predictor),
                        "budget": run.budget_lines(held, measured.costs),
                        "steps": config.steps,
                        "init": config.init,
                        "seconds": round(seconds[0], 2),
                    }
                )
        write_json(stage.path / "results.json", results)


def paired_difference(evaluation: Evaluation, reference: Evaluation) -> dict[str, float]:
    """Mean of the differences in loss, sequence by sequence, and its standard error: what two models share (easy and
    hard text) cancels, so this error is far smaller than that of either loss. Chance in training is not in it."""
    pairs = zip(evaluation.sequence_losses, reference.sequence_losses, strict=True)
    differences = torch.tensor([mine - other for mine, other in pairs], dtype=torch.float64)
    error = differences.std().item() / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    return {"mean": differences.mean().item(), "standard_error": error}


def contestants(run: Run) -> dict[str, tuple[Architecture, float]]:
    """Name, architecture and inherited validation loss of every model that is trained, the searched one first."""
    figures = read_json(run.stages["export"].path / "best" / "figures.json")
    best = load_exported(run.stages["export"].path / "best").architecture
    models = {SEARCHED: (best, figures["validation_loss"])}
    if run.config.retrain.rivals:
        for rival in read_json(run.stages["search"].path / "rivals.json"):
            models[rival["kind"].replace(" ", "-")] = (Architecture.from_dict(rival["architecture"]), rival["loss"])
    return models


def retrain_export(
    directory: Path, overrides: Sequence[str], reporter: Reporter, should_stop: Callable[[], bool]
) -> dict[str, Any]:
    """Train an exported model by its ``retrain.yaml``, with its own tokenizer, into ``directory/retrained``."""
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
    identity = fingerprint(
        {
            "file": file.model_dump(mode="json", exclude={"name"}),
            "corpus": corpus.fingerprint,
            "architecture": model.architecture.fingerprint,
        }
    )
    inherited = model if file.retrain.init == "inherited" else None
    target = RunDirectory(directory / "retrained")
    with target.locked(), reporter.task("retrain") as task:
        trained = retrain(
            model.architecture,
            file.retrain,
            corpus,
            device,
            file.seed,
            target.path,
            identity,
            inherited,
            lambda step, record: task.update(step, file.retrain.steps, f"loss {record['loss']:.3f}"),
            should_stop,
        )
        result = {
            "name": file.name,
            "fingerprint": model.architecture.fingerprint,
            "device": str(device),
            "steps": file.retrain.steps,
            "init": file.retrain.init,
            "seed": file.seed,
            **loss_figures(corpus, trained.evaluation),
        }
        write_json(target.path / "result.json", result)
    return result
