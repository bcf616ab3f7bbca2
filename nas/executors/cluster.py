"""The connection to Ray: a cluster that runs, or a Ray of our own that only this user on this machine can reach."""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray._raylet import AuthenticationTokenLoader, Config  # pyright: ignore[reportAttributeAccessIssue]

from moesaic.nas.config import DeviceConfig, ExecutorConfig
from moesaic.nas.device import usable_processors
from moesaic.search_spaces import MoesaicError

STARTS = 3
"""A search stops after this many failed starts of lanes in a row."""
_PATIENCE = 20.0
"""After this many seconds without a lane, the user is told what the search is waiting for."""
_MODE, _TOKEN, _TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


@contextmanager
def connected(config: ExecutorConfig, device: DeviceConfig) -> Iterator[None]:
    """Ray while the block runs: the cluster at ``config.address``, or one on this machine that ends with the block. A
    connection that exists is used and kept.

    Raises
    ------
    MoesaicError : no cluster answers, or this machine has fewer processors than local lanes need.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent from a user's machine
    _read_settings_again()
    threads = device.threads or max(1, int(config.resources.cpu))
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}},
    }
    if config.address is not None:
        _join(config.address, options)
        try:
            yield
        finally:
            ray.shutdown()
        return
    _check_processors(config)
    with _token():
        with _on_loopback(), _signals_kept():
            ray.init(address="local", include_dashboard=False, **options)
        try:
            yield
        finally:
            ray.shutdown()


def _join(address: str, options: dict[str, Any]) -> None:
    try:
        found = canonicalize_bootstrap_address_or_die(address)  # of "auto", the cluster on this machine
        _look_for(found)
        with _signals_kept():
            ray.init(address=found, **options)
    except (OSError, ValueError) as error:  # a ConnectionError is an OSError
        raise MoesaicError(
            "no Ray cluster answers",
            where="executor.address",
            found=f"{address} ({in_short(str(error))})",
            allowed="auto, or HOST:PORT as `ray start --head` prints it; without one, Ray starts on this machine",
        ) from None


def _check_processors(config: ExecutorConfig) -> None:
    processors, needed = usable_processors(), config.lanes * config.resources.cpu
    if needed > processors:
        raise MoesaicError(
            f"{config.lanes} lanes need {needed:g} processors and this machine has {processors}",
            where="executor.lanes",
            allowed="fewer lanes, a smaller executor.resources.cpu, or the address of a cluster",
            nearest=max(1, int(processors / config.resources.cpu)),
        )


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that starts in the block listens on the loopback address alone. Ray replaces 127.0.0.1 given as the address
    of its node; its own switch is for laptops that ask the user before a program may listen, and has no option."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _token() -> Iterator[None]:
    """A secret for the Ray that starts, in a file that only this user can read, unless the user has set one or wants
    none: whoever reaches Ray's sockets runs code as this user. Ray's own file, in the user's home, is open to all."""
    mode = os.environ.get(_MODE)
    if mode not in (None, "token") or _TOKEN in os.environ or _TOKEN_PATH in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="moesaic-ray-") as folder:
        path = Path(folder) / "token"
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        os.environ |= {_MODE: "token", _TOKEN_PATH: str(path)}
        _read_settings_again()
        try:
            yield
        finally:
            os.environ.pop(_TOKEN_PATH, None)
            if mode is None:
                os.environ.pop(_MODE, None)
            _read_settings_again()


def _read_settings_again() -> None:
    """Ray reads the environment once per process, and a process may connect to one Ray after another."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _look_for(address: str) -> None:
    """Raises OSError or ValueError where nothing answers; Ray itself would try for minutes. The Ray of another run on
    this machine, which "auto" finds too, does not answer there."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=5).close()


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Restore the SIGTERM handler, which ``ray.init`` replaces; a search must finish running evaluations first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


class Waiting:
    """Tells the user once what the search waits for, when no lane could start for long and the cluster has no room."""

    def __init__(self, config: ExecutorConfig, say: Callable[[str], None]):
        self._config, self._say = config, say
        self._since = time.monotonic()
        self._told = False

    def look(self, lanes_run: bool) -> None:
        if self._told or lanes_run or time.monotonic() - self._since < _PATIENCE:
            return
        wanted, free = self._config.resources, ray.available_resources()
        processors, gpus = free.get("CPU", 0), free.get("GPU", 0)
        if processors < wanted.cpu or gpus < wanted.gpu:
            self._told = True
            self._say(
                f"executor: waiting for a node with {wanted.cpu:g} CPUs and {wanted.gpu:g} GPUs for a lane; "
                f"free in the cluster: {processors:g} CPUs, {gpus:g} GPUs"
            )


def in_short(message: str) -> str:
    """The essence of Ray's long messages: the exception that was raised, or why the lane died."""
    raised = re.findall(r"^\S*(?:Error|Exception): .*$", message, re.MULTILINE)
    cause = re.findall(r"because (.+?)(?:\.\s|\n|$)", message)
    return (raised[-1] if raised else cause[-1] if cause else message.strip().partition("\n")[0])[:200]
