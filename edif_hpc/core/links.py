"""Result links: signed, expiring, bound to one request. They need no key, since the stock client sends none."""

from __future__ import annotations

import hashlib
import hmac
import time


def _sign(secret: str, request_id: str, expires: int) -> str:
    return hmac.new(secret.encode(), f"{request_id}\n{expires}".encode(), hashlib.sha256).hexdigest()


def make(secret: str, base_url: str, request_id: str, seconds: float) -> str:
    """A link under `base_url` that is valid for `seconds`."""
    expires = int(time.time() + seconds)
    signature = _sign(secret, request_id, expires)
    return f"{base_url.rstrip('/')}/result/{request_id}?expires={expires}&signature={signature}"


def valid(secret: str, request_id: str, expires: int, signature: str) -> bool:
    return expires >= time.time() and hmac.compare_digest(_sign(secret, request_id, expires), signature)
