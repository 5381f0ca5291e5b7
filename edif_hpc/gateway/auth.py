"""Who asks: by key, or on loopback by the uid of the service itself.

A login node's loopback belongs to everybody, so an address proves nothing: without a key only the service's own uid
gets in, as the kernel reports it, and only if nothing hints that somebody else's request is passed on (a forwarding
header, or a browser led here by a foreign page: Host and Origin must be this machine's). Below isolation `locked` a
request's code runs with that uid too, so then it counts only while the home has a single user.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection

from edif_hpc.core.apikeys import ApiKey, ApiKeys, hashed
from edif_hpc.core.errors import AdminRequired, KeyRequired

from .observed import Observed
from .peer import is_loopback, peer_uid

KEY_HEADER = "ndif-api-key"
OWNER = "owner"
ADMIN_TAG = "admin"
METRICS_TAG = "metrics"
CACHE_SECONDS = 2.0
"""How long a revoked key may still work."""
CACHE_ENTRIES = 10_000
LONGEST_KEY = 512
FORWARDING = frozenset({"forwarded", "via", "x-real-ip", "x-client-ip", "true-client-ip", "cf-connecting-ip"})

HOW = "ask its admin for one (`edif-hpc keys create NAME`) and set NDIF_API_KEY, or call `nnsight.login()`"


@dataclass(frozen=True)
class User:
    name: str
    priority: int = 5
    tags: tuple[str, ...] = ()

    @property
    def admin(self) -> bool:
        return self.name == OWNER or ADMIN_TAG in self.tags


class Auth:
    def __init__(self, keys: ApiKeys, observed: Observed, *, trust_owner: bool, owner_uid: int | None = None) -> None:
        self.keys = keys
        self.observed = observed
        self.trust_owner = trust_owner
        self.owner_uid = os.geteuid() if owner_uid is None else owner_uid
        self._known: dict[str, tuple[float, ApiKey | None]] = {}
        self._single: tuple[float, bool] = (0.0, False)

    async def user(self, connection: HTTPConnection) -> User:
        """Who this connection speaks for.

        Raises:
            KeyRequired: nobody that is known here.
        """
        key = connection.headers.get(KEY_HEADER)
        if not key:
            await self._check_owner(connection)
            return User(OWNER)
        found = await self._find(key)
        if found is None:
            raise KeyRequired(f"This API key is unknown here or was revoked; {HOW}.")
        return User(found.user, found.priority, found.tags)

    async def find(self, connection: HTTPConnection) -> User | None:
        """The same, for what answers strangers too."""
        try:
            return await self.user(connection)
        except KeyRequired:
            return None

    async def admin(self, connection: HTTPConnection, *tags: str) -> User:
        """An admin, or who has one of `tags`.

        Raises:
            AdminRequired: somebody else.
        """
        user = await self.user(connection)
        if not user.admin and not set(tags) & set(user.tags):
            raise AdminRequired("This needs an admin's key; make one with `edif-hpc keys create NAME --tag admin`.")
        return user

    async def _find(self, key: str) -> ApiKey | None:
        if len(key) > LONGEST_KEY:
            return None
        digest, now = hashed(key), time.monotonic()
        until, found = self._known.get(digest, (0.0, None))
        if now >= until:
            found = await self.keys.find(key)
            if len(self._known) >= CACHE_ENTRIES:
                self._known.clear()
            self._known[digest] = (now + CACHE_SECONDS, found)
        return found

    # -- the owner ---------------------------------------------------------------------------------------------------

    async def _check_owner(self, connection: HTTPConnection) -> None:
        if not self._is_owner(connection):
            raise KeyRequired(f"This service needs an API key; {HOW}.")
        if not await self._single_user() and not await self.observed.all_locked():
            raise KeyRequired(
                "This service has several users and runs requests below isolation `locked`, so its owner needs a key "
                "on loopback too; set NDIF_API_KEY to the one in secrets/owner-key of its home."
            )

    def _is_owner(self, connection: HTTPConnection) -> bool:
        client, server = connection.scope.get("client"), connection.scope.get("server")
        if not self.trust_owner or not client or not server or server[1] is None or not is_loopback(client[0]):
            return False
        headers = connection.headers
        if _forwarded(headers) or not _own_host(headers) or not _own_origin(headers):
            return False
        return peer_uid((client[0], client[1]), (server[0], server[1])) == self.owner_uid

    async def _single_user(self) -> bool:
        until, single = self._single
        if time.monotonic() >= until:
            single = (await self.keys.users()) <= {OWNER}
            self._single = (time.monotonic() + CACHE_SECONDS, single)
        return single


def _forwarded(headers: Headers) -> bool:
    return any(name in FORWARDING or name.startswith("x-forwarded-") for name in headers)


def _own_host(headers: Headers) -> bool:
    """Against DNS rebinding: a foreign page can make its own name mean 127.0.0.1, but not use one of ours."""
    try:
        name = urlsplit(f"//{headers.get('host', '')}").hostname or ""
    except ValueError:
        return False
    return is_loopback(name) or name in ("localhost", socket.gethostname().lower())


def _own_origin(headers: Headers) -> bool:
    """Browsers name the page that sent them; the stock client's WebSocket library names the server itself."""
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc == headers.get("host")
