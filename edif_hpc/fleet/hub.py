"""A model from the Hugging Face Hub, downloaded on the login node into a staging folder of the shared cache.

huggingface_hub is imported only here and only when asked: the small install works without it. Every way in which the
Hub can say no becomes one sentence. What this module must not know: how an entry is put in place.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from edif_hpc.core.errors import ComponentError, ModelError, Unavailable
from edif_hpc.fleet.shelf import LEFT_OUT, Progress, Report, describable, point, publish, staging
from edif_hpc.hardware.checkpoint import COMMIT, Checkpoint, entry_name

POLL_SECONDS = 0.5
"""How often the size of what has arrived is looked at."""


def fetch(repo_id: str, cache: Path, revision: str | None, report: Report) -> Checkpoint:
    """Download what transformers loads of a repository and put it into the cache.

    Raises:
        ModelError: the Hub does not have it, or does not give it to this account.
        Unavailable: the Hub cannot be reached.
    """
    wanted = revision or "main"
    with _sentences(repo_id, wanted):
        commit, total = _look_up(repo_id, wanted)
    ref = None if COMMIT.fullmatch(wanted) else wanted
    with staging(cache, repo_id, keep=True) as stage:
        if describable(cache, repo_id, commit):
            return point(cache, repo_id, commit, ref)
        with _sentences(repo_id, wanted), _watched(stage / entry_name(repo_id) / "blobs", total, report):
            _download(repo_id, commit, stage)
        return publish(stage, cache, repo_id, commit, ref)


def _look_up(repo_id: str, revision: str) -> tuple[str, int]:
    """The commit behind a revision, and the bytes that will be fetched."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
    if info.sha is None:
        raise ModelError(f"The Hub names no commit for {repo_id!r} at {revision!r}; pull another revision.")
    wanted = [file for file in info.siblings or [] if not any(fnmatch(file.rfilename, mask) for mask in LEFT_OUT)]
    return info.sha, sum(file.size or 0 for file in wanted)


def _download(repo_id: str, commit: str, stage: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quiet = are_progress_bars_disabled()
    disable_progress_bars()  # one bar, ours
    try:
        snapshot_download(repo_id, revision=commit, cache_dir=stage, ignore_patterns=list(LEFT_OUT))
    finally:
        if not quiet:
            enable_progress_bars()


@contextmanager
def _sentences(repo_id: str, revision: str) -> Iterator[None]:
    """Every refusal of huggingface_hub as one of ours."""
    try:
        from huggingface_hub import errors
    except ImportError:
        raise ComponentError(
            "Pulling from the Hub needs huggingface_hub, which is not installed; run `pip install huggingface_hub`, or "
            "pull a folder instead."
        ) from None
    away = Unavailable(
        f"The Hub cannot be reached from here, so {repo_id!r} was not pulled; pull on a machine with internet access, "
        "or copy the model here and pull its folder."
    )
    try:
        yield
    except errors.GatedRepoError:
        raise ModelError(
            f"The model {repo_id!r} is gated; accept its terms on the Hub and run `hf auth login`, then pull again."
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"The Hub has {repo_id!r}, but no revision {revision!r}; name another.") from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"The Hub has no model {repo_id!r}, or not for this account; check the name, or run `hf auth login`."
        ) from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        raise away from None
    except errors.HfHubHTTPError as error:
        raise Unavailable(f"The Hub did not give {repo_id!r} ({_first_line(error)}); try again later.") from error
    except _no_connection(errors.HfHubHTTPError) as error:
        raise away from error


def _no_connection(hub_error: type[Exception]) -> tuple[type[BaseException], ...]:
    """What huggingface_hub lets through when there is no network: errors of the HTTP library its own stand on.

    That was requests before 1.0, then httpx, then httpx2; all call the root of their tree by one of two names.
    """
    roots = [kind for kind in hub_error.__mro__ if kind.__name__ in ("HTTPError", "RequestException")]
    return (*roots, ConnectionError, TimeoutError)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextmanager
def _watched(blobs: Path, total: int, report: Report) -> Iterator[None]:
    """Report the size of what has arrived, while something else downloads it."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(POLL_SECONDS):
            report(Progress("Downloading", min(_size(blobs), total), total))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
    report(Progress("Downloading", total, total))


def _size(folder: Path) -> int:
    size = 0
    for path in folder.glob("*"):
        try:
            size += path.stat().st_size
        except OSError:  # renamed in between
            continue
    return size
