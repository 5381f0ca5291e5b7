"""Building the images that workers run in, without root and from what the building machine is configured to use.

Wheels are fetched here, outside, by this machine's own pip: so its mirrors, proxies and credentials hold and none of
them gets into an image. Debian's packages come from the mirror in this machine's own apt configuration, which the build
sees through loopback, so that its address does not get into the image either.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from edif_hpc import __version__
from edif_hpc.core.errors import ComponentError

from .mirror import through_loopback

ROOT = Path(__file__).parents[2]
"""The checkout, when this is one."""
DEFINITIONS = ROOT / "apptainer"
APT = Path("/etc/apt")
GLIBC_MINOR = 36
"""Of Debian 12; the vendors' images have later ones."""
TORCH = ("torch==2.13.0+cpu", "torch==2.13.0")
"""The first that pip finds."""
PACKED = ("--mksquashfs-args", "-comp zstd -Xcompression-level 3")
"""A fraction of the time that the default takes, and quicker to read from."""
WHEELS = "wheels"
"""The folder, as the build sees it from where it runs: a whole path would stand in the image."""
ROOM_BYTES = 6 * 1024**3

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Kind:
    """One image: its definition, and what of ours goes into it."""

    definition: str
    extras: str
    torch: Sequence[str] = ()
    pins: str = ""
    """File with all that is fetched beside ours, for a base that brings torch; empty: pip finds that out."""
    pythons: Sequence[str] = ("3.11",)
    """Of the base. Debian 12 has one; which one the vendors' images have changes with their tags."""

    @property
    def is_debian(self) -> bool:
        return not self.pins


KINDS = {
    "cpu": Kind("worker-cpu.def", "[worker]", TORCH),
    "cuda": Kind("worker-cuda.def", "[worker]", pins="cuda/requirements.txt", pythons=("3.11", "3.12")),
    "rocm": Kind("worker-rocm.def", "[worker]", pins="rocm/requirements.txt", pythons=("3.12",)),
    "gateway": Kind("gateway.def", "[local]"),
}


@dataclass
class Built:
    """What a build did. Sizes are bytes, times seconds."""

    image: Path
    kind: str
    bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)


def build(kind: str, image: Path, arguments: Mapping[str, str], tell: Tell) -> Built:
    """Build one image and test it. What was there under its name is replaced at the end.

    Args:
        arguments: build arguments of the definition that are not to be found out here.

    Raises:
        ComponentError: something is missing or failed; the sentence says what to do.
    """
    chosen = KINDS[kind]
    definition = DEFINITIONS / chosen.definition
    refuse(chosen, image)
    built = Built(image, kind)
    image.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".edif-hpc-image-", dir=image.parent) as folder:
        place = Path(folder)
        found = dict(arguments)
        mirror = found.pop("mirror", None) or (debian_mirror() if chosen.is_debian else "")
        with _timed(built, "wheels", tell, "fetching wheels"):
            found = {**fetch_wheels(chosen, place), **found}
        half = place / "image.sif"
        seen = through_loopback(mirror) if mirror else nullcontext("")
        with _timed(built, "image", tell, f"building {image.name}"), seen as address:
            found |= {"mirror": address} if address else {}
            options = [*privileges(), *PACKED, *_build_arguments(found)]
            run(["apptainer", "build", *options, str(half), str(definition)], place)
        built.labels = labels(half)
        built.bytes = half.stat().st_size
        os.replace(half, image)
    return built


def refuse(kind: Kind, image: Path) -> None:
    """Look for what a build needs before it takes minutes.

    Raises:
        ComponentError: the first thing that is missing.
    """
    if not (DEFINITIONS / kind.definition).exists():
        raise ComponentError("Images are built from a checkout of edif_hpc; clone it and run this there.")
    wanted = {"apptainer": "Apptainer", **({"debootstrap": "debootstrap"} if kind.is_debian else {})}
    for program, package in wanted.items():
        if shutil.which(program, path=_path()) is None:
            raise ComponentError(f"There is no {program} here; install {package}, or build on a machine that has it.")
    nearest = next(folder for folder in image.absolute().parents if folder.exists())
    room = shutil.disk_usage(nearest).free
    if room < ROOM_BYTES:
        raise ComponentError(
            f"Building takes {ROOM_BYTES >> 30} GiB in {nearest}, and {room >> 30} GiB are free; choose another --out."
        )


