"""Results on their way to disk: cut, resumed, renewed, held to their checksums, mapped into memory."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import edif_hpc
from tests.support.proxy import Proxy
from tests.support.servers import eventually
from tests.support.stack import Stack

from . import far
from .conftest import PROMPT

NUMBERS = 7_000_000
"""Noise of 28 MB, of which compression leaves 26: four parts."""
HEADERS = 100_000
"""What HTTP and JSON add to a download, at most."""


def noise(size: int) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def large(service: Stack) -> str:
    """The id of a request with a large result, made once."""
    from nnsight.modeling.transformers import TransformersModel

    from tests.support import models
    from tests.support.stack import client_of

    with client_of(service):
        edif_hpc.connect(service.url, service.key)
        model = TransformersModel(models.repo_id("gpt2"), task="text-generation")
        handle = edif_hpc.submit()
        with model.trace(PROMPT, backend=handle):
            found = torch.rand(NUMBERS, generator=torch.Generator().manual_seed(7)).save()  # noqa: F841
        assert handle.wait(60) == "COMPLETED"
        edif_hpc.disconnect()
    return handle.id


def size_of(request_id: str) -> int:
    return int(edif_hpc.get(request_id).record()["result_bytes"])


def test_a_cut_download_reads_on_where_it_stopped(proxy: Proxy, large: str, shelf: Path) -> None:
    size = size_of(large)
    before = proxy.counters.down_bytes
    proxy.bytes_per_second = 20e6  # so that little waits in sockets, where a reset loses it
    proxy.cut_after(1_000_000, 3_000_000, 5_000_000)
    found = edif_hpc.get(large).result()["found"]
    assert torch.equal(found, noise(NUMBERS))
    lost_in_the_cuts = 3 * 3_000_000  # what was on its way when the line broke
    assert size <= proxy.counters.down_bytes - before <= size + lost_in_the_cuts + HEADERS
    assert list(shelf.iterdir()) == []


def test_another_process_reads_only_what_is_missing(
    stack: Stack, proxy: Proxy, large: str, tmp_path: Path, child: Callable[..., Any]
) -> None:
    target = tmp_path / "kept.pt"
    state, part = tmp_path / f"kept.pt.{large}.state", tmp_path / f"kept.pt.{large}.part"
    proxy.bytes_per_second = 20e6
    script = f"import edif_hpc; edif_hpc.get({large!r}).download({str(target)!r})"

    def noted() -> int:
        """Bytes that are there."""
        return sum(json.loads(state.read_text())["there"].values()) if state.exists() else 0

    ours = proxy.open
    with child(script, url=proxy.url) as downloading:
        eventually(noted, 60, "a piece of a part")
        downloading.kill()
        downloading.wait()
    there = noted()
    proxy.bytes_per_second = 0
    eventually(lambda: proxy.open <= ours, 30, "the end of what was on its way")
    size, before = size_of(large), proxy.counters.down_bytes
    assert there < size
    assert part.stat().st_size == size
    assert edif_hpc.get(large).download(target) == target
    assert proxy.counters.down_bytes - before <= size - there + HEADERS
    assert torch.equal(edif_hpc.load(target)["found"], noise(NUMBERS))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("kept")] == ["kept.pt"]


def test_a_file_that_is_there_is_not_taken_for_the_result(stack: Stack, large: str, tmp_path: Path) -> None:
    (tmp_path / "mine.pt").write_text("mine")
    request = edif_hpc.get(large)
    for path, why in (("mine.pt", "already"), ("", "already"), ("nowhere/found.pt", "no folder")):
        with pytest.raises(edif_hpc.Misused, match=why):
            request.download(tmp_path / path)
    assert (tmp_path / "mine.pt").read_text() == "mine"


def test_a_lazy_result_is_mapped_and_kept(stack: Stack, large: str, shelf: Path) -> None:
    found = edif_hpc.get(large).result(lazy=True)["found"]
    (kept,) = shelf.iterdir()
    assert kept.name == f"{large}.pt"
    maps = Path("/proc/self/maps").read_text()
    assert str(kept) in maps
    assert torch.equal(found[-1000:], noise(NUMBERS)[-1000:])
    again = edif_hpc.get(large)
    assert torch.equal(again.result(lazy=True)["found"][:10], found[:10])
    assert torch.equal(again.result()["found"][:10], found[:10])


def test_a_line_gone_silent_is_given_up_for_another(proxy: Proxy, large: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edif_hpc.client._download.SILENCE_SECONDS", 0.5)
    proxy.bytes_per_second = 30e6
    before = proxy.counters.down_bytes

    def sleeps() -> None:
        eventually(lambda: proxy.counters.down_bytes - before > 5e6, 30, "some bytes")
        proxy.silent = True
        eventually(lambda: proxy.counters.connections > connections, 30, "another connection")
        proxy.silent = False

    import threading

    connections = proxy.counters.connections + 6
    sleeper = threading.Thread(target=sleeps)
    sleeper.start()
    assert torch.equal(edif_hpc.get(large).result()["found"], noise(NUMBERS))
    sleeper.join()


def test_an_expired_link_is_renewed(stack: Stack, large: str, tmp_path: Path) -> None:
    """Links of this service last 2 s; a download over a slow line takes longer."""
    from tests.support.proxy import proxied

    with proxied(stack.url, bytes_per_second=9e6) as slow:
        edif_hpc.connect(slow.url, stack.key)
        slow.cut_after(*[4_000_000] * 4)  # what is asked for after that needs a link that is still good
        edif_hpc.get(large).download(tmp_path / "found.pt")
    assert torch.equal(edif_hpc.load(tmp_path / "found.pt", lazy=True)["found"], noise(NUMBERS))


def test_a_bit_flipped_on_the_way_is_noticed(proxy: Proxy, large: str) -> None:
    if not edif_hpc.get(large).record().get("transfer"):
        pytest.skip("this service gives no checksums yet")
    proxy.flip_at(3_000_000)
    assert torch.equal(edif_hpc.get(large).result()["found"], noise(NUMBERS))


# -- what only a stand-in does on demand -------------------------------------------------------------------------------

PART = 64 * 1024


@pytest.fixture
def content() -> bytes:
    return random.Random(7).randbytes(10 * PART + 17)


@pytest.fixture
def there(content: bytes) -> Iterator[far.Far]:
    with far.serving(content, PART) as serving:
        edif_hpc.connect(serving.url, "key", check=False, stock=True)
        yield serving
        edif_hpc.disconnect()


def download(tmp_path: Path) -> bytes:
    return edif_hpc.get(far.REQUEST).download(tmp_path / "found").read_bytes()


def test_a_corrupt_part_is_read_again(there: far.Far, content: bytes, tmp_path: Path) -> None:
    there.corrupt = 2
    assert download(tmp_path) == content
    assert there.given == len(content) + 2 * PART or there.given == len(content) + PART + 17


def test_one_that_stays_corrupt_is_named(there: far.Far, content: bytes, tmp_path: Path) -> None:
    there.corrupt = 10**6
    with pytest.raises(edif_hpc.CorruptPart, match="did not match their checksum 3 times"):
        download(tmp_path)
    there.corrupt = 0
    assert download(tmp_path) == content


def test_what_a_crash_left_wrong_on_disk_is_read_again(there: far.Far, content: bytes, tmp_path: Path) -> None:
    (tmp_path / f"found.{far.REQUEST}.part").write_bytes(
        bytes(PART) + content[PART : 5 * PART] + bytes(len(content) - 5 * PART)
    )
    state = {"request": far.REQUEST, "bytes": len(content), "part_bytes": PART, "there": dict.fromkeys(range(5), PART)}
    (tmp_path / f"found.{far.REQUEST}.state").write_text(json.dumps(state))
    assert download(tmp_path) == content
    assert there.given == len(content) - 4 * PART


def test_refused_links_are_renewed_a_few_times(there: far.Far, content: bytes, tmp_path: Path) -> None:
    there.refused_links = 2
    assert download(tmp_path) == content
    there.refused_links = 10**6
    (tmp_path / "found").unlink()
    with pytest.raises(edif_hpc.DownloadFailed, match="its links are refused"):
        download(tmp_path)


def test_ranges_that_a_proxy_drops(there: far.Far, content: bytes, tmp_path: Path) -> None:
    there.ranges = False
    assert download(tmp_path) == content


def test_what_is_no_result_is_not_loaded(there: far.Far) -> None:
    with pytest.raises(edif_hpc.DownloadFailed, match="cannot be loaded"):
        edif_hpc.get(far.REQUEST).result()


def test_a_forged_result_runs_nothing(there: far.Far, tmp_path: Path) -> None:
    import io
    import os

    class Forged:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made by the result"),)

    forged = io.BytesIO()
    torch.save({"found": Forged()}, forged, pickle_protocol=4)
    there.content = forged.getvalue()
    with pytest.raises(edif_hpc.UntrustedResult, match=r"names posix\.mkdir"):
        edif_hpc.get(far.REQUEST).result()
    assert not (tmp_path / "made by the result").exists()
