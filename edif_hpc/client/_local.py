"""Where the service is and which key opens it, when nobody says: the environment, else the home on this machine.

Settings are imported where a home is looked at: a client of a service elsewhere needs no such libraries. This module
knows of nnsight only the one line of its configuration file that holds a key, so that finding a request again needs
no torch.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from edif_hpc.core.errors import EdifError
from edif_hpc.core.home import Home, read_secret

from ._errors import NotConnected

if TYPE_CHECKING:
    from edif_hpc.core.settings import Settings

SAVED_KEY = re.compile(r"^\s+APIKEY:\s*['\"]?([^\s'\"#]+)", re.MULTILINE)
"""In the YAML that nnsight.login() writes."""
UP = "up.json"
"""In a home's `run`: what its `edif-hpc up` was told, which holds while it runs."""
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - looked up, not bound
LOCAL = re.compile(r"https?://(127\.|localhost|\[::1\])")


def address(given: str | None = None) -> str:
    """The service's address: what was given, else NDIF_HOST, else the gateway of the home on this machine.

    Raises:
        NotConnected: there is none, or it is not one.
    """
    url = (given or os.environ.get("NDIF_HOST") or _home_url()).rstrip("/")
    if "://" not in url:
        url = f"http://{url}"
    if not url.startswith(("http://", "https://")):
        raise NotConnected(f"{url!r} is no address of a service; give one that starts with http:// or https://.")
    return url


def api_key(url: str, given: str | None = None) -> str:
    """The key: what was given, else NDIF_API_KEY, else what nnsight saved, else the owner's of the home; "" for none.

    The owner's key goes to the home's own gateway alone: `url` may be somebody else's.
    """
    found = given or os.environ.get("NDIF_API_KEY") or _saved_key()
    if found:
        return found
    from edif_hpc.core.endpoints import OWNER_KEY

    try:
        if url == _home_url():
            return read_secret(Home.locate().secrets / OWNER_KEY)
    except (EdifError, OSError):
        pass
    return ""


def is_local(url: str) -> bool:
    """A proxy named in the environment has no business with this machine's own addresses."""
    return LOCAL.match(url) is not None


def hub_cache(url: str) -> Path | None:
    """The Hugging Face cache of the home on this machine, if `url` is its gateway."""
    try:
        home, settings = _home()
    except (EdifError, OSError):
        return None
    if url != _url(settings):
        return None
    return Path(settings.models.cache).expanduser() if settings.models.cache else home.hub


def _home() -> tuple[Home, Settings]:
    from edif_hpc.core.settings import load

    home = Home.locate()
    home.check()
    try:
        told = json.loads((home.run / UP).read_text())
    except (FileNotFoundError, ValueError):
        told = {}
    config = told.get("config") or ""
    return home, load(Path(config) if config else home.config, told.get("overrides") or {}).settings


def _home_url() -> str:
    try:
        return _url(_home()[1])
    except EdifError as error:
        raise NotConnected(
            "No service is known: call edif_hpc.connect(url, key), or set NDIF_HOST and NDIF_API_KEY "
            f"({str(error).rstrip('.')})."
        ) from None


def _url(settings: Settings) -> str:
    host = EVERYWHERE.get(settings.gateway.host, settings.gateway.host)
    return f"http://{host}:{settings.gateway.port}"


def _saved_key() -> str:
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    named = os.environ.get("NNSIGHT_CONFIG") or f"{base}/nnsight/config.yaml"
    try:
        found = SAVED_KEY.search(Path(named).expanduser().read_text())
    except OSError:
        return ""
    return found[1] if found and found[1] not in ("null", "~") else ""
