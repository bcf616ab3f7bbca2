"""A torch.distributed store that only this machine can reach."""

from __future__ import annotations

import socket

# The documented name; the type stubs define the class elsewhere.
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

LOOPBACK = "127.0.0.1"


def serve_on_loopback() -> TCPStore:
    """A store on a free port of the loopback address. Left to itself, ``TCPStore`` listens on all addresses, whatever
    host it is given; so it gets a socket that listens already, and owns it."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        port = listener.getsockname()[1]
        return TCPStore(
            LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True
        )
