"""Where other machines reach Redis and the object store: whether that can be right, seen from here.

What it cannot tell: whether a firewall lets compute nodes through to it.
"""

from __future__ import annotations

import socket
from ipaddress import ip_address
from urllib.parse import urlsplit

from edif_hpc.core.errors import SettingsError
from edif_hpc.core.settings import Settings

LOOPBACK = "127.0.0.1"
WHAT_TO_DO = "set network.address to a host name or address of this machine that compute nodes reach"


def embeds(settings: Settings) -> bool:
    """Whether a server of ours is among the meeting points."""
    return not (settings.redis.url and settings.store.endpoint)


def refuse_loopback(settings: Settings) -> None:
    """Raise SettingsError when workers would have to dial a loopback, or an address that is not this machine's."""
    elsewhere = next((pool.name for pool in settings.pool if pool.launcher == "slurm"), None)
    for key, url in _external(settings).items():
        if elsewhere and _is_loopback(url):
            raise SettingsError(
                f"Workers of the pool {elsewhere} run on other machines and do not reach {key} = {url!r}: name a host "
                "or address that compute nodes reach."
            )
    if not embeds(settings):
        return
    if settings.network.address:
        interface(settings.network.address)
        return
    if elsewhere:
        raise SettingsError(
            f"Workers of the pool {elsewhere} run on other machines and cannot reach a Redis and an object store on "
            f"this machine's loopback: {WHAT_TO_DO}."
        )


def meeting_points(settings: Settings) -> list[str]:
    """The hosts that workers dial, which no proxy leads to."""
    named = [settings.network.address, *(urlsplit(url).hostname or "" for url in _external(settings).values())]
    return list(dict.fromkeys(host for host in named if host))


def _external(settings: Settings) -> dict[str, str]:
    given = {"redis.url": settings.redis.url, "store.endpoint": settings.store.endpoint}
    return {key: url for key, url in given.items() if url}


def _is_loopback(url: str) -> bool:
    parts = urlsplit(url)
    if parts.scheme == "unix" or parts.hostname in (None, "localhost"):
        return True
    try:
        return ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False


def interface(address: str) -> str:
    """The address of this machine that a host name or address stands for.

    Raises:
        SettingsError: it stands for none, for a loopback, or for other machines too.
    """
    try:
        infos = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise SettingsError(
            f"network.address names {address}, which does not resolve ({error.strerror}); {WHAT_TO_DO}."
        ) from None
    found = sorted({str(info[4][0]) for info in infos})
    # Where a name has both kinds, clusters use the older.
    found = [each for each in found if ":" not in each] or found
    for each in found:
        # Debian lets a machine's own name stand for 127.0.1.1.
        if ip_address(each).is_loopback or ip_address(each).is_unspecified:
            raise SettingsError(f"network.address names {address}, which is {each} here, a loopback; {WHAT_TO_DO}.")
        if not _is_here(each):
            raise SettingsError(
                f"network.address names {address}, which is {each}, and this machine has no such address; {WHAT_TO_DO}."
            )
    return found[0]


def listened(settings: Settings) -> tuple[str, ...]:
    """The addresses that the embedded Redis and S3 listen on."""
    address = settings.network.address
    return (LOOPBACK, interface(address)) if address else (LOOPBACK,)


def _is_here(address: str) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
        try:
            sock.bind((address, 0))
        except OSError:
            return False
    return True
