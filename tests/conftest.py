"""What every test process needs before the first test: its share of the tests, and the device they run on."""

import os
import signal

import pytest

from tests.support import device

LONGEST = (
    "cluster",
    "faults",
    "submit",
    "toolkit",
    "notebooks",
    "equality",
    "delivery",
    "fleet",
    "client",
    "isolation",
)
"""Folders whose tests share servers for minutes: begun first, they end while others have still enough to do."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default=device.CPU,
        choices=(device.CPU, "cuda"),
        help="where models run, as worker.device has it; ROCm answers to cuda",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--dist loadgroup` a file's tests stay in one process, as its servers do, unless they name another group."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
    items.sort(key=_begun)


def _begun(item: pytest.Item) -> int:
    folder = item.nodeid.split("/")[1]
    return LONGEST.index(folder) if folder in LONGEST else len(LONGEST)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "xdist_group(name): tests that share a service")  # also without xdist
    # Started in the background, a shell has these ignored, and what a test starts would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    chosen = config.getoption("--device")
    if trouble := device.trouble(chosen):
        raise pytest.UsageError(trouble)
    os.environ[device.VARIABLE] = chosen
