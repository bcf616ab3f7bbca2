"""The command `moesaic retrain DIRECTORY`: train one exported model by its ``retrain.yaml``, without a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moesaic.nas.config import check_translates, load_retrain_file
from moesaic.nas.device import choose_device
from moesaic.nas.exports.folder import load_exported, vocabulary_of
from moesaic.nas.stages.directory import LOCK, RunDirectory, check_place, fingerprint
from moesaic.nas.stages.retrain_models import seed_directory
from moesaic.nas.tasks import Metric, load_task
from moesaic.nas.terminal.progress import Reporter
from moesaic.nas.training.recipe import single_recipe
from moesaic.nas.training.trainer import Trainer
from moesaic.nas.trust.scores import MeanScores, Scores, SeedRun
from moesaic.search_spaces.files import sweep, write_value
from moesaic.supernet import Judge, slice_of
from moesaic.supernet.convert import open_checkpoint


@dataclass(frozen=True, kw_only=True)
class RetrainedExport(MeanScores):
    """``result.json``: means over the seeds, of which ``seed`` is the first."""

    name: str
    fingerprint: str
    device: str
    steps: int
    init: str
    seed: int


def retrain_export(
    directory: Path, overrides: Sequence[str], reporter: Reporter, should_stop: Callable[[], bool]
) -> tuple[RetrainedExport, Sequence[Metric]]:
    """Train an exported model with its own tokenizer. Writes ``directory/retrained``: a folder per seed, and
    ``result.json``. Returns that result and its metrics."""
    model = load_exported(directory)
    file = load_retrain_file(directory / "retrain.yaml", overrides)
    device = choose_device(file.device)
    source = None if file.source is None else open_checkpoint(file.source)
    where = str(directory / "retrain.yaml")
    check_translates(file.data, model.architecture.encoder is not None, where)
    task = load_task(
        file.data,
        model.architecture.backbone.head,
        where,
        lambda text: reporter.say(f"data: {text}"),
        vocabulary_of(directory, model),
        source,
        [directory],
    )
    trainer = Trainer(task, device, file.train, reporter.say, should_stop)
    weights = slice_of(model) if file.retrain.init == "inherited" else None
    unimportant = {"name": True, "seed": True, "train": True, "source": True, "retrain": {"seeds"}}
    inputs = {
        "file": file.model_dump(mode="json", exclude=unimportant),
        "corpus": task.fingerprint,
        "architecture": model.architecture.fingerprint,
    }
    target, runs, steps = RunDirectory(directory / "retrained"), [], file.retrain.steps
    check_place(target.path, LOCK)
    with target.locked(), reporter.progress("retrain") as bar:
        sweep(target.path)
        for seed in range(file.seed, file.seed + file.retrain.seeds):
            trained = trainer.finish(
                single_recipe(model.architecture, file.retrain, seed, device.bfloat16),
                seed_directory(target.path, seed),
                fingerprint(inputs | {"seed": seed}),
                lambda step, record: bar.update(
                    len(runs) * steps + step, file.retrain.seeds * steps, f"loss {record['loss']:.3f}"
                ),
                weights,
            )
            judge = Judge(trained, task.held_out("test", file.retrain.evaluation_windows), device.bfloat16, task.loss)
            scores = Scores.of(task, "test", trained, judge(model.architecture))
            runs.append(SeedRun(**vars(scores), seed=seed, fingerprint=model.architecture.fingerprint))
        result = RetrainedExport(
            **vars(MeanScores.over(runs)),
            name=file.name,
            fingerprint=model.architecture.fingerprint,
            device=str(device),
            steps=steps,
            init=file.retrain.init,
            seed=file.seed,
        )
        write_value(target.path / "result.json", result)
    return result, task.metrics + task.generation_metrics
