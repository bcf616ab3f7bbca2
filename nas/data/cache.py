"""The cache folder of this user, and folders in it that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from moesaic.search_spaces import MoesaicError
from moesaic.search_spaces.files import sweep, temporary_beside, unwritable


def cache_directory() -> Path:
    """``$MOESAIC_CACHE``, or ``moesaic`` in the user's cache directory; ``~`` is the home directory.

    Raises
    ------
    MoesaicError : there is no home directory, and none of the variables is set.
    """
    if directory := os.environ.get("MOESAIC_CACHE"):
        return expanded(directory, "MOESAIC_CACHE").absolute()
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "the cache").absolute() / "moesaic"


def expanded(path: str, where: str) -> Path:
    """``path``, with the home directory for ``~`` at its start.

    Raises
    ------
    MoesaicError : that home directory is not known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise MoesaicError(
            "the home directory is not known",
            where=where,
            found=path,
            allowed="HOME set to a folder, or for the cache MOESAIC_CACHE; elsewhere a path without ~",
        ) from None


def make_folder(directory: Path, fill: Callable[[Path], object], sound: Callable[[Path], bool]) -> None:
    """Let ``fill`` write a temporary folder, then rename it to ``directory``.

    Several processes may do this at once: the first sound folder stays, and one that is not sound is replaced.

    Raises
    ------
    MoesaicError : the place cannot be written.
    """
    temporary, outdated = temporary_beside(directory), temporary_beside(directory)
    try:
        temporary.mkdir(parents=True)
        sweep(directory.parent, below=False, shared=True)
        fill(temporary)
        if directory.exists() and not sound(directory):
            directory.rename(outdated)
        try:
            temporary.rename(directory)
        except OSError:
            if not sound(directory):
                raise
    except OSError as error:
        raise unwritable(directory, error) from None
    finally:
        for folder in (temporary, outdated):
            shutil.rmtree(folder, ignore_errors=True)
