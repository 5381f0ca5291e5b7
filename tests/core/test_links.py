"""Signed links, and by which address they are followed."""

from __future__ import annotations

import pytest

from edif_hpc.core import links

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("link", "gateway", "followed"),
    [
        ("http://h.org/result/a?b=c", "https://h.org", "https://h.org/result/a?b=c"),
        ("http://h.org/result/a?b=c", "https://h.org:8443", "https://h.org:8443/result/a?b=c"),
        ("http://h.org/result/a?b=c", "http://h.org:8001", "http://h.org/result/a?b=c"),
        ("https://h.org/result/a", "https://h.org", "https://h.org/result/a"),
        ("http://store.org/result/a", "https://h.org", "http://store.org/result/a"),
        ("http://h.org/bucket/a", "https://h.org", "http://h.org/bucket/a"),
    ],
)
def test_a_gateways_own_link_is_as_safe_as_the_way_to_it(link: str, gateway: str, followed: str) -> None:
    assert links.by_the_same_door(link, gateway) == followed


def test_a_link_opens_one_result_until_it_expires() -> None:
    link = links.make("secret", "http://h.org/", "a", 60)
    assert link.startswith("http://h.org/result/a?expires=")
    expires, signature = (part.partition("=")[2] for part in link.partition("?")[2].split("&"))
    assert links.valid("secret", "a", int(expires), signature)
    for wrong in (("other", "a", int(expires)), ("secret", "b", int(expires)), ("secret", "a", int(expires) + 1)):
        assert not links.valid(*wrong, signature)
    past = int(expires) - 120
    assert not links.valid("secret", "a", past, links._sign("secret", "a", past))
