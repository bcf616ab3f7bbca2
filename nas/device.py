"""The device of a run, described so that measurements from another device are recognised, and library versions."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

from moesaic.nas.config import DeviceConfig
from moesaic.search_spaces import MoesaicError

_PACKAGES = ("torch", "numpy", "scipy", "optuna", "tokenizers", "safetensors", "pydantic")


@dataclass(frozen=True)
class Device:
    """``name`` is the processor or GPU, ``dtype`` what products are computed in."""

    kind: str
    name: str
    dtype: str
    threads: int
    torch: str

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.kind)

    @property
    def bfloat16(self) -> bool:
        return self.dtype == "bfloat16"

    @property
    def bytes_per_value(self) -> int:
        return 2 if self.bfloat16 else 4

    @property
    def computing(self) -> dict[str, str | int]:
        """What the last digits of a result depend on."""
        return {"kind": self.kind, "dtype": self.dtype, "threads": self.threads}

    def autocast(self) -> torch.autocast:
        """A context in which products are computed in ``dtype``."""
        return torch.autocast(self.kind, dtype=torch.bfloat16, enabled=self.bfloat16)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.name}, {self.threads} threads, {self.dtype}, torch {self.torch}"


def choose_device(config: DeviceConfig) -> Device:
    """The device of ``config`` on this machine; sets torch's number of threads.

    Raises
    ------
    MoesaicError : a GPU is requested but not available, or more threads than processors are requested.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise MoesaicError("no CUDA device is available", where="device.device", found="cuda", nearest="cpu")
    kind = "cuda" if config.device != "cpu" and available else "cpu"
    processors = usable_processors()
    threads = config.threads or min(processors, torch.get_num_threads())
    if threads > processors:
        raise MoesaicError("more threads than processors", where="device.threads", found=threads, nearest=processors)
    torch.set_num_threads(threads)
    wanted = "bfloat16" if kind == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    name = torch.cuda.get_device_name() if kind == "cuda" else processor_name()
    return Device(kind, name, wanted if config.dtype == "auto" else config.dtype, threads, torch.__version__)


def versions() -> dict[str, str]:
    """Versions of Python, this program, and the libraries that results depend on."""
    found = {"python": platform.python_version()}
    for name in ("moesaic", *_PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def usable_processors() -> int:
    """Processors this process may use: those it may run on, and no more than the quota of its control group (a
    container's limit), rounded down."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(allowed, _quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))))


def _quota(groups: Path, mount: Path) -> float:
    """Processors' worth of time that the control groups of this process allow; the smallest of nested limits.

    Version 2 has ``cpu.max`` ("QUOTA PERIOD" or "max PERIOD"), version 1 ``cpu/cpu.cfs_quota_us`` (-1 is no limit) and
    ``cpu.cfs_period_us``. A container may see its own group at the root of the mount.
    """
    try:
        lines = [line.split(":", 2) for line in groups.read_text().splitlines()]
    except OSError:
        return math.inf
    limits = [math.inf]
    for _, controllers, path in lines:
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = mount / "cpu" if controllers else mount
        folder = root / path.lstrip("/")
        for place in {root, folder, *folder.parents}:
            if place.is_relative_to(root):
                limits.append(_limit(place, controllers != ""))
    return min(limits)


def _limit(folder: Path, first_version: bool) -> float:
    try:
        if first_version:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        else:
            quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError):  # no limit is set here, or it is "max"
        return math.inf


def used_by_others(seconds: float = 0.2) -> float:
    """How many processors other programs keep busy, measured while this process sleeps for ``seconds``; 0 where the
    system does not tell."""
    try:
        before = _busy_ticks()
        time.sleep(seconds)
        return (_busy_ticks() - before) / (os.sysconf("SC_CLK_TCK") * seconds)
    except (OSError, ValueError, AttributeError):
        return 0.0


def _busy_ticks() -> int:
    user, nice, system, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    return user + nice + system


def processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
