"""One process of a distributed training: run by the elastic agent or ``torchrun -m moesaic.nas.training.worker``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from moesaic.nas.device import Device
from moesaic.nas.tasks import task_of
from moesaic.nas.terminal.stop import stop_on_signals
from moesaic.nas.training.link import Link
from moesaic.nas.training.recipe import Recipe
from moesaic.search_spaces import MoesaicError
from moesaic.search_spaces.files import read_json
from moesaic.supernet import train
from moesaic.supernet.distributed import joined


def work(job_path: Path, link: Link | None, should_stop: Callable[[], bool]) -> None:
    """Do this process's part of the training that ``job_path`` describes, in that file's folder.

    The environment says which part: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT.

    Raises
    ------
    StageFailed, Interrupted, MoesaicError : as ``supernet.train``, in every process at the same step; with a ``link``
        they are sent there instead.
    """
    job = read_json(job_path)
    device = Device(**job["device"])
    if device.kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.set_num_threads(max(1, device.threads // int(os.environ["LOCAL_WORLD_SIZE"])))
    with joined(device.torch_device, job["shard"]) as ranks, _told(link):
        task, recipe = task_of(job["task"]), Recipe.of(job["recipe"])
        model = recipe.weights(task)(recipe.architecture)
        if ranks.mesh is None:  # with a mesh, no GPU has to hold the whole model
            model = model.to(device.torch_device)
        report = _Report(link) if link is not None and ranks.leads else None

        def stop() -> bool:
            return should_stop() or (report is not None and report.link.stop_asked())

        on_step = report.on_step if report is not None else lambda step, record: None
        train(model, recipe.data(task), recipe.settings, job_path.parent, job["identity"], on_step, stop, ranks)


@contextmanager
def _told(link: Link | None) -> Iterator[None]:
    """Send ``link`` an error that the user can fix, and ignore failures that follow from the first."""
    try:
        yield
    except MoesaicError as error:
        if link is None:
            raise
        link.fail(error)
    except RuntimeError:
        if link is None or link.error() is None:
            raise


class _Report:
    """Reports the step of the training, the number of restarts, and the step at which this one began."""

    def __init__(self, link: Link):
        self.link = link
        self._restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self._first: int | None = None

    def on_step(self, step: int, record: dict[str, float]) -> None:
        self._first = step - 1 if self._first is None else self._first
        self.link.tell({"restart": self._restart, "first": self._first, "step": step, "record": record})


@record
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", type=Path, help="training.json in the folder of a distributed training")
    parser.add_argument("--link", help="host:port of the program that watches")
    arguments = parser.parse_args()
    with stop_on_signals() as should_stop:
        try:
            work(arguments.job, Link.connect(arguments.link) if arguments.link else None, should_stop)
        except MoesaicError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
