"""Checks of this machine: what is available and what is missing, for users and bug reports."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path

from moesaic.nas.config import DeviceConfig
from moesaic.nas.data.cache import cache_directory
from moesaic.nas.device import choose_device, usable_processors, versions
from moesaic.search_spaces import MoesaicError


@dataclass(frozen=True)
class Check:
    name: str
    value: str
    fine: bool = True


def examine() -> list[Check]:
    """Versions, device, threads, triton, disk, and optional packages."""
    import torch

    checks = [Check(name, version, version != "not installed") for name, version in versions().items()]
    device = choose_device(DeviceConfig())
    checks.append(Check("device", str(device)))
    checks.append(Check("processors", f"{usable_processors()} usable, {device.threads} threads"))
    cuda = torch.cuda.is_available()
    checks.append(Check("cuda", f"{torch.version.cuda}, {torch.cuda.get_device_name()}" if cuda else "not available"))
    triton = importlib.util.find_spec("triton") is not None
    checks.append(Check("triton", "installed" if triton else "not installed (only a GPU uses it)", triton or not cuda))
    for name, what in (("optuna_dashboard", "opens a running search"), ("ray", "runs a search on many machines")):
        found = importlib.util.find_spec(name) is not None
        checks.append(Check(name, "installed" if found else f"not installed (optional: {what})"))
    for name, place in (("cache", cache_directory), ("current folder", Path.cwd)):
        try:
            checks.append(_disk(name, place()))
        except (MoesaicError, FileNotFoundError) as error:
            checks.append(Check(name, str(error), fine=False))
    return checks


def _disk(name: str, path: Path) -> Check:
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    try:
        probe = existing / ".moesaic-probe"
        probe.touch()
        probe.unlink()
        writable = True
    except OSError:
        writable = False
    text = f"{path}, {free / 1e9:.1f} GB free" + ("" if writable else ", NOT WRITABLE")
    return Check(name, text, writable and free > 1e9)
