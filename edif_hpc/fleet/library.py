"""The shared model cache: what an admin puts in on the login node, so that workers can stay offline.

The cache is an ordinary Hugging Face one (`models--ORG--NAME/{blobs,refs,snapshots}`), so every tool reads it. An entry
is prepared in a staging folder inside the cache, described there, and only then renamed into place: a reader sees the
old model, the new one, or none, never half of one. What this module must not know: what is served, and where.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from edif_hpc.core.errors import ModelError
from edif_hpc.fleet.shelf import LEFT_OUT, Progress, Report, locked, publish, silent, stage_path, staging
from edif_hpc.hardware.checkpoint import Checkpoint, check_repo_id, entry_name

CHUNK = 4 * 1024 * 1024
"""Bytes copied between two progress reports."""


def pull(
    source: str,
    cache: Path,
    revision: str | None = None,
    report: Report = silent,
    name: str | None = None,
) -> Checkpoint:
    """Put a model into the shared cache, from the Hub or from a save_pretrained folder.

    Args:
        source: `ORG/NAME` on the Hub, or a folder written as a path (`/…`, `./…`, `../…`, `~…`).
        revision: branch, tag or commit on the Hub.
        name: the repository id for a folder; by default `local/FOLDER`.

    Raises:
        ModelError: it is not there, cannot be served, or the disk is full. The cache is then as it was.
        KeyboardInterrupt: with a sentence; the cache is as it was.
    """
    if is_path(source):
        folder = Path(source).expanduser()
        if revision is not None:
            raise ModelError("A folder has no revisions; leave --revision out.")
        return adopt(folder, cache, name or f"local/{folder.resolve().name}", report)
    if name is not None:
        raise ModelError("A model from the Hub keeps its own name; give --name only with a folder.")
    check_repo_id(source)
    from edif_hpc.fleet import hub

    return hub.fetch(source, cache, revision, report)


def is_path(source: str) -> bool:
    """Whether `source` names a folder; `org/name` never does, even if there is one."""
    return source in (".", "..") or source.startswith(("/", "./", "../", "~"))


def adopt(folder: Path, cache: Path, repo_id: str, report: Report = silent) -> Checkpoint:
    """Copy a save_pretrained folder into the cache as the main revision of `repo_id`.

    The commit is a digest of names and contents, so the same folder gives the same commit and is copied once.
    """
    check_repo_id(repo_id)
    files = _files(folder)
    with staging(cache, repo_id) as stage:
        entry = stage / entry_name(repo_id)
        digests = _copy_blobs(files, folder, entry / "blobs", report)
        commit = _commit(digests)
        for relative, digest in digests.items():
            link = entry / "snapshots" / commit / relative
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path(*[".."] * (2 + len(relative.parts) - 1), "blobs", digest))
        return publish(stage, cache, repo_id, commit)


def remove(cache: Path, repo_id: str) -> int:
    """Take a model out of the cache, all its revisions; the bytes that came free.

    Raises:
        ModelError: it is not there.
    """
    entry = cache / entry_name(repo_id)
    with locked(cache, repo_id):
        if not entry.is_dir() or entry.is_symlink():
            raise ModelError(f"The model {repo_id!r} is not in the cache; `edif-hpc models list` shows what is.")
        size = sum(path.lstat().st_size for path in entry.rglob("*") if path.is_file() and not path.is_symlink())
        going = stage_path(cache, repo_id)
        shutil.rmtree(going, ignore_errors=True)
        entry.rename(going)  # at once for every reader; a worker that has files open keeps them
        shutil.rmtree(going)
    return size


# -- copying ----------------------------------------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    """What of a folder belongs into the cache, relative to it."""
    if not folder.is_dir():
        raise ModelError(f"There is no folder {str(folder)!r}; for a model from the Hub write ORG/NAME without a dot.")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ModelError(f"The folder {str(folder)!r} has no config.json; name one that save_pretrained wrote.")
    found = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [path for path in found if not any(part.startswith(".") for part in path.parts) and not _left_out(path)]


def _left_out(path: Path) -> bool:
    return any(path.match(pattern) for pattern in LEFT_OUT)


def _copy_blobs(files: list[Path], folder: Path, blobs: Path, report: Report) -> dict[Path, str]:
    """Copy each file to a blob named after its sha256."""
    blobs.mkdir(parents=True)
    total = sum((folder / path).stat().st_size for path in files)
    done, digests = 0, {}
    for path in files:
        digest, draft = hashlib.sha256(), blobs / "draft"
        with (folder / path).open("rb") as reader, draft.open("wb") as writer:
            while chunk := reader.read(CHUNK):
                digest.update(chunk)
                writer.write(chunk)
                done += len(chunk)
                report(Progress("Copying", done, total))
        draft.rename(blobs / digest.hexdigest())
        digests[path] = digest.hexdigest()
    return digests


def _commit(digests: dict[Path, str]) -> str:
    lines = "".join(f"{path.as_posix()}\0{digest}\n" for path, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:40]
