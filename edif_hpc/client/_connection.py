"""One service as a client sees it: its address, a key, and calls that outlive restarts and dropped sockets.

Whatever is asked twice must come to the same: reading does, and a submission carries an idempotency key. So every
call is repeated while the service is away, for as long as this client is patient. What it must not know: nnsight, and
results.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from edif_hpc.core.scripts import here

from . import _local
from ._errors import Misused, NotConnected, Refused, Unreachable

CONNECT_SECONDS = 10.0
WRITE_SECONDS = 60.0
READ_SECONDS = 60.0
GRACE_SECONDS = 10.0
"""A long poll that is not answered so long after its time hangs on a dead socket."""
FIRST_PAUSE_SECONDS = 0.1
LAST_PAUSE_SECONDS = 5.0
LONGEST_RETRY_AFTER_SECONDS = 60.0
PATIENCE_SECONDS = 120.0
"""How long a call goes on trying: a gateway that is started again takes seconds, a login node minutes."""
WAITING_PATIENCE_SECONDS = 12 * 3600.0
"""The same while waiting for a request, which runs on without us. A machine that sleeps does not use it up."""
AWAY = frozenset({502, 503, 504})
HOPELESS = (httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.InvalidURL)

Trouble = Callable[[str], None]
"""Told why the service does not answer before each further try; told "" once it does again."""


def unheard(_: str) -> None:
    """Where nobody wants to be told."""


@dataclass(frozen=True)
class Choices:
    """What was chosen when connecting.

    Args:
        progress: True and False are orders; None shows it to people, not to files.
        trust: load results of whatever type, which runs code that they name.
    """

    progress: bool | None = None
    trust: bool = False


class Connection:
    """A service and the user's key for it. May be used by several threads."""

    def __init__(self, url: str, key: str = "", choices: Choices | None = None) -> None:
        self.url = url
        self.key = key
        self.choices = choices or Choices()
        self._lock = threading.Lock()
        self._clients: tuple[int, httpx.Client, httpx.Client] | None = None

    def __repr__(self) -> str:
        return f"<edif_hpc connection to {self.url}{'' if self.key else ', without a key'}>"

    def get(
        self,
        path: str,
        query: dict[str, Any] | None = None,
        *,
        wait: float = 0.0,
        patience: float = PATIENCE_SECONDS,
        trouble: Trouble = unheard,
    ) -> Any:
        """JSON of a GET.

        Args:
            wait: seconds that the service may take by itself; told to it as `wait`.
            patience: seconds for which an absent service is tried again.

        Raises:
            Refused: the service said no.
            Unreachable: it stayed away.
        """
        asked = {**(query or {}), **({"wait": wait} if wait else {})}
        timeout = _timeout(wait + GRACE_SECONDS if wait else READ_SECONDS)
        return self._repeat(lambda client: client.get(path, params=asked, timeout=timeout), patience, trouble).json()

    def post(self, path: str, *, patience: float = PATIENCE_SECONDS, trouble: Trouble = unheard, **body: Any) -> Any:
        """JSON of a POST; the body as httpx takes it. It may arrive twice: see to it that this does no harm."""
        timeout = _timeout(2 * READ_SECONDS)
        return self._repeat(lambda client: client.post(path, timeout=timeout, **body), patience, trouble).json()

    @property
    def plain(self) -> httpx.Client:
        """For signed links, which may lead to another host: it sends no key."""
        return self._both()[1]

    def _both(self) -> tuple[httpx.Client, httpx.Client]:
        with self._lock:
            if self._clients is None or self._clients[0] != os.getpid():  # sockets are not for both sides of a fork
                version = {"user-agent": "edif-hpc"}
                keyed = {**version, **({"ndif-api-key": self.key} if self.key else {})}
                trust = not _local.is_local(self.url)
                try:
                    own = httpx.Client(base_url=self.url, headers=keyed, trust_env=trust)
                except httpx.InvalidURL as error:
                    raise NotConnected(f"{self.url!r} is no address of a service ({error}).") from None
                links = httpx.Client(headers=version, trust_env=trust)
                for client in (own, links):
                    weakref.finalize(self, client.close)
                self._clients = os.getpid(), own, links
            return self._clients[1:]

    def _repeat(self, send: Callable[[httpx.Client], httpx.Response], patience: float, trouble: Trouble) -> Any:
        if here.is_running():
            raise Misused(here.NO_SERVICE)
        client = self._both()[0]
        deadline = time.monotonic() + patience
        for number, pause in enumerate(pauses()):
            asked = 0.0
            try:
                answer = send(client)
            except HOPELESS as error:
                raise NotConnected(f"{self.url!r} is no address of a service ({error}).") from None
            except httpx.TransportError as error:
                if "CERTIFICATE_VERIFY_FAILED" in str(error):
                    raise Unreachable(f"The certificate of {self.url} is not one that this machine trusts.") from None
                why = _why(error)
            else:
                if answer.status_code not in AWAY:
                    if number:
                        trouble("")
                    return _accepted(answer)
                why, _ = detail(answer)
                asked = retry_after(answer)
            pause = max(pause, asked)
            if time.monotonic() + pause > deadline:
                raise Unreachable(
                    f"The service at {self.url} does not answer ({why.rstrip('.')}); look whether it runs, and whether "
                    "the address is right."
                )
            trouble(why)
            time.sleep(pause)  # between two tries; nothing tells that the service is back
        raise AssertionError("pauses never end")


def pauses() -> Iterator[float]:
    """Seconds between tries, for ever."""
    pause = FIRST_PAUSE_SECONDS
    while True:
        yield pause
        pause = min(2 * pause, LAST_PAUSE_SECONDS)


def retry_after(answer: httpx.Response) -> float:
    """The pause that a service asks for, in seconds; 0 for none."""
    try:
        return min(max(0.0, float(answer.headers.get("retry-after", 0))), LONGEST_RETRY_AFTER_SECONDS)
    except ValueError:  # a date, which nobody here sends
        return 0.0


def detail(answer: httpx.Response) -> tuple[str, str]:
    """What the service said, and its code for it."""
    try:
        said = answer.json()
        return str(said["detail"]), str(said.get("code", "refused"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"It answered {answer.status_code}.", "refused"


def _accepted(answer: httpx.Response) -> httpx.Response:
    if answer.is_success:
        return answer
    sentence, code = detail(answer)
    raise Refused(sentence, code, answer.status_code)


def _timeout(read: float) -> httpx.Timeout:
    return httpx.Timeout(CONNECT_SECONDS, read=read, write=WRITE_SECONDS)


def _why(error: httpx.TransportError) -> str:
    return str(error).strip().rstrip(".") or type(error).__name__


_current: Connection | None = None


def use(connection: Connection) -> Connection:
    """Make this the connection that everything goes through which names none."""
    global _current
    _current = connection
    return connection


def forget() -> None:
    global _current
    _current = None


def current() -> Connection:
    """The connection of `connect`, else one to where the environment or the home on this machine says.

    Raises:
        NotConnected: neither is there.
    """
    if here.is_running():
        raise Misused(here.NO_SERVICE)
    if _current is not None:
        return _current
    url = _local.address()
    return use(Connection(url, _local.api_key(url)))
