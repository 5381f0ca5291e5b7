"""The service on a cluster, as a site has it: gateway and fleet on the login side, workers in allocations.

Redis and the object store are the embedded ones, or the site's own, on the address that nodes reach.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edif_hpc.core.endpoints import StoreEndpoint
from edif_hpc.core.errors import Unavailable
from edif_hpc.core.store import Store
from edif_hpc.fleet.embedded import redis_binary, store_binary
from tests.support import models
from tests.support.servers import free_port
from tests.support.slurm import Cluster

EDIF_HPC = Path(sys.executable).parent / "edif-hpc"
PASSWORD, ACCESS, SECRET = "site-redis-password", "site-access", "site-secret"
UP_SECONDS = 120.0
SETTINGS = """
[gateway]
port = {port}
[models]
cache = "{cache}"
[worker]
threads = 1
[network]
address = "{address}"
{pools}
"""
SITES_OWN = """
[redis]
url = "redis://{address}:{redis}/0"
password_file = "{folder}/redis-password"
[store]
endpoint = "http://{address}:{store}"
credentials_file = "{folder}/store-credentials"
"""


@dataclass
class Site:
    """A service that is up. `key` is its user's."""

    cluster: Cluster
    home: Path
    url: str
    key: str = field(default="", repr=False)

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.cluster.run([EDIF_HPC, *arguments, "--home", self.home], check=check, timeout=UP_SECONDS)

    def json(self, *arguments: str) -> Any:
        return json.loads(self.cli(*arguments, "--json").stdout)

    def logs(self) -> str:
        """The ends of all logs but for what every request leaves there."""
        found = [*sorted((self.home / "logs").glob("*.log")), *sorted((self.home / "allocations").glob("*_log.out"))]
        return "\n".join(f"== {path.name}\n{_end_of(path)}" for path in found)


def _end_of(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if '"request ended"' not in line]
    return "\n".join(lines)[-4000:]


def model_cache() -> Path:
    """Model files that the service's user can read; this process's client knows them too."""
    root = models.test_cache() / "cluster"
    found = models.build_cache(root, ["gpt2", "llama"])
    models.smollm2(root)
    for path in (found, *found.rglob("*")):
        path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))
    models.offline_client(found)
    return found


@contextmanager
def running(cluster: Cluster, cache: Path, pools: str, *, external: bool = False) -> Iterator[Site]:
    """A service with these pools, up; down at the end, with its allocations. `external`: with the site's servers."""
    folder = cluster.home / f"site-{free_port()}"
    home = folder / "home"
    home.mkdir(parents=True)
    ports = {"port": free_port(), "redis": free_port(), "store": free_port()}
    address = cluster.internal_address
    settings = SETTINGS + (SITES_OWN if external else "")
    (home / "edif-hpc.toml").write_text(
        settings.format(cache=cache, folder=folder, address=address, pools=pools, **ports)
    )
    (folder / "redis-password").write_text(PASSWORD)
    (folder / "store-credentials").write_text(f"{ACCESS}\n{SECRET}\n")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o700 if path.is_dir() else 0o600)
        os.chown(path, cluster.uid, cluster.gid)
    with _servers(cluster, folder, address, ports) if external else nullcontext():
        site = Site(cluster, home, f"http://127.0.0.1:{ports['port']}")
        try:
            site.cli("up", "--detach")
            site.key = site.json("keys", "create", "tester")["key"]
            yield site
        except BaseException:
            print(site.logs())  # for who reads why a test failed
            raise
        finally:
            site.cli("down", check=False)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _servers(cluster: Cluster, folder: Path, address: str, ports: dict[str, int]) -> Iterator[None]:
    data = folder / "servers"
    data.mkdir()
    (data / "store").mkdir()
    identity = {"name": "site", "credentials": [{"accessKey": ACCESS, "secretKey": SECRET}]}
    rights = {**identity, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    (data / "s3.json").write_text(json.dumps({"identities": [rights]}))
    master, volume, filer = free_port(), free_port(), free_port()
    commands = [
        [redis_binary(), "--port", str(ports["redis"]), "--bind", address, "--requirepass", PASSWORD,
         "--dir", str(data), "--appendonly", "yes", "--maxmemory-policy", "noeviction"],
        [store_binary(), "-logtostderr=true", "server", f"-dir={data / 'store'}", f"-ip={address}",
         f"-ip.bind={address}", f"-master.port={master}", f"-master.port.grpc={free_port()}",
         f"-volume.port={volume}", f"-volume.port.grpc={free_port()}", "-filer", f"-filer.port={filer}",
         f"-filer.port.grpc={free_port()}", "-s3", f"-s3.port={ports['store']}", f"-s3.port.grpc={free_port()}",
         "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={data / 's3.json'}"],
    ]  # fmt: skip
    store = Store(StoreEndpoint(f"http://{address}:{ports['store']}", "us-east-1", "edif-hpc", ACCESS, SECRET))
    with (data / "log").open("w") as log:
        processes = [subprocess.Popen(command, stdout=log, stderr=log, cwd=data) for command in commands]
        try:
            cluster.wait(lambda: _answers(store), 60.0, "the object store answering")
            yield
        finally:
            for process in processes:
                process.kill()
                process.wait()


def _answers(store: Store) -> bool:
    try:
        store.ensure_bucket()
    except Unavailable:
        return False
    return True
