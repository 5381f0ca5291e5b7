"""Putting an entry into the shared model cache: prepared aside, described, and renamed into place whole.

A reader sees the old model, the new one, or none, never half of one. What this module must not know: where the files
come from.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edif_hpc.core.errors import EdifError, ModelError
from edif_hpc.hardware.checkpoint import Checkpoint, describe, entry_name

LEFT_OUT = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.gguf", "*.tflite")
"""Never loaded here, often as large as the safetensors beside them, and the pickles among them can run code."""

NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


@dataclass(frozen=True)
class Progress:
    """How far something has come. `total` is 0 while it is unknown; sizes in bytes."""

    step: str
    done: int = 0
    total: int = 0


Report = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Report to nobody."""


@contextmanager
def staging(cache: Path, repo_id: str, keep: bool = False) -> Iterator[Path]:
    """A folder inside the cache to prepare an entry in, and this model's lock.

    Disk full, refused access and Ctrl-C become one sentence; the folder goes away, unless `keep` lets a long download
    be taken up again.
    """
    with _sentences(repo_id, keep):
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache, repo_id):
            stage = stage_path(cache, repo_id)
            if not keep:
                shutil.rmtree(stage, ignore_errors=True)  # left behind by a process that was killed
            stage.mkdir(exist_ok=True)
            try:
                yield stage
            except BaseException:
                if not keep:
                    shutil.rmtree(stage, ignore_errors=True)
                raise
            shutil.rmtree(stage, ignore_errors=True)


def publish(stage: Path, cache: Path, repo_id: str, commit: str, ref: str | None = "main") -> Checkpoint:
    """Move a staged entry into the cache and point `ref` at it, after making sure that it can be described.

    Raises:
        ModelError: what is staged cannot be served.
    """
    describe(stage, repo_id, commit)
    staged, entry = stage / entry_name(repo_id), cache / entry_name(repo_id)
    damaged = (entry / "snapshots" / commit).exists() and not describable(cache, repo_id, commit)
    if damaged:
        shutil.rmtree(entry / "snapshots" / commit)
    for kind in ("blobs", "snapshots"):  # in this order: a snapshot's links must never dangle
        (entry / kind).mkdir(parents=True, exist_ok=True)
        for path in (staged / kind).glob("*"):
            target = entry / kind / path.name
            if (damaged or not target.exists()) and not path.name.endswith(".incomplete"):
                path.replace(target)
    return point(cache, repo_id, commit, ref)


def point(cache: Path, repo_id: str, commit: str, ref: str | None) -> Checkpoint:
    """Let a branch or tag name a commit that is in the cache; None leaves all as they are."""
    if ref is not None:
        path = cache / entry_name(repo_id) / "refs" / ref
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_text(commit)
        draft.replace(path)
    return describe(cache, repo_id, commit if ref is None else ref)


def describable(cache: Path, repo_id: str, commit: str) -> bool:
    """Whether the cache holds this commit, whole enough to be served."""
    try:
        describe(cache, repo_id, commit)
    except ModelError:
        return False
    return True


@contextmanager
def locked(cache: Path, repo_id: str) -> Iterator[None]:
    """One writer per model, over all processes that share the cache where its file system has locks."""
    path = cache / ".locks" / f"{entry_name(repo_id)}.edif-hpc"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_FLOCK:  # some parallel file systems are mounted without
                raise
        yield


def stage_path(cache: Path, repo_id: str) -> Path:
    """Where an entry is prepared, or put aside on its way out."""
    return cache / f".staging-{entry_name(repo_id)}"


@contextmanager
def _sentences(repo_id: str, keep: bool) -> Iterator[None]:
    left = "what was downloaded so far is kept" if keep else "nothing half-done was left"
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Pulling {repo_id!r} was stopped; {left}; run it again to finish.") from None
    except EdifError:
        raise
    except OSError as error:
        raise ModelError(disk_sentence(repo_id, error)) from error


def disk_sentence(repo_id: str, error: OSError) -> str:
    """What to do about an error of the file system."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk of the model cache is full; free some space or set models.cache, then pull {repo_id!r} again."
    return f"The model {repo_id!r} could not be written to the cache ({error}); check the cache's permissions."
