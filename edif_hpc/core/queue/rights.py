"""What a worker may do in Redis: the commands of its transitions, on the keys they touch, and the bells they ring.

It covers a worker whose credentials leaked: no API keys, no sessions, no leadership, no administration of Redis. It
does not keep workers apart: each may take, end or read any request, since any may have to run it.
"""

from __future__ import annotations

from . import keys

SCRIPTED = (
    "del", "expire", "get", "hdel", "hget", "hincrby", "hmget", "hset", "hsetnx", "llen", "lpush", "lrange", "lrem",
    "pexpire", "publish", "rpush", "set", "time", "xadd", "zadd", "zcard", "zincrby", "zrange", "zrem",
    "zremrangebyscore", "zscore",
)  # fmt: skip
"""What the scripts call that a worker runs: Redis asks for the caller's rights inside them too."""
DIRECT = (
    "evalsha", "script|load", "multi", "exec", "hgetall", "mget", "ping", "subscribe", "unsubscribe", "zrevrange",
)  # fmt: skip

KEYS = (
    keys.request("*"), keys.payload("*"), keys.result("*"), keys.events("*"), keys.share("*"), keys.estimates("*"),
    keys.running("*"), keys.waiting("*"), keys.line("*"), keys.user("*"), keys.open_requests("*"),
    keys.worker("*"), keys.control("*"), keys.lineage("*"), keys.pace("*"),
    keys.DEAD, keys.TARGETS, keys.LEASES, keys.WAITING_SINCE, keys.WORKERS, keys.OBJECTS, keys.COUNTERS,
    keys.ENVIRONMENT, keys.COMPONENTS, keys.SLURM_COMMANDS, keys.slurm_hour("*"),
)  # fmt: skip
CHANNELS = (keys.BELL_REQUESTS, keys.BELL_QUEUE, keys.BELL_WORKERS)


def worker_rules() -> str:
    """The rules as Redis 6.2 and later read them."""
    return " ".join([
        "resetchannels",
        *(f"~{pattern}" for pattern in KEYS),
        *(f"&{channel}" for channel in CHANNELS),
        "-@all",
        *(f"+{command}" for command in (*SCRIPTED, *DIRECT)),
    ])  # fmt: skip


def gateway_rules() -> str:
    """Everything of ours, for what runs beside Redis; nothing that changes or empties Redis itself."""
    return f"resetchannels ~{keys.PREFIX}* &{keys.PREFIX}* +@all -@admin -@dangerous +info"
