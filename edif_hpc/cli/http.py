"""Talking to the gateway: which address, which key, and how its refusals and absence become sentences."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edif_hpc.core.errors import EdifError, Unavailable
from edif_hpc.core.home import Home
from edif_hpc.core.links import by_the_same_door

if TYPE_CHECKING:
    import httpx

SECONDS = 30.0
PAYLOAD_SECONDS = 300.0
SEND_TRIES = 4
RETRY_SECONDS = 1.0
UNTRUSTED = "CERTIFICATE_VERIFY_FAILED"
AWAY = frozenset({502, 503, 504})
SAVED_KEY = re.compile(r"^\s+APIKEY:\s*['\"]?([^\s'\"#]+)", re.MULTILINE)
"""In the YAML that nnsight.login() writes; no YAML library is needed to read one line of it."""


class Refused(EdifError):
    """The gateway's own sentence."""

    code = "refused"


def address(home: Home) -> str:
    """NDIF_HOST, else the gateway of the home."""
    from edif_hpc.fleet.state import gateway_url, settings_of

    given = os.environ.get("NDIF_HOST")
    if given:
        return given.rstrip("/") if "://" in given else f"http://{given.rstrip('/')}"
    home.check()
    return gateway_url(settings_of(home).settings)


def api_key(home: Home, url: str) -> str:
    """NDIF_API_KEY, else the key nnsight saved, else the owner's of the home; empty when there is none.

    The owner's key goes to the home's own gateway alone: NDIF_HOST may name somebody else's.
    """
    from edif_hpc.core.endpoints import OWNER_KEY
    from edif_hpc.core.home import read_secret
    from edif_hpc.fleet.state import gateway_url, settings_of

    given = os.environ.get("NDIF_API_KEY") or saved_key()
    if given or not (home.secrets / OWNER_KEY).exists() or url != gateway_url(settings_of(home).settings):
        return given
    return read_secret(home.secrets / OWNER_KEY)


def saved_key() -> str:
    """What nnsight keeps in its user configuration."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    try:
        found = SAVED_KEY.search((Path(base).expanduser() / "nnsight" / "config.yaml").read_text())
    except (FileNotFoundError, NotADirectoryError):
        return ""
    return found[1] if found and found[1] not in ("null", "~") else ""


class Gateway:
    """The gateway's JSON endpoints."""

    def __init__(self, home: Home) -> None:
        self.url = address(home)
        key = api_key(home, self.url)
        self._headers = {"ndif-api-key": key} if key else {}

    def get(self, path: str, **query: Any) -> Any:
        return self._call("GET", path, query)

    def post(self, path: str) -> Any:
        return self._call("POST", path, {})

    def delete(self, path: str) -> Any:
        return self._call("DELETE", path, {})

    def send(self, path: str, envelope: dict[str, Any], payload: bytes, headers: dict[str, str]) -> Any:
        """JSON of a POST that carries a payload. It may be sent twice, so `headers` must say that it is the same one.

        A gateway that answers nobody is refused at once; a connection that breaks on the way is tried again.
        """
        import httpx

        for left in reversed(range(SEND_TRIES)):
            try:
                with self._client(httpx.Timeout(SECONDS, write=PAYLOAD_SECONDS, read=PAYLOAD_SECONDS)) as client:
                    answer = client.post(
                        path,
                        data={"data": json.dumps(envelope)},
                        files={"blob": ("request", payload, "application/octet-stream")},
                        headers=headers,
                    )
                break
            except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
                raise self.silent(error) from None
            except httpx.HTTPError as error:
                if not left:
                    raise self.silent(error) from None
                time.sleep(RETRY_SECONDS)  # nothing tells that the network is back
        return _accepted(answer)

    def _client(self, timeout: httpx.Timeout) -> httpx.Client:
        return _client(self.url, base_url=self.url, headers=self._headers, timeout=timeout)

    def _call(self, method: str, path: str, query: dict[str, Any]) -> Any:
        import httpx

        try:
            with self._client(httpx.Timeout(SECONDS)) as client:
                answer = client.request(method, path, params=query)
        except httpx.HTTPError as error:
            raise self.silent(error) from None
        return _accepted(answer)

    @contextmanager
    def stream(self, url: str, start: int) -> Iterator[httpx.Response]:
        """The answer of a signed link, from byte `start` on, as it comes. The key stays here: links need none."""
        url = by_the_same_door(url, self.url)
        headers = {"accept-encoding": "identity", **({"range": f"bytes={start}-"} if start else {})}
        with (
            _client(url, timeout=SECONDS) as client,
            client.stream("GET", url, headers=headers) as answer,
        ):
            yield answer

    def silent(self, error: Exception) -> Unavailable:
        """The refusal for a gateway that does not answer."""
        why = str(error).rstrip(".")
        if UNTRUSTED in why:
            return Unavailable(
                f"The certificate of {self.url} is not trusted here ({why}); have SSL_CERT_FILE name the authority "
                "that signed it."
            )
        return Unavailable(
            f"The gateway at {self.url} does not answer ({why}); start it with `edif-hpc up`, or set NDIF_HOST."
        )


def _accepted(answer: httpx.Response) -> Any:
    if answer.status_code in AWAY:
        raise Unavailable(detail(answer))
    if answer.is_error:
        raise Refused(detail(answer))
    return answer.json()


def _client(url: str, **options: Any) -> httpx.Client:
    """A client for this address: with what the environment says of proxies where that is not this machine's own, and
    of certificates anywhere."""
    import httpx

    local = _local(url)
    verify = httpx.create_ssl_context() if local and url.startswith("https:") else True
    return httpx.Client(trust_env=not local, verify=verify, **options)


def _local(url: str) -> bool:
    """A proxy named in the environment has no business with this machine's own addresses."""
    return re.match(r"https?://(127\.|localhost|\[::1\])", url) is not None


def detail(answer: httpx.Response) -> str:
    """The sentence of a refusal, or, from a store that a link led to, its number."""
    try:
        return str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return f"The gateway, or the store that its link leads to, answered {answer.status_code}."
