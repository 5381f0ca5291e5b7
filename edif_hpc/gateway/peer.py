"""Whose process is at the other end of a loopback connection: the kernel's own table says.

What it covers: TCP over 127.0.0.0/8 and ::1 on this machine. What it does not: a proxy that runs as the asked uid and
passes strangers on; `auth` refuses what names a forwarder, and a proxy that hides itself needs `trust_owner = false`.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
from pathlib import Path

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
ESTABLISHED = b"01"
"""Other states must not count: the kernel shows uid 0 for sockets whose process is gone."""
UID_COLUMN = 3  # after the state: tx:rx queues, timer, retransmits, uid
MAPPED = b"\0" * 10 + b"\xff" * 2

Address = tuple[str, int]


def is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def peer_uid(client: Address, server: Address, tables: tuple[Path, Path] = TABLES) -> int | None:
    """The uid that owns the client's socket of this connection, or None when the table does not show it."""
    needles = _needles(client, server)
    for table in tables:
        try:
            text = table.read_bytes()
        except FileNotFoundError:  # no IPv6 on this machine
            continue
        for needle in needles:
            at = text.find(needle)
            if at >= 0:
                return int(text[at + len(needle) :].split(None, UID_COLUMN + 1)[UID_COLUMN])
    return None


def _needles(client: Address, server: Address) -> list[bytes]:
    """The client's row as either table writes it: its end is the local one there."""
    pairs = [(_packed(client[0]), _packed(server[0]))]
    if all(len(address) == 4 for address in pairs[0]):
        pairs.append((MAPPED + pairs[0][0], MAPPED + pairs[0][1]))  # an IPv6 socket that speaks IPv4
    elif all(address.startswith(MAPPED) for address in pairs[0]):
        pairs.append((pairs[0][0][12:], pairs[0][1][12:]))
    return [b" %s:%04X %s:%04X %s " % (_hex(near), client[1], _hex(far), server[1], ESTABLISHED) for near, far in pairs]


def _packed(host: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)


def _hex(packed: bytes) -> bytes:
    """The kernel prints each 32-bit word in the machine's own byte order."""
    words = (packed[at : at + 4] for at in range(0, len(packed), 4))
    return b"".join(b"%08X" % int.from_bytes(word, sys.byteorder) for word in words)
