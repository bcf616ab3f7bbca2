"""Trains models in this process, or in several that it starts, watches and stops."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from moesaic.nas.config import TrainConfig
from moesaic.nas.device import Device
from moesaic.nas.tasks import Task
from moesaic.nas.training.recipe import Recipe
from moesaic.search_spaces import MoesaicError
from moesaic.search_spaces.files import PathLike, write_json
from moesaic.supernet import Transformer, Weights, train
from moesaic.supernet.checkpoint import load_tensors, load_weights, save_tensors
from moesaic.supernet.train import CHECKPOINT, load_trained, save_initial

OnStep = Callable[[int, dict[str, float]], None]
JOB, LOGS, WEIGHTS = "training.json", "workers", "model.safetensors"
_LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Trainer:
    """Trains models for ``task`` on ``device``, in the number of processes that ``config`` sets.

    ``say`` is told when workers had to be restarted; ``should_stop`` is asked before each step.
    """

    task: Task
    device: Device
    config: TrainConfig = field(default_factory=TrainConfig)
    say: Callable[[str], None] = lambda text: None
    should_stop: Callable[[], bool] = lambda: False

    def train(
        self,
        recipe: Recipe,
        directory: PathLike,
        identity: str,
        on_step: OnStep = lambda step, record: None,
        weights: Weights | None = None,
    ) -> Transformer:
        """The trained model, on the device, in evaluation mode.

        ``directory`` receives checkpoints and metrics, under ``identity``; an interrupted training continues there.
        ``weights`` replace the random initial ones. Where several processes train, ``on_step`` gets the latest step
        now and then, and ``directory`` also holds ``training.json``, with which ``torchrun`` can continue the training
        until it is complete. If workers failed, their output stays in ``workers/``.

        Raises
        ------
        StageFailed, Interrupted, MoesaicError : as ``supernet.train``.
        WorkersLost : as ``moesaic.nas.training.elastic.launch``.
        """
        directory = Path(directory)
        model = (weights or recipe.weights(self.task))(recipe.architecture).to(self.device.torch_device)
        if self.config.workers == 1:
            data = recipe.data(self.task)
            train(model, data, recipe.settings, directory, identity, on_step, self.should_stop)
            return model.eval()
        _check_devices(self.device, self.config.workers)
        model.cpu()  # the GPUs are the workers'
        if not (directory / CHECKPOINT).exists():
            save_initial(model, directory, identity)
        facts = {"identity": identity, "device": asdict(self.device), "shard": self.config.shard}
        write_json(directory / JOB, {**facts, "task": self.task.plain(), "recipe": recipe.plain()})
        self._run(directory, on_step)
        load_trained(model, directory / CHECKPOINT)
        (directory / JOB).unlink()
        return model.to(self.device.torch_device).eval()

    def finish(
        self,
        recipe: Recipe,
        directory: PathLike,
        identity: str,
        on_step: OnStep = lambda step, record: None,
        weights: Weights | None = None,
    ) -> Transformer:
        """As ``train``, but leaves ``model.safetensors`` in place of a checkpoint, and loads it where it exists for
        ``identity``."""
        directory = Path(directory)
        path = directory / WEIGHTS
        tensors, metadata = load_tensors(path) if path.exists() else ({}, {})
        if metadata.get("identity") == identity:
            model = Transformer(recipe.architecture, self.task.vocab_size, recipe.sharing, self.task.source_vocab_size)
            load_weights(model, tensors, str(path))
            return model.to(self.device.torch_device).eval()
        model = self.train(recipe, directory, identity, on_step, weights)
        save_tensors(path, dict(model.named_parameters()), {"identity": identity})
        (directory / CHECKPOINT).unlink(missing_ok=True)  # three times the model's size
        return model

    def _run(self, directory: Path, on_step: OnStep) -> None:
        """Run the workers to the end of the training in ``directory``."""
        from moesaic.nas.training.elastic import launch  # imported here, as the link: only several processes use them
        from moesaic.nas.training.link import Link

        link, logs = Link.serve(), directory / LOGS
        step = restart = 0
        agent = _in_thread(lambda: launch(self.config, directory / JOB, logs, link.address))
        try:
            ended = False
            while not ended:
                ended = bool(wait([agent], _LOOK_SECONDS).done)
                if self.should_stop():
                    link.ask_to_stop()
                news = link.news()
                if news is None or news["step"] == step:
                    continue
                if news["restart"] > restart:
                    restart = news["restart"]
                    self.say(f"a worker was lost; all continue from step {news['first']} (restart {restart})")
                step = news["step"]
                on_step(step, news["record"])
        finally:
            link.ask_to_stop()
        if (error := link.error()) is None:
            agent.result()
        shutil.rmtree(logs, ignore_errors=True)
        if error is not None:
            raise error


def _check_devices(device: Device, workers: int) -> None:
    if device.kind == "cuda" and workers > torch.cuda.device_count():
        raise MoesaicError(
            "a worker needs a GPU of its own",
            where="train.workers",
            found=workers,
            allowed=f"at most {torch.cuda.device_count()}, the GPUs of this machine",
            nearest=torch.cuda.device_count(),
        )


def _in_thread(function: Callable[[], None]) -> Future[None]:
    """Run outside the main thread, where the agent would take over Ctrl-C, in a thread that does not block exit."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
