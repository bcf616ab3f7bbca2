"""Messages between the workers of a training and the program that started them: progress, a stop request, the end.

The messages are texts in a torch.distributed store that the program serves. When the program ends, so does the store:
workers then fail at their next message, so that no training goes on unwatched.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

# The documented name; the type stubs define the class elsewhere.
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from moesaic.nas.training.store import serve_on_loopback
from moesaic.search_spaces import Interrupted, MoesaicError, StageFailed

_CONNECT = timedelta(seconds=60)
_ERRORS = {error.__name__: error for error in (MoesaicError, StageFailed, Interrupted)}


class Link:
    """One end of the connection. ``address`` is where the other end connects to."""

    def __init__(self, store: TCPStore):
        self._store = store

    @classmethod
    def serve(cls) -> Link:
        return cls(serve_on_loopback())

    @classmethod
    def connect(cls, address: str) -> Link:
        host, _, port = address.rpartition(":")
        return cls(TCPStore(host, int(port), is_master=False, timeout=_CONNECT))

    @property
    def address(self) -> str:
        return f"{self._store.host}:{self._store.port}"

    def ask_to_stop(self) -> None:
        self._store.set("stop", "")

    def stop_asked(self) -> bool:
        return self._store.check(["stop"])

    def tell(self, news: dict[str, Any]) -> None:
        self._store.set("news", json.dumps(news))

    def news(self) -> dict[str, Any] | None:
        """The latest news."""
        return self._read("news")

    def fail(self, error: MoesaicError) -> None:
        """Send an error that the user can fix, for the other end to raise; returns once it has arrived."""
        facts = {name: getattr(error, name) for name in ("where", "found", "allowed", "nearest")}
        texts = {name: None if value is None else str(value) for name, value in facts.items()}
        self._store.set("error", json.dumps({"kind": type(error).__name__, "problem": error.problem, **texts}))
        self._store.wait(["error"])  # the store sets a value when it comes to it

    def error(self) -> MoesaicError | None:
        facts = self._read("error")
        return None if facts is None else _ERRORS.get(facts.pop("kind"), MoesaicError)(facts.pop("problem"), **facts)

    def _read(self, key: str) -> dict[str, Any] | None:
        return json.loads(self._store.get(key)) if self._store.check([key]) else None
