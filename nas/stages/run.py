"""State shared by the stages of a run: configuration, device, task, folders, and the artifacts made so far."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from moesaic.kernels import implementation_on
from moesaic.nas.config import Config, LimitConfig, Loaded
from moesaic.nas.context import Context
from moesaic.nas.costs.compliance import MeasuredLine, most_tolerated, status_of
from moesaic.nas.costs.latency.predictor import LatencyPredictor
from moesaic.nas.costs.measure import MeasuredCosts, measure_costs
from moesaic.nas.costs.price import Pricer
from moesaic.nas.costs.use import Occupancy, OccupancyRow
from moesaic.nas.data.cache import expanded
from moesaic.nas.data.tokenizer import Vocabulary, read_tokenizer
from moesaic.nas.device import Device, choose_device
from moesaic.nas.search.budget import Budget, resolve_budget
from moesaic.nas.stages.directory import RunDirectory, StageDirectory
from moesaic.nas.stages.stage import BY_NAME, STAGES, Stage
from moesaic.nas.tasks import Metric, Task, load_task
from moesaic.nas.tasks.questions import ACCURACY, Questions
from moesaic.nas.tasks.task import Split
from moesaic.nas.terminal.progress import Reporter
from moesaic.nas.training.recipe import Teacher
from moesaic.nas.training.trainer import Trainer
from moesaic.nas.trust.scores import Scores
from moesaic.nas.units import DIMENSIONS
from moesaic.search_spaces import Architecture, Interrupted, SearchSpace
from moesaic.search_spaces.files import read_value
from moesaic.supernet import Batch, Evaluation, Judge, LayerLoad, Transformer, Weights, slice_of
from moesaic.supernet.checkpoint import load_tensors, load_weights
from moesaic.supernet.sharing import Sharing
from moesaic.supernet.sparsify.repair import repaired

Item = TypeVar("Item")
SUPERNET = "model.safetensors"
"""The file of the shared weights, in the folder of their stage."""


@dataclass
class Run:
    """One run. Properties load results of earlier stages; each raises MoesaicError when its result is missing."""

    loaded: Loaded
    path: Path
    reporter: Reporter = field(default_factory=Reporter)
    should_stop: Callable[[], bool] = lambda: False
    tune_callbacks: Sequence[Any] = ()
    """Objects of ``ray.tune.Callback`` for a search under Ray Tune."""
    calibration: Path | None = None
    """Folder of the latency calibration that this process uses, once known."""
    latency_asked: bool = False
    """Calibrate latency even where no budget line and no objective needs it."""
    spent_ahead: dict[str, float] = field(default_factory=dict)
    """Seconds of a stage's work that were already spent before its turn."""
    _folders: dict[str, StageDirectory] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.path = Path(self.path)  # programs give a str

    @cached_property
    def budgets(self) -> tuple[BudgetRun, ...]:
        """What belongs to each budget."""
        return tuple(BudgetRun(self, name) for name in self.config.budgets_by_name)

    @property
    def config(self) -> Config:
        return self.loaded.config

    @property
    def space(self) -> SearchSpace:
        return self.loaded.space

    @property
    def source_name(self) -> str:
        """The file that the configuration was read from."""
        return self.loaded.source.name

    def command(self, name: str, *settings: str) -> str:
        """The command line that does ``name`` in this run's folder, with further ``settings``, quoted to be pasted."""
        words = ["moesaic", name, self.source_name, *self.loaded.overrides, *settings, "--out", str(self.path)]
        return shlex.join(words)

    @property
    def own_files(self) -> list[Path]:
        """What this run reads and writes itself: never part of its corpus, even where that is all around it."""
        stages = (stage.folder_name for stage in STAGES)
        written = (*stages, "previous", "budgets", "config.yaml", "env.json", "summary.json")
        return [Path(self.loaded.source.name), self.path, *(self.path / name for name in written)]

    @cached_property
    def device(self) -> Device:
        return choose_device(self.config.device)

    @cached_property
    def task(self) -> Task:
        where = self.loaded.source.where(("data", "files") if self.config.data.files else ("data",))
        source = self.loaded.checkpoint
        return load_task(
            self.config.data,
            self.space.backbone.head,
            where,
            lambda text: self.reporter.say(f"data: {text}"),
            None if source is None else Vocabulary(source.tokenizer, source.vocab_size),
            source,
            self.own_files,
        )

    @cached_property
    def questions(self) -> Questions | None:
        """Raises MoesaicError where the file cannot be read."""
        return None if self.config.questions is None else Questions.read(expanded(self.config.questions, "questions"))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Those of the task, and the accuracy where there are questions."""
        own = self.task.metrics + self.task.generation_metrics
        return own + (() if self.questions is None else (ACCURACY,))

    def scores(self, split: Split, model: Transformer, evaluation: Evaluation) -> Scores:
        """Of ``model``, from its ``evaluation`` on a split: ``metrics``."""
        scores = Scores.of(self.task, split, model, evaluation)
        if self.questions is None:
            return scores
        found = self.questions.accuracy(model, read_tokenizer(self.task.tokenizer))
        return replace(scores, metrics=scores.metrics | {ACCURACY.name: found})

    @cached_property
    def trainer(self) -> Trainer:
        return Trainer(self.task, self.device, self.config.train, self.reporter.say, self.should_stop)

    @cached_property
    def context(self) -> Context:
        """The pass whose costs count, as ``latency`` describes it."""
        latency, translates = self.config.latency, self.space.encoder is not None
        phase = latency.phase or ("translate" if translates else "prefill")
        return Context(
            self.task.vocab_size,
            latency.sequence_length or self.task.sequence_length,
            latency.batch_size,
            self.device.bytes_per_value,
            phase,
            implementation_on(self.device.torch_device),
            (latency.source_length or self.task.sequence_length) if translates else 0,
            latency.beam if phase == "translate" else 1,
            self.task.source_vocab_size,
        )

    @property
    def needs_latency(self) -> bool:
        """Whether a budget line, an objective or the command is of latency."""
        lines = [name for limits in self.config.budgets_by_name.values() for name in limits]
        return self.latency_asked or "latency" in (*lines, *self.config.search.objectives)

    def folder(self, name: str) -> StageDirectory:
        """The folder of a shared stage, with the inputs that decide its result, including the results it needs."""
        if name not in self._folders:
            self._folders[name] = _folder(BY_NAME[name], self)
        return self._folders[name]

    def forget_folders(self) -> None:
        """Compute inputs again, after results changed."""
        self._folders.clear()
        for part in self.budgets:
            part.folders.clear()

    def check_stop(self, what: str) -> None:
        """Raises Interrupted where a stop was requested, for work that leaves nothing to continue from."""
        if self.should_stop():
            raise Interrupted(f"stopped in {what}; the same command repeats it")

    def each(self, name: str, items: Sequence[Item]) -> Iterator[Item]:
        """``items`` one by one, with progress under ``name``. Raises Interrupted as ``check_stop``."""
        with self.reporter.progress(name) as bar:
            for done, item in enumerate(items):
                self.check_stop(name)
                bar.update(done, len(items))
                yield item
            bar.update(len(items), len(items))

    def judge(self, split: Split, windows: int, model: Transformer | None = None) -> Judge:
        """Evaluates slices of ``model`` (by default of the supernet) on held-out sequences of a split; on those for
        validation, by what the search goes by."""
        batch, bleu = self.task.held_out(split, windows), split == "validation" and self.config.search.judge == "bleu"
        return Judge(model or self.supernet, batch, self.device.bfloat16, "bleu" if bleu else self.task.loss)

    @property
    def judged_in(self) -> str:
        """What losses on the validation split are in."""
        return "1 - BLEU" if self.config.search.judge == "bleu" else self.task.unit

    @cached_property
    def supernet(self) -> Transformer:
        """The trained supernet on the device, in evaluation mode."""
        path = self.folder("supernet").path / SUPERNET
        tensors, _ = load_tensors(path)
        model = Transformer(self.space.envelope, self.task.vocab_size, self.sharing, self.task.source_vocab_size)
        load_weights(model, tensors, str(path))
        return model.to(self.device.torch_device).eval()

    def start(
        self, what: str, on_layer: Callable[[int], None] = lambda done: None
    ) -> tuple[Weights | None, Teacher | None]:
        """How a model of ``retrain`` starts (None: from random weights), and what it imitates while it trains (None:
        what the task says). ``what`` names the stage in messages; ``on_layer`` gets the layers of a model that are
        repaired."""
        config = self.config.retrain
        supernet = self.folder("supernet").path / SUPERNET
        imitates = config.distil and self.task.imitation is not None
        teacher = Teacher(str(supernet), self.space.envelope, self.space.largest) if imitates else None
        if config.init == "scratch":
            return None, teacher
        if config.init == "inherited":
            return slice_of(self.supernet), teacher
        windows = self.task.batch(config.repair_windows, self.config.seed, 0).tokens

        def repaired_layer(done: int) -> None:
            on_layer(done)
            self.check_stop(what)

        return repaired(self.supernet, self.space.largest, windows, repaired_layer), teacher

    @property
    def sharing(self) -> Sharing:
        """Which rows a slice takes: a trained model's experts keep their own."""
        return "nested" if self.loaded.checkpoint else self.config.supernet.sharing

    @cached_property
    def pricer(self) -> Pricer:
        """Costs with the measured occupancy and, where it is needed, the calibrated latency."""
        rows = read_value(self.folder("supernet").path / "occupancy.json", list[OccupancyRow])
        return Pricer(self.context, Occupancy.of(rows), self.predictor)

    @cached_property
    def predictor(self) -> LatencyPredictor | None:
        """None where nothing needs latency."""
        folder = self.folder("latency")
        return LatencyPredictor.load(folder.path / "predictor.json", self.device) if folder.inputs["needed"] else None


