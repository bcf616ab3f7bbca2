"""Workers on this machine under torch's elastic agent, which is what ``torchrun`` is.

When a worker dies, the agent ends the others and starts all of them again.
"""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from moesaic.nas.config import TrainConfig
from moesaic.search_spaces import MoesaicError

_END_SECONDS = 5
"""How long workers that wait for a dead one get to end: they have nothing to save."""


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
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=config.restarts,
        logs_specs=DefaultLogsSpecs(str(logs), redirects=Std.ALL),
        shutdown_timeout=_END_SECONDS,
    )
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else restarted workers find old addresses
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
