"""What the stages of one run share: configuration, device, corpus, folder, and the artifacts made so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from moesaic.nas.config import Config, Loaded, TrainingConfig
from moesaic.nas.context import Context
from moesaic.nas.costs.compliance import most_tolerated, status_of
from moesaic.nas.costs.latency.predictor import LatencyPredictor
from moesaic.nas.costs.measure import MeasuredCosts, measure_costs
from moesaic.nas.costs.price import Pricer
from moesaic.nas.costs.use import Occupancy
from moesaic.nas.data import Corpus, load_corpus
from moesaic.nas.device import Device, choose_device
from moesaic.nas.search.budget import Budget, resolve_budget
from moesaic.nas.stages.directory import RunDirectory, StageDirectory, fingerprint, stopwatch
from moesaic.nas.terminal.progress import Reporter, Task, duration
from moesaic.nas.units import DIMENSIONS
from moesaic.search_spaces import Architecture, MoesaicError, SearchSpace
from moesaic.search_spaces.files import read_json
from moesaic.supernet import Transformer
from moesaic.supernet.checkpoint import load_tensors, load_weights

STAGES = ("supernet", "latency", "search", "fidelity", "export", "retrain", "report")
SHARED_STAGES = ("supernet", "latency", "search")
"""Stages that several budgets have in common."""
_UPSTREAM = {
    "search": ("supernet", "latency"),
    "fidelity": ("search",),
    "export": ("search", "fidelity"),
    "retrain": ("export",),
    "report": ("fidelity", "retrain"),
}
"""Stages whose results a stage depends on."""


def _before(name: str) -> list[str]:
    """All stages that must be complete before ``name``, in their order."""
    direct = _UPSTREAM.get(name, ())
    needed = {*direct, *(stage for before in direct for stage in _before(before))}
    return [stage for stage in STAGES if stage in needed]


@dataclass
class Run:
    """One run. Properties load what earlier stages left; each raises MoesaicError when it is not there."""

    loaded: Loaded
    path: Path
    reporter: Reporter = field(default_factory=Reporter)
    should_stop: Callable[[], bool] = lambda: False
    calibration: Path | None = None
    """Folder of the latency calibration that this process uses, once it has one."""
    spent_ahead: dict[str, float] = field(default_factory=dict)
    """Seconds of a stage's work that were needed, and spent, before its turn."""
    name: str = ""
    """Of the budget, where the configuration has several."""
    whole: Run | None = None
    """The run of all budgets, of which this is the part for one; the stages up to the search are the whole one's."""

    def parts(self) -> list[Run]:
        """A run for each of several budgets in a folder of its own; this one itself where there is one budget."""
        if not self.config.budgets:
            return [self]
        return [
            Run(
                self.loaded.under(name),
                self.path / "budgets" / name,
                self.reporter,
                self.should_stop,
                self.calibration,
                name=name,
                whole=self,
            )
            for name in self.config.budgets
        ]

    @property
    def config(self) -> Config:
        return self.loaded.config

    @property
    def space(self) -> SearchSpace:
        return self.loaded.space

    @cached_property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.path)

    @cached_property
    def device(self) -> Device:
        if self.whole:
            return self.whole.device
        return choose_device(self.config.device)

    @cached_property
    def corpus(self) -> Corpus:
        if self.whole:
            return self.whole.corpus
        where = self.loaded.source.where(("data", "files") if self.config.data.files else ("data",))
        return load_corpus(self.config.data, where, lambda text: self.reporter.say(f"data: {text}"))

    @cached_property
    def context(self) -> Context:
        """What costs are of: the pass that ``latency`` describes. On a GPU a row tile is that of its kernels."""
        latency = self.config.latency
        return Context(
            self.corpus.vocab_size,
            latency.sequence_length or self.config.data.sequence_length,
            latency.batch_size,
            self.device.bytes_per_value,
            latency.phase,
            row_tile=64 if self.device.kind == "cuda" else 16,
        )

    @cached_property
    def stages(self) -> dict[str, StageDirectory]:
        """Each stage's folder with the inputs that decide its result; later stages depend on earlier ones' results."""
        config = self.config.model_dump(mode="json")
        device = {"kind": self.device.kind, "dtype": self.device.dtype, "threads": self.device.threads}
        inputs: dict[str, dict[str, Any]] = {
            "supernet": {
                "seed": config["seed"],
                "data": config["data"],
                "corpus": self.corpus.fingerprint,
                "space": config["space"],
                "supernet": config["supernet"],
                "device": device,
            },
            "latency": {
                "seed": config["seed"],
                "space": config["space"],
                "latency": config["latency"],
                "vocabulary": self.context.vocab_size,
                "sequence_length": self.context.sequence_length,
                "device": {**device, "name": self.device.name, "torch": self.device.torch},
            },
            "search": {
                "seed": config["seed"],
                "budget": config["budget"],
                "budgets": config["budgets"],
                "search": config["search"],
            },
            "fidelity": {
                "seed": config["seed"],
                "budget": config["budget"],
                "fidelity": config["fidelity"],
                "training": {
                    name: config["retrain"][name]
                    for name in (*TrainingConfig.model_fields, "evaluation_windows")
                    if name != "steps"
                },
            },
            "export": {"export": config["export"]},
            "retrain": {"seed": config["seed"], "retrain": config["retrain"]},
            "report": {"name": config["name"]},
        }
        found: dict[str, StageDirectory] = {}
        for name in STAGES:
            if self.whole and name in SHARED_STAGES:
                found[name] = self.whole.stages[name]
                continue
            for before in _UPSTREAM.get(name, ()):
                inputs[name][before] = self._result_id(found[before])
            found[name] = self.directory.stage("exports" if name == "export" else name, inputs[name])
        return found

    @staticmethod
    def _result_id(stage: StageDirectory) -> str:
        """A finished stage's result: its inputs, and its digest where it measured something."""
        digest = stage.artifact().get("digest") if stage.complete else None
        return fingerprint({"inputs": stage.inputs, "digest": digest})

    @contextmanager
    def work(self, name: str, extendable: tuple[str, ...] = ()) -> Iterator[StageDirectory | None]:
        """The stage's folder to work in, or None when it is complete already; marks it complete when left in peace."""
        stage = self.stages[name]
        if stage.complete:
            self.reporter.say(f"{name}: complete, skipped")
            yield None
            return
        self.require(*_before(name), for_stage=name)
        resumed, changes = self.directory.prepare(stage, extendable)
        if changes:
            again = "continues" if resumed else "runs again; what was there moved to previous/"
            self.reporter.say(f"{name}: {again}, because {'; '.join(changes)}")
        elif resumed:
            self.reporter.say(f"{name}: continues where it stopped")
        with stopwatch() as seconds:
            yield stage
        digest_file = stage.path / "digest"
        digest = digest_file.read_text() if digest_file.exists() else None
        total = seconds[0] + self.spent_ahead.pop(name, 0.0)
        stage.finish(total, resumed, digest)
        self.__dict__.pop("stages", None)  # later stages' inputs hold this one's result
        self.reporter.say(f"{name}: done in {duration(total)}")

    def require(self, *names: str, for_stage: str) -> None:
        """Raises MoesaicError naming the command that makes the first stage that is missing."""
        for name in names:
            if not self.stages[name].complete:
                raise MoesaicError(
                    f"stage {for_stage} needs stage {name}, which is not complete for this configuration",
                    where=str(self.stages[name].path),
                    nearest=f"moesaic {name} {self.loaded.source.name}",
                )

    @contextmanager
    def task(self, name: str) -> Iterator[Task]:
        with self.reporter.task(name) as task:
            yield task

    @cached_property
    def supernet(self) -> Transformer:
        """The trained supernet on the device, in evaluation mode."""
        if self.whole:
            return self.whole.supernet
        path = self.stages["supernet"].path / "model.safetensors"
        tensors, _ = load_tensors(path)
        model = Transformer(self.space.envelope, self.corpus.vocab_size, self.config.supernet.sharing)
        load_weights(model, tensors, str(path))
        return model.to(self.device.torch_device).eval()

    @cached_property
    def pricer(self) -> Pricer:
        """Costs with the measured occupancy and the calibrated latency."""
        if self.whole:
            return self.whole.pricer
        occupancy = Occupancy.from_rows(read_json(self.stages["supernet"].path / "occupancy.json"))
        return Pricer(self.context, occupancy, self.predictor)

    @cached_property
    def predictor(self) -> LatencyPredictor:
        path = self.stages["latency"].path / "predictor.json"
        return LatencyPredictor.load(path, self.device.fingerprint, str(self.device))

    @cached_property
    def budget(self) -> Budget:
        return resolve_budget(self.config, self.space, self.pricer)

    def windows(self, split: str, count: int) -> Tensor:
        return self.corpus.windows(split, count)

    def measure(self, model: Transformer, windows: Tensor) -> MeasuredCosts:
        """What ``model`` costs on this device; a latency over its budget is measured again before it is believed."""
        limits = {line.cost: line.limit for line in self.budget.lines}
        most_ms = most_tolerated(limits.get("latency", math.inf))
        return measure_costs(model, windows, self.pricer, self.device, most_ms)

    def budget_lines(self, architecture: Architecture, measured: dict[str, float]) -> list[dict[str, Any]]:
        """``[{name, bind, confidence, limit, predicted, bound, measured, unit, status}]`` for a measured model.

        ``bound`` is the predicted cost, or its upper edge where a confidence is asked for.
        """
        expected, worst = self.pricer.expected(architecture), self.pricer.worst(architecture)
        bound = self.budget.bound(architecture)
        return [
            {
                "name": line.cost,
                "bind": line.bind,
                "confidence": line.confidence,
                "limit": line.limit,
                "predicted": (worst if line.bind == "worst" else expected)[line.cost],
                "bound": bound[line.cost],
                "measured": measured[line.cost],
                "unit": f"{DIMENSIONS[line.cost].unit} {DIMENSIONS[line.cost].per}".strip(),
                "status": status_of(measured[line.cost], line.limit),
            }
            for line in self.budget.lines
        ]