@dataclass
class BudgetRun:
    """The part of a run for one budget. Each of several has its own folder; a single budget has an empty name."""

    run: Run
    name: str
    folders: dict[str, StageDirectory] = field(default_factory=dict, repr=False)

    @property
    def path(self) -> Path:
        return self.run.path / "budgets" / self.name if self.name else self.run.path

    @property
    def limits(self) -> dict[str, LimitConfig]:
        """The budget as configured."""
        return self.run.config.budgets_by_name[self.name]

    @cached_property
    def budget(self) -> Budget:
        return resolve_budget(self.limits, self.run.space, self.run.pricer)

    @property
    def reporter(self) -> Reporter:
        return self.run.reporter

    @property
    def spent_ahead(self) -> dict[str, float]:
        return self.run.spent_ahead

    def command(self, name: str) -> str:
        return self.run.command(name)

    def folder(self, name: str) -> StageDirectory:
        """The folder of any stage; shared stages have theirs in the run's folder."""
        if BY_NAME[name].shared:
            return self.run.folder(name)
        if name not in self.folders:
            self.folders[name] = _folder(BY_NAME[name], self)
        return self.folders[name]

    def forget_folders(self) -> None:
        self.run.forget_folders()

    def measure(self, model: Transformer, loads: Sequence[LayerLoad | None], batch: Batch) -> MeasuredCosts:
        """Costs of ``model`` on this device, under the ``loads`` of an evaluation; a latency over the budget is
        measured again."""
        limits = {line.cost: line.limit for line in self.budget.lines}
        limit_ms = most_tolerated(limits.get("latency", math.inf))
        return measure_costs(model, loads, batch, self.run.pricer, self.run.device, limit_ms)

    def measured_lines(self, architecture: Architecture, measured: dict[str, float]) -> tuple[MeasuredLine, ...]:
        """Every budget line of a model with these measured costs."""
        expected, worst = self.run.pricer.expected(architecture), self.run.pricer.worst(architecture)
        bound = self.budget.bound(architecture)
        return tuple(
            MeasuredLine(
                name=line.cost,
                bind=line.bind,
                confidence=line.confidence,
                limit=line.limit,
                predicted=(worst if line.bind == "worst" else expected)[line.cost],
                bound=bound[line.cost],
                measured=measured[line.cost],
                unit=f"{DIMENSIONS[line.cost].unit} {DIMENSIONS[line.cost].per}".strip(),
                status=status_of(measured[line.cost], line.limit),
            )
            for line in self.budget.lines
        )


def _folder(stage: Stage, run: Run | BudgetRun) -> StageDirectory:
    inputs: dict[str, Any] = stage.inputs(run)
    inputs |= {needed: run.folder(needed).result_id() for needed in stage.needs}
    return RunDirectory(run.path).stage(stage.folder_name, inputs, stage.private)
