"""Large results by links to the store itself, for sites whose clients can reach it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch

from tests.support import models
from tests.support.stack import Stack, client_of, running

from .support import PROMPT, Watched, backend, tiny

FLOATS = 700_000
SETTINGS = """
[worker]
threads = 1
[store]
delivery = "presigned"
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Stack]:
    models.offline_client(cache)
    home = tmp_path_factory.mktemp("presigned") / "home"
    with running(home, cache, "none", SETTINGS) as service, client_of(service):
        yield service


class Linked(Watched):
    """Keeps the link that COMPLETED brought."""

    link = ""

    def download_result(self, url: Any) -> Any:
        self.link = url
        return super().download_result(url)


def test_the_client_downloads_from_the_store(stack: Stack) -> None:
    model = tiny()
    asked = backend(model, Linked)
    with model.trace(PROMPT, backend=asked):
        found = torch.arange(FLOATS).sin().save()
    assert torch.equal(found, torch.arange(FLOATS).sin())

    store = next(each["address"] for each in stack.json("ps") if each["name"] == "store")
    assert urlsplit(asked.link).netloc == urlsplit(store).netloc
    assert httpx.get(asked.link, headers={"range": "bytes=0-9"}).status_code == 206
    # The link opens one object for a while, and nothing else.
    assert httpx.get(asked.link.replace("Expires=", "Expires=1")).status_code == 403
    assert httpx.get(asked.link.replace("/results/", "/payloads/")).status_code == 403
    assert httpx.get(asked.link.partition("?")[0]).status_code == 403
