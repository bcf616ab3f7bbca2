"""A training in this process, or in several that are started, watched and stopped from here."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from moesaic.nas.config import TrainConfig
from moesaic.nas.data import Corpus
from moesaic.nas.device import Device
from moesaic.nas.training.recipe import Job, Training
from moesaic.search_spaces import MoesaicError
from moesaic.search_spaces.files import write_json
from moesaic.supernet import train
from moesaic.supernet.train import CHECKPOINT, load_trained, save_initial

OnStep = Callable[[int, dict[str, float]], None]
JOB, LOGS = "training.json", "workers"
_LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Workers:
    """How many processes train, by ``config``. ``say`` is told when they had to be restarted."""

    config: TrainConfig = field(default_factory=TrainConfig)
    say: Callable[[str], None] = lambda text: None

    def train(
        self,
        training: Training,
        job: Job,
        corpus: Corpus,
        device: Device,
        directory: Path,
        identity: str,
        on_step: OnStep,
        should_stop: Callable[[], bool],
    ) -> None:
        """``supernet.train`` in this process, or in several, to which ``job`` says what ``training`` is.

        Of several, ``on_step`` is told the latest step now and then, and ``directory`` also holds ``training.json``,
        with which ``torchrun`` can continue the training, until that is complete; ``workers/`` with what they printed
        stays when they failed.

        Raises
        ------
        StageFailed, Interrupted, MoesaicError : as ``supernet.train``.
        WorkersLost : as ``nas.elastic.launch``.
        """
        model, data, settings = training
        if self.config.workers == 1:
            train(model, data, settings, directory, identity, on_step, should_stop)
            return
        _check_devices(device, self.config.workers)
        model.cpu()  # the GPUs are the workers'
        if not (directory / CHECKPOINT).exists():
            save_initial(model, directory, identity)
        place = {"corpus": str(corpus.tokenizer_path.parent.absolute()), "sequence_length": corpus.sequence_length}
        facts = {"identity": identity, **place, "device": asdict(device), "shard": self.config.shard}
        write_json(directory / JOB, {**facts, **job})
        self._run(directory, on_step, should_stop)
        load_trained(model, directory / CHECKPOINT)
        model.to(device.torch_device)
        (directory / JOB).unlink()

    def _run(self, directory: Path, on_step: OnStep, should_stop: Callable[[], bool]) -> None:
        """Run the workers to the end of the training in ``directory``."""
        from moesaic.nas.training.elastic import launch  # imported here, as the link: of use to several processes alone
        from moesaic.nas.training.link import Link

        link, logs = Link.serve(), directory / LOGS
        step = restart = 0
        agent = _in_thread(lambda: launch(self.config, directory / JOB, logs, link.address))
        try:
            ended = False
            while not ended:
                ended = bool(wait([agent], _LOOK_SECONDS).done)
                if should_stop():
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


ONE = Workers()


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
    """Not in the main thread, where the agent would take over Ctrl-C; nor in one that the program waits for."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
