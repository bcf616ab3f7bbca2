"""Workers on this machine under torch's elastic agent, which is what ``torchrun`` is.

When a worker dies, the agent ends the others and starts all of them again.
"""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# The documented name; the type stubs define the class elsewhere.
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.api import rendezvous_handler_registry
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from moesaic.nas.config import TrainConfig
from moesaic.nas.training.store import LOOPBACK, serve_on_loopback
from moesaic.search_spaces import MoesaicError

_END_SECONDS = 5
"""How long workers that wait for a dead one get to end: they have nothing to save."""


class OneMachine(RendezvousHandler):
    """The rendezvous of one agent with itself, which needs no network.

    torch's own is a store on all addresses of the machine, whose values the agent unpickles. Here the agent's store is
    in its memory, and the workers get a new store on the loopback address at every start, in which the addresses of
    workers that died are not found.
    """

    name = "one-machine"

    def __init__(self, run_id: str):
        self._run_id = run_id

    def get_backend(self) -> str:
        return self.name

    @property
    def use_agent_store(self) -> bool:
        """The workers connect to the agent's store for them, and none of them serves one."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        self._workers = serve_on_loopback()
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo(LOOPBACK, self._workers.port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


rendezvous_handler_registry.register(OneMachine.name, lambda parameters: OneMachine(parameters.run_id))


class WorkersLost(MoesaicError):
    """Workers died and no restarts are left."""

    exit_code = 1


def launch(config: TrainConfig, job: Path, logs: Path, link: str) -> None:
    """Run ``moesaic.nas.training.worker`` for ``job`` in every worker, and return when all have ended normally.

    Their output and the agent's goes to files in ``logs``.

    Raises
    ------
    WorkersLost : after ``config.restarts`` restarts.
    """
    agent = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.workers,
        run_id=uuid.uuid4().hex[:8],
        rdzv_backend=OneMachine.name,
        local_addr=LOOPBACK,
        max_restarts=config.restarts,
        logs_specs=DefaultLogsSpecs(str(logs), redirects=Std.ALL),
        shutdown_timeout=_END_SECONDS,
    )
    with _logged(logs / "agent.log"):
        try:
            elastic_launch(agent, sys.executable)("-m", "moesaic.nas.training.worker", str(job), "--link", link)
        except ChildFailedError as error:
            raise _lost(error, config.restarts, logs) from None


def _lost(failed: ChildFailedError, restarts: int, logs: Path) -> WorkersLost:
    """Names the worker that was killed, if any: the others end because they lost the connection, perhaps earlier."""
    rank, cause = min(failed.failures.items(), key=lambda item: (item[1].exitcode >= 0, item[1].timestamp))
    message: Any = cause.message  # a mapping for a traceback, a text for a signal
    if isinstance(message, dict):
        message = message["message"]
    return WorkersLost(
        f"worker {rank} ended, after {restarts} restarts: {message}",
        where=str(logs),
        allowed="the same command continues from the last checkpoint; the folder holds what every worker printed",
    )


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Send the agent's log to a file: the user gets its essence in one line elsewhere."""
    logger, handler = logging.getLogger("torch.distributed.elastic"), logging.FileHandler(path)
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.propagate = propagates
        logger.removeHandler(handler)
        handler.close()