def debian_mirror(apt: Path = APT) -> str:
    """The mirror that this machine installs Debian's packages from.

    Raises:
        ComponentError: it has none, as it is no Debian; then --arg mirror=URL names one.
    """
    files = [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*"))] if apt.is_dir() else []
    for path in files:
        text = path.read_text(errors="replace") if path.suffix in (".list", ".sources") and path.is_file() else ""
        for line in text.splitlines():
            match = re.match(r"\s*(?:deb\s+(?:\[[^]]*\]\s+)?|URIs:\s*)(https?://\S+)", line)
            if match and "security" not in match[1] and "debian" in match[1]:
                return match[1].rstrip("/")
    raise ComponentError("No Debian mirror stands in this machine's apt configuration; name one: --arg mirror=URL.")


def fetch_wheels(kind: Kind, place: Path) -> dict[str, str]:
    """Ours, built from the checkout, and all it needs, into a folder. Returns the build arguments that say so."""
    wheels = place / WHEELS
    pip = [sys.executable, "-m", "pip"]
    run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels), str(ROOT)], place)
    found = {"wheels": WHEELS, "version": __version__}
    download = [*pip, "download", "--quiet", "--only-binary=:all:", "--dest", str(wheels), "--find-links", str(wheels)]
    ours = f"edif-hpc{kind.extras}=={__version__}"
    for python in kind.pythons:
        target = [*download, "--implementation", "cp", "--python-version", python, *_platforms()]
        if kind.pins:
            run([*target, "--no-deps", "--requirement", str(ROOT / kind.pins)], place)
        elif kind.torch:
            found["torch"] = _with_torch([*target, ours], kind.torch, place)
        else:
            run([*target, ours], place)
    return found


def _with_torch(download: list[str], builds: Sequence[str], place: Path) -> str:
    """Fetch with the first build of torch that pip finds, and say which."""
    for torch in builds[:-1]:
        try:
            run([*download, torch], place)
        except ComponentError:
            continue  # it may be that this index has another of them
        return torch
    run([*download, builds[-1]], place)
    return builds[-1]


def _platforms() -> list[str]:
    """Every kind of wheel that the image's C library runs, the newest first."""
    machine = platform.machine()
    tags = [f"manylinux_2_{minor}_{machine}" for minor in range(GLIBC_MINOR, 4, -1)]
    tags += [f"manylinux2014_{machine}", f"manylinux2010_{machine}", f"manylinux1_{machine}", f"linux_{machine}"]
    return [part for tag in tags for part in ("--platform", tag)]


def privileges() -> list[str]:
    """How Apptainer becomes root in what it builds. An ordinary user needs no word for it.

    Raises:
        ComponentError: neither way is open.
    """
    if os.geteuid() != 0 or _has_all_rights():
        return []
    if re.search(r"^(root|0):", _read("/etc/subuid"), re.MULTILINE):
        return ["--fakeroot"]
    raise ComponentError("Root has fewer rights here than Apptainer needs; build as an ordinary user.")


def _has_all_rights() -> bool:
    last = int(_read("/proc/sys/kernel/cap_last_cap") or 0)
    match = re.search(r"^CapBnd:\s*([0-9a-f]+)", _read("/proc/self/status"), re.MULTILINE)
    return bool(match) and int(match[1], 16) == (1 << (last + 1)) - 1  # type: ignore[index]  # it matched


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except FileNotFoundError:
        return ""


def labels(image: Path) -> dict[str, str]:
    """The image's own, and who made it how."""
    if not image.exists():
        raise ComponentError(f"There is no image {image}; build one: edif-hpc image build cpu --out {image}.")
    with tempfile.TemporaryDirectory() as folder:
        said = run(["apptainer", "--silent", "inspect", "--json", "--labels", str(image.absolute())], Path(folder))
    found = json.loads(said)["data"]["attributes"]["labels"]
    return {str(key): str(value) for key, value in sorted(found.items())}


def test(image: Path) -> str:
    """Run the image's %test and return what it said.

    Raises:
        ComponentError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        return run(["apptainer", "test", "--cleanenv", "--containall", str(image.absolute())], Path(folder))


def run(command: Sequence[str], folder: Path) -> str:
    """Run one step; its words go to a file, and the end of them into the error.

    Raises:
        ComponentError: it failed.
    """
    log = folder / "log"
    environment = {**os.environ, "PATH": _path(), "APPTAINER_TMPDIR": str(folder), "TMPDIR": str(folder)}
    with log.open("w+") as words:
        try:
            done = subprocess.run(command, stdout=words, stderr=words, env=environment, check=False, cwd=folder)
        except FileNotFoundError:
            raise ComponentError(f"There is no {command[0]} here; install it.") from None
        words.seek(0)
        said = words.read()
    if done.returncode:
        raise ComponentError(f"`{' '.join(command[:3])} …` failed:\n{_last(said)}")
    return said


def _path() -> str:
    """debootstrap lies where an ordinary user's PATH may not lead."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _last(text: str, lines: int = 15) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def _build_arguments(arguments: Mapping[str, str]) -> list[str]:
    return [f"--build-arg={name}={value}" for name, value in sorted(arguments.items())]


class _timed:
    def __init__(self, built: Built, step: str, tell: Tell, words: str) -> None:
        self.built, self.step, self.tell, self.words = built, step, tell, words

    def __enter__(self) -> None:
        self.began = time.monotonic()
        self.tell(f"{self.words} …")

    def __exit__(self, *_: object) -> None:
        self.built.seconds[self.step] = round(time.monotonic() - self.began, 1)
