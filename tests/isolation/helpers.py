"""What attacks share. All of it travels by value with the blocks that use it."""

from __future__ import annotations

import ctypes
import errno
import os
import socket


def call(name: str, *arguments: object) -> int:
    """A function of libc that Python does not offer; raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    function = getattr(libc, name)
    # Where a function returns an int, the upper half of the register is anything: -1 would not be seen.
    function.restype = ctypes.c_long if name in ("syscall", "ptrace", "process_vm_readv") else ctypes.c_int
    result = int(function(*[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]))
    if result == -1:
        raise OSError(ctypes.get_errno(), name)
    return result


def each(targets: dict, action: object) -> object:
    """Do something to each named target: refused when all refuse, else who did not."""
    fell = []
    for name, target in sorted(targets.items()):
        try:
            action(target)
            fell.append(name)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EACCES, errno.ESRCH, errno.ENOENT):
                raise
    if not fell:
        raise PermissionError(errno.EPERM, "all refused")
    return "did: " + " ".join(fell)


def chosen(g: dict, *names: str) -> dict:
    """The pids of these components, this process left out."""
    return {name: pid for name, pid in g["pids"].items() if name in names and pid != os.getpid()}


def talk(port: int, text: bytes) -> bytes:
    """Send a few bytes to a port of this machine and return the first of its answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        sock.sendall(text)
        return sock.recv(65536)


def get(g: dict, path: str, key: str = "") -> bytes:
    """A plain HTTP request to the gateway, whole."""
    header = f"ndif-api-key: {key}\r\n" if key else ""
    request = f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1:{g['gateway']}\r\n{header}connection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", g["gateway"]), timeout=5) as sock:
        sock.sendall(request.encode())
        answer = b""
        while part := sock.recv(65536):
            answer += part
    return answer


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def descriptors() -> list:
    """Every open descriptor of this process but the standard streams, without asking /proc."""
    found = []
    for fd in range(3, 1024):
        try:
            os.fstat(fd)
            found.append(fd)
        except OSError:
            continue
    return found
