"""Apptainer on this machine, and the CPU image that cluster tests run their workers in.

Debian 12 has no Apptainer; Debian's unstable branch has. Installing it from there brings a newer C library along, so
it is done only in CI or when asked for. The image is built as the cluster's ordinary user, once for what goes into it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from edif_hpc.fleet.images import APT, debian_mirror
from tests.support import models
from tests.support.slurm import Cluster

from . import bed
from .bed import ROOT, SYSTEM_PATH

SOURCE, PINS = "edif-hpc-test.sources", "edif-hpc-test"
NEEDED = ("debootstrap", "squashfuse", "uidmap")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
BUILD_SECONDS = 900.0


def obstacle() -> str:
    """Why there can be no image here and what to do; empty when there can. Installs what is missing where asked to."""
    missing = [program for program in ("apptainer", "debootstrap") if shutil.which(program, path=SYSTEM_PATH) is None]
    if not missing:
        return ""
    if not (os.environ.get("CI") == "true" or os.environ.get("EDIF_HPC_TEST_INSTALL") == "1"):
        return (
            f"There is no {missing[0]} here: set EDIF_HPC_TEST_INSTALL=1 to let the tests install it from Debian's "
            "unstable branch, which brings a newer C library, or do it yourself."
        )
    install()
    return "" if shutil.which("apptainer", path=SYSTEM_PATH) else "apt-get installed no apptainer."


def install() -> None:
    """Later branches of Debian, pinned below this one, and from them Apptainer alone and what it needs."""
    source = f"Types: deb\nURIs: {debian_mirror()}\nSuites: trixie sid\nComponents: main\nSigned-By: {KEYRING}\n"
    (APT / "sources.list.d" / SOURCE).write_text(source)
    pins = "\n".join(
        f"Package: *\nPin: release n={branch}\nPin-Priority: {priority}\n"
        for branch, priority in (("trixie", 90), ("sid", 80))
    )
    (APT / "preferences.d" / PINS).write_text(pins)
    apt("update")
    apt("install", "-y", "--no-install-recommends", *NEEDED)
    apt("install", "-y", "-t", "sid", "-o", "Dpkg::Options::=--force-confold", "apptainer")


def apt(*arguments: str) -> None:
    environment = {**os.environ, "PATH": SYSTEM_PATH, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=300", *arguments]
    subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=True)


def image(cluster: Cluster) -> Path:
    """The CPU image with what this checkout holds."""
    folder = models.test_cache() / "images"
    found = folder / f"worker-cpu-{_contents()}.sif"
    if found.exists():
        return found
    Path("/dev/fuse").chmod(0o666)  # as on every machine that mounts images for ordinary users
    place = cluster.home / "image"
    place.mkdir()
    os.chown(place, cluster.uid, cluster.gid)
    program = Path(sys.executable).parent / "edif-hpc"
    pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    cluster.run([program, "image", "build", "cpu", "--out", place / "worker.sif"], timeout=BUILD_SECONDS, **pip)
    folder.mkdir(parents=True, exist_ok=True)
    for older in folder.glob("worker-cpu-*.sif"):
        older.unlink()
    shutil.copyfile(place / "worker.sif", found)
    shutil.rmtree(place)
    return found


def _contents() -> str:
    """Tells images apart by what goes into them."""
    files = [*sorted((ROOT / "edif_hpc").rglob("*.py")), *sorted((ROOT / "edif_hpc").rglob("*.lua"))]
    files += [ROOT / "apptainer" / "worker-cpu.def", ROOT / "pyproject.toml"]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def main() -> int:
    """Install what the cluster's tests need, Slurm first, ahead of all tests: what starts while the C library is
    replaced fails."""
    found = bed.obstacle() or obstacle()
    if found:
        print(found, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
