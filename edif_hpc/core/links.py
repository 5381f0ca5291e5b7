"""Result links: signed, expiring, bound to one request. They need no key, since the stock client sends none."""

from __future__ import annotations

import hashlib
import hmac
import time
from urllib.parse import urlsplit, urlunsplit

RESULT = "/result/"


def _sign(secret: str, request_id: str, expires: int) -> str:
    return hmac.new(secret.encode(), f"{request_id}\n{expires}".encode(), hashlib.sha256).hexdigest()


def make(secret: str, base_url: str, request_id: str, seconds: float) -> str:
    """A link under `base_url` that is valid for `seconds`."""
    expires = int(time.time() + seconds)
    signature = _sign(secret, request_id, expires)
    return f"{base_url.rstrip('/')}{RESULT}{request_id}?expires={expires}&signature={signature}"


def by_the_same_door(link: str, gateway: str) -> str:
    """A gateway's own link by the address that the gateway was reached at.

    A TLS proxy in front of it may not have told it that the way there is https. Links that lead elsewhere stay.
    """
    made, known = urlsplit(link), urlsplit(gateway)
    own = made.hostname == known.hostname and made.path.startswith(RESULT)
    if not own or (made.scheme, known.scheme) != ("http", "https"):
        return link
    return urlunsplit((known.scheme, known.netloc, made.path, made.query, ""))


def valid(secret: str, request_id: str, expires: int, signature: str) -> bool:
    return expires >= time.time() and hmac.compare_digest(_sign(secret, request_id, expires), signature)
