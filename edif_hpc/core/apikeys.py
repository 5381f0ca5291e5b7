"""API keys: shown once, stored as a hash. A key is 256 random bits, so a plain SHA-256 is enough to hide it."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import time
from dataclasses import asdict, dataclass
from typing import Any

from redis.asyncio import Redis

from .errors import EdifError
from .queue import keys

KEY_PREFIX = "edif_"
USER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")


class KeyNameError(EdifError):
    code = "key_name"
    http_status = 400


@dataclass(frozen=True)
class ApiKey:
    """What is kept of a key. `name` is the first characters of its hash, enough to revoke it by."""

    name: str
    user: str
    created: float
    priority: int = 5
    tags: tuple[str, ...] = ()
    revoked: float | None = None


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class ApiKeys:
    def __init__(self, redis: Redis) -> None:
        # redis-py annotates every answer as bytes | str; which of them it is depends on the connection, ours is bytes.
        self.redis: Any = redis

    async def create(
        self, user: str, *, priority: int = 5, tags: tuple[str, ...] = (), key: str = ""
    ) -> tuple[str, ApiKey]:
        """Make a key for a user. Returns the key itself, which is not kept, and its record."""
        if not USER.fullmatch(user):
            raise KeyNameError(
                "A user name has 1 to 64 letters, digits or . _ @ + - and begins with a letter or digit."
            )
        key = key or KEY_PREFIX + secrets.token_urlsafe(32)
        digest = hashed(key)
        record = ApiKey(digest[:12], user, time.time(), priority, tags)
        await self.redis.hset(keys.API_KEYS, digest, json.dumps(asdict(record)))
        return key, record

    async def ensure(self, key: str, user: str, *, tags: tuple[str, ...] = ()) -> None:
        """Know a key that a file already holds, such as the owner's. One that was revoked stays revoked."""
        digest = hashed(key)
        record = ApiKey(digest[:12], user, time.time(), tags=tags)
        await self.redis.hsetnx(keys.API_KEYS, digest, json.dumps(asdict(record)))

    async def find(self, key: str) -> ApiKey | None:
        """The record of a key that is known and not revoked."""
        found = await self.redis.hget(keys.API_KEYS, hashed(key))
        record = _record(found) if found else None
        return record if record and record.revoked is None else None

    async def all(self) -> list[ApiKey]:
        found = await self.redis.hvals(keys.API_KEYS)
        return sorted((_record(value) for value in found), key=lambda record: record.created)

    async def users(self) -> set[str]:
        """Users with a key that is not revoked."""
        return {record.user for record in await self.all() if record.revoked is None}

    async def revoke(self, name: str) -> ApiKey:
        """Revoke by name (a prefix of the hash that is unique)."""
        found = await self.redis.hgetall(keys.API_KEYS)
        matching = [(digest, _record(value)) for digest, value in found.items() if digest.decode().startswith(name)]
        if len(matching) != 1 or not name:
            several = f"{len(matching)} keys begin with" if name and matching else "No key is named"
            raise KeyNameError(f"{several} {name!r}; see `edif-hpc keys list`.")
        digest, record = matching[0]
        record = ApiKey(**{**asdict(record), "tags": record.tags, "revoked": time.time()})
        await self.redis.hset(keys.API_KEYS, digest, json.dumps(asdict(record)))
        return record


def _record(value: bytes) -> ApiKey:
    data = json.loads(value)
    return ApiKey(**{**data, "tags": tuple(data.get("tags", ()))})
