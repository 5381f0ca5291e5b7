"""Where Redis and the object store are, and how to get in: external by the settings, embedded by the home.

A component gets its endpoints once at start, from 0600 files that it reads itself: no credential is in an environment
or an argument list.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from urllib.parse import quote, urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import DefaultParser
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ReadOnlyError, RedisError

from .errors import SettingsError
from .home import Home, read_secret
from .settings import Settings


class Role(StrEnum):
    """Who asks: the embedded servers know two users. Their names in Redis and in the store are these.

    `GATEWAY` is whoever runs beside the servers: gateway, fleet, command line. `WORKER` may be anywhere.
    """

    GATEWAY = "gateway"
    WORKER = "worker"


REDIS_PASSWORDS = {Role.GATEWAY: "redis-password", Role.WORKER: "redis-worker-password"}
"""Names of secrets, as the next one: access key and secret key."""
STORE_KEYS = {
    Role.GATEWAY: ("store-access-key", "store-secret-key"),
    Role.WORKER: ("store-worker-access-key", "store-worker-secret-key"),
}
AUTHORITY = "authority.pem"
"""The certificate, among the secrets, against which clients of the embedded servers check who answers."""
LINK_SECRET = "link-secret"  # noqa: S105 - the name of a file
OWNER_KEY = "owner-key"
PORTS = "ports.json"

CONNECT_SECONDS = 5.0
COMMAND_SECONDS = 5.0
POOL_SECONDS = 10.0
CONNECTIONS = 64
"""A burst of 700 requests at once would otherwise open as many connections."""
TAKES_NO_WRITES = ("OOM ", "MISCONF ", "READONLY ")
"""How Redis begins to say that its memory or its disk is full, or that it follows another; a script puts its own place
before these words."""
SAID_WITHIN = 200


class Parser(DefaultParser):  # type: ignore[misc, valid-type]  # which one it is depends on what is installed
    """Reads replies; a Redis that takes no writes at the moment is a ReadOnlyError, whoever says so.

    Left to itself, redis-py has another class for each of the reasons, and none once a script met them: nobody could
    tell a server that is to be waited for from one that refuses.
    """

    @classmethod
    def parse_error(cls, response: str) -> RedisError:
        if any(words in response[:SAID_WITHIN] for words in TAKES_NO_WRITES):
            return ReadOnlyError(response)
        found: RedisError = super().parse_error(response)
        return found


@dataclass(frozen=True)
class RedisEndpoint:
    url: str
    username: str = ""
    password: str = field(default="", repr=False)
    authority: str = ""
    """PEM file of who must have signed the server's certificate; empty: whom this machine trusts."""

    @property
    def address(self) -> str:
        """Without credentials, for people and logs."""
        return self.url

    def client(self, *, retries: int = 1, connections: int = CONNECTIONS) -> Redis:
        """A client whose pool grows on demand; beyond `connections` a command waits for one.

        Commands are retried once on a connection that went stale.
        """
        verified = {"ssl_ca_certs": self.authority, "ssl_check_hostname": True} if self.authority else {}
        pool = BlockingConnectionPool.from_url(
            self.url,
            **verified,
            max_connections=connections,
            timeout=POOL_SECONDS,
            username=self.username or None,
            password=self.password or None,
            socket_connect_timeout=CONNECT_SECONDS,
            socket_timeout=COMMAND_SECONDS,
            retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), retries),
            retry_on_error=[ConnectionError],
            protocol=2,
            parser_class=Parser,
        )
        return Redis.from_pool(pool)

    def with_credentials(self) -> str:
        """The URL with its credentials, for a library that takes nothing else. Never log it."""
        parts = urlsplit(self.url)
        user = f"{quote(self.username)}:{quote(self.password)}@" if self.password else ""
        return parts._replace(netloc=user + parts.netloc).geturl()


@dataclass(frozen=True)
class StoreEndpoint:
    endpoint: str
    region: str
    bucket: str
    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)
    public_endpoint: str = ""
    authority: str = ""
    """As in `RedisEndpoint`."""


def embedded_ports(home: Home) -> dict[str, int]:
    """Ports of the embedded servers, by component; empty before the first `up`."""
    try:
        ports: dict[str, int] = json.loads((home.run / PORTS).read_text())
        return ports
    except FileNotFoundError:
        return {}


def in_url(host: str) -> str:
    """A host name or address as it stands in a URL."""
    return f"[{host}]" if ":" in host else host


def redis_endpoint(home: Home, settings: Settings, role: Role = Role.GATEWAY) -> RedisEndpoint:
    """The external Redis of the settings, else the embedded one: where `role` reaches it and as whom.

    Raises:
        SettingsError: neither is there.
    """
    external = settings.redis
    if external.url:
        password = read_secret(Path(external.password_file).expanduser()) if external.password_file else ""
        return RedisEndpoint(external.url, external.username, password)
    port = external.port or embedded_ports(home).get("redis")
    if not port:
        raise SettingsError(f"No Redis is running in {home.root}; run `edif-hpc up`, or set redis.url.")
    password = home.secret(REDIS_PASSWORDS[role])
    if role is Role.WORKER and settings.network.address:
        url = f"rediss://{in_url(settings.network.address)}:{port}/0"
        return RedisEndpoint(url, role.value, password, str(home.secrets / AUTHORITY))
    return RedisEndpoint(f"redis://127.0.0.1:{port}/0", role.value, password)


def store_endpoint(home: Home, settings: Settings, role: Role = Role.GATEWAY) -> StoreEndpoint:
    """The external store of the settings, else the embedded one: where `role` reaches it and as whom.

    Raises:
        SettingsError: neither is there, or its credentials are not readable.
    """
    external = settings.store
    authority = ""
    if external.endpoint:
        if not external.credentials_file:
            raise SettingsError("store.endpoint needs store.credentials_file: two lines, access key and secret key.")
        lines = read_secret(Path(external.credentials_file).expanduser()).splitlines()
        if len(lines) != 2:
            raise SettingsError(f"{external.credentials_file} must hold two lines, access key and secret key.")
        access, secret = (line.strip() for line in lines)
        endpoint = external.endpoint
    else:
        port = external.port or embedded_ports(home).get("store")
        if not port:
            raise SettingsError(f"No object store is running in {home.root}; run `edif-hpc up`, or set store.endpoint.")
        endpoint = f"http://127.0.0.1:{port}"
        if settings.network.address:
            host = in_url(settings.network.address) if role is Role.WORKER else "127.0.0.1"
            endpoint, authority = f"https://{host}:{port}", str(home.secrets / AUTHORITY)
        access, secret = (home.secret(name) for name in STORE_KEYS[role])
    return StoreEndpoint(
        endpoint, external.region, external.bucket, access, secret, external.public_endpoint or endpoint, authority
    )
