"""Stage fidelity: what the search's losses can tell apart, and how well they rank what is trained from scratch."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.nas.costs.latency.probe import autocast
from moesaic.nas.search.loop import SearchResult
from moesaic.nas.search.trials import Trial
from moesaic.nas.stages.directory import StageDirectory, fingerprint
from moesaic.nas.stages.run import Run
from moesaic.nas.stages.run_search import inherited_loss, load_search, search_folder
from moesaic.nas.training.single import paired_difference, retrain
from moesaic.nas.training.workers import Workers
from moesaic.nas.trust.correction import Judged
from moesaic.nas.trust.judges import compare_judges, correction_of, judged_trial
from moesaic.nas.trust.sentences import corrects
from moesaic.nas.trust.significance import adjusted_p_values, levels
from moesaic.search_spaces import Architecture, StageFailed
from moesaic.search_spaces.files import read_json, write_atomically, write_json, write_text
from moesaic.supernet import Evaluation, evaluate

_LEVEL = 0.05
_FLOPS_MODELS = 16


def run_fidelity(run: Run) -> None:
    """Leaves ``fidelity.json`` and, with ``fidelity.check``, ``check.csv`` and a folder with metrics per member."""
    with run.work("fidelity") as stage:
        if stage is None:
            return
        trials, result = load_search(run)
        found = _tell_apart(run, result)
        found["flops"] = _flops_errors(run, trials)
        rivals = read_json(search_folder(run) / "rivals.json")
        found |= {"check": None, "corrected": {}}
        marks = [rival["loss"] for rival in rivals]
        if run.config.fidelity.check:
            found["check"] = check = _check(run, stage, trials)
            correction = correction_of(trials, check["members"])
            if correction is not None and corrects(check["judges"]):
                feasible = [trial for trial in trials if trial.feasible]
                losses = correction([judged_trial(trial) for trial in feasible])
                found["corrected"] = {str(t.number): float(loss) for t, loss in zip(feasible, losses, strict=True)}
                marks = correction([_judged_rival(rival) for rival in rivals])
        found["contenders"] = _best_of_kind(rivals, marks)
        write_json(stage.path / "fidelity.json", found)
        write_text(stage.path / "digest", fingerprint(found["corrected"]))
        for weights in stage.path.glob("*/*.safetensors"):  # of models trained too little to be of use
            weights.unlink()


def _tell_apart(run: Run, result: SearchResult) -> dict[str, Any]:
    """The front by rising loss and the search's rivals, each with its loss and whether it differs from the best one."""
    judged = read_json(search_folder(run) / "rivals.json")
    rivals = _best_of_kind(judged, [rival["loss"] for rival in judged])
    models = {f"trial {trial.number}": trial.architecture for trial in result.front}
    models |= {rival["kind"]: Architecture.from_dict(rival["architecture"]) for rival in rivals}
    judge = inherited_loss(run)
    evaluations: list[Evaluation] = []
    with run.task("front") as task:
        for name, architecture in models.items():
            task.update(len(evaluations), len(models), name)
            evaluations.append(judge(architecture))
        task.update(len(models), len(models))
    p_values = adjusted_p_values(np.array([evaluation.sequence_losses for evaluation in evaluations]))
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "fingerprint": architecture.fingerprint,
            "loss": evaluation.loss,
            "standard_error": evaluation.standard_error,
            "above_best": paired_difference(evaluation, evaluations[0]),
            "p_value": float(p_value),
            "differs": bool(p_value < _LEVEL),
        }
        for (name, architecture), evaluation, p_value in zip(models.items(), evaluations, p_values[0], strict=True)
    ]
    size = len(result.front)
    differ = p_values[:size, :size] < _LEVEL
    return {
        "sequences": len(evaluations[0].sequence_losses),
        "front": [row | {"level": level} for row, level in zip(rows[:size], levels(differ), strict=True)],
        "neighbours_that_differ": int(np.diagonal(differ, 1).sum()),
        "rivals": rows[size:],
    }


def _flops_errors(run: Run, trials: list[Trial]) -> dict[str, Any] | None:
    """Relative errors of FLOPs on unseen text (the test split): as they are expected ``before`` a model with threshold
    routers is evaluated, and ``after`` it was, on the validation split. None where no trial has such a router."""
    models = choose_members([trial for trial in trials if has_threshold_router(trial.architecture)], _FLOPS_MODELS)
    windows, pricer = run.windows("test", run.config.search.evaluation_windows), run.pricer
    errors: dict[str, list[float]] = {"before": [], "after": []}
    with run.task("FLOPs") as task, autocast(run.device):
        for done, trial in enumerate(models):
            task.update(done, len(models), f"trial {trial.number}")
            loads = evaluate(run.supernet, windows, trial.architecture).loads
            unseen = pricer.measured(trial.architecture, loads)["flops"]
            errors["before"].append(abs(pricer.expected(trial.architecture)["flops"] / unseen - 1))
            errors["after"].append(abs(trial.costs["flops"] / unseen - 1))
        task.update(len(models), len(models))
    if not models:
        return None
    summary = {when: {"median": float(np.median(e)), "largest": max(e)} for when, e in errors.items()}
    return {"models": len(models), **summary}


