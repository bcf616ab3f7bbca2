"""Tables that many passes read: computed once, and kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar

import torch

T = TypeVar("T")


def kept(function: Callable[..., T]) -> Callable[..., T]:
    """Keeps the tensors of the last calls, which must serve a training step too. A program that traces computes its
    own: what it makes while it traces is of no use to others."""

    @lru_cache(maxsize=32)
    def keeping(*arguments: object) -> T:
        with torch.inference_mode(False):
            return function(*arguments)

    @wraps(function)
    def call(*arguments: object) -> T:
        return function(*arguments) if torch.compiler.is_compiling() else keeping(*arguments)

    return call
