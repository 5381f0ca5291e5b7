"""`connect`: one line that points nnsight at a service, and has `remote=True` go through this client.

nnsight makes the backend of `remote=` in one method of its models, `Remotable._remote_backend`. That method alone is
replaced, and only where it was asked for `remote=True` and to wait: `remote="http://…"`, `blocking=False`, a `job_id`
and any `backend=` are left to nnsight, whose own client goes to the same service then. `disconnect` puts the method
back.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from edif_hpc.core.scripts import here

from . import _connection, _local
from ._connection import Choices, Connection
from ._errors import NotConnected
from ._request import Blocking

CHECK_PATIENCE_SECONDS = 10.0
TRUE = frozenset({"1", "true", "yes", "on"})


def connect(
    url: str | None = None,
    key: str | None = None,
    *,
    offline: bool | None = None,
    cache: str | Path | None = None,
    progress: bool | None = None,
    trust: bool = False,
    stock: bool = False,
    check: bool = True,
) -> Connection:
    """Point this process's nnsight at a service.

    Args:
        url: its address; None: NDIF_HOST, else the service of the home on this machine.
        key: yours; None: NDIF_API_KEY, else the one nnsight saved, else the owner's of that home.
        offline: do without a model hub: models are taken from the Hugging Face cache. None: as HF_HUB_OFFLINE says.
        cache: that cache, as `~/.cache/huggingface/hub`; None: HF_HUB_CACHE, offline on the service's own machine the
            one its workers use.
        progress: whether waiting shows a line. None shows it in terminals and notebooks; what a block prints is passed
            on even elsewhere.
        trust: load results of whatever type, which runs code that they name.
        stock: leave `remote=True` to nnsight's own client.
        check: ask the service whether the key is good.

    Raises:
        NotConnected: no address is known.
        Refused: the key is not good.
        Unreachable: nothing answers there.
    """
    if here.is_running():  # nothing to point at: remote=True means here
        return Connection("http://here.invalid", "", Choices(progress, trust))
    address = _local.address(url)
    connection = Connection(address, _local.api_key(address, key), Choices(progress, trust))
    if check:
        connection.get("/api/requests", {"limit": 1}, patience=CHECK_PATIENCE_SECONDS)
    if offline is None:
        offline = any(os.environ.get(name, "").lower() in TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    if offline:
        _go_offline(Path(cache).expanduser() if cache else _local.hub_cache(address))
    _configure_nnsight(connection)
    _take_remote(not stock)
    return _connection.use(connection)


def disconnect() -> None:
    """Give `remote=True` back to nnsight's own client; what nnsight was pointed at stays."""
    _take_remote(False)
    _connection.forget()


def _configure_nnsight(connection: Connection) -> None:
    try:
        from nnsight.schema.config import CONFIG
    except ImportError:
        raise NotConnected("nnsight is not installed here; `pip install 'edif-hpc[client]'` brings it.") from None
    CONFIG.API.HOST, CONFIG.API.APIKEY = connection.url, connection.key or None


def _go_offline(cache: Path | None) -> None:
    """What nnsight and transformers ask a hub for, answered from the cache."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if cache is not None and not os.environ.get("HF_HUB_CACHE"):
        os.environ["HF_HUB_CACHE"] = str(cache)
    from huggingface_hub import constants

    # Both were read from the environment when the package was first imported.
    constants.HF_HUB_OFFLINE = True
    if cache is not None:
        constants.HF_HUB_CACHE = str(cache)
    from nnsight.modeling.huggingface import _ID_CACHE

    # nnsight asks how an id is really spelled; a cache's folders are named by just that.
    for entry in Path(constants.HF_HUB_CACHE).glob("models--*"):
        repo = entry.name.removeprefix("models--").replace("--", "/")
        _ID_CACHE.setdefault(repo, repo)


_original: Any = None


def _take_remote(ours: bool) -> None:
    global _original
    from nnsight.modeling.mixins.remotable import Remotable

    if ours and _original is None:
        _original = Remotable._remote_backend
        Remotable._remote_backend = _remote_backend
    elif not ours and _original is not None:
        Remotable._remote_backend, _original = _original, None


def _remote_backend(self: Any, remote: Any, blocking: bool, job_id: str | None, verbose: bool) -> Any:
    """In the place of nnsight's: see the module."""
    if remote is True and blocking and job_id is None:
        return Blocking(_connection.current(), model=self, progress=True if verbose else None)
    return _original(self, remote, blocking, job_id, verbose)