def has_threshold_router(architecture: Architecture) -> bool:
    routers = (layer.feed_forward.router for layer in architecture.decoder.layers)
    return any(router is not None and router.kind == "threshold" for router in routers)


def _check(run: Run, stage: StageDirectory, trials: list[Trial]) -> dict[str, Any]:
    """Trains members of the search from scratch and compares their order with that of their inherited losses."""
    members = choose_members(trials, run.config.fidelity.check)
    steps = run.config.fidelity.steps
    rows: list[dict[str, Any]] = []
    with run.task("fidelity") as task:
        for index, trial in enumerate(members):

            def on_step(step: int, record: dict[str, float], trial: Trial = trial, index: int = index) -> None:
                facts = f"trial {trial.number}  loss {record['loss']:.3f}"
                task.update(index * steps + step, len(members) * steps, facts)

            evaluation = _train(run, stage, trial, on_step)
            rows.append(
                {
                    "trial": trial.number,
                    "fingerprint": trial.architecture.fingerprint,
                    "inherited_loss": trial.loss,
                    "inherited_standard_error": trial.standard_error,
                    "retrained_loss": evaluation and evaluation.loss,
                    "retrained_standard_error": evaluation and evaluation.standard_error,
                    **{cost: trial.costs[cost] for cost in ("flops", "active_parameters", "parameters")},
                }
            )
    _write_table(stage.path / "check.csv", rows)
    return {"steps": steps, "members": rows, "judges": compare_judges(rows, correction_of(trials, rows))}


def choose_members(trials: list[Trial], count: int) -> list[Trial]:
    """``count`` feasible trials, or all if there are fewer: the one of least loss, the one of most, and others at even
    steps of the order between them."""
    order = sorted((t for t in trials if t.feasible), key=lambda t: (t.loss or 0.0, t.number))
    if len(order) <= count:
        return order
    return [order[index * (len(order) - 1) // (count - 1)] for index in range(count)]


def _best_of_kind(rivals: list[dict[str, Any]], marks: Sequence[float] | np.ndarray) -> list[dict[str, Any]]:
    """Of each kind the rival with the least mark."""
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    for rival, mark in zip(rivals, marks, strict=True):
        if rival["kind"] not in best or mark < best[rival["kind"]][0]:
            best[rival["kind"]] = mark, rival
    return [rival for _, rival in best.values()]


def _judged_rival(rival: dict[str, Any]) -> Judged:
    architecture, costs = Architecture.from_dict(rival["architecture"]), rival["costs"]
    return Judged(architecture, rival["loss"], costs["flops"], costs["parameters"])


def load_judged(run: Run) -> dict[str, float]:
    """The corrected loss of feasible trials by their number; empty where inherited losses decide."""
    return read_json(run.stages["fidelity"].path / "fidelity.json")["corrected"]


def load_rivals(run: Run) -> list[dict[str, Any]]:
    """The best uniform and the best dense layout, ``{kind, loss, costs, architecture}``: judged as the searched one."""
    return read_json(run.stages["fidelity"].path / "fidelity.json")["contenders"]


def _train(
    run: Run, stage: StageDirectory, trial: Trial, on_step: Callable[[int, dict[str, float]], None]
) -> Evaluation | None:
    """The evaluation of ``trial`` trained from scratch; None where it diverged. It is on the validation split, since a
    correction learnt from it chooses what is compared on the test split in the end."""
    architecture = trial.architecture
    try:
        model = retrain(
            architecture,
            run.config.retrain.model_copy(update={"steps": run.config.fidelity.steps}),
            run.corpus,
            run.device,
            run.config.seed,
            stage.path / architecture.fingerprint,
            fingerprint({"stage": stage.fingerprint, "architecture": architecture.fingerprint}),
            on_step=on_step,
            should_stop=run.should_stop,
            workers=Workers(run.config.train, run.reporter.say),
        ).model
    except StageFailed as error:
        run.reporter.say(f"fidelity: trial {trial.number} is left out: {error.problem}")
        return None
    with autocast(run.device):
        evaluation = evaluate(model, run.windows("validation", run.config.retrain.evaluation_windows))
    return evaluation if math.isfinite(evaluation.loss) else None


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)
