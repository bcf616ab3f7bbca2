"""Stage retrain: train the chosen architecture and its rivals alike, and compare them on the test split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from moesaic.nas.costs.measure import MeasuredCosts
from moesaic.nas.exports.figures import BEST, INHERITED_BEST, RetrainedModel, SourceModel, weights_text
from moesaic.nas.exports.folder import export_model, load_exported, write_facts
from moesaic.nas.search.thresholds import lower_thresholds_to_fit
from moesaic.nas.stages.check_fidelity import load_trust
from moesaic.nas.stages.directory import RunDirectory, StageDirectory, fingerprint, stopwatch
from moesaic.nas.stages.export_models import load_exports
from moesaic.nas.stages.run import BudgetRun
from moesaic.nas.stages.stage import BY_NAME
from moesaic.nas.training.recipe import single_recipe
from moesaic.nas.trust.scores import MeanScores, Scores, SeedRun, difference_over_seeds
from moesaic.search_spaces import Architecture
from moesaic.search_spaces.files import read_value, write_value
from moesaic.supernet import Evaluation

SEARCHED = "searched"
_SOURCE = "source.json"


@dataclass(frozen=True)
class Trained:
    """The result of one training of a model; ``architecture`` has the thresholds that fit the budget."""

    architecture: Architecture
    evaluation: Evaluation
    run: SeedRun


def inputs(part: BudgetRun) -> dict[str, Any]:
    questions = part.run.questions
    asked = {} if questions is None else {"questions": questions.digest}
    return part.run.config.model_dump(mode="json", include={"seed", "retrain"}) | asked


def passes(part: BudgetRun) -> float:
    config = part.run.config.retrain
    models = 3 if config.rivals else 1
    repair = 2.0 * config.repair_windows if config.init == "repaired" else 0.0
    return models * config.seeds * (3.0 * config.steps * config.batch_size + repair)


def work(part: BudgetRun, directory: StageDirectory) -> None:
    """Writes a folder per model and seed (a model that loads, and metrics) and ``results.json``, the searched model
    first; exports the searched model of the first seed as ``best``. Of the trained model that a run starts from, it
    writes ``source.json``.

    If a model's threshold routers keep more experts after training than its budget allows, its thresholds are
    lowered.
    """
    config = part.run.config.retrain
    models = compared_models(part)
    best = part.folder("export").path / BEST
    if best.exists():  # of other settings, or of fewer seeds
        RunDirectory(part.path).set_aside(best, f"exports-{BEST}")
    results: list[RetrainedModel] = []
    searched: list[Evaluation] = []
    depth = part.run.space.depth if config.init == "repaired" else 0  # a repaired layer counts as a step
    each = config.steps + depth
    steps = len(models) * config.seeds * each
    with part.reporter.progress("retrain") as bar:
        for index, (name, (architecture, inherited_loss)) in enumerate(models.items()):

            def on_step(trained: int, step: int, facts: str, name: str = name, index: int = index) -> None:
                best = min((result.loss for result in results), default=None)
                facts = f"{name}  {facts}" + (f"  best test {best:.4f}" if best else "")
                bar.update((index * config.seeds + trained) * each + step, steps, facts)

            trained, measured = _train_seeds(part, directory, name, architecture, on_step)
            evaluations = [one.evaluation for one in trained]
            searched = searched or evaluations
            first = trained[0].architecture
            results.append(
                RetrainedModel(
                    **vars(MeanScores.over([one.run for one in trained])),
                    name=name,
                    fingerprint=first.fingerprint,
                    architecture=first,
                    thresholds_lowered=any(one.run.thresholds_lowered for one in trained),
                    inherited_loss=inherited_loss,
                    above_searched=difference_over_seeds(evaluations, searched),
                    predicted=dict(part.run.pricer.expected(first)),
                    measured=measured.costs,
                    latency=measured.latency,
                    budget=part.measured_lines(first, measured.costs | _most_by_routing(part, trained)),
                    steps=config.steps,
                    init=config.init,
                    seconds=round(sum(one.run.seconds for one in trained), 2),
                )
            )
    _export(part, best, results[0], seed_directory(directory.path / SEARCHED, part.run.config.seed))
    if part.run.space.source is not None:
        write_value(directory.path / _SOURCE, _measured_source(part, part.run.space.source), SourceModel)
    write_value(directory.path / "results.json", results, list[RetrainedModel])


def _measured_source(part: BudgetRun, architecture: Architecture) -> SourceModel:
    run = part.run
    model = run.supernet.extract(architecture).eval()
    judge = run.judge("test", run.config.retrain.evaluation_windows, model)
    evaluation = judge(architecture)
    measured = part.measure(model, evaluation.loads, judge.batch)
    scores = vars(run.scores("test", model, evaluation))
    return SourceModel(**scores, architecture=architecture, measured=measured.costs, latency=measured.latency)


def load_source(part: BudgetRun) -> SourceModel | None:
    """The trained model that the run starts from; None where it starts from random weights."""
    if part.run.space.source is None:
        return None
    return read_value(part.folder("retrain").path / _SOURCE, SourceModel)


def load_results(part: BudgetRun) -> list[RetrainedModel]:
    """Every retrained model, the searched one first."""
    return read_value(part.folder("retrain").path / "results.json", list[RetrainedModel])


def seed_directory(directory: Path, seed: int) -> Path:
    """The folder of the training with ``seed``, for a model that is trained with several seeds."""
    return directory / f"seed-{seed}"


def _train_seeds(
    part: BudgetRun,
    directory: StageDirectory,
    name: str,
    architecture: Architecture,
    on_step: Callable[[int, int, str], None],
) -> tuple[list[Trained], MeasuredCosts]:
    """Train a model with every seed; costs are measured on the first seed's model.

    ``on_step`` gets the number of finished trainings, the step (after a layer of each is repaired), and what to show.
    """
    run, config = part.run, part.run.config.retrain
    trained: list[Trained] = []
    depth = run.space.depth if config.init == "repaired" else 0
    weights, teacher = run.start("retrain", lambda done: on_step(len(trained), done, f"repaired {done} layers"))
    costs: list[MeasuredCosts] = []
    for seed in range(run.config.seed, run.config.seed + config.seeds):
        folder = seed_directory(directory.path / name, seed)
        recipe = single_recipe(architecture, config, seed, run.device.bfloat16, teacher)
        with stopwatch() as seconds:
            model = run.trainer.finish(
                recipe,
                folder,
                _identity(directory, architecture, seed),
                lambda step, record: on_step(len(trained), depth + step, f"loss {record['loss']:.3f}"),
                weights,
            )
        held = lower_thresholds_to_fit(
            run.judge("validation", run.config.search.evaluation_windows, model), part.budget
        )
        if held != architecture:
            model = model.extract(held).eval()
        judge = run.judge("test", config.evaluation_windows, model)
        evaluation = judge(held)
        write_facts(folder, model, run.task)
        costs = costs or [part.measure(model, evaluation.loads, judge.batch)]
        scores = SeedRun(
            **vars(run.scores("test", model, evaluation)),
            seed=seed,
            fingerprint=held.fingerprint,
            thresholds_lowered=held != architecture,
            seconds=round(seconds[0], 2),
        )
        trained.append(Trained(held, evaluation, scores))
    return trained, costs[0]


def _export(part: BudgetRun, directory: Path, searched: RetrainedModel, folder: Path) -> None:
    """Export the model in ``folder``, the searched one of the first seed, which was measured."""
    run, inherited, first = part.run, load_exports(part)[0], searched.runs[0]
    weights = weights_text(searched.init, searched.steps, first.seed)
    if searched.interval is not None:
        low, high = searched.interval
        weights += f", the first of {len(searched.runs)}, whose mean loss is {searched.loss:.4f} "
        weights += f"(95 % interval over seeds {low:.4f} to {high:.4f})"
    scores = {field.name: getattr(first, field.name) for field in fields(Scores)}
    before = Scores(**{name: getattr(inherited, name) for name in scores})
    figures = replace(
        inherited,
        **scores,
        name=BEST,
        fingerprint=searched.fingerprint,
        weights=weights,
        predicted=searched.predicted,
        measured=searched.measured,
        latency=searched.latency,
        budget=part.measured_lines(searched.architecture, searched.measured),
        inherited=before,
        slice_max_logit_difference=None,
    )
    export_model(directory, load_exported(folder), run.config, run.task, figures, run.task.held_out("test", 4))


def _identity(directory: StageDirectory, architecture: Architecture, seed: int) -> str:
    """Identity of one training: all but the number of seeds and what is asked of its result, so that more seeds, and
    other questions, keep the models already trained."""
    extended = BY_NAME["retrain"].extendable
    inputs = {name: value for name, value in directory.inputs.items() if name not in extended}
    return fingerprint({"inputs": inputs, "architecture": architecture.fingerprint, "seed": seed})


def _most_by_routing(part: BudgetRun, trained: Sequence[Trained]) -> dict[str, float]:
    """The largest FLOPs and active parameters of any seed's model, under the loads of its evaluation."""
    costs = [part.run.pricer.measured(one.architecture, one.evaluation.loads) for one in trained]
    return {name: max(cost[name] for cost in costs) for name in ("flops", "active_parameters")}


def compared_models(part: BudgetRun) -> dict[str, tuple[Architecture, float | None]]:
    """Name, architecture and inherited validation loss of every model to train, the searched one first."""
    best = load_exported(part.folder("export").path / INHERITED_BEST).architecture
    models: dict[str, tuple[Architecture, float | None]] = {SEARCHED: (best, load_exports(part)[0].validation_loss)}
    if part.run.config.retrain.rivals:
        models |= {rival.kind: (rival.architecture, rival.loss) for rival in load_trust(part).chosen_rivals}
    return models
