"""Stage export: the best architecture and a spread of the front as models of their own, measured against the budget."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nas.costs.measure import latency_figures, measure_costs
from nas.costs.probe import autocast
from nas.export import export_model
from nas.retrain import loss_figures
from nas.search.pareto import spread
from nas.search.trials import Trial
from nas.stages.run import Run
from nas.stages.search import load_search
from search_spaces.files import write_json
from supernet import Transformer, evaluate


def run_export(run: Run) -> None:
    """Leaves a folder for ``best`` and each ``front-N``, and ``exports.json``."""
    with run.work("export") as stage:
        if stage is None:
            return
        _, result = load_search(run)
        chosen = {"best": result.best}
        others = [trial for trial in result.front if trial is not result.best]
        if others and run.config.export.front:
            points = np.array([trial.values for trial in others])
            for place, index in enumerate(spread(points, run.config.export.front), start=1):
                chosen[f"front-{place}"] = others[index]
        rows = []
        with run.task("export") as task:
            for done, (name, trial) in enumerate(chosen.items()):
                task.update(done, len(chosen), name)
                rows.append(_export(run, stage.path / name, trial))
            task.update(len(chosen), len(chosen))
        write_json(stage.path / "exports.json", rows)


def _export(run: Run, directory: Path, trial: Trial) -> dict[str, Any]:
    model = run.supernet.extract(trial.architecture).eval()
    windows = run.windows("test", run.config.retrain.evaluation_windows)
    with autocast(run.device):
        evaluation = evaluate(model, windows)
    predicted = dict(run.pricer.expected(trial.architecture))
    measured = measure_costs(model, windows, run.pricer, run.device)
    tokens = windows[:4, :-1].to(run.device.torch_device)
    with torch.inference_mode():
        difference = (run.supernet(tokens, trial.architecture) - model(tokens)).abs().max().item()
    figures = {
        "name": directory.name,
        "trial": trial.number,
        "fingerprint": trial.architecture.fingerprint,
        "weights": "inherited from the supernet, not retrained",
        "validation_loss": trial.loss,
        **loss_figures(run.corpus, evaluation),
        "predicted": predicted,
        "measured": measured.costs,
        "latency": latency_figures(measured.timing, predicted["latency"], run.predictor),
        "budget": run.budget_lines(trial.architecture, measured.costs),
        "device": str(run.device),
        "context": asdict(run.context),
        "slice_max_logit_difference": difference,
    }
    exported = Transformer(trial.architecture, run.corpus.vocab_size)
    exported.load_state_dict(model.state_dict())
    export_model(directory, exported.eval(), run.config, run.corpus.tokenizer_path, figures, windows)
    return figures
