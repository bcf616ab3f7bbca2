"""What the processes of a tree listen on, as the kernel lists it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

_LISTENS = "0A"


def processes_under(root: int) -> set[int]:
    """The process and all that it and its children started."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended as we looked
            continue
        children.setdefault(parent, []).append(int(folder.name))
    found, waiting = set(), [root]
    while waiting:
        found.add(one := waiting.pop())
        waiting += children.get(one, [])
    return found


def listening(root: int) -> set[tuple[str, int]]:
    """Address and port of every TCP socket on which a process under ``root`` listens."""
    sockets = {inode for process in processes_under(root) for inode in _sockets(process)}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENS and fields[9] in sockets:
                address, _, port = fields[1].partition(":")
                found.add((_address(address), int(port, 16)))
    return found


def is_loopback(address: str) -> bool:
    parsed = ip_address(address)
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def _sockets(process: int) -> Iterator[str]:
    for path in Path(f"/proc/{process}").glob("fd/*"):
        with suppress(OSError):  # it was closed as we looked
            link = os.readlink(path)
            if link.startswith("socket:["):
                yield link[8:-1]


def _address(hexadecimal: str) -> str:
    """The kernel writes each four bytes as a number of this machine's byte order."""
    words = [bytes.fromhex(hexadecimal[at : at + 8])[::-1] for at in range(0, len(hexadecimal), 8)]
    return str(ip_address(b"".join(words)))
