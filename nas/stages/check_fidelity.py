"""Stage fidelity: which models inherited losses can tell apart, and how well they rank models trained alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from moesaic.nas.config import TrainingConfig
from moesaic.nas.search.loop import SearchResult
from moesaic.nas.search.rivals import Rival
from moesaic.nas.search.trials import Trial
from moesaic.nas.stages.directory import StageDirectory, fingerprint
from moesaic.nas.stages.run import BudgetRun
from moesaic.nas.stages.run_search import load_search, search_folder
from moesaic.nas.terminal.tables import write_csv
from moesaic.nas.training.recipe import single_recipe
from moesaic.nas.training.trainer import WEIGHTS
from moesaic.nas.trust.findings import Check, CheckedMember, Errors, FlopsErrors, Standing, Trust
from moesaic.nas.trust.judges import compare_judges, correction_of, judged_rival, judged_trial
from moesaic.nas.trust.scores import paired_difference
from moesaic.nas.trust.sentences import corrects
from moesaic.nas.trust.significance import LEVEL, adjusted_p_values, levels
from moesaic.search_spaces import Architecture, StageFailed
from moesaic.search_spaces.files import read_value, write_value
from moesaic.supernet import Evaluation

_FLOPS_MODELS = 16


def inputs(part: BudgetRun) -> dict[str, Any]:
    config = part.run.config.model_dump(mode="json", include={"seed", "fidelity", "retrain"})
    training = {*TrainingConfig.model_fields, "evaluation_windows"} - {"steps"}
    if part.run.loaded.checkpoint:
        training |= {"init", "repair_windows", "distil"}
    return {
        "seed": config["seed"],
        "budget": {name: line.model_dump(mode="json") for name, line in part.limits.items()},
        "fidelity": config["fidelity"],
        "training": {name: config["retrain"][name] for name in sorted(training)},
    }


def passes(part: BudgetRun) -> float:
    config = part.run.config
    return 3.0 * config.fidelity.check * config.fidelity.steps * config.retrain.batch_size


def work(part: BudgetRun, directory: StageDirectory) -> str:
    """Writes ``fidelity.json`` and, with ``fidelity.check``, ``check.csv`` and a folder with metrics per member."""
    trials, result = load_search(part)
    rivals = read_value(search_folder(part) / "rivals.json", list[Rival])
    sequences, standings, differ = _tell_apart(part, result, rivals)
    size = len(result.front)
    flops = _flops_errors(part, trials)
    marks: Sequence[float] | np.ndarray = [rival.loss for rival in rivals]
    check, corrected = None, {}
    if part.run.config.fidelity.check:
        check = _check(part, directory, trials)
        correction = correction_of(trials, check.members)
        if correction is not None and corrects(check.judges):
            feasible = [trial for trial in trials if trial.feasible]
            losses = correction([judged_trial(trial) for trial in feasible])
            corrected = {trial.number: float(loss) for trial, loss in zip(feasible, losses, strict=True)}
            marks = correction([judged_rival(rival) for rival in rivals])
    trust = Trust(
        sequences=sequences,
        front=tuple(standings[:size]),
        neighbours_that_differ=int(np.diagonal(differ, 1).sum()),
        rivals=tuple(standings[size:]),
        flops=flops,
        check=check,
        corrected=corrected,
        chosen_rivals=tuple(_best_of_kind(rivals, marks)),
    )
    write_value(directory.path / "fidelity.json", trust)
    for member in check.members if check else ():  # trained too briefly to be useful
        (directory.path / member.fingerprint / WEIGHTS).unlink(missing_ok=True)
    return fingerprint({str(number): loss for number, loss in corrected.items()})


def load_trust(part: BudgetRun) -> Trust:
    return read_value(part.folder("fidelity").path / "fidelity.json", Trust)


def _tell_apart(
    part: BudgetRun, result: SearchResult, rivals: Sequence[Rival]
) -> tuple[int, list[Standing], np.ndarray]:
    """The number of sequences; the front by rising loss and the best rival of each kind, each compared with the best of
    the front; and [front, front] which members differ."""
    models = {f"trial {trial.number}": trial.architecture for trial in result.front}
    best = _best_of_kind(rivals, [rival.loss for rival in rivals])
    models |= {rival.kind: rival.architecture for rival in best}
    judge = part.run.judge("validation", part.run.config.search.evaluation_windows)
    evaluations = [judge(models[name]) for name in part.run.each("front", list(models))]
    p_values = adjusted_p_values(np.array([evaluation.sequence_losses for evaluation in evaluations]))
    size = len(result.front)
    differ = p_values[:size, :size] < LEVEL
    steps = [*levels(differ), *[None] * len(best)]
    standings = [
        Standing(
            name,
            architecture.fingerprint,
            evaluation.loss,
            evaluation.standard_error,
            paired_difference(evaluation, evaluations[0]),
            float(p_value),
            bool(p_value < LEVEL),
            level,
        )
        for (name, architecture), evaluation, p_value, level in zip(
            models.items(), evaluations, p_values[0], steps, strict=True
        )
    ]
    return len(evaluations[0].sequence_losses), standings, differ


def _flops_errors(part: BudgetRun, trials: list[Trial]) -> FlopsErrors | None:
    """Relative errors of predicted FLOPs on unseen text; None where no trial has a threshold router."""
    models = choose_members([trial for trial in trials if has_threshold_router(trial.architecture)], _FLOPS_MODELS)
    judge, pricer = part.run.judge("test", part.run.config.search.evaluation_windows), part.run.pricer
    before, after = [], []
    if not models:
        return None
    for trial in part.run.each("FLOPs", models):
        unseen = pricer.measured(trial.architecture, judge(trial.architecture).loads)["flops"]
        before.append(abs(pricer.expected(trial.architecture)["flops"] / unseen - 1))
        after.append(abs(trial.costs["flops"] / unseen - 1))
    return FlopsErrors(len(models), *(Errors(float(np.median(errors)), max(errors)) for errors in (before, after)))


def has_threshold_router(architecture: Architecture) -> bool:
    routers = (layer.feed_forward.router for layer in architecture.layers.values())
    return any(router is not None and router.kind == "threshold" for router in routers)


def _check(part: BudgetRun, directory: StageDirectory, trials: list[Trial]) -> Check:
    """Trains evaluated architectures alone and compares their ranking with that by inherited loss."""
    chosen = choose_members(trials, part.run.config.fidelity.check)
    steps = part.run.config.fidelity.steps
    members: list[CheckedMember] = []
    with part.reporter.progress("fidelity") as bar:
        for index, trial in enumerate(chosen):

            def on_step(step: int, record: dict[str, float], trial: Trial = trial, index: int = index) -> None:
                facts = f"trial {trial.number}  loss {record['loss']:.3f}"
                bar.update(index * steps + step, len(chosen) * steps, facts)

            evaluation = _train(part, directory, trial, on_step)
            assert trial.loss is not None
            members.append(
                CheckedMember(
                    trial=trial.number,
                    fingerprint=trial.architecture.fingerprint,
                    inherited_loss=trial.loss,
                    inherited_standard_error=trial.standard_error,
                    retrained_loss=evaluation and evaluation.loss,
                    retrained_standard_error=evaluation and evaluation.standard_error,
                    flops=trial.costs["flops"],
                    active_parameters=trial.costs["active_parameters"],
                    parameters=trial.costs["parameters"],
                )
            )
    write_csv(directory.path / "check.csv", [asdict(member) for member in members])
    return Check(steps, tuple(members), compare_judges(members, correction_of(trials, members)))


def choose_members(trials: list[Trial], count: int) -> list[Trial]:
    """``count`` feasible trials, or all if there are fewer: those with the lowest and highest loss, and others evenly
    spaced by rank between them."""
    order = sorted((t for t in trials if t.feasible), key=lambda t: (t.loss or 0.0, t.number))
    if len(order) <= count:
        return order
    return [order[index * (len(order) - 1) // (count - 1)] for index in range(count)]


def _best_of_kind(rivals: Sequence[Rival], marks: Sequence[float] | np.ndarray) -> list[Rival]:
    """The rival with the lowest score of each kind."""
    best: dict[str, tuple[float, Rival]] = {}
    for rival, mark in zip(rivals, marks, strict=True):
        if rival.kind not in best or mark < best[rival.kind][0]:
            best[rival.kind] = mark, rival
    return [rival for _, rival in best.values()]


def _train(
    part: BudgetRun, directory: StageDirectory, trial: Trial, on_step: Callable[[int, dict[str, float]], None]
) -> Evaluation | None:
    """The evaluation of ``trial`` trained alone; None where it diverged. It uses the validation split, because
    the correction learnt from it chooses the models that are compared on the test split."""
    architecture, run = trial.architecture, part.run
    config = run.config.retrain.model_copy(update={"steps": run.config.fidelity.steps})
    # The ranking in question is that of trained models: from scratch, or of a trained model's members once recovered.
    weights, teacher = run.start("fidelity") if run.loaded.checkpoint else (None, None)
    recipe = single_recipe(architecture, config, run.config.seed, run.device.bfloat16, teacher)
    identity = fingerprint({"stage": directory.fingerprint, "architecture": architecture.fingerprint})
    try:
        model = run.trainer.finish(recipe, directory.path / architecture.fingerprint, identity, on_step, weights)
    except StageFailed as error:
        part.reporter.say(f"fidelity: trial {trial.number} is left out: {error.problem}")
        return None
    evaluation = run.judge("validation", config.evaluation_windows, model)(architecture)
    return evaluation if math.isfinite(evaluation.loss) else None
